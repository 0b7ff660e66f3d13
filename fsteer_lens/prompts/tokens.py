"""From prompts to token ids and back.

TransformerLens' two classes differ in when they put a beginning-of-sequence token in front, and both drop changes made
to a tokenizer in memory; so the package tokenises by itself, the same way for both.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fsteer_lens.errors import ContextLengthError, InputError, TokenizerError
from fsteer_lens.ground.checks import clean_text, optional
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import GivenPrompt, as_prompt, prompt_text


def require_tokenizer(model: SteerableModel) -> Any:
    """The model's tokenizer; raises `TokenizerError` where it has none."""
    if model.tokenizer is None:
        raise TokenizerError(
            "the model has no tokenizer", fix="Load it with fsteer_lens.models.from_hf(hf_model, tokenizer)."
        )
    return model.tokenizer


def prompt_ids(
    model: SteerableModel, prompt: GivenPrompt, *, chat: bool = False, context: str | None = None
) -> list[int]:
    """Token ids of a prompt, ready for the model.

    A string is tokenised and, where the tokenizer has a beginning-of-sequence token, gets exactly one of it in front.
    Messages, and with `chat=True` strings as well, go through the tokenizer's chat template, which decides about that
    token itself. Ids are taken as they are.

    Args:
        model: whose tokenizer and context length count.
        prompt: string, messages or ids, also as an array.
        chat: send a string as the user's turn through the chat template.
        context: text put before a string verbatim; in a chat, the system message, or the opening of the user turn
            where the template refuses a system message.

    Raises:
        TokenizerError: no tokenizer, or no chat template where one is needed.
        ContextLengthError: longer than the model's context.
        InputError: no prompt, a text with NUL or half a character (a lone surrogate), or a context with token ids.
    """
    prompt, context = as_prompt(prompt), optional(clean_text, "context", context)
    if isinstance(prompt, str) and not chat:
        ids = text_ids(require_tokenizer(model), (context or "") + prompt)
    elif isinstance(prompt, str) or isinstance(prompt[0], Mapping):
        turns: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        ids = _chat_ids(require_tokenizer(model), turns, context)
    elif context is not None:
        raise InputError("a prompt of token ids takes no context", fix="Give the prompt as text, or two prompts.")
    else:
        ids = [int(token) for token in prompt]  # pyright: ignore[reportArgumentType]
        if min(ids) < 0 or max(ids) >= model.cfg.d_vocab:
            raise InputError("token ids", expected=f"ids in 0..{model.cfg.d_vocab - 1}", got=[min(ids), max(ids)])
    require_fits(model, len(ids), f"prompt {prompt_text(prompt)[:40]!r}")
    return ids


def answer_ids(model: SteerableModel, answer: str) -> list[int]:
    """Token ids of an answer: tokenised by itself, without special tokens."""
    return list(require_tokenizer(model)(clean_text("answer", answer), add_special_tokens=False).input_ids)


def require_fits(model: SteerableModel, length: int, what: str) -> None:
    """Raise `ContextLengthError` where `length` tokens do not fit into the model's context."""
    if length > model.cfg.n_ctx:
        raise ContextLengthError(
            f"{what} is too long",
            expected=f"at most {model.cfg.n_ctx} tokens",
            got=length,
            fix="Shorten the prompt, or ask for fewer new tokens.",
        )


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with exactly one beginning-of-sequence token in front where the tokenizer has one."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _chat_ids(tokenizer: Any, turns: list[Mapping[str, str]], context: str | None) -> list[int]:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise TokenizerError(
            "the tokenizer has no chat template",
            fix="Pass text prompts with chat=False, or set tokenizer.chat_template.",
        )

    def render(messages: list[Any]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    if context is None:
        return render(list(turns))
    try:
        return render([{"role": "system", "content": context}, *turns])
    except TemplateError:
        warnings.warn("the chat template takes no system message; the context opens the user turn", stacklevel=3)
        first = {**turns[0], "content": f"{context}\n\n{turns[0]['content']}"}
        return render([first, *turns[1:]])


def stop_ids(model: SteerableModel) -> frozenset[int]:
    """Ids that end an answer: end of sequence, those of the generation config, and the template's end of turn."""
    tokenizer = require_tokenizer(model)
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    ids = {tokenizer.eos_token_id}
    configured = getattr(config, "eos_token_id", None)
    ids.update(configured if isinstance(configured, list) else [configured])
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        tail = tokenizer(text[text.rindex("b") + 1 :], add_special_tokens=False).input_ids
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ids.update([token for token in tail if token in special][:1])
    return frozenset(token for token in ids if token is not None)


class Detokenizer:
    """Turns token ids into text one by one; the pieces of a row add up to its text.

    A token that leaves a character unfinished gives "", and the token that completes it the whole character.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer, self._ids = tokenizer, list(before)
        self._start, self._read = max(0, len(self._ids) - 4), len(self._ids)

    def __call__(self, token: int) -> str:
        """Text that `token` adds."""
        self._ids.append(token)
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if text.endswith("\ufffd") or not text.startswith(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_texts(model: SteerableModel, ids: Sequence[int], before: Sequence[int] = ()) -> tuple[str, ...]:
    """Text of every token; `before` are the ids that come in front of them."""
    detokenize = Detokenizer(require_tokenizer(model), before)
    return tuple(detokenize(token) for token in ids)


def texts_of_top(tokenizer: Any, ids: Int[Tensor, "b n top"]) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Each of the likeliest tokens as text by itself, per row and step; steps that are filled with −1 are left out."""
    known = [token for token in ids.unique().tolist() if token >= 0]
    text = dict(zip(known, tokenizer.batch_decode([[token] for token in known]), strict=True))
    return tuple(tuple(tuple(text[token] for token in step) for step in row if step[0] >= 0) for row in ids.tolist())


@dataclass(frozen=True, eq=False)
class Batch:
    """Token rows of several lengths in one rectangle.

    Attributes:
        tokens: padded ids, [b s].
        mask: true at real tokens, [b s].
    """

    tokens: Int[Tensor, "b s"]
    mask: Bool[Tensor, "b s"]


def pad(model: SteerableModel, rows: Sequence[Sequence[int]], side: Literal["left", "right"]) -> Batch:
    """Put token rows into one rectangle on the model's device.

    Pads are masked out everywhere, so any token serves: the pad token, else the end-of-sequence token.

    Raises:
        TokenizerError: rows of several lengths and a tokenizer that has neither.
    """
    longest = max(len(row) for row in rows)
    filler = 0
    if any(len(row) < longest for row in rows):
        tokenizer = require_tokenizer(model)
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        filler = next((token for token in candidates if token is not None), -1)
        if filler < 0:
            raise TokenizerError(
                "the tokenizer has neither a pad nor an end-of-sequence token",
                expected="one of them, to batch prompts of different lengths",
                got="none",
                fix="Set tokenizer.pad_token to a token that prompts do not use, or pass batch_size=1.",
            )
    tokens = torch.full((len(rows), longest), filler)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for index, row in enumerate(rows):
        cut = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        tokens[index, cut], mask[index, cut] = torch.tensor(row), True
    return Batch(tokens.to(model.cfg.device), mask.to(model.cfg.device))

"""From prompts to token ids and back.

TransformerLens' two classes differ in when they put a beginning-of-sequence token in front, and both drop changes made
to a tokenizer in memory; so the package tokenises by itself, the same way for both.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fsteer_lens.errors import ContextLengthError, InputError, TokenizerError
from fsteer_lens.ground.checks import clean_text, optional
from fsteer_lens.models.classes import SteerableModel, require_steerable
from fsteer_lens.models.conversion import prepends_bos
from fsteer_lens.models.devices import device_of
from fsteer_lens.prompts.chat import NO_ARGUMENTS, ChatTemplate, canonical_arguments
from fsteer_lens.prompts.forms import GivenPrompt, Prompt, as_prompt, prompt_text


def require_tokenizer(model: SteerableModel) -> Any:
    """The model's tokenizer; raises `TokenizerError` where it has none."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        if not hasattr(model, "get_decoder"):  # a model of transformers lacks no more than that
            require_steerable(model)
        raise TokenizerError(
            "the model has no tokenizer",
            expected="a model of TransformerLens that has its own",
            got=type(model).__name__,
            fix="Load it with fsteer_lens.models.from_hf(hf_model, tokenizer).",
        )
    return tokenizer


def prompt_ids(
    model: SteerableModel,
    prompt: GivenPrompt,
    *,
    chat: bool = False,
    context: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prepend_bos: bool | None = None,
) -> list[int]:
    """Token ids of a prompt, ready for the model.

    A string is tokenised, with a beginning-of-sequence token in front where the tokenizer itself puts one, never two.
    Messages, and with `chat=True` strings as well, go through the tokenizer's chat template, which decides about that
    token itself; a last message of the assistant is continued, not closed. A string that the template was put around
    before is not put through it again. Ids are taken as they are.

    Args:
        model: whose tokenizer and context length count.
        prompt: string, messages or ids, also as an array.
        chat: send a string as the user's turn through the chat template.
        context: text put before a string verbatim. In a chat it goes in front of the prompt's own system message;
            where there is none it is the system message, in the place of the template's default one; where the
            template refuses a system message it opens the user turn.
        chat_template_kwargs: further arguments of the chat template, such as `{"enable_thinking": False}` or `tools`.
        prepend_bos: put a beginning-of-sequence token in front of a string (True) or not (False) that is not put
            through the template; None does as the tokenizer does.

    Raises:
        TokenizerError: no tokenizer, no chat template where one is needed, one that drops what was said or does not
            take such turns, or prepend_bos=True without such a token.
        ContextLengthError: longer than the model's context.
        InputError: no prompt, a text with NUL or half a character (a lone surrogate), a context with token ids, or
            arguments that the chat template does not know.
    """
    return Tokenisation(model, chat, canonical_arguments(chat_template_kwargs), prepend_bos).ids(prompt, context)


@dataclass(frozen=True, eq=False)
class Tokenisation:
    """How prompts of one kind become token ids; arguments as in `prompt_ids`, those of the template as JSON."""

    model: SteerableModel
    chat: bool = False
    arguments: str = NO_ARGUMENTS
    prepend_bos: bool | None = None

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(require_tokenizer(self.model), self.arguments)

    def ids(self, prompt: GivenPrompt, context: str | None = None) -> list[int]:
        """Token ids of a prompt; errors as in `prompt_ids`."""
        prompt, context = as_prompt(prompt), optional(clean_text, "context", context)
        if self._goes_through_template(prompt):
            turns: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = self.template.text(turns, context)
            ids = list(require_tokenizer(self.model)(text, add_special_tokens=False).input_ids)
        elif isinstance(prompt, str):
            if self.arguments != NO_ARGUMENTS and not self.chat:
                fix = "Pass chat=True, or leave it out."
                raise InputError("chat_template_kwargs have no effect on a plain string", got="chat=False", fix=fix)
            ids = text_ids(require_tokenizer(self.model), (context or "") + prompt, self.prepend_bos)
        elif context is not None:
            raise InputError("a prompt of token ids takes no context", fix="Give the prompt as text, or two prompts.")
        else:
            ids = [int(token) for token in prompt]  # pyright: ignore[reportArgumentType]
            most = self.model.cfg.d_vocab - 1
            if min(ids) < 0 or max(ids) > most:
                raise InputError("token ids", expected=f"ids in 0..{most}", got=[min(ids), max(ids)])
        require_fits(self.model, len(ids), f"prompt {prompt_text(prompt)[:40]!r}")
        return ids

    def tails(self, rows: Iterable[Sequence[int]]) -> list[int]:
        """How many tokens of each prompt come after the one that ends the user's turn; 0 where none does.

        That is where the chat template's end of a user's turn begins that comes last in the prompt.
        """
        end = self._end_of_question
        return [len(row) - 1 - _last_place(list(row), end) if end else 0 for row in rows]

    @cached_property
    def opening_tail(self) -> int:
        """The same of a user's turn that the model is to answer, whatever it says."""
        tokenizer = require_tokenizer(self.model)
        if not self.chat:
            return 0
        opening = tokenizer(self.template.after_question(opening=True), add_special_tokens=False).input_ids
        return self.tails([opening])[0]

    @cached_property
    def _end_of_question(self) -> list[int]:
        tokenizer = require_tokenizer(self.model)
        if not getattr(tokenizer, "chat_template", None):
            return []
        return list(tokenizer(self.template.after_question(opening=False), add_special_tokens=False).input_ids)

    def is_chat(self, prompt: Prompt) -> bool | None:
        """Whether a prompt is put through the chat template; None where somebody may have done so, as in token ids."""
        prompt = as_prompt(prompt)
        if self._goes_through_template(prompt):
            return True
        return False if isinstance(prompt, str) and not self._is_rendered(prompt) else None

    def _goes_through_template(self, prompt: Prompt) -> bool:
        if isinstance(prompt, str):
            return self.chat and not self.template.holds(prompt)
        return isinstance(prompt[0], Mapping)

    def _is_rendered(self, text: str) -> bool:
        return bool(getattr(require_tokenizer(self.model), "chat_template", None)) and self.template.holds(text)


def _last_place(row: list[int], part: list[int]) -> int:
    """Where a part of a row stands that comes last in it; its last place where there is none."""
    starts = range(len(row) - len(part), -1, -1)
    return next((start for start in starts if row[start : start + len(part)] == part), len(row) - 1)


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


def text_ids(tokenizer: Any, text: str, prepend_bos: bool | None = None) -> list[int]:
    """Token ids of a text.

    Args:
        tokenizer: of a model.
        text: what to tokenise.
        prepend_bos: put a beginning-of-sequence token in front, unless the text begins with it; None does so where the
            tokenizer does.

    Raises:
        TokenizerError: prepend_bos=True, and the tokenizer has no such token.
    """
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    bos = tokenizer.bos_token_id
    wanted = prepends_bos(tokenizer) if prepend_bos is None else prepend_bos
    if wanted and bos is None:
        raise TokenizerError("prepend_bos=True", expected="a tokenizer with a beginning-of-sequence token", got="none")
    return [bos, *ids] if wanted and ids[:1] != [bos] else ids


def stop_ids(model: SteerableModel) -> frozenset[int]:
    """Ids that end an answer: end of sequence, those of the generation config, and the template's end of turn."""
    tokenizer = require_tokenizer(model)
    config = getattr(getattr(model, "original_model", model), "generation_config", None)
    ids = {tokenizer.eos_token_id}
    configured = getattr(config, "eos_token_id", None)
    ids.update(configured if isinstance(configured, list) else [configured])
    if getattr(tokenizer, "chat_template", None):
        tail = tokenizer(ChatTemplate(tokenizer).end_of_turn(), add_special_tokens=False).input_ids
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
    tokens = torch.full((len(rows), longest), filler, dtype=torch.long, device="cpu")
    mask = torch.zeros((len(rows), longest), dtype=torch.bool, device="cpu")
    for index, row in enumerate(rows):
        cut = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        tokens[index, cut], mask[index, cut] = torch.tensor(row, dtype=torch.long, device="cpu"), True
    return Batch(tokens.to(device_of(model)), mask.to(device_of(model)))

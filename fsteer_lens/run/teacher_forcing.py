"""Teacher-forced passes: what steering does to the probabilities of answers that are given, not generated."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError, NonFiniteError
from fsteer_lens.ground.checks import instance, several, whole
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.hooks.opening import EXPECTED, Read, open_session
from fsteer_lens.hooks.session import Session
from fsteer_lens.models.attaching import unsteered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import GivenPrompts, prompts_of
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.prompts.tokens import Batch, answer_ids, pad, require_fits
from fsteer_lens.prompts.windows import Asked
from fsteer_lens.run.answer_passes import Answered, AnswerPasses, asked_of, require_defined, together
from fsteer_lens.run.unsteered import CHUNK_NUMBERS, divergence

Advance = Callable[[int], None]


def answered(
    model: SteerableModel,
    prompts: GivenPrompts,
    answers: Iterable[str | Sequence[int]] | None,
    passes: Passes,
) -> list[Answered]:
    """Prompts with their answers as ids; an answer is text or ids, and None for all of them asks for no answer.

    Raises:
        InputError: no prompts, another number of answers, or an answer without a token.
        ContextLengthError: a prompt with its answer does not fit into the context.
    """
    asked = prompts_of(prompts)
    told = f"one for each of {len(asked)} prompts"
    given = [()] * len(asked) if answers is None else several("answers", answers, told)
    if len(given) != len(asked):
        raise InputError("answers", expected=told, got=len(given))
    rows, tokenisation = [], passes.tokenisation(model)
    for number, (prompt, answer) in enumerate(zip(asked, given, strict=True)):
        ids = tuple(tokenisation.ids(prompt))
        row = Answered(ids, _answer_ids(model, answer, f"answer {number}"), Asked(prompt, tokenisation))
        if answers is not None and not row.answer:
            raise InputError(f"answer {number}", expected="at least one token", got="none")
        require_fits(model, len(row.prompt) + len(row.answer), f"prompt {number} with its answer")
        rows.append(row)
    return rows


def _answer_ids(model: SteerableModel, answer: Any, name: str) -> tuple[int, ...]:
    if isinstance(answer, str):
        return tuple(answer_ids(model, answer))
    most = model.cfg.d_vocab - 1
    return tuple(whole(f"token of {name}", token, 0, most) for token in several(name, answer, "text or token ids"))


def answer_logprobs(
    model: SteerableModel, rows: Sequence[Answered], hook_object: HookObject | None, *, batch_size: int = 16
) -> list[Float[Tensor, " tokens"]]:
    """Log-probability of every token of each answer, in nats, under a hook object, or None for the bare model."""
    return answer_logprobs_of_each(model, rows, [hook_object], batch_size=batch_size)[0]


def answer_logprobs_of_each(
    model: SteerableModel, rows: Sequence[Answered], hook_objects: Sequence[HookObject | None], *, batch_size: int = 16
) -> list[list[Float[Tensor, " tokens"]]]:
    """The same under each of several hook objects, in one list for each; what they share is run once."""
    found = _room(rows, hook_objects)
    unsteered_first = sorted(range(len(hook_objects)), key=lambda number: hook_objects[number] is not None)
    for chosen, passes in passes_of_answers(model, rows, hook_objects, batch_size):
        for number in unsteered_first:
            for place, logits in passes.each(hook_objects[number]):
                index = chosen[place]
                found[number][index] = known_logprobs(logits, rows[index].answer).cpu()
    return found


def _room(rows: Sequence[Answered], hook_objects: Sequence[HookObject | None]) -> list[list[Tensor]]:
    """A tensor for each row, for each of the hook objects."""
    return [[torch.empty(0, dtype=torch.float32, device="cpu")] * len(rows) for _ in hook_objects]


def passes_of_answers(
    model: SteerableModel,
    rows: Sequence[Answered],
    hook_objects: Sequence[HookObject | None],
    batch_size: int,
    *,
    held: bool = False,
) -> Iterator[tuple[list[int], AnswerPasses]]:
    """The rows in batches, their numbers with the passes that give their logits under each of the hook objects.

    `held` says whether the logits of a whole batch are kept at once, which bounds its rows.
    """
    for hook_object in hook_objects:
        if hook_object is not None:
            instance("steering", hook_object, HookObject, EXPECTED).session_on(model)  # raises before anything is run
    for chosen in together(model, rows, hook_objects, batch_size, held=held):
        yield chosen, AnswerPasses(model, [rows[index] for index in chosen], hook_objects, batch_size)


def each_answer(
    model: SteerableModel,
    rows: Sequence[Answered],
    hook_object: HookObject | None,
    *,
    batch_size: int,
    advance: Advance = lambda steps: None,
) -> Iterator[tuple[int, Float[Tensor, "tokens vocab"]]]:
    """Number of every row and the raw logits that predict its answer, batch by batch; None is the bare model."""
    for chosen, passes in passes_of_answers(model, rows, [hook_object], batch_size):
        for place, logits in passes.each(hook_object):
            yield chosen[place], logits
            advance(1)


def known_logprobs(logits: Float[Tensor, "n vocab"], tokens: Sequence[int]) -> Float[Tensor, " n"]:
    """Log-probability of each of these tokens, in nats."""
    targets = torch.tensor(tokens, dtype=torch.long, device=logits.device).unsqueeze(1)
    return logits.float().log_softmax(dim=-1).gather(1, targets).squeeze(1)


def answer_divergences(
    model: SteerableModel,
    rows: Sequence[Answered],
    hook_objects: Sequence[HookObject],
    *,
    batch_size: int = 16,
    advance: Advance = lambda steps: None,
    beyond: bool = False,
) -> list[list[Float[Tensor, " tokens"]]]:
    """KL(steered ‖ unsteered) of the next-token distributions at every token of each answer, in nats.

    One list per hook object, of one tensor per row; a row without an answer has one number, for its first token. One
    unsteered pass serves all hook objects, and they share all layers below the first that they look at. The query
    activation of a row is that of its prompt alone. `advance` is told how many rows are done. With `beyond` a hook
    object under which the model's numbers blow up is infinitely far from the unsteered model, on every row of the batch
    in which they do; otherwise that raises.
    """
    for hook_object in hook_objects:
        instance("steering", hook_object, HookObject, EXPECTED)
    found = _room(rows, hook_objects)
    for chosen, passes in passes_of_answers(model, rows, [None, *hook_objects], batch_size, held=True):
        base = passes.logits(None)
        for number, hook_object in enumerate(hook_objects):
            try:
                steered = passes.logits(hook_object)
            except NonFiniteError:
                if not beyond:
                    raise
                apart = [torch.full((len(one),), math.inf, dtype=torch.float32, device="cpu") for one in base]
            else:
                apart = [divergences(*pair) for pair in zip(steered, base, strict=True)]
            for index, one in zip(chosen, apart, strict=True):
                found[number][index] = one
        advance(len(chosen))
    return found


def batches(model: SteerableModel, rows: Sequence[Answered], batch_size: int) -> Iterator[tuple[list[int], Batch]]:
    """The rows in batches of like length, padded on the right, with their numbers: each answer with its prompt."""
    batch_size = whole("batch_size", batch_size, 1)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].fed))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen, pad(model, [rows[index].fed for index in chosen], "right")


def session_for(
    model: SteerableModel,
    batch: Batch,
    rows: Sequence[Answered],
    hook_object: HookObject,
    read: Read | None = None,
) -> Session:
    """A session for one batch of prompts with answers."""
    lengths = torch.tensor([len(row.prompt) for row in rows], dtype=torch.long, device="cpu")
    return open_session(model, batch, hook_object, lengths, read, asked_of(rows))


@torch.no_grad()
def answer_logits(
    model: SteerableModel, batch: Batch, rows: Sequence[Answered], session: Session | None
) -> list[Float[Tensor, "tokens vocab"]]:
    """Raw logits that predict the tokens of each answer; without a session those of the unsteered model.

    Raises:
        NonFiniteError: some of them are NaN or infinite.
        HookError: a hook of the session did not run.
    """
    with unsteered(model), nullcontext() if session is None else session.step(model, fresh=True):
        whole = model(batch.tokens, attention_mask=batch.mask.long(), return_type="logits")
    starts = [len(row.prompt) - 1 for row in rows]
    found = [
        logits[start : start + max(1, len(row.answer))] for logits, start, row in zip(whole, starts, rows, strict=True)
    ]
    require_defined(model, rows, found, None if session is None else session.hook_object)
    return found


def divergences(
    steered: Float[Tensor, "tokens vocab"], base: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """KL(steered ‖ unsteered) at every token from raw logits, in nats, in chunks of tokens, on the CPU."""
    size = max(1, CHUNK_NUMBERS // base.shape[-1])
    pairs = zip(steered.split(size), base.split(size), strict=True)
    return torch.cat([divergence(*(logits.float().log_softmax(dim=-1) for logits in pair)).cpu() for pair in pairs])

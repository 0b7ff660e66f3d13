"""Passes of prompts with given answers, in which whatever is the same is run once.

1. A prompt with several answers is run once; each answer goes on from its keys and values.
2. The layers below the first that a hook object looks at are run once for all of them, and for the unsteered model.
3. The model's head sees the places alone that predict a token of an answer.

Where a model, or a hook object, does not allow that, every answer is run with its prompt; the logits are the same.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.ground.checks import whole
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.hooks.opening import open_session
from fsteer_lens.hooks.session import Session
from fsteer_lens.models.attaching import unsteered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.devices import device_of
from fsteer_lens.models.forward import Forward
from fsteer_lens.models.layers import begun_at, can_begin_above, outputs_kept
from fsteer_lens.prompts.tokens import Batch, pad, require_tokenizer
from fsteer_lens.prompts.windows import Asked
from fsteer_lens.reading.reader import PADDING
from fsteer_lens.run.overflow import blown_up, undefined

PASS_OF_ANY_MODEL = 12
PASS_COST = 3e6
"""What a pass costs on a CPU beside its tokens, as so many of these: weights are read once a pass, which takes as long
as 12 tokens do, and Python takes its time for every layer, as long as this number over d_model²."""


@dataclass(frozen=True)
class Answered:
    """A prompt and an answer to it, both as token ids; without an answer its first token is still predicted.

    `asked` is the prompt as it was given, where that is known.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()
    asked: Asked | None = field(default=None, compare=False, repr=False)

    @property
    def fed(self) -> tuple[int, ...]:
        """What the model reads: the answer's last token predicts nothing."""
        return self.prompt + self.answer[:-1]

    @property
    def predicted(self) -> int:
        """How many tokens are predicted."""
        return max(1, len(self.answer))


def asked_of(rows: Sequence[Answered]) -> list[Asked] | None:
    """The prompts as they were given; None where one of them is not known."""
    known = [row.asked for row in rows if row.asked is not None]
    return known if len(known) == len(rows) else None


@dataclass(frozen=True, eq=False)
class _Stage:
    """Tokens of one pass: those it begins with, or those that go on from it.

    Attributes:
        tokens, mask: as in `Batch`.
        keep: places whose logits are wanted, [b kept].
        numbers: of the rows whose logits are complete with this pass.
        owners: row of the first pass that each row goes on from.
    """

    tokens: Int[Tensor, "b s"]
    mask: Bool[Tensor, "b s"]
    keep: Int[Tensor, "b kept"]
    numbers: tuple[int, ...]
    owners: Int[Tensor, " b"] | None = None


@dataclass(frozen=True, eq=False)
class _Base:
    """What passes that begin above need of the unsteered ones.

    Attributes:
        forward: the first pass, with the keys and values of its tokens.
        entered: what entered some layers, {layer: output of the block below}, in each pass.
    """

    forward: Forward
    entered: tuple[dict[int, Any], ...]


class AnswerPasses:
    """Passes of a few prompts with answers under hook objects, or None, the unsteered model.

    Args:
        model: what to run.
        rows: prompts with answers; those of one prompt share its pass.
        hook_objects: all that these rows will be run under; the unsteered model first, where it is among them.
        batch_size: rows of a pass at most.
    """

    def __init__(
        self,
        model: SteerableModel,
        rows: Sequence[Answered],
        hook_objects: Sequence[HookObject | None],
        batch_size: int,
    ) -> None:
        self._model, self._rows, self._batch_size = model, rows, batch_size
        self._several = shares_prompts(model, rows, hook_objects)
        starts = {_first_layer(one) for one in hook_objects if one is not None} - {0}
        self._starts = starts if len(hook_objects) > 1 and starts and can_begin_above(model) else set()
        self._lengths, self._stages = self._prompts_first() if self._several else self._all_at_once()
        self._base: _Base | None = None

    def logits(self, hook_object: HookObject | None) -> list[Float[Tensor, "tokens vocab"]]:
        """Raw logits that predict the tokens of each answer under one of the hook objects; errors as in `each`."""
        found = dict(self.each(hook_object))
        return [found[number] for number in range(len(self._rows))]

    def each(self, hook_object: HookObject | None) -> Iterator[tuple[int, Float[Tensor, "tokens vocab"]]]:
        """Number of every row and the logits that predict its answer, as the passes come to it.

        Raises:
            NonFiniteError: some of them are NaN or infinite.
            HookError: a hook did not run.
        """
        session, layer = None, 0
        if hook_object is not None:
            first = Batch(self._stages[0].tokens, self._stages[0].mask)
            session = open_session(self._model, first, hook_object, self._lengths, asked=asked_of(self._first))
            layer = _first_layer(hook_object) if _first_layer(hook_object) in self._starts else 0
        if layer and self._base is None:
            for _ in self._run(None, 0, stop=max(self._starts)):
                pass
        prompts = torch.empty(0, dtype=torch.float32, device="cpu")
        for stage, logits in zip(self._stages, self._run(session, layer), strict=True):
            if stage.owners is None:
                prompts = logits
            found = self._by_row(stage, prompts, logits)
            require_defined(self._model, [self._rows[number] for number in found], [*found.values()], hook_object)
            yield from found.items()

    @torch.no_grad()
    def _run(self, session: Session | None, layer: int, stop: int | None = None) -> Iterator[Tensor]:
        """Logits of each pass, begun at a layer; those of the unsteered model leave behind what others begin with.

        With `stop` they end below that layer, and there are no logits that mean anything.
        """
        forward = Forward(self._model, cache=len(self._stages) > 1, layers=stop)
        base = self._base if layer else None
        entered: list[dict[int, Any]] = []
        for number, stage in enumerate(self._stages):
            going_on, acting = forward, session
            if stage.owners is not None:
                below = None if base is None else base.forward
                going_on = forward.fork_rows(stage.owners, below=below, layer=layer)
                acting = None if session is None else session.fork(stage.owners, stage.mask)
            with ExitStack() as around:
                around.enter_context(unsteered(self._model))
                if acting is not None:
                    around.enter_context(acting.step(self._model, fresh=not number))
                if base is not None:
                    around.enter_context(begun_at(self._model, layer, base.entered[number][layer]))
                entered.append(around.enter_context(outputs_kept(self._model, () if session else self._starts)))
                logits = going_on(stage.tokens, stage.mask, None if stop else stage.keep)
            yield logits
        if session is None:
            self._base = _Base(forward, tuple(entered))

    def _by_row(self, stage: _Stage, prompts: Tensor, logits: Tensor) -> dict[int, Tensor]:
        """Logits of the rows that a pass completes: its own, with those of their prompts' last tokens before them."""
        if not self._several:
            return {n: logits[n, : self._rows[n].predicted] for n in stage.numbers}
        if stage.owners is None:
            return {n: prompts[self._owners[n]] for n in stage.numbers}
        return {
            n: torch.cat([prompts[self._owners[n]], one[: self._rows[n].predicted - 1]])
            for n, one in zip(stage.numbers, logits, strict=True)
        }

    # --------------------------------------------------------------------------------------------- what the passes run

    def _all_at_once(self) -> tuple[Tensor, list[_Stage]]:
        """Every answer with its prompt, padded on the right."""
        self._first = self._rows
        batch = pad(self._model, [row.fed for row in self._rows], "right")
        lengths = torch.tensor([len(row.prompt) for row in self._rows], dtype=torch.long, device="cpu")
        places = torch.arange(max(row.predicted for row in self._rows), device="cpu")
        keep = (lengths.unsqueeze(1) - 1 + places).clamp(max=batch.tokens.shape[1] - 1)
        return lengths, [_Stage(batch.tokens, batch.mask, keep, tuple(range(len(self._rows))))]

    def _prompts_first(self) -> tuple[Tensor, list[_Stage]]:
        """Every prompt once, padded on the left; then the answers, padded on the right, in passes of like length."""
        first: dict[tuple[int, ...], Answered] = {}
        for row in self._rows:
            first.setdefault(row.prompt, row)
        self._first, prompts = list(first.values()), list(first)
        place = {prompt: number for number, prompt in enumerate(prompts)}
        self._owners = [place[row.prompt] for row in self._rows]
        batch = pad(self._model, prompts, "left")
        keep = torch.full((len(prompts), 1), batch.tokens.shape[1] - 1, dtype=torch.long, device="cpu")
        short = tuple(number for number, row in enumerate(self._rows) if row.predicted == 1)
        stages = [_Stage(batch.tokens, batch.mask, keep, short)]
        stages += [self._answers(numbers, batch.tokens.device) for numbers in self._like_lengths()]
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long, device="cpu")
        return lengths, stages

    def _answers(self, numbers: Sequence[int], device: torch.device) -> _Stage:
        """The answers of these numbers, all but their last tokens; what a pad holds is not seen."""
        rows = [self._rows[number].answer[:-1] for number in numbers]
        longest = max(map(len, rows))
        places = torch.arange(longest, device="cpu").repeat(len(rows), 1)
        mask = places < torch.tensor([len(row) for row in rows], dtype=torch.long, device="cpu").unsqueeze(1)
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long, device="cpu")
        owners = torch.tensor([self._owners[number] for number in numbers], dtype=torch.long, device="cpu")
        return _Stage(tokens.to(device), mask.to(device), places, tuple(numbers), owners.to(device))

    def _like_lengths(self) -> Iterator[list[int]]:
        """Numbers of the answers that have more than one token, in passes with little padding."""
        on_cpu = device_of(self._model).type == "cpu"
        free = PASS_OF_ANY_MODEL + PASS_COST / self._model.cfg.d_model**2 if on_cpu else math.inf
        chosen: list[int] = []
        real = 0
        for number in sorted(range(len(self._rows)), key=lambda number: len(self._rows[number].answer)):
            fed = len(self._rows[number].answer) - 1
            if fed < 1:
                continue
            padding = (len(chosen) + 1) * fed - (real + fed)
            if chosen and (len(chosen) == self._batch_size or padding > max(free, PADDING * (real + fed))):
                yield chosen
                chosen, real = [], 0
            chosen.append(number)
            real += fed
        if chosen:
            yield chosen


def shares_prompts(model: SteerableModel, rows: Sequence[Answered], hook_objects: Sequence[HookObject | None]) -> bool:
    """Whether rows of one prompt go on from one pass over it: some have one, and neither model nor hooks forbid it."""
    if len({row.prompt for row in rows}) == len(rows):
        return False
    links = (link for one in hook_objects if one is not None for link in one.links)
    return all(link.forks for link in links) and can_begin_above(model)


def together(
    model: SteerableModel,
    rows: Sequence[Answered],
    hook_objects: Sequence[HookObject | None],
    batch_size: int,
    *,
    held: bool,
) -> Iterator[list[int]]:
    """Numbers of the rows in batches of like length, those of one prompt together.

    Where the logits of a batch are held all at once it has at most `batch_size` rows, else at most so many prompts.
    """
    batch_size = whole("batch_size", batch_size, 1)
    groups: dict[Any, list[int]] = defaultdict(list)
    shared = shares_prompts(model, rows, hook_objects)
    for number, row in enumerate(rows):
        groups[row.prompt if shared else number].append(number)

    def size(group: list[int]) -> int:
        return len(rows[group[0]].prompt) if shared else len(rows[group[0]].fed)

    chosen: list[int] = []
    room = batch_size
    for group in sorted(groups.values(), key=size):
        step = batch_size if held else len(group)
        for piece in (group[start : start + step] for start in range(0, len(group), step)):
            takes = len(piece) if held else 1
            if chosen and (takes > room or not _fit(model, rows, [*chosen, *piece])):
                yield chosen
                chosen, room = [], batch_size
            chosen += piece
            room -= takes
    if chosen:
        yield chosen


def _fit(model: SteerableModel, rows: Sequence[Answered], numbers: Sequence[int]) -> bool:
    """Whether the longest of these prompts fits into the context with the longest of these answers."""
    longest = [max(map(len, parts)) for parts in zip(*[(rows[n].prompt, rows[n].answer) for n in numbers], strict=True)]
    return sum(longest) <= model.cfg.n_ctx


def _first_layer(hook_object: HookObject) -> int:
    """The lowest layer that must be run with its hooks."""
    return min(point.layer for point in hook_object.points)


def require_defined(
    model: SteerableModel, rows: Sequence[Answered], found: Sequence[Tensor], hook_object: object | None
) -> None:
    """Raise `NonFiniteError` where logits that predict an answer are no distribution."""
    wrong = [undefined(logits) for logits in found]
    if wrong and bool(torch.cat(wrong).any()):
        first, *more = [row for row, places in enumerate(wrong) if bool(places.any())]
        place, said = int(wrong[first].nonzero()[0]), require_tokenizer(model).decode(list(rows[first].prompt))
        raise blown_up(f"logits of token {place} of the answer,", model, said, hook_object, 1 + len(more))

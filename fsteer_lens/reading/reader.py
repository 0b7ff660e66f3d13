"""Reading the residual stream: the one way in which this package looks at a model's activations.

Rows are run once for any number of layers, up to the last of them, with every hook of this package taken off for that
time: what is read is the unsteered stream, whatever is attached. Of each activation only what is asked for is kept, the
last token of a prompt or the mean over it, the mean over an answer, or all of it. What all rows begin with, such as the
system message of a chat, is run once, and so is a prompt with two answers: what follows goes on from the KV cache.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple, SupportsIndex

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fsteer_lens.ground.checks import whole
from fsteer_lens.method.gates import READINGS, Reading
from fsteer_lens.models.attaching import hooks_added, hooks_suspended, unsteered
from fsteer_lens.models.classes import SteerableModel, attention_window
from fsteer_lens.models.devices import device_of
from fsteer_lens.models.forward import Forward, run_up_to
from fsteer_lens.models.points import DEFAULT_SITE, Point, layers_of, site_name
from fsteer_lens.prompts.forms import GivenPrompts, prompts_of
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.prompts.tokens import Batch, pad
from fsteer_lens.reading.readings import of_prompt

PADDING = 0.125
"""Share of padding, beside the tokens of its rows one by one, from which on a smaller batch is faster on a CPU."""

SHARED = 8
"""Tokens that all rows must have in common at their beginning for it to be worth while to run these apart."""

Keep = Callable[[Tensor], Tensor]
"""What to keep of an activation, [b s d]."""
Hooks = list[tuple[str, Any]]
"""Names of hook points with the functions to be called there."""
Advance = Callable[[int], None]
"""Is told how many rows are done."""


def read(
    model: SteerableModel,
    batch: Batch,
    points: Sequence[Point],
    keep: Keep = lambda activation: activation,
    *,
    bare: bool = False,
) -> dict[Point, Tensor]:
    """One pass of padded rows through the unsteered model; of every point what `keep` makes of its activation, float32.

    Args:
        model: whose stream to read.
        batch: token rows, padded on either side.
        points: where; at least one. The pass ends at the last of their layers.
        keep: from an activation [b s d] to what is kept of it; all of it, unless something is given.
        bare: without anybody's hooks; otherwise those of others stay on.

    Raises:
        SiteError: the model has no such point.
    """
    kept: dict[Point, Tensor] = {}
    hooks = _hooks(model, points, lambda point, activation: kept.update({point: keep(activation).float()}))
    with hooks_suspended(model) if bare else unsteered(model):
        run_up_to(model, batch.tokens, batch.mask, max(point.layer for point in points), hooks)
    return kept


def read_prompts(
    model: SteerableModel,
    prompts: GivenPrompts,
    passes: Passes,
    layers: SupportsIndex | Iterable[SupportsIndex],
    reads: Sequence[Reading],
    *,
    site: str = DEFAULT_SITE,
    advance: Advance = lambda rows: None,
) -> dict[Reading, dict[int, Float[Tensor, "n d"]]]:
    """What is read of each prompt in the given ways, per layer, on the CPU; arguments and errors as of `Reader`."""
    tokenisation = passes.tokenisation(model)
    rows = [tokenisation.ids(prompt) for prompt in prompts_of(prompts, least=0)]
    reader = Reader(model, layers, site, batch_size=passes.batch_size, advance=advance)
    return reader.prompts(rows, tokenisation.tails(rows), reads)


class _Beginning(NamedTuple):
    """What all rows begin with, run apart: the pass that goes on from it, and the stream of its tokens, [s d]."""

    forward: Forward
    stream: Mapping[Point, Tensor]

    @property
    def length(self) -> int:
        assert self.forward.tokens is not None
        return self.forward.tokens.shape[1]


class Reader:
    """Reads many rows at some layers of a model, in batches of like length.

    Args:
        model: whose stream to read.
        layers: one layer, or several that share every pass.
        site: the hook point within a layer.
        batch_size: rows per forward pass, at most: on a CPU rows of about one length only share it.
        advance: is told how many rows are done.

    Raises:
        InputError: no layer, or a batch size below 1.
        SiteError: the model has no such layer or site.
    """

    def __init__(
        self,
        model: SteerableModel,
        layers: SupportsIndex | Iterable[SupportsIndex],
        site: str = DEFAULT_SITE,
        *,
        batch_size: int = 16,
        advance: Advance = lambda rows: None,
    ) -> None:
        self.layers = layers_of(model, layers)
        for layer in self.layers:
            site_name(model, layer, site)
        self._model, self._points = model, [Point(layer, site) for layer in self.layers]
        self._batch_size, self._advance = whole("batch_size", batch_size, 1), advance

    def last(self, rows: Sequence[Sequence[int]]) -> dict[int, Float[Tensor, "n d"]]:
        """Activation at the last token of each row, per layer, on the CPU."""
        return self.prompts(rows, [0] * len(rows), ("last",))["last"]

    def prompts(
        self, rows: Sequence[Sequence[int]], tails: Sequence[int], reads: Sequence[Reading] = READINGS
    ) -> dict[Reading, dict[int, Float[Tensor, "n d"]]]:
        """What is read of each row, in every way that is asked for, per layer, on the CPU.

        `tails` are the numbers of tokens after the user's turn, see `Tokenisation.tails`.
        """
        found: dict[Reading, dict[int, Tensor]] = {read: self._room(len(rows)) for read in reads}
        start, rests = self._begun(rows)
        for chosen in self._batches([(len(rest), 0) for rest in rests], self._length(start)):
            batch = pad(self._model, [rests[index] for index in chosen], "right")
            hooks = self._reading(found, chosen, batch, tails, start)
            with unsteered(self._model), hooks_added(self._model, hooks):
                self._go_on(start, len(chosen))(batch.tokens, batch.mask)
            self._advance(len(chosen))
        return found

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        tails: Sequence[int] | None = None,
    ) -> tuple[dict[Reading, dict[int, Float[Tensor, "n d"]]], dict[int, Float[Tensor, "n 2 d"]]]:
        """What is read of each prompt, and means over the tokens of its two answers, per layer, on the CPU.

        A prompt is run once, padded on the left; both of its answers go on from there, padded on the right. `tails` as
        in `prompts`; None is none.
        """
        queries: dict[Reading, dict[int, Tensor]] = {read: self._room(len(prompts)) for read in READINGS}
        means, tails = self._room(len(prompts), 2), tails or [0] * len(prompts)
        start, rests = self._begun(prompts, max((len(one) for pair in answers for one in pair), default=0))
        sizes = [(len(rest), max(map(len, pair))) for rest, pair in zip(rests, answers, strict=True)]
        for chosen in self._batches(sizes, self._length(start)):
            prompt = pad(self._model, [rests[index] for index in chosen], "left")
            both = [list(answer) for index in chosen for answer in answers[index]]
            lengths = torch.tensor([len(answer) for answer in both], dtype=torch.long, device="cpu")
            longest = int(lengths.max())
            # what a pad holds is not seen, and one prompt alone must do without a pad token
            tokens = pad(self._model, [answer + [0] * (longest - len(answer)) for answer in both], "right").tokens
            mask = (torch.arange(longest, device="cpu") < lengths.unsqueeze(1)).to(tokens.device)
            with unsteered(self._model):
                forward = self._go_on(start, len(chosen), cache=True)
                with hooks_added(self._model, self._reading(queries, chosen, prompt, tails, start)):
                    forward(prompt.tokens, prompt.mask)
                with hooks_added(self._model, self._averaging(means, chosen, mask)):
                    forward.fork(2)(tokens, mask)
            self._advance(len(chosen))
        return queries, means

    def _begun(
        self, rows: Sequence[Sequence[int]], longest_answer: int = 0
    ) -> tuple[_Beginning | None, Sequence[Sequence[int]]]:
        """A pass over what all rows begin with, None where that is little, and what is left of each of them.

        Padding comes between the two, and takes up room in an attention window: so all of a row has to fit into one.
        """
        ordered = sorted(map(list, rows))
        longest = min(map(len, rows), default=1) - 1  # of every row something is left
        alike = (one == other for one, other in zip(ordered[0][:longest], ordered[-1], strict=False)) if rows else ()
        shared = sum(takewhile(bool, alike))
        fits = max(map(len, rows), default=0) + longest_answer <= attention_window(self._model)
        if len(rows) < 2 or shared < SHARED or not fits:
            return None, rows
        forward = self._go_on(None, 1, cache=True)
        tokens = pad(self._model, [rows[0][:shared]], "right")
        stream: dict[Point, Tensor] = {}
        hooks = _hooks(self._model, self._points, lambda point, h: stream.update({point: h[0].float()}))
        with unsteered(self._model), hooks_added(self._model, hooks):
            forward(tokens.tokens, tokens.mask)
        return _Beginning(forward, stream), [row[shared:] for row in rows]

    def _go_on(self, start: _Beginning | None, times: int, cache: bool = False) -> Forward:
        """Passes of so many rows, up to the last layer that is read, that go on from `start`."""
        if start is not None:
            return start.forward.fork(times)
        return Forward(self._model, cache=cache, layers=max(self.layers) + 1)

    @staticmethod
    def _length(start: _Beginning | None) -> int:
        return 0 if start is None else start.length

    def _room(self, *shape: int) -> dict[int, Tensor]:
        return {
            layer: torch.empty(*shape, self._model.cfg.d_model, dtype=torch.float32, device="cpu")
            for layer in self.layers
        }

    def _reading(
        self,
        rooms: Mapping[Reading, Mapping[int, Tensor]],
        rows: Sequence[int],
        batch: Batch,
        tails: Sequence[int],
        start: _Beginning | None,
    ) -> Hooks:
        """Hooks that put into the rooms what is read of the prompts."""
        own = torch.tensor([tails[row] for row in rows], dtype=torch.long, device="cpu")

        def keep(point: Point, h: Tensor) -> None:
            before = None if start is None else start.stream[point].to(h.device)
            for read, room in rooms.items():
                room[point.layer][rows] = of_prompt(read, h, batch.mask, own, before).cpu()

        return _hooks(self._model, self._points, keep)

    def _averaging(self, room: Mapping[int, Tensor], rows: Sequence[int], mask: Tensor) -> Hooks:
        """Hooks that put into the room the means over both answers of each prompt."""

        def keep(point: Point, h: Tensor) -> None:
            room[point.layer][rows] = _mean_of_pairs(h, mask).cpu()

        return _hooks(self._model, self._points, keep)

    def _batches(self, sizes: Sequence[tuple[int, int]], before: int) -> Iterator[list[int]]:
        """Numbers of rows of about one length: at most `batch_size` at once, within the context, with little padding.

        `sizes` are the length of each prompt and that of the longer of its two answers, 0 without answers; `before` is
        the number of tokens that come before all of them.
        """
        cfg = self._model.cfg
        allowed = 1 + PADDING if device_of(self._model).type == "cpu" else math.inf
        chosen: list[int] = []
        real = longest = 0
        for index in sorted(range(len(sizes)), key=lambda index: sizes[index]):
            prompt, answer = sizes[index]
            widest, added = max(longest, answer), prompt + 2 * answer
            padded = (len(chosen) + 1) * (prompt + 2 * widest)
            fits = before + prompt + widest <= cfg.n_ctx and padded <= allowed * (real + added)
            if chosen and (len(chosen) == self._batch_size or not fits):
                yield chosen
                chosen, real, widest = [], 0, answer
            chosen.append(index)
            real, longest = real + added, widest
        if chosen:
            yield chosen


def _hooks(model: SteerableModel, points: Sequence[Point], keep: Callable[[Point, Tensor], None]) -> Hooks:
    """Hooks that hand the activation at each point to `keep`, and leave it as it is."""

    def hook_of(point: Point) -> Any:
        def hook_function(activation: Tensor, hook: Any) -> None:
            keep(point, activation.detach())

        return hook_function

    return [(site_name(model, point.layer, point.site), hook_of(point)) for point in points]


def _mean_of_pairs(activation: Float[Tensor, "b s d"], mask: Bool[Tensor, "b s"]) -> Float[Tensor, "n 2 d"]:
    """Mean over the real tokens of each row; rows come in pairs."""
    real = mask.to(activation.device).unsqueeze(-1)
    mean = activation.float().masked_fill(~real, 0).sum(dim=1) / real.sum(dim=1)
    return mean.unflatten(0, (-1, 2))

"""Collecting query activations and response shifts from a model.

Only the last prompt token and the mean over the response are kept, never a whole cache. Rows are sorted by length and
run in batches up to the last layer asked for; a prompt with two answers is run once, and both go on from its KV cache.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fsteer_lens.errors import DataError, InputError, NonFiniteError
from fsteer_lens.ground.progress import progress_bar
from fsteer_lens.method.linalg import move
from fsteer_lens.models.attaching import hooks_added
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.forward import Forward, run_up_to
from fsteer_lens.models.points import DEFAULT_SITE, site_name
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet, Prompt, prompt_text
from fsteer_lens.prompts.tokens import answer_ids, pad, prompt_ids, require_fits
from fsteer_lens.reading.fingerprints import Fingerprint, fingerprint

Shift = Literal["response_mean", "last_prompt"]
PADDING = 0.125
"""Share of padding, beside the tokens of its rows one by one, from which on a smaller batch is faster on a CPU."""


@dataclass(frozen=True, eq=False, repr=False)
class Activations:
    """What was read from one layer of a model for a set of prompts.

    Attributes:
        queries: activation at the last prompt token of each prompt, [n d], float32.
        shifts: preferred minus undesired of each contrast, [n d]; None where only prompts were given.
        labels: label of each prompt.
        groups: fold group of each prompt.
        layer: the layer that was read.
        site: the hook point within the layer.
        shift: how the shifts were taken.
        fingerprint: of the model.
    """

    queries: Float[Tensor, "n d"]
    shifts: Float[Tensor, "n d"] | None
    labels: tuple[str | None, ...]
    groups: tuple[str | None, ...]
    layer: int
    site: str
    shift: Shift | None
    fingerprint: Fingerprint

    def __repr__(self) -> str:
        n, d_model = self.queries.shape
        return f"Activations(n={n}, d_model={d_model}, layer={self.layer}, shift={self.shift})"

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Activations":
        """The same activations on another device or in another dtype."""
        return move(self, device, dtype)


@overload
def collect(
    model: SteerableModel,
    contrasts: Sequence[Contrast],
    *,
    layer: int,
    shift: Shift = ...,
    chat: bool = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> Activations: ...
@overload
def collect(
    model: SteerableModel,
    contrasts: Sequence[Contrast],
    *,
    layer: Sequence[int],
    shift: Shift = ...,
    chat: bool = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> dict[int, Activations]: ...
def collect(
    model: SteerableModel,
    contrasts: Sequence[Contrast],
    *,
    layer: int | Sequence[int],
    shift: Shift = "response_mean",
    chat: bool = False,
    batch_size: int = 16,
    progress: bool = True,
) -> Activations | dict[int, Activations]:
    """Read the query activation and the response shift δ = h₊ − h₋ of every contrast.

    Args:
        model: a HookedTransformer or TransformerBridge.
        contrasts: what to read; not empty.
        layer: one layer, or several: these share one set of forward passes and give {layer: Activations}.
        shift: "response_mean": prompt with each answer, activations averaged over the answer's tokens (the paper's
            set-up for truthfulness). "last_prompt": the prompt with and without its context, both at the last prompt
            token; every contrast needs a context.
        chat: apply the chat template to string prompts; see `tokens.prompt_ids`.
        batch_size: rows per forward pass, at most: on a CPU rows of one length only share it. With "response_mean" it
            counts prompts; their answers follow, twice as many.
        progress: show a progress bar.

    Raises:
        DataError: no contrasts, a missing context, or two sides that are the same.
        SiteError: no such layer.
        ContextLengthError: a prompt with its answer does not fit into the context.
        NonFiniteError: the model gave NaN or infinity; names the prompt.
    """
    contrasts = ContrastSet(contrasts)
    if shift not in ("response_mean", "last_prompt"):
        raise InputError("shift", expected="'response_mean' or 'last_prompt'", got=repr(shift))
    _require_some(contrasts, "contrast set")
    prompts: list[list[int]] = []
    sides: list[list[list[int]]] = []
    for number, contrast in enumerate(contrasts):
        prompt = prompt_ids(model, contrast.prompt, chat=chat)
        where = f"contrast {number}, prompt {prompt_text(contrast.prompt)[:40]!r}"
        if shift == "last_prompt":
            if contrast.context is None:
                raise DataError(
                    f"{where} has no context",
                    expected="context= text that switches the preferred behaviour on",
                    fix="Give every contrast a context, or use shift='response_mean'.",
                )
            pair = [prompt_ids(model, contrast.prompt, chat=chat, context=contrast.context), prompt]
        else:
            pair = [answer_ids(model, text) for text in (contrast.preferred, contrast.undesired)]
            if pair[0] == pair[1]:
                raise DataError(f"{where}: both answers are the same", fix="Drop it, or mend its answers.")
            require_fits(model, len(prompt) + max(map(len, pair)), f"{where} with its answer")
        prompts.append(prompt)
        sides.append(pair)
    if shift == "last_prompt":
        last = _read(model, [ids for pair in sides for ids in pair], layer, batch_size, progress)
        queries = {key: value[1::2] for key, value in last.items()}
        shifts = {key: value[0::2] - value[1::2] for key, value in last.items()}
    else:
        queries, means = _read_answers(model, prompts, sides, layer, batch_size, progress)
        shifts = {key: value[:, 0] - value[:, 1] for key, value in means.items()}
    result = _package(
        model,
        queries,
        shifts,
        contrasts.labels,
        [contrast.group for contrast in contrasts],
        contrasts.prompts,
        shift,
    )
    return result[layer] if isinstance(layer, int) else result


@overload
def collect_queries(
    model: SteerableModel,
    prompts: Sequence[Prompt],
    *,
    layer: int,
    labels: Sequence[str | None] | None = ...,
    chat: bool = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> Activations: ...
@overload
def collect_queries(
    model: SteerableModel,
    prompts: Sequence[Prompt],
    *,
    layer: Sequence[int],
    labels: Sequence[str | None] | None = ...,
    chat: bool = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> dict[int, Activations]: ...
def collect_queries(
    model: SteerableModel,
    prompts: Sequence[Prompt],
    *,
    layer: int | Sequence[int],
    labels: Sequence[str | None] | None = None,
    chat: bool = False,
    batch_size: int = 16,
    progress: bool = True,
) -> Activations | dict[int, Activations]:
    """Read the activation at the last token of every prompt; arguments and errors as in `collect`."""
    prompts = list(prompts)
    _require_some(prompts, "prompts")
    rows = [prompt_ids(model, prompt, chat=chat) for prompt in prompts]
    at_query = _read(model, rows, layer, batch_size, progress)
    names = list(labels) if labels is not None else [None] * len(prompts)
    if len(names) != len(prompts):
        raise DataError("labels", expected=f"one for each of {len(prompts)} prompts", got=len(names))
    result = _package(model, at_query, None, names, [None] * len(prompts), prompts, None)
    return result[layer] if isinstance(layer, int) else result


def _require_some(items: Sequence[Any], what: str) -> None:
    if not len(items):
        raise DataError(what, expected="at least one", got="none", fix="Did a filter or a split leave nothing?")


def _read(
    model: SteerableModel, rows: Sequence[Sequence[int]], layer: int | Sequence[int], batch_size: int, progress: bool
) -> dict[int, Tensor]:
    """Activation at the last token of each row, {layer: [n d]}."""
    reader = _Reader(model, layer)
    found = reader.room(len(rows))
    with progress_bar(len(rows), "reading activations", progress) as advance:
        for chosen in _batches(model, [(len(row), 0) for row in rows], batch_size):
            batch = pad(model, [rows[index] for index in chosen], "right")
            last = batch.mask.sum(dim=1) - 1
            reader.reduce = lambda activation, last=last: activation[
                torch.arange(len(activation), device=activation.device), last.to(activation.device)
            ]
            run_up_to(model, batch.tokens, batch.mask, max(reader.layers), reader.hooks)
            reader.move_to(found, chosen)
            advance(len(chosen))
    return found


def _read_answers(
    model: SteerableModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    layer: int | Sequence[int],
    batch_size: int,
    progress: bool,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Activation at each prompt's last token, {layer: [n d]}, and means over its two answers, {layer: [n 2 d]}.

    A prompt is run once, padded on the left; both of its answers go on from there, padded on the right.
    """
    reader = _Reader(model, layer)
    queries, means = reader.room(len(prompts)), reader.room(len(prompts), 2)
    sizes = [(len(prompt), max(map(len, pair))) for prompt, pair in zip(prompts, answers, strict=True)]
    with progress_bar(len(prompts), "reading activations", progress) as advance:
        for chosen in _batches(model, sizes, batch_size):
            prompt = pad(model, [prompts[index] for index in chosen], "left")
            both = [list(answer) for index in chosen for answer in answers[index]]
            lengths = torch.tensor([len(answer) for answer in both])
            longest = int(lengths.max())
            # what a pad holds is not seen, and one prompt alone must do without a pad token
            tokens = pad(model, [answer + [0] * (longest - len(answer)) for answer in both], "right").tokens
            mask = (torch.arange(longest) < lengths.unsqueeze(1)).to(tokens.device)
            forward = Forward(model, cache=True, layers=max(reader.layers) + 1)
            with hooks_added(model, reader.hooks):
                reader.reduce = lambda activation: activation[:, -1]
                forward(prompt.tokens, prompt.mask)
                reader.move_to(queries, chosen)
                forward.fork(2)
                reader.reduce = lambda activation, mask=mask: _mean(activation, mask).unflatten(0, (-1, 2))
                forward(tokens, mask)
                reader.move_to(means, chosen)
            advance(len(chosen))
    return queries, means


def _mean(activation: Float[Tensor, "b s d"], mask: Bool[Tensor, "b s"]) -> Float[Tensor, "b d"]:
    """Mean over the real tokens of each row."""
    real = mask.to(activation.device).unsqueeze(-1)
    return activation.float().masked_fill(~real, 0).sum(dim=1) / real.sum(dim=1)


def _batches(model: SteerableModel, sizes: Sequence[tuple[int, int]], batch_size: int) -> Iterator[list[int]]:
    """Numbers of rows of about one length: at most `batch_size` at once, within the context, with little padding.

    `sizes` are the length of each prompt and that of the longer of its two answers, 0 without answers.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError("batch_size", expected="an int >= 1", got=repr(batch_size))
    allowed = 1 + PADDING if torch.device(model.cfg.device).type == "cpu" else math.inf
    chosen: list[int] = []
    real = longest = 0
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index]):
        prompt, answer = sizes[index]
        widest, added = max(longest, answer), prompt + 2 * answer
        padded = (len(chosen) + 1) * (prompt + 2 * widest)
        if chosen and (
            len(chosen) == batch_size or prompt + widest > model.cfg.n_ctx or padded > allowed * (real + added)
        ):
            yield chosen
            chosen, real, widest = [], 0, answer
        chosen.append(index)
        real, longest = real + added, widest
    yield chosen


class _Reader:
    """Hooks that keep of every layer what `reduce` makes of its activation, so that no layer is held whole."""

    def __init__(self, model: SteerableModel, layer: int | Sequence[int]) -> None:
        self.layers = [layer] if isinstance(layer, int) else list(layer)
        if not self.layers:
            raise InputError("layer", expected="an int or a sequence of ints", got=layer)
        self.hooks = [(site_name(model, one), self._keep(one)) for one in self.layers]
        self.reduce: Callable[[Tensor], Tensor] = lambda activation: activation
        self._kept: dict[int, Tensor] = {}
        self._d_model: int = model.cfg.d_model

    def room(self, *shape: int) -> dict[int, Tensor]:
        """An empty tensor per layer."""
        return {one: torch.empty(*shape, self._d_model) for one in self.layers}

    def move_to(self, room: Mapping[int, Tensor], rows: Sequence[int]) -> None:
        """Put what the latest pass showed into these rows."""
        for layer in self.layers:
            room[layer][rows] = self._kept.pop(layer)

    def _keep(self, layer: int) -> Any:
        def hook_function(activation: Tensor, hook: Any) -> None:
            self._kept[layer] = self.reduce(activation).float().to("cpu", copy=True)

        return hook_function


def _package(
    model: SteerableModel,
    queries: Mapping[int, Tensor],
    shifts: Mapping[int, Tensor] | None,
    labels: Sequence[str | None],
    groups: Sequence[str | None],
    prompts: Sequence[Prompt],
    shift: Shift | None,
) -> dict[int, Activations]:
    taken = fingerprint(model, sorted(queries))
    result = {}
    for layer, values in queries.items():
        for what in (values, *([shifts[layer]] if shifts else [])):
            bad = ~what.isfinite().all(dim=1)
            if bad.any():
                prompt = prompt_text(prompts[int(bad.nonzero()[0])])
                raise NonFiniteError(
                    f"activations at layer {layer}",
                    expected="finite numbers",
                    got=f"NaN or infinity for {int(bad.sum())} prompts, first {prompt[:60]!r}",
                    fix="Half precision overflows on some models: load in bfloat16 or float32.",
                )
        result[layer] = Activations(
            queries=values,
            shifts=shifts[layer] if shifts else None,
            labels=tuple(labels),
            groups=tuple(groups),
            layer=layer,
            site=DEFAULT_SITE,
            shift=shift,
            fingerprint=taken.at_layer(layer),
        )
    return result

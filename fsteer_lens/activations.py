"""Collecting query activations and response shifts from a model.

Only the last prompt token and the mean over the response are kept, never a whole cache. Rows are sorted by length and
run in batches up to the last layer asked for; a prompt with two answers is run once, and both go on from its KV cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import DataError, InputError, NonFiniteError
from fsteer_lens.fingerprints import Fingerprint, fingerprint
from fsteer_lens.linalg import move
from fsteer_lens.models import DEFAULT_SITE, Forward, SteerableModel, hooks_added, run_up_to, site_name
from fsteer_lens.progress import progress_bar
from fsteer_lens.prompts import Contrast, ContrastSet, Prompt, prompt_text
from fsteer_lens.tokens import answer_ids, pad, prompt_ids, require_fits

Shift = Literal["response_mean", "last_prompt"]
PADDING = 0.125
"""Share of padding, beside the real tokens of a batch, from which on a shorter batch is faster."""


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
        batch_size: rows per forward pass; with "response_mean" prompts, whose answers follow twice as many in a pass.
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
    reader = _Reader(model, layer, batch_size)
    found = reader.room(len(rows))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    with progress_bar(len(rows), "reading activations", progress) as advance:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad(model, [rows[index] for index in chosen], "right")
            last = batch.mask.sum(dim=1) - 1
            run_up_to(model, batch.tokens, batch.mask, max(reader.layers), reader.hooks)
            for at_layer, activation in reader.seen.items():
                rows_at = torch.arange(len(chosen), device=activation.device)
                found[at_layer][chosen] = activation[rows_at, last.to(activation.device)].float().to("cpu")
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
    reader = _Reader(model, layer, batch_size)
    queries, means = reader.room(len(prompts)), reader.room(len(prompts), 2)
    with progress_bar(len(prompts), "reading activations", progress) as advance:
        for chosen in _batches(prompts, answers, batch_size, model.cfg.n_ctx):
            prompt = pad(model, [prompts[index] for index in chosen], "left")
            both = [list(answer) for index in chosen for answer in answers[index]]
            lengths = torch.tensor([len(answer) for answer in both])
            longest = int(lengths.max())
            # what a pad holds is not seen, and one prompt alone must do without a pad token
            tokens = pad(model, [answer + [0] * (longest - len(answer)) for answer in both], "right").tokens
            mask = (torch.arange(longest) < lengths.unsqueeze(1)).to(tokens.device)
            forward = Forward(model, cache=True, layers=max(reader.layers) + 1)
            with hooks_added(model, reader.hooks):
                forward(prompt.tokens, prompt.mask)
                for at_layer, activation in reader.seen.items():
                    queries[at_layer][chosen] = activation[:, -1].float().to("cpu")
                forward.fork(2)
                forward(tokens, mask)
            for at_layer, activation in reader.seen.items():
                real = mask.to(activation.device).unsqueeze(-1)
                mean = activation.float().masked_fill(~real, 0).sum(dim=1) / real.sum(dim=1)
                means[at_layer][chosen] = mean.reshape(len(chosen), 2, -1).to("cpu")
            advance(len(chosen))
    return queries, means


def _batches(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]], batch_size: int, n_ctx: int
) -> Iterator[list[int]]:
    """Prompts of about one length, at most `batch_size` at once, with little padding, within the context."""
    chosen: list[int] = []
    real = longest = 0
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        prompt, lengths = len(prompts[index]), [len(answer) for answer in answers[index]]
        widest = max(longest, *lengths)
        padded = (len(chosen) + 1) * (prompt + len(lengths) * widest)
        added = prompt + sum(lengths)
        if chosen and (len(chosen) == batch_size or prompt + widest > n_ctx or padded > (1 + PADDING) * (real + added)):
            yield chosen
            chosen, real, widest = [], 0, max(lengths)
        chosen.append(index)
        real, longest = real + added, widest
    yield chosen


class _Reader:
    """Hooks that keep what the latest forward pass showed at each layer."""

    def __init__(self, model: SteerableModel, layer: int | Sequence[int], batch_size: int) -> None:
        self.layers = [layer] if isinstance(layer, int) else list(layer)
        if not self.layers:
            raise InputError("layer", expected="an int or a sequence of ints", got=layer)
        if batch_size < 1:
            raise InputError("batch_size", expected="at least 1", got=batch_size)
        self.hooks = [(site_name(model, one), self._keep(one)) for one in self.layers]
        self.seen: dict[int, Tensor] = {}
        self._d_model: int = model.cfg.d_model

    def room(self, *shape: int) -> dict[int, Tensor]:
        """An empty tensor per layer."""
        return {one: torch.empty(*shape, self._d_model) for one in self.layers}

    def _keep(self, layer: int) -> Any:
        def hook_function(activation: Tensor, hook: Any) -> None:
            self.seen[layer] = activation

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

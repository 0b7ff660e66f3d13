"""Collecting query activations and response shifts from a model.

Only the last prompt token and the mean over the response are kept, never a whole cache. Rows are sorted by length,
padded on the right and gathered at their last real token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import DataError, InputError, NonFiniteError
from fsteer_lens.fingerprints import Fingerprint, fingerprint
from fsteer_lens.linalg import move
from fsteer_lens.models import DEFAULT_SITE, SteerableModel, run_up_to, site_name
from fsteer_lens.progress import progress_bar
from fsteer_lens.prompts import Contrast, ContrastSet, Prompt, prompt_text
from fsteer_lens.tokens import answer_ids, pad, prompt_ids, require_fits

Shift = Literal["response_mean", "last_prompt"]


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
        batch_size: rows per forward pass.
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
    rows: list[list[int]] = []
    spans: list[tuple[int, int]] = []
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
            sides = [prompt_ids(model, contrast.prompt, chat=chat, context=contrast.context), prompt]
            starts = [len(ids) - 1 for ids in sides]
        else:
            answers = [answer_ids(model, text) for text in (contrast.preferred, contrast.undesired)]
            if answers[0] == answers[1]:
                raise DataError(f"{where}: both answers are the same", fix="Drop it, or mend its answers.")
            sides = [prompt + answer for answer in answers]
            starts = [len(prompt), len(prompt)]
        for ids, start in zip(sides, starts, strict=True):
            require_fits(model, len(ids), f"{where} with its answer")
            rows.append(ids)
            spans.append((start, len(ids)))
    queries_at = [start if shift == "last_prompt" else start - 1 for start, _ in spans]
    means, at_query = _read(model, rows, spans, queries_at, layer, batch_size, progress)
    result = _package(
        model,
        {key: value[1::2] for key, value in at_query.items()},
        {key: value[0::2] - value[1::2] for key, value in means.items()},
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
    last = [len(row) - 1 for row in rows]
    _, at_query = _read(model, rows, [(at, at + 1) for at in last], last, layer, batch_size, progress)
    names = list(labels) if labels is not None else [None] * len(prompts)
    if len(names) != len(prompts):
        raise DataError("labels", expected=f"one for each of {len(prompts)} prompts", got=len(names))
    result = _package(model, at_query, None, names, [None] * len(prompts), prompts, None)
    return result[layer] if isinstance(layer, int) else result


def _require_some(items: Sequence[Any], what: str) -> None:
    if not len(items):
        raise DataError(what, expected="at least one", got="none", fix="Did a filter or a split leave nothing?")


def _read(
    model: SteerableModel,
    rows: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    queries_at: Sequence[int],
    layer: int | Sequence[int],
    batch_size: int,
    progress: bool,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Mean activation over each row's span, and the activation at each row's query position, both {layer: [n d]}."""
    layers = [layer] if isinstance(layer, int) else list(layer)
    if not layers:
        raise InputError("layer", expected="an int or a sequence of ints", got=layer)
    if batch_size < 1:
        raise InputError("batch_size", expected="at least 1", got=batch_size)
    names = {at: site_name(model, at) for at in layers}
    means = {at: torch.empty(len(rows), model.cfg.d_model) for at in layers}
    at_query = {at: torch.empty(len(rows), model.cfg.d_model) for at in layers}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    with progress_bar(len(rows), "reading activations", progress) as advance:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad(model, [rows[index] for index in chosen], "right")

            def keep(at: int, chosen: list[int] = chosen) -> Any:
                def hook_function(activation: Tensor, hook: Any) -> None:
                    for row, index in enumerate(chosen):
                        first, end = spans[index]
                        means[at][index] = activation[row, first:end].float().mean(dim=0)
                        at_query[at][index] = activation[row, queries_at[index]].float()

                return hook_function

            run_up_to(model, batch.tokens, batch.mask, max(layers), [(names[at], keep(at)) for at in layers])
            advance(len(chosen))
    return means, at_query


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

"""Activations of prompts and answers: `collect`, `collect_queries`, and the value that they give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import DataError, NonFiniteError
from fsteer_lens.ground.checks import choice
from fsteer_lens.method.linalg import move
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.points import DEFAULT_SITE
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet, Prompt, prompt_text
from fsteer_lens.prompts.formats import PromptFormat, format_of
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.prompts.tokens import answer_ids, require_fits
from fsteer_lens.reading.fingerprints import Fingerprint, fingerprint
from fsteer_lens.reading.reader import Reader

Shift = Literal["response_mean", "last_prompt"]
READING = "reading activations"


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
        prompt_format: how the prompts became tokens; None is unknown.
    """

    queries: Float[Tensor, "n d"]
    shifts: Float[Tensor, "n d"] | None
    labels: tuple[str | None, ...]
    groups: tuple[str | None, ...]
    layer: int
    site: str
    shift: Shift | None
    fingerprint: Fingerprint
    prompt_format: PromptFormat | None = None

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
    chat: bool | None = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
    prepend_bos: bool | None = ...,
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
    chat: bool | None = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
    prepend_bos: bool | None = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> dict[int, Activations]: ...
def collect(
    model: SteerableModel,
    contrasts: Sequence[Contrast],
    *,
    layer: int | Sequence[int],
    shift: Shift = "response_mean",
    chat: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Activations | dict[int, Activations]:
    """Read the query activation and the response shift δ = h₊ − h₋ of every contrast.

    What is read is the unsteered stream: hooks of this package that are on the model are off while it is read.

    Args:
        model: a HookedTransformer or TransformerBridge.
        contrasts: what to read; not empty.
        layer: one layer, or several: these share one set of forward passes and give {layer: Activations}.
        shift: "response_mean": prompt with each answer, activations averaged over the answer's tokens (the paper's
            set-up for truthfulness). "last_prompt": the prompt with and without its context, both at the last prompt
            token; every contrast needs a context.
        chat: apply the chat template to string prompts; see `tokens.prompt_ids`.
        chat_template_kwargs: further arguments of the chat template, such as `{"enable_thinking": False}`.
        prepend_bos: put a beginning-of-sequence token in front of plain strings; None does as the tokenizer does.
        batch_size: rows per forward pass, at most: on a CPU rows of about one length only share it. Of shift
            "response_mean" it counts prompts; their answers follow, twice as many.
        progress: show a progress bar.

    Returns:
        Activations, which remember how the prompts became tokens: a steering that is fitted to them is run that way.

    Raises:
        DataError: no contrasts, a missing context, or two sides that are the same.
        SiteError: no such layer.
        ContextLengthError: a prompt with its answer does not fit into the context.
        NonFiniteError: the model gave NaN or infinity; names the prompt.
    """
    contrasts = ContrastSet(contrasts)
    choice("shift", shift, ("response_mean", "last_prompt"))
    passes = Passes(chat, batch_size, progress, chat_template_kwargs, prepend_bos)
    tokenisation = passes.tokenisation(model)
    _require_some(contrasts, "contrast set")
    prompts: list[list[int]] = []
    sides: list[list[list[int]]] = []
    for number, contrast in enumerate(contrasts):
        prompt = tokenisation.ids(contrast.prompt)
        where = f"contrast {number}, prompt {prompt_text(contrast.prompt)[:40]!r}"
        if shift == "last_prompt":
            if contrast.context is None:
                raise DataError(
                    f"{where} has no context",
                    expected="context= text that switches the preferred behaviour on",
                    fix="Give every contrast a context, or use shift='response_mean'.",
                )
            pair = [tokenisation.ids(contrast.prompt, contrast.context), prompt]
        else:
            pair = [answer_ids(model, text) for text in (contrast.preferred, contrast.undesired)]
            if pair[0] == pair[1]:
                raise DataError(f"{where}: both answers are the same", fix="Drop it, or mend its answers.")
            require_fits(model, len(prompt) + max(map(len, pair)), f"{where} with its answer")
        prompts.append(prompt)
        sides.append(pair)
    with passes.bar(len(contrasts) * (1 + (shift == "last_prompt")), READING) as advance:
        reader = Reader(model, layer, batch_size=passes.batch_size, advance=advance)
        if shift == "last_prompt":
            preferred = reader.last([with_context for with_context, _ in sides])
            queries = reader.last(prompts)
            shifts = {layer: preferred[layer] - queries[layer] for layer in queries}
        else:
            queries, means = reader.answers(prompts, sides)
            shifts = {key: value[:, 0] - value[:, 1] for key, value in means.items()}
    result = _package(
        model,
        queries,
        shifts,
        contrasts.labels,
        [contrast.group for contrast in contrasts],
        contrasts.prompts,
        shift,
        format_of(tokenisation, contrasts.prompts),
    )
    return result if isinstance(layer, Sequence) else result[reader.layers[0]]


@overload
def collect_queries(
    model: SteerableModel,
    prompts: Sequence[Prompt],
    *,
    layer: int,
    labels: Sequence[str | None] | None = ...,
    chat: bool | None = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
    prepend_bos: bool | None = ...,
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
    chat: bool | None = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
    prepend_bos: bool | None = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> dict[int, Activations]: ...
def collect_queries(
    model: SteerableModel,
    prompts: Sequence[Prompt],
    *,
    layer: int | Sequence[int],
    labels: Sequence[str | None] | None = None,
    chat: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Activations | dict[int, Activations]:
    """Read the activation at the last token of every prompt; arguments and errors as in `collect`."""
    prompts = list(prompts)
    _require_some(prompts, "prompts")
    passes = Passes(chat, batch_size, progress, chat_template_kwargs, prepend_bos)
    with passes.bar(len(prompts), READING) as advance:
        reader = Reader(model, layer, batch_size=passes.batch_size, advance=advance)
        at_query = reader.last(passes.ids(model, prompts))
    names = list(labels) if labels is not None else [None] * len(prompts)
    if len(names) != len(prompts):
        raise DataError("labels", expected=f"one for each of {len(prompts)} prompts", got=len(names))
    known = format_of(passes.tokenisation(model), prompts)
    result = _package(model, at_query, None, names, [None] * len(prompts), prompts, None, known)
    return result if isinstance(layer, Sequence) else result[reader.layers[0]]


def _require_some(items: Sequence[Any], what: str) -> None:
    if not len(items):
        raise DataError(what, expected="at least one", got="none", fix="Did a filter or a split leave nothing?")


def _package(
    model: SteerableModel,
    queries: Mapping[int, Tensor],
    shifts: Mapping[int, Tensor] | None,
    labels: Sequence[str | None],
    groups: Sequence[str | None],
    prompts: Sequence[Prompt],
    shift: Shift | None,
    prompt_format: PromptFormat,
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
            prompt_format=prompt_format,
        )
    return result

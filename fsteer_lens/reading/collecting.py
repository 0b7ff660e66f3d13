"""`collect` and `collect_queries`: from prompts to what is read of a model while it runs them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex, overload

from torch import Tensor

from fsteer_lens.errors import DataError, NonFiniteError
from fsteer_lens.ground.checks import choice, is_several
from fsteer_lens.method.gates import READINGS, Reading, require_reading
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.points import DEFAULT_SITE
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.prompts.formats import PromptFormat, format_of
from fsteer_lens.prompts.forms import GivenPrompts, Prompt, prompt_text, prompts_of
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.prompts.tokens import answer_ids, require_fits
from fsteer_lens.reading.activations import SHIFTS, Activations, Shift
from fsteer_lens.reading.fingerprints import fingerprint
from fsteer_lens.reading.reader import Reader, read_prompts
from fsteer_lens.reading.rows import one_a_row

READING = "reading activations"


@overload
def collect(
    model: SteerableModel,
    contrasts: Iterable[Contrast],
    *,
    layer: SupportsIndex,
    shift: Shift = ...,
    read: Reading = ...,
    chat: bool | None = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
    prepend_bos: bool | None = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> Activations: ...
@overload
def collect(
    model: SteerableModel,
    contrasts: Iterable[Contrast],
    *,
    layer: Iterable[SupportsIndex],
    shift: Shift = ...,
    read: Reading = ...,
    chat: bool | None = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
    prepend_bos: bool | None = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> dict[int, Activations]: ...
def collect(
    model: SteerableModel,
    contrasts: Iterable[Contrast],
    *,
    layer: SupportsIndex | Iterable[SupportsIndex],
    shift: Shift = "response_mean",
    read: Reading = "last",
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
        contrasts: what to read, a `ContrastSet` or anything that gives contrasts one after the other; not empty.
        layer: one layer, or several: these share one set of forward passes and give {layer: Activations}. A layer that
            is named twice is read once.
        shift: "response_mean": prompt with each answer, activations averaged over the answer's tokens (the paper's
            set-up for truthfulness). "last_prompt": the prompt with and without its context, both at the last prompt
            token; every contrast needs a context.
        read: what the query activation is of a prompt, see `Activations`; the other ways are kept beside it.
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
    choice("shift", shift, SHIFTS)
    require_reading(read)
    passes = Passes(chat, batch_size, progress, chat_template_kwargs, prepend_bos)
    tokenisation = passes.tokenisation(model)
    require_readable(contrasts, shift)
    prompts: list[list[int]] = []
    sides: list[list[list[int]]] = []
    for number, contrast in enumerate(contrasts):
        prompt = tokenisation.ids(contrast.prompt)
        where = _where(number, contrast)
        if shift == "last_prompt":
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
            queries = reader.prompts(prompts, tokenisation.tails(prompts))
            shifts = {layer: preferred[layer] - at_last for layer, at_last in queries["last"].items()}
        else:
            queries, means = reader.answers(prompts, sides, tokenisation.tails(prompts))
            shifts = {key: value[:, 0] - value[:, 1] for key, value in means.items()}
    result = _package(
        model,
        queries,
        read,
        shifts,
        contrasts.labels,
        [contrast.group for contrast in contrasts],
        contrasts.prompts,
        shift,
        format_of(tokenisation, contrasts.prompts),
    )
    return result if is_several(layer) else result[reader.layers[0]]


@overload
def collect_queries(
    model: SteerableModel,
    prompts: GivenPrompts,
    *,
    layer: SupportsIndex,
    labels: Iterable[Any] | None = ...,
    read: Reading = ...,
    chat: bool | None = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
    prepend_bos: bool | None = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> Activations: ...
@overload
def collect_queries(
    model: SteerableModel,
    prompts: GivenPrompts,
    *,
    layer: Iterable[SupportsIndex],
    labels: Iterable[Any] | None = ...,
    read: Reading = ...,
    chat: bool | None = ...,
    chat_template_kwargs: Mapping[str, Any] | None = ...,
    prepend_bos: bool | None = ...,
    batch_size: int = ...,
    progress: bool = ...,
) -> dict[int, Activations]: ...
def collect_queries(
    model: SteerableModel,
    prompts: GivenPrompts,
    *,
    layer: SupportsIndex | Iterable[SupportsIndex],
    labels: Iterable[Any] | None = None,
    read: Reading = "last",
    chat: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Activations | dict[int, Activations]:
    """Read the query activation of every prompt; arguments and errors as in `collect`."""
    require_reading(read)
    prompts = prompts_of(prompts, least=0)
    _require_some(prompts, "prompts")
    names = one_a_row("labels", labels, len(prompts))
    passes = Passes(chat, batch_size, progress, chat_template_kwargs, prepend_bos)
    with passes.bar(len(prompts), READING) as advance:
        queries = read_prompts(model, prompts, passes, layer, READINGS, advance=advance)
    known = format_of(passes.tokenisation(model), prompts)
    result = _package(model, queries, read, None, names, [None] * len(prompts), prompts, None, known)
    return result if is_several(layer) else next(iter(result.values()))


def require_readable(contrasts: ContrastSet, shift: Shift) -> None:
    """Raise `DataError` where there are no contrasts, or one lacks the context that the shift is taken with."""
    _require_some(contrasts, "contrast set")
    for number, contrast in enumerate(contrasts if shift == "last_prompt" else ()):
        if contrast.context is None:
            raise DataError(
                f"{_where(number, contrast)} has no context",
                expected="context= text that switches the preferred behaviour on",
                fix="Give every contrast a context, or use shift='response_mean'.",
            )


def _where(number: int, contrast: Contrast) -> str:
    return f"contrast {number}, prompt {prompt_text(contrast.prompt)[:40]!r}"


def _require_some(items: Sequence[Any], what: str) -> None:
    if not len(items):
        raise DataError(what, expected="at least one", got="none", fix="Did a filter or a split leave nothing?")


def _package(
    model: SteerableModel,
    queries: Mapping[Reading, Mapping[int, Tensor]],
    read: Reading,
    shifts: Mapping[int, Tensor] | None,
    labels: Sequence[str | None],
    groups: Sequence[str | None],
    prompts: Sequence[Prompt],
    shift: Shift | None,
    prompt_format: PromptFormat,
) -> dict[int, Activations]:
    taken = fingerprint(model, sorted(queries[read]))
    result = {}
    for layer, values in queries[read].items():
        others: dict[Reading, Tensor] = {name: found[layer] for name, found in queries.items() if name != read}
        for what in (values, *others.values(), *([shifts[layer]] if shifts else [])):
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
            read=read,
            readings=others,
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

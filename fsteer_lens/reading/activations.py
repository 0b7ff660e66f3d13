"""Activations of prompts and answers: `collect`, `collect_queries`, and the value that they give."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, SupportsIndex, overload

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import DataError, MismatchError, NonFiniteError, ShapeError
from fsteer_lens.ground.checks import choice, instance, is_several, normalised, optional, whole
from fsteer_lens.method.linalg import move, require_shapes
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.points import DEFAULT_SITE, SITES
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.prompts.formats import PromptFormat, format_of
from fsteer_lens.prompts.forms import GivenPrompts, Prompt, prompt_text, prompts_of
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.prompts.tokens import answer_ids, require_fits
from fsteer_lens.reading import stored
from fsteer_lens.reading.fingerprints import Fingerprint, fingerprint, require_same_model
from fsteer_lens.reading.reader import Reader
from fsteer_lens.reading.rows import one_a_row, row_numbers

Shift = Literal["response_mean", "last_prompt"]
SHIFTS = ("response_mean", "last_prompt")
ROWS = ("queries", "shifts", "labels", "groups")
"""Fields that hold one value for each prompt; all others tell how these were read."""
READING = "reading activations"


@dataclass(frozen=True, eq=False, repr=False)
class Activations:
    """What was read from one layer of a model for a set of prompts: a row for each.

    `activations[:50]`, `activations[rows]` and `activations[mask]` are some of the rows, `a + b` those of both, and
    `.save(path)` and `Activations.load(path)` keep them in a file.

    Attributes:
        queries: activation at the last prompt token of each prompt, [n d], float32.
        shifts: preferred minus undesired of each contrast, [n d]; None where only prompts were given.
        labels: label of each prompt; None, or one that is None, has none.
        groups: fold group of each prompt, likewise.
        layer: the layer that was read.
        site: the hook point within the layer.
        shift: how the shifts were taken.
        fingerprint: of the model; None where they were made by hand. What is fitted to these asks for `model=` when it
            is saved.
        prompt_format: how the prompts became tokens; None is unknown.

    Raises:
        ShapeError, NonFiniteError: no finite floating matrix, no row, or shifts of another shape than the queries.
        InputError: no layer, or an unknown site or shift.
        DataError: another number of labels or groups than of rows.
    """

    queries: Float[Tensor, "n d"]
    shifts: Float[Tensor, "n d"] | None = None
    labels: tuple[str | None, ...] = None  # pyright: ignore[reportAssignmentType]  # becomes one None a row
    groups: tuple[str | None, ...] = None  # pyright: ignore[reportAssignmentType]
    layer: int = None  # pyright: ignore[reportAssignmentType]  # refused: what comes before it may be left out
    site: str = DEFAULT_SITE
    shift: Shift | None = None
    fingerprint: Fingerprint | None = None
    prompt_format: PromptFormat | None = None

    def __post_init__(self) -> None:
        given = {} if self.shifts is None else {"shifts": (self.shifts, "n d")}
        require_shapes("activations", queries=(self.queries, "n d"), **given)
        n = len(self.queries)
        if not n:
            raise ShapeError("activations", expected="at least one row", got="none")
        optional(instance, "fingerprint", self.fingerprint, Fingerprint, "a Fingerprint or None")
        optional(instance, "prompt_format", self.prompt_format, PromptFormat, "a PromptFormat or None")
        normalised(
            self,
            queries=self.queries.contiguous(),
            shifts=None if self.shifts is None else self.shifts.contiguous(),
            labels=one_a_row("labels", self.labels, n),
            groups=one_a_row("groups", self.groups, n),
            layer=whole("layer", self.layer, 0),
            site=choice("site", self.site, SITES),
            shift=choice("shift", self.shift, (*SHIFTS, None)),
        )

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, rows: Any) -> "Activations":
        """Some of the rows: a slice, a list or array of row numbers (negative ones count from the end), or a mask.

        Raises:
            InputError: a single number, a number out of range, or a mask of another length.
            DataError: no row is left.
        """
        chosen = row_numbers(rows, len(self))
        index = torch.tensor(chosen, dtype=torch.long, device=self.queries.device)
        return replace(
            self,
            queries=self.queries[index],
            shifts=None if self.shifts is None else self.shifts[index],
            labels=tuple(self.labels[row] for row in chosen),
            groups=tuple(self.groups[row] for row in chosen),
        )

    def __add__(self, other: "Activations") -> "Activations":
        """The rows of both, these first.

        Raises:
            MismatchError: they are of different models, layers or sites, or were read in different ways; names how.
        """
        if not isinstance(other, Activations):
            return NotImplemented
        own, others = self._about, other._about
        differences = [f"{name}: {own[name]} and {others[name]}" for name in own if own[name] != others[name]]
        if differences:
            got, fix = "; ".join(differences), "Collect both in the same way."
            raise MismatchError("these activations do not go together", got=got, fix=fix)
        require_same_model(self.fingerprint, other.fingerprint, "activations")
        both = other.to(self.queries.device)
        return replace(
            self,
            queries=torch.cat([self.queries, both.queries]),
            shifts=None if self.shifts is None else torch.cat([self.shifts, both.shifts]),  # pyright: ignore[reportArgumentType, reportCallIssue]
            labels=self.labels + other.labels,
            groups=self.groups + other.groups,
        )

    @property
    def _about(self) -> dict[str, Any]:
        """What both parts of a sum must share: every field that is not one value a row, but for the fingerprint."""
        shared = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ROWS}
        del shared["fingerprint"]
        has_shifts = "with shifts" if self.shifts is not None else "without shifts"
        return {**shared, "width": self.queries.shape[1], "rows": has_shifts}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write these to one file, atomically; `Activations.load` reads it back.

        Raises:
            InputError: no such folder, or no leave to write there.
        """
        stored.write(path, {item.name: getattr(self, item.name) for item in fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Activations":
        """Read what `save` wrote; a file is trusted no more than that of a steering: no code, no pickle, checked bytes.

        Raises:
            FileFormatError: no such file, not one of ours, damaged, or of a newer version.
        """
        found = stored.read(path)
        try:
            return cls(**found)
        except Exception as error:
            raise stored.no_activations(path, error) from error

    def __repr__(self) -> str:
        n, d_model = self.queries.shape
        return f"Activations(n={n}, d_model={d_model}, layer={self.layer}, shift={self.shift})"

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Activations":
        """The same activations on another device or in another dtype."""
        return move(self, device, dtype)


@overload
def collect(
    model: SteerableModel,
    contrasts: Iterable[Contrast],
    *,
    layer: SupportsIndex,
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
    contrasts: Iterable[Contrast],
    *,
    layer: Iterable[SupportsIndex],
    shift: Shift = ...,
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
    return result if is_several(layer) else result[reader.layers[0]]


@overload
def collect_queries(
    model: SteerableModel,
    prompts: GivenPrompts,
    *,
    layer: SupportsIndex,
    labels: Iterable[Any] | None = ...,
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
    chat: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Activations | dict[int, Activations]:
    """Read the activation at the last token of every prompt; arguments and errors as in `collect`."""
    prompts = prompts_of(prompts, least=0)
    _require_some(prompts, "prompts")
    names = one_a_row("labels", labels, len(prompts))
    passes = Passes(chat, batch_size, progress, chat_template_kwargs, prepend_bos)
    with passes.bar(len(prompts), READING) as advance:
        reader = Reader(model, layer, batch_size=passes.batch_size, advance=advance)
        at_query = reader.last(passes.ids(model, prompts))
    known = format_of(passes.tokenisation(model), prompts)
    result = _package(model, at_query, None, names, [None] * len(prompts), prompts, None, known)
    return result if is_several(layer) else result[reader.layers[0]]


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

"""Activations of prompts and answers: what `collect` and `collect_queries` give, as a value with a row for each."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import DataError, InputError, MismatchError, ShapeError
from fsteer_lens.ground.addresses import local_path
from fsteer_lens.ground.checks import choice, instance, normalised, optional, whole
from fsteer_lens.method.gates import Reading, require_reading
from fsteer_lens.method.linalg import move, require_shapes
from fsteer_lens.models.points import DEFAULT_SITE, SITES
from fsteer_lens.prompts.formats import PromptFormat
from fsteer_lens.reading import stored
from fsteer_lens.reading.fingerprints import Fingerprint, require_same_model
from fsteer_lens.reading.rows import one_a_row, row_numbers

Shift = Literal["response_mean", "last_prompt"]
SHIFTS = ("response_mean", "last_prompt")
ROWS = ("queries", "readings", "shifts", "labels", "groups")
"""Fields that hold one value for each prompt; all others tell how these were read."""


@dataclass(frozen=True, eq=False, repr=False)
class Activations:
    """What was read from one layer of a model for a set of prompts: a row for each.

    `activations[:50]`, `activations[rows]` and `activations[mask]` are some of the rows, `a + b` those of both, and
    `.save(path)` and `Activations.load(path)` keep them in a file.

    Attributes:
        queries: the query activation of each prompt, [n d], float32.
        shifts: preferred minus undesired of each contrast, [n d]; None where only prompts were given.
        labels: label of each prompt; None, or one that is None, has none.
        groups: fold group of each prompt, likewise.
        layer: the layer that was read.
        site: the hook point within the layer.
        shift: how the shifts were taken.
        fingerprint: of the model; None where they were made by hand. What is fitted to these asks for `model=` when it
            is saved.
        prompt_format: how the prompts became tokens; None is unknown.
        read: what the queries are of a prompt: "last", its last token; "mean", the mean over all its tokens but the
            first; "turn_end", the token that ends the user's turn. What is fitted to them reads so.
        readings: the queries read in the other ways, by name, each [n d]; `reading` puts one of them in their place.

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
    read: Reading = "last"
    readings: Mapping[Reading, Float[Tensor, "n d"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {} if self.shifts is None else {"shifts": (self.shifts, "n d")}
        for name, rows in dict(instance("readings", self.readings, Mapping, "a mapping")).items():
            if name == self.read:
                raise InputError("readings", expected=f"other ways of reading than {name!r}", got=name)
            given[f"reading {require_reading(name)}"] = (rows, "n d")
        require_shapes("activations", queries=(self.queries, "n d"), **given)
        n = len(self.queries)
        if not n:
            raise ShapeError("activations", expected="at least one row", got="none")
        optional(instance, "fingerprint", self.fingerprint, Fingerprint, "a Fingerprint or None")
        optional(instance, "prompt_format", self.prompt_format, PromptFormat, "a PromptFormat or None")
        normalised(
            self,
            queries=self.queries.contiguous(),
            readings={name: rows.contiguous() for name, rows in self.readings.items()},
            read=require_reading(self.read),
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
            readings={name: rows[index] for name, rows in self.readings.items()},
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
            readings={
                name: torch.cat([rows, both.readings[name]])
                for name, rows in self.readings.items()
                if name in both.readings
            },
            shifts=None if self.shifts is None else torch.cat([self.shifts, both.shifts]),  # pyright: ignore[reportArgumentType, reportCallIssue]
            labels=self.labels + other.labels,
            groups=self.groups + other.groups,
        )

    def reading(self, read: Reading) -> "Activations":
        """The same prompts with queries that were read in another way.

        Raises:
            DataError: they were not, say since these were made by hand or come from an older file.
        """
        if require_reading(read) == self.read:
            return self
        if read not in self.readings:
            got = f"queries read by {[self.read, *self.readings]}"
            raise DataError(f"activations by read={read!r}", expected="activations of collect()", got=got)
        others = {name: rows for name, rows in self.readings.items() if name != read}
        return replace(self, queries=self.readings[read], read=read, readings={**others, self.read: self.queries})

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

        `path` may be "hf://owner/name@revision" too, as in `load`.

        Raises:
            FileFormatError: no such file, not one of ours, damaged, or of a newer version.
            InputError: an address on the hub that is none, or that gives no activations.
        """
        path = local_path(path, "activations")
        found = stored.read(path)
        try:
            return cls(**found)
        except Exception as error:
            raise stored.no_activations(path, error) from error

    def __repr__(self) -> str:
        n, d_model = self.queries.shape
        read = "" if self.read == "last" else f", read={self.read}"
        return f"Activations(n={n}, d_model={d_model}, layer={self.layer}, shift={self.shift}{read})"

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Activations":
        """The same activations on another device or in another dtype."""
        return move(self, device, dtype)

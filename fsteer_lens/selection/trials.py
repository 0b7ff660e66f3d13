"""One setting of a search with its numbers, and what these depend on."""

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

from fsteer_lens.errors import NonFiniteError
from fsteer_lens.ground.checks import finite, instance, normalised, number, optional, whole
from fsteer_lens.hooks.scopes import Schedule, Scope, Window, require_scope
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.reading.fingerprints import fingerprint

One = TypeVar("One")


class Settings(NamedTuple):
    """What a trial is known by: None is the method's own."""

    layer: int
    rank: int | None
    strength: float
    scope: Scope | None = None
    schedule: Schedule | None = None


@dataclass(frozen=True)
class Trial:
    """One setting of a search on the validation split.

    Attributes:
        layer, rank, strength: the setting; a rank of None is the method's own.
        effect: mean effect over the contrasts.
        utility: mean utility over the general prompts.
        scope, schedule: the rest of the setting; None is the method's own.
        length: how much is added to the stream, ‖λ · g · v‖ on average over the prompts of train, in lengths of the
            mean shift: unlike strengths it compares across methods. A schedule counts by its first factor. None where
            an earlier version ran the trial, or where the method steers at other layers than the one it was given.
    """

    layer: int
    rank: int | None
    strength: float
    effect: float
    utility: float
    scope: Scope | None = None
    schedule: Schedule | None = None
    length: float | None = None

    def __post_init__(self) -> None:
        optional(lambda _, scope: require_scope(scope), "scope", self.scope)
        optional(instance, "schedule", self.schedule, Schedule, "a Schedule or None")
        normalised(
            self,
            layer=whole("layer", self.layer, 0),
            rank=optional(whole, "rank", self.rank, 1),
            strength=finite("strength", self.strength),
            effect=number("effect", self.effect),
            utility=number("utility", self.utility),
            length=optional(number, "length", self.length),
        )

    @property
    def settings(self) -> Settings:
        """What it was tried at."""
        return Settings(self.layer, self.rank, self.strength, self.scope, self.schedule)

    def to_record(self) -> dict[str, Any]:
        """A flat, JSON-ready mapping: a window as "start:stop", a schedule as its factors with blanks in between."""
        scope, schedule = self.scope, self.schedule
        if isinstance(scope, Window):
            scope = f"{scope.start}:{'' if scope.stop is None else scope.stop}"
        factors = None if schedule is None else " ".join(f"{factor:g}" for factor in schedule.factors)
        return {**asdict(self), "scope": scope, "schedule": factors}


def trial_of(row: Mapping[str, Any]) -> Trial:
    """A trial of a line in a journal."""
    scope, schedule = row.get("scope"), row.get("schedule")
    scope = Window(**scope) if isinstance(scope, Mapping) else scope
    schedule = Schedule(tuple(schedule["factors"])) if schedule is not None else None
    return Trial(**{**row, "scope": scope, "schedule": schedule})


def finite_ones(owner: str, trials: Sequence[One], *names: str) -> list[One]:
    """The trials whose numbers of these names are finite; a warning tells of the others.

    Raises:
        NonFiniteError: there are none.
    """
    found = [one for one in trials if all(math.isfinite(getattr(one, name)) for name in names)]
    others = [one for one in trials if one not in found]
    told = f"expected a finite {' and '.join(names)}, got {others[:1]}"
    if not found:
        raise NonFiniteError(f"{owner}: not one of {len(trials)} settings can be chosen, {told}")
    if others:
        warnings.warn(f"{owner}: {len(others)} of {len(trials)} settings cannot be chosen, {told}", stacklevel=3)
    return found


def identity_of(model: SteerableModel, layers: Sequence[int], known: Sequence[Any]) -> str:
    """SHA-256 of a model at these layers and of all else that a trial's numbers depend on, as JSON shows it."""
    return hashlib.sha256(json.dumps([asdict(fingerprint(model, layers)), *known], default=str).encode()).hexdigest()

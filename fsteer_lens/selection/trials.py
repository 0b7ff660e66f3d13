"""One setting of a search with its numbers, and the file that keeps finished ones."""

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.files import read_text, write_atomically
from fsteer_lens.hooks.scopes import Schedule, Scope, Window
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.reading.fingerprints import fingerprint


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


@runtime_checkable
class Tried(Protocol):
    """What a journal keeps: a dataclass that knows what it was tried at."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def settings(self) -> Hashable:
        """What it was tried at."""
        ...


One = TypeVar("One", bound=Tried)


def identity_of(model: SteerableModel, layers: Sequence[int], known: Sequence[Any]) -> str:
    """SHA-256 of a model at these layers and of all else that a trial's numbers depend on, as JSON shows it."""
    return hashlib.sha256(json.dumps([asdict(fingerprint(model, layers)), *known], default=str).encode()).hexdigest()


class Journal(Generic[One]):
    """Finished trials in a file of JSON lines, the first of which tells which search they belong to.

    `owner` is what ran them, "search" say, and `made_of` makes a trial of its line.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        owner: str,
        identity: str,
        made_of: Callable[[Mapping[str, Any]], One],
    ) -> None:
        self.known: dict[Hashable, One] = {}
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        if not self._path.exists():
            self._write({owner: identity}, "x")
            return
        whole = read_text(self._path).split("\n")[:-1]  # a line that was cut off in writing has no end
        try:
            header, *rows = [json.loads(line) for line in whole]
            found, trials = header[owner], [made_of(row) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError, InputError, RecursionError) as error:
            raise DataError(f"{path}", expected=f"the file of an earlier {owner}", got=str(error)) from error
        if found != identity:
            raise DataError(
                f"{path} belongs to another {owner}",
                expected="the same model, data and options",
                got="others",
                fix="Name another file, or delete this one.",
            )
        write_atomically(self._path, "".join(line + "\n" for line in whole).encode())
        for trial in trials:
            self.add(trial, write=False)

    def add(self, trial: One, *, write: bool = True) -> None:
        """Remember a finished trial."""
        self.known[trial.settings] = trial
        if write and self._path is not None:
            self._write(asdict(trial), "a")

    def _write(self, row: Mapping[str, Any], mode: str) -> None:
        assert self._path is not None
        if not self._path.parent.is_dir():
            raise InputError(f"cannot write {self._path}", expected="an existing folder", got=str(self._path.parent))
        with self._path.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

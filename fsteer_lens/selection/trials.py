"""One setting of a search with its numbers, and the file that keeps finished ones."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.files import read_text, write_atomically
from fsteer_lens.hooks.scopes import Schedule, Scope, Window


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


def _trial(row: Mapping[str, Any]) -> Trial:
    """A trial of a line in a journal."""
    scope, schedule = row.get("scope"), row.get("schedule")
    scope = Window(**scope) if isinstance(scope, Mapping) else scope
    schedule = Schedule(tuple(schedule["factors"])) if schedule is not None else None
    return Trial(**{**row, "scope": scope, "schedule": schedule})


class Journal:
    """Finished trials in a file of JSON lines, the first of which tells which search they belong to."""

    def __init__(self, path: str | os.PathLike[str] | None, identity: str) -> None:
        self.known: dict[Settings, Trial] = {}
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        if not self._path.exists():
            self._write({"search": identity}, "x")
            return
        whole = read_text(self._path).split("\n")[:-1]  # a line that was cut off in writing has no end
        try:
            header, *rows = [json.loads(line) for line in whole]
            found, trials = header["search"], [_trial(row) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError, InputError, RecursionError) as error:
            raise DataError(f"{path}", expected="the file of an earlier search", got=str(error)) from error
        if found != identity:
            raise DataError(
                f"{path} belongs to another search",
                expected="the same model, data, method, measures and shift",
                got="others",
                fix="Name another file, or delete this one.",
            )
        write_atomically(self._path, "".join(line + "\n" for line in whole).encode())
        for trial in trials:
            self.add(trial, write=False)

    def add(self, trial: Trial, *, write: bool = True) -> None:
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

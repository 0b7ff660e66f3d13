"""The file that keeps finished trials, so that an interrupted search goes on where it was."""

import json
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import BufferedRandom
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from fsteer_lens.errors import DataError
from fsteer_lens.ground.files import mode_of, path_of, read_text, unwritable
from fsteer_lens.ground.tables import parse_json


@runtime_checkable
class Tried(Protocol):
    """What a journal keeps: a dataclass that knows what it was tried at."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def settings(self) -> Hashable:
        """What it was tried at."""
        ...


One = TypeVar("One", bound=Tried)


class Journal(Generic[One]):
    """Finished trials in a file of JSON lines, the first of which tells which search they belong to.

    Whoever reads or writes has the file to himself for that moment (where the system can lock files), so that two
    searches may share one: no line is torn or lost. A line that a crash cut off is cut away, a heading likewise.

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
        self._path = None if path is None else path_of(path)
        if self._path is None:
            return
        heading = _line({owner: identity})
        with _alone_with(self._path) as file:
            *lines, cut = read_text(self._path).split("\n")
            if not lines and _may_become(heading, cut):
                file.truncate(0)
                _append(file, heading)
                return
            try:
                header, *rows = [parse_json(line, f"line {number}") for number, line in enumerate(lines, 1)]
                found, trials = header[owner], [made_of(row) for row in rows]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(f"{path}", expected=f"the file of an earlier {owner}", got=str(error)) from error
            if found != identity:
                raise DataError(
                    f"{path} belongs to another {owner}",
                    expected="the same model, data and options",
                    got="others",
                    fix="Name another file, or delete this one.",
                )
            file.truncate(file.seek(0, os.SEEK_END) - len(cut.encode()))
        self.known.update({trial.settings: trial for trial in trials})

    def add(self, trial: One) -> None:
        """Remember a finished trial.

        Raises:
            InputError: the file cannot be written to any more; it is left as it was.
        """
        self.known[trial.settings] = trial
        if self._path is not None:
            with _alone_with(self._path) as file:
                _append(file, _line(asdict(trial)))


@contextmanager
def _alone_with(path: Path) -> Iterator[BufferedRandom]:
    """A file to read and to append to, made where there is none, that nobody else with a journal touches meanwhile."""
    try:
        mode_of(Path(os.path.realpath(path)))
        with path.open("a+b") as file:
            _lock(file)
            yield file
    except OSError as error:
        raise unwritable(path, error) from error


def _lock(file: BufferedRandom) -> None:
    """Wait until the file is ours, until it is closed; not where the system, or the file's, has no locks."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


def _append(file: BufferedRandom, line: bytes) -> None:
    """Add a line, all of it or nothing."""
    before = file.seek(0, os.SEEK_END)
    try:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            file.truncate(before)
        raise


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _may_become(heading: bytes, cut: str) -> bool:
    """Whether this is what a crash leaves of a heading, of this search or of another."""
    begun, start = cut.encode(), heading[: heading.index(b":")]
    return len(begun) < len(heading) and start.startswith(begun[: len(start)])

"""Folders of shards: what one is to hold, the manifest that says so, and which shards are there.

1. The first process that has loaded the model writes the manifest: SHA-256 of the data, spec and fingerprint of the
   model, the arguments, and the number of shards, under a SHA-256 of its own. It appears whole, and never changes.
2. Every other process compares, and stops where anything differs.
3. The names of shards carry a key of the manifest, so that those of another run are never taken for this one's.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsteer_lens.errors import DataError, FileFormatError, InputError, MismatchError
from fsteer_lens.ground.checks import brief, finite, instance, whole
from fsteer_lens.ground.files import read_text, write_once
from fsteer_lens.ground.tables import parse_json
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.points import layers_of
from fsteer_lens.reading.fingerprints import Fingerprint, fingerprint
from fsteer_lens.reading.stored import FORMAT
from fsteer_lens.scale.specs import ModelSpec

MANIFEST = "manifest.json"
VERSION = 1
MAX_SHARDS = 100_000
"""Files of one folder that a file system still lists in no time."""
LOOK = 0.5
"""Seconds between two looks at a folder that is waited for."""
SHOWN = 5
"""Missing shards that a message names."""


@dataclass(frozen=True)
class Plan:
    """What a folder is to hold.

    Attributes:
        holds: "activations" or "evaluation".
        spec: the model.
        about: all else that the numbers depend on, as plain JSON.
        n_shards: how many shards.
        names: of the files of each shard.
        layers: where the fingerprint of the model is taken; None is the last layer.
    """

    holds: str
    spec: ModelSpec
    about: Mapping[str, Any]
    n_shards: int
    names: Sequence[str]
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        fix = "Give a larger shard_size=."
        whole("shards", self.n_shards, 1, MAX_SHARDS, fix=fix)

    @property
    def compared(self) -> dict[str, Any]:
        """What must be the same in a manifest, by name."""
        told = {f"model {name}": value for name, value in self.spec.to_record().items()}
        return {"holds": self.holds, **told, **json.loads(json.dumps(self.about)), "shards": self.n_shards}


@dataclass(frozen=True)
class Shards:
    """A folder whose manifest is known.

    Attributes:
        folder: where it is.
        manifest: what it says: "holds", "shards", the model's spec, and all that the shards were made with.
        fingerprint: of the model.
        key: what the names of its shards end with.
    """

    folder: Path
    manifest: Mapping[str, Any]
    fingerprint: Fingerprint
    key: str

    def paths(self, number: int) -> list[Path]:
        """Where the files of a shard are."""
        return [self.folder / f"shard-{number:05d}-{name}-{self.key}.safetensors" for name in self.manifest["files"]]

    def is_finished(self, number: int) -> bool:
        """Whether all files of a shard are there."""
        return all(path.is_file() for path in self.paths(number))

    def require_finished(self) -> None:
        """Raise `DataError` naming the shards that are missing."""
        missing = [number for number in range(self.manifest["shards"]) if not self.is_finished(number)]
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise DataError(
                f"{self.folder}",
                expected=f"{self.manifest['shards']} shards",
                got=f"no shard {', '.join(map(str, missing[:SHOWN]))}{more}",
                fix="Run again what writes them, with the same arguments: only missing ones are done."
                " Where another process is at it, give wait=.",
            )

    @contextmanager
    def reading(self, number: int) -> Iterator[list[Path]]:
        """The files of a shard; what is wrong with them says how to mend it."""
        try:
            yield self.paths(number)
        except Exception as error:  # whatever goes wrong in putting it together, the file is at fault
            raise FileFormatError(
                f"shard {number} of {self.folder} cannot be used",
                got=error,
                fix="Delete its files and run again what writes them: it alone is done anew.",
            ) from error


def require_plan(folder: Path, plan: Plan) -> None:
    """Raise `MismatchError` where the folder has a manifest of something else."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot write to {folder}", expected="a folder", got="a file", fix="Name a folder.")
    if not folder.parent.is_dir():
        raise InputError(f"cannot make {folder}", expected="an existing folder", got=str(folder.parent), fix="Make it.")
    if (folder / MANIFEST).exists():
        _require_same(read_manifest(folder, plan.holds), plan)


def begin(folder: Path, plan: Plan, model: SteerableModel) -> Shards:
    """The folder, ready for shards: its manifest is written, or found to be of the same plan and the same model.

    Raises:
        MismatchError: it is of other data, another model or other arguments; names the differences.
        FileFormatError: it has a manifest that is damaged.
        InputError: no leave to write there.
    """
    layers = [model.cfg.n_layers - 1] if plan.layers is None else layers_of(model, list(plan.layers))
    here = fingerprint(model, layers)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder}", expected="a place that may be written to", got=str(error)) from error
    if not (folder / MANIFEST).exists():
        content = {**plan.compared, "files": list(plan.names), "fingerprint": FORMAT.encode(here, "fingerprint", {})}
        write_once(folder / MANIFEST, _sealed(content).encode())
    found = read_manifest(folder, plan.holds)
    _require_same(found, plan)
    try:
        found.fingerprint.require_match(here)
    except MismatchError as error:
        raise MismatchError(f"{folder} is of another model", got=error.got, fix="Name another folder.") from error
    return found


def read_manifest(folder: Path, holds: str) -> Shards:
    """The folder of a manifest.

    Raises:
        DataError: no manifest.
        FileFormatError: a damaged or changed one, or one of another version.
        InputError: it holds something else.
    """
    path = folder / MANIFEST
    ours = "a manifest that fsteer_lens.scale wrote"
    if not path.is_file():
        raise DataError(f"{path}", expected=ours, got="no such file", fix="Name a folder that scale wrote to.")
    try:
        found = instance("manifest", parse_json(read_text(path), f"{path}"), dict, "a mapping")
        version, told = found.get("fsteer_lens_scale"), found.pop("sha256", None)
        if version != VERSION:
            fix = "Upgrade fsteer_lens, or write it to another folder again."
            raise FileFormatError(f"{path} is of another version", expected=VERSION, got=brief(version), fix=fix)
        if told != _digest(found):
            fix = "Take it from a copy, or write to another folder."
            raise FileFormatError(
                f"{path} was changed or is damaged", expected=f"SHA-256 {told}", got="another", fix=fix
            )
        whole("shards", found["shards"], 1, MAX_SHARDS)
        known = instance("fingerprint", FORMAT.decode(found["fingerprint"], {}), Fingerprint, "a Fingerprint")
    except FileFormatError:
        raise
    except Exception as error:  # whatever goes wrong in putting it together, the file is at fault
        raise FileFormatError(f"{path}", expected=ours, got=f"{type(error).__name__}: {error}") from error
    if found["holds"] != holds:
        fix = {"activations": "Read it with scale.read.", "evaluation": "Read it with scale.read_evaluation."}
        raise InputError(
            f"{folder}", expected=f"a folder with {holds}", got=found["holds"], fix=fix.get(found["holds"])
        )
    return Shards(folder, found, known, told[:12])


def finished(folder: str | os.PathLike[str], holds: str, wait: float) -> Shards:
    """A folder with all its shards, after at most so many seconds.

    Raises:
        DataError: after that no manifest, or shards that are missing.
        As `read_manifest`.
    """
    deadline = time.monotonic() + finite("wait", wait, 0)
    while True:
        try:
            shards = read_manifest(folder_of(folder), holds)
            shards.require_finished()
            return shards
        except DataError:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
        time.sleep(min(LOOK, left))


def _require_same(found: Shards, plan: Plan) -> None:
    """Raise `MismatchError` naming every difference of a manifest to a plan."""
    there, here = found.manifest, plan.compared
    differences = [
        f"{name}: {brief(there.get(name))} there, {brief(here[name])} here"
        for name in here
        if there.get(name) != here[name]
    ]
    if differences:
        raise MismatchError(
            f"{found.folder} holds another run",
            got="; ".join(differences),
            fix="Give the same data, model and arguments to go on with it, or name another folder.",
        )


def _sealed(content: Mapping[str, Any]) -> str:
    told = {"fsteer_lens_scale": VERSION, **content}
    return json.dumps({**told, "sha256": _digest(told)}, indent=1)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def folder_of(out: str | os.PathLike[str]) -> Path:
    """A folder by its full path, so that it is the same in every process."""
    try:
        path = Path(out).absolute()
        with suppress(FileNotFoundError):
            path.stat()  # a name that is too long, or holds what no name may, is told here
    except (TypeError, ValueError, OSError) as error:
        raise InputError("folder", expected="the path of a folder", got=f"{brief(out)}: {error}") from error
    return path

"""The steerings that an engine knows, and what a request may ask of them."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fsteer_lens.errors import InputError, SiteError
from fsteer_lens.ground.checks import finite
from fsteer_lens.ground.files import path_of, read_bytes
from fsteer_lens.hooks.chains import Chain
from fsteer_lens.hooks.objects import HookObject, Link
from fsteer_lens.hooks.scopes import Window
from fsteer_lens.steering.steering import Steering
from fsteer_lens.steering.storage import load

FOLDER: Final = "FSTEER_STEERINGS"
"""The environment variable that names the folder."""
NAME, STRENGTH, READ, KEY = ARGUMENTS = ("fsteer", "fsteer_strength", "fsteer_read", "fsteer_key")


@dataclass(frozen=True)
class Artefact:
    """A steering that was read from a file.

    Attributes:
        name: the file's, without its ending.
        steering: what it holds.
        digest: the first half of the SHA-256 of its bytes.
    """

    name: str
    steering: HookObject
    digest: str

    @property
    def edits(self) -> bool:
        """Whether it ever adds anything."""
        return any(_edits(link) for link in self.steering.links)

    @property
    def edits_prompts(self) -> bool:
        """Whether it adds something before a prompt's last token."""
        return any(_edits(link) and not _is_late(link) for link in self.steering.links)

    @property
    def needs_prompts_at_once(self) -> bool:
        """Whether it adds something to a prompt that depends on its last token: the prompt must come in one piece."""
        return any(_edits(link) and not _is_late(link) for link in self.steering.links if isinstance(link, Steering))

    @property
    def needs_prompts_whole(self) -> bool:
        """Whether every token of a prompt must be computed anew: it is edited, or more than the last one is read."""
        return self.edits_prompts or any(link.reads != ("last",) for link in self.steering.links)

    def cache_key(self, prompt: Sequence[int], arguments: Mapping[str, Any]) -> str:
        """What keys and values depend on that were computed under it, beside the tokens before them."""
        edited = hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest() if self.edits_prompts else ""
        strength = float(arguments[STRENGTH]) if STRENGTH in arguments else ""
        return "|".join([self.digest, str(strength), str(len(prompt)), edited])

    def asked_for(self, arguments: Mapping[str, Any]) -> HookObject:
        """The steering at the strength that a request asks for."""
        if STRENGTH not in arguments:
            return self.steering
        links = [link.with_strength(float(arguments[STRENGTH])) for link in _steerings(self.steering)]
        return links[0] if len(links) == 1 else Chain(tuple(links))


def read_artefacts(folder: str | os.PathLike[str]) -> dict[str, Artefact]:
    """The steerings in a folder, by the names of their files without ".safetensors".

    Raises:
        InputError: no such folder, none in it, or one whose gate scans windows of the prompts or reads where the
            user's turn ends: an engine sees tokens, and knows neither.
        SiteError: one acts on what enters the first layer.
        FileFormatError: a file that cannot be read.
    """
    if not path_of(folder).is_dir():
        raise InputError(FOLDER, expected="a folder of steerings", got=f"{folder}, which is none")
    found = {path.stem: _artefact(path) for path in sorted(Path(folder).glob("*.safetensors"))}
    if not found:
        raise InputError(FOLDER, expected="files that fsteer_lens.save wrote", got=f"no .safetensors in {folder}")
    return found


@functools.cache
def catalogue() -> dict[str, Artefact]:
    """The steerings that this process was told of, read once."""
    return read_artefacts(os.environ[FOLDER])


def require_artefact(arguments: Mapping[str, Any], known: Mapping[str, Artefact]) -> Artefact | None:
    """The steering that a request names; None where it names none.

    Raises:
        InputError: a name, or an argument, that is unknown or does not fit.
    """
    ours = {name: value for name, value in arguments.items() if name.startswith(NAME)}
    unknown = sorted(set(ours) - set(ARGUMENTS))
    if unknown:
        raise InputError("arguments of a request", expected=f"some of {', '.join(ARGUMENTS)}", got=", ".join(unknown))
    if NAME not in ours:
        if ours:
            raise InputError("arguments of a request", expected=NAME, got=f"{', '.join(ours)} without it")
        return None
    artefact = known.get(ours[NAME]) if isinstance(ours[NAME], str) else None
    if artefact is None:
        raise InputError(NAME, expected=f"one of {', '.join(known)}", got=repr(ours[NAME]))
    if STRENGTH in ours:
        finite(STRENGTH, ours[STRENGTH])
        if len(_steerings(artefact.steering)) < len(artefact.steering.links):
            raise InputError(STRENGTH, expected="a steering that has a strength", got=repr(artefact.steering))
    several = len(artefact.steering.points) > 1
    if several and ours.get(READ) != "live":
        raise InputError(
            f"{artefact.name} reads at several layers",
            expected=f'{READ}="live"',
            got=repr(ours.get(READ)),
            fix="An engine runs a prompt once: later layers see what earlier ones have added.",
        )
    if READ in ours and ours[READ] not in ("live", "clean"):
        raise InputError(READ, expected='"live" or "clean"', got=repr(ours[READ]))
    return artefact


def _artefact(path: Path) -> Artefact:
    steering = load(path)
    for link in steering.links:
        if link.site == "hook_resid_pre" and 0 in link.hooked_layers:
            raise SiteError(f"{path.name}", expected="what leaves a decoder layer", got=f"{link!r} at the first one")
        if link.scanning or "turn_end" in link.reads:
            raise InputError(
                f"{path.name}: {link!r}",
                expected='gates that read="last" or "mean" of the prompt',
                got="windows of it" if link.scanning else 'read="turn_end"',
                fix="An engine sees tokens alone: fit on activations.reading('last').",
            )
    return Artefact(path.stem, steering, hashlib.sha256(read_bytes(path)).hexdigest()[:32])


def _steerings(steering: HookObject) -> list[Steering]:
    return [link for link in steering.links if isinstance(link, Steering)]


def _edits(link: Link) -> bool:
    return bool(link.edited_layers) and not (isinstance(link, Steering) and link.monitor)


def _is_late(link: Link) -> bool:
    return isinstance(link, Steering) and (isinstance(link.scope, Window) or link.scope == "generated")

"""A model as a few words that travel: what every process loads it from."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import choice, clean_text, instance, normalised, optional, several
from fsteer_lens.models.classes import CLASS_NAMES, Kind, SteerableModel
from fsteer_lens.models.loading import load

OWN_GPU = "cuda"


@dataclass(frozen=True)
class ModelSpec:
    """Which model to load, and how: small enough to be sent to another process, and plain JSON both ways.

    Attributes:
        name: what `models.load` takes: "tutor", "smollm2", a folder, a name on the hub, or a .gguf file. A folder must
            be there under this path on every machine.
        kind: "hooked" or "bridge"; None as in `models.load`.
        device: where to put it. "cuda" is a GPU of the process's own: under torchrun, that of its local rank.
        dtype: of its weights.
        device_map: in place of `device`, where each part goes: "auto", or a dict of parts and devices.

    Raises:
        InputError: something of another type, or an unknown kind.
    """

    name: str
    kind: Kind | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    device_map: str | Mapping[str, str | int] | None = None

    def __post_init__(self) -> None:
        given = str(self.name) if isinstance(self.name, Path) else self.name
        normalised(
            self,
            name=clean_text("name of a model", given),
            kind=choice("kind", self.kind, (*CLASS_NAMES, None)),
            device=instance("device", self.device, str, "a text such as 'cpu' or 'cuda:1'"),
            dtype=instance("dtype", self.dtype, torch.dtype, "a dtype of PyTorch, such as torch.bfloat16"),
            device_map=optional(_placement, "device_map", self.device_map),
        )

    def __hash__(self) -> int:
        return hash((self.name, self.kind, self.device, self.dtype))

    def load(self) -> SteerableModel:
        """Load the model; errors as in `models.load`."""
        return load(self.name, self.kind, _device_here(self.device), self.dtype, self.device_map)

    def to_record(self) -> dict[str, Any]:
        """Plain JSON; `from_record` reads it back equal."""
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "ModelSpec":
        """The spec of what `to_record` gave.

        Raises:
            InputError: fields that are missing, unknown, or of no use.
        """
        known = [item.name for item in fields(cls)]
        given = dict(instance("record of a model", record, Mapping, f"a mapping with {known}"))
        if set(given) != set(known):
            raise InputError("record of a model", expected=known, got=several("names", list(given), "texts"))
        return cls(**{**given, "dtype": getattr(torch, str(given["dtype"]), None)})


def _placement(name: str, value: Any) -> Any:
    """A device map that JSON holds, or `InputError`."""
    if isinstance(value, str):
        return clean_text(name, value)
    parts = dict(instance(name, value, Mapping, "a text such as 'auto', or a mapping of parts to devices"))
    for part, place in parts.items():
        if not isinstance(part, str) or not isinstance(place, str | int):
            raise InputError(name, expected="names of parts, with a device's name or number each", got=(part, place))
    return parts


def _device_here(device: str) -> str:
    """The device in this process: of several processes on a machine each has a GPU, or shares one."""
    local = os.environ.get("LOCAL_RANK", "")
    if device != OWN_GPU or not local.isdigit():
        return device
    return f"{OWN_GPU}:{int(local) % max(1, torch.cuda.device_count())}"

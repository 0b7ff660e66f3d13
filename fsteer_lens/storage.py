"""`save` and `load`: one safetensors file for a steering, never pickle.

The metadata holds the format's version, a JSON tree in which every tensor is a reference, and the SHA-256 of tensor
bytes and tree. Values are rebuilt through a fixed list of classes, whose constructors check what they are given.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsteer_lens.baselines import MeanShift
from fsteer_lens.errors import FileFormatError, FsteerError, InputError
from fsteer_lens.experts import Controller, Experts, FitReport
from fsteer_lens.files import write_atomically
from fsteer_lens.fingerprints import Fingerprint, fingerprint
from fsteer_lens.gates import EnergyGate, LogisticGate, MaxGate, MinGate, NotGate, QuantileGate
from fsteer_lens.models import SteerableModel
from fsteer_lens.steering import FineSteer, Schedule, Steering
from fsteer_lens.subspace import Subspace

FORMAT = "fsteer_lens"
VERSION = 1
CLASSES: Mapping[str, Any] = {
    cls.__name__: cls
    for cls in (
        Controller,
        EnergyGate,
        Experts,
        FineSteer,
        Fingerprint,
        FitReport,
        LogisticGate,
        MaxGate,
        MeanShift,
        MinGate,
        NotGate,
        QuantileGate,
        Schedule,
        Subspace,
    )
}


def save(steering: Steering, path: str | os.PathLike[str], model: SteerableModel | None = None) -> None:
    """Write a steering to one file, atomically: an interrupted save leaves the old file whole.

    Args:
        steering: a FineSteer or a baseline.
        path: the file, by custom ending in .safetensors; its folder must exist.
        model: the model it belongs to; needed where the steering carries no fingerprint, checked where it does.

    Raises:
        InputError: no steering, no fingerprint and no model, or no such folder.
        MismatchError: fitted on another model than the given one.
    """
    from safetensors.torch import save as to_bytes

    if type(steering).__name__ not in CLASSES or not isinstance(steering, Steering):
        raise InputError("save", expected="a FineSteer or a baseline", got=type(steering).__name__)
    if model is not None:
        current = fingerprint(model, steering.hooked_layers, steering.site)
        if steering.fingerprint is None:
            steering = replace(steering, fingerprint=current)
        else:
            steering.fingerprint.require_match(current)
    elif steering.fingerprint is None:
        raise InputError(
            f"{steering!r} does not know its model",
            expected="model=",
            got=None,
            fix="save(steering, path, model=model).",
        )
    tensors: dict[str, Tensor] = {}
    tree = _encode(steering, "steering", tensors)
    header = {"version": VERSION, "tree": tree, "sha256": _digest(tensors, tree)}
    write_atomically(path, to_bytes(tensors, metadata={FORMAT: _canonical(header)}))


def load(path: str | os.PathLike[str], model: SteerableModel | None = None) -> Steering:
    """Read a steering.

    Args:
        path: a file that `save` wrote.
        model: check at once that it was fitted on this model; otherwise it is checked when put on a model.

    Raises:
        FileFormatError: no such file, not one of ours, damaged, or of a newer version.
        MismatchError: fitted on another model; names the differences.
    """
    tree, tensors = _read(Path(path))
    try:
        steering = _decode(tree, tensors)
    except (FsteerError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path} does not hold a valid steering", got=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(steering, Steering) or steering.fingerprint is None:
        raise FileFormatError(f"{path}", expected="a steering with a fingerprint", got=type(steering).__name__)
    if model is not None:
        steering.session_on(model)
    return steering


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileFormatError(f"{path}", expected="a file written by fsteer_lens.save", got="no such file")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(FORMAT)
            if text is None:
                raise FileFormatError(
                    f"{path} is a safetensors file of another program",
                    expected=f"{FORMAT!r} in its metadata",
                    got=sorted(file.metadata() or {}),
                    fix="Give a file written by fsteer_lens.save.",
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise FileFormatError(
            f"{path} is truncated, damaged or no safetensors file",
            expected="a file written by fsteer_lens.save",
            got=str(error),
        ) from error
    try:
        header = json.loads(text)
        version, tree, checksum = header["version"], header["tree"], header["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged", expected="JSON metadata", got=str(error)) from error
    if version != VERSION:
        raise FileFormatError(
            f"{path} is of another version",
            expected=VERSION,
            got=version,
            fix="Upgrade fsteer_lens, or save the steering again.",
        )
    if checksum != _digest(tensors, tree):
        raise FileFormatError(f"{path} is damaged", expected=f"SHA-256 {checksum}", got="another")
    return tree, tensors


def _canonical(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(tensors: Mapping[str, Tensor], tree: Any) -> str:
    digest = hashlib.sha256(_canonical(tree).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    kind = type(value).__name__
    if CLASSES.get(kind) is type(value):
        names = [item.name for item in fields(value)] if is_dataclass(value) else value._fields
        return {"class": kind, "fields": {n: _encode(getattr(value, n), f"{name}.{n}", tensors) for n in names}}
    if isinstance(value, tuple | list):
        return {"tuple": [_encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        return {"map": [[key, _encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    raise InputError(f"cannot save {name}", expected="tensors, numbers, text or fitted values", got=kind)


def _decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {"tensor"}:
        return tensors[tree["tensor"]]
    if set(tree) == {"tuple"}:
        return tuple(_decode(item, tensors) for item in tree["tuple"])
    if set(tree) == {"map"}:
        return {key: _decode(item, tensors) for key, item in tree["map"]}
    return CLASSES[tree["class"]](**{name: _decode(item, tensors) for name, item in tree["fields"].items()})

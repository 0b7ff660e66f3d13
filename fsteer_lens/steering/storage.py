"""`save` and `load`: one safetensors file for a steering, never pickle.

The metadata holds the format's version, a JSON tree in which every tensor is a reference, and the SHA-256 of tensor
bytes and tree. Values are rebuilt through a fixed list of classes, whose constructors check what they are given.

A file is believed as little as possible: its header may have so many bytes and hold so many values and no more, so that
what is built from it stays small whatever it says, and its tensors take as much memory again as the file itself.
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

from fsteer_lens.errors import FileFormatError, InputError
from fsteer_lens.ground.checks import instance
from fsteer_lens.ground.files import write_atomically
from fsteer_lens.hooks.chains import Chain
from fsteer_lens.hooks.objects import HookObject, Link
from fsteer_lens.hooks.probes import ExpertProbe, SubspaceAblation, SubspaceProbe
from fsteer_lens.hooks.scopes import Schedule, Window
from fsteer_lens.method.controller import Controller
from fsteer_lens.method.experts import Experts, FitReport
from fsteer_lens.method.gates import CutGate, Gate, MaxGate, MinGate, NotGate
from fsteer_lens.method.linear_gates import CosineGate, LinearGate
from fsteer_lens.method.subspace import Subspace
from fsteer_lens.method.subspace_gates import CalibrationRange, EnergyGate, LogisticGate, QuantileGate, ThresholdGate
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.reading.fingerprints import Fingerprint, fingerprint, require_model
from fsteer_lens.steering.baselines import MeanShift, NearestCentroid, NullSpaceSteering, PcaDirection
from fsteer_lens.steering.steering import FineSteer

FORMAT = "fsteer_lens"
VERSION = 1
MAX_HEADER = 2**20
"""Bytes that the header of a file may have: enough for some thousand tensors."""
MAX_VALUES = 2**16
"""Values that it may hold: an empty list takes two bytes in a file, and thirty times as many in memory."""
CLASSES: Mapping[str, Any] = {
    cls.__name__: cls
    for cls in (
        CalibrationRange,
        Chain,
        Controller,
        CosineGate,
        CutGate,
        EnergyGate,
        ExpertProbe,
        Experts,
        FineSteer,
        Fingerprint,
        FitReport,
        LinearGate,
        LogisticGate,
        MaxGate,
        MeanShift,
        MinGate,
        NearestCentroid,
        NotGate,
        NullSpaceSteering,
        PcaDirection,
        QuantileGate,
        Schedule,
        Subspace,
        SubspaceAblation,
        SubspaceProbe,
        ThresholdGate,
        Window,
    )
}


def save(steering: HookObject, path: str | os.PathLike[str], model: SteerableModel | None = None) -> None:
    """Write a steering to one file, atomically: an interrupted save leaves the old file whole.

    Args:
        steering: a FineSteer, a baseline, a probe, an ablation, or a chain of them.
        path: the file, by custom ending in .safetensors; its folder must exist.
        model: the model it belongs to; needed where the steering carries no fingerprint, checked where it does.

    Raises:
        InputError: no hook object, no fingerprint and no model, or no such folder.
        FileFormatError: more parts than a file may have: hundreds of layers.
        MismatchError: fitted on another model than the given one.
    """
    from safetensors.torch import save as to_bytes

    instance("save", steering, HookObject, "a steering, probe, ablation or chain")
    _require_known(steering)
    for link in steering.links:
        _require_known(link)
    links = tuple(_with_fingerprint(link, model) for link in steering.links)
    steering = replace(steering, hooks=links) if isinstance(steering, Chain) else links[0]
    tensors: dict[str, Tensor] = {}
    tree = _encode(steering, "steering", tensors)
    header = {"version": VERSION, "tree": tree, "sha256": _digest(tensors, tree)}
    content = to_bytes(tensors, metadata={FORMAT: _canonical(header)})
    _require_modest(content, "save: the steering has too many parts for one file")
    write_atomically(path, content)


def _with_fingerprint(link: Link, model: SteerableModel | None) -> Link:
    """The link with the fingerprint of its model, checked against `model` where there is one."""
    if model is None:
        if link.fingerprint is None:
            raise InputError(
                f"{link!r} does not know its model",
                expected="model=",
                got=None,
                fix="save(steering, path, model=model).",
            )
        return link
    if link.fingerprint is None:
        current = fingerprint(model, link.hooked_layers, link.site)
        return replace(link, fingerprint=current)  # pyright: ignore[reportArgumentType]
    require_model(link.fingerprint, model, link.site)
    return link


def load(path: str | os.PathLike[str], model: SteerableModel | None = None) -> Any:
    """Read what `save` wrote: a FineSteer, a baseline, a probe, an ablation or a chain.

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
    except Exception as error:  # whatever goes wrong in putting it together, the file is at fault
        raise FileFormatError(
            f"{path} does not hold a valid steering", got=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(steering, HookObject) or any(link.fingerprint is None for link in steering.links):
        raise FileFormatError(f"{path}", expected="a steering with a fingerprint", got=type(steering).__name__)
    if model is not None:
        steering.session_on(model)
    return steering


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    if not path.is_file():
        raise FileFormatError(f"{path}", expected="a file written by fsteer_lens.save", got="no such file")
    try:
        content = path.read_bytes()
        size = _require_modest(content, f"{path} is truncated, damaged or no safetensors file")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
        text = metadata.get(FORMAT)
        if text is None:
            raise FileFormatError(
                f"{path} is a safetensors file of another program",
                expected=f"{FORMAT!r} in its metadata",
                got=sorted(metadata),
                fix="Give a file written by fsteer_lens.save.",
            )
        header = json.loads(text, parse_constant=_no_constant)
        version, tree, checksum = header["version"], header["tree"], header["sha256"]
        if version != VERSION:
            raise FileFormatError(
                f"{path} is of another version",
                expected=VERSION,
                got=version,
                fix="Upgrade fsteer_lens, or save the steering again.",
            )
        tensors = from_bytes(content)
        del content
        matches = checksum == _digest(tensors, tree)
    except (
        SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise FileFormatError(
            f"{path} is truncated, damaged or no safetensors file",
            expected="a file written by fsteer_lens.save",
            got=f"{type(error).__name__}: {error}",
        ) from error
    if not matches:
        raise FileFormatError(f"{path} is damaged", expected=f"SHA-256 {checksum}", got="another")
    return tree, tensors


def _require_modest(content: bytes, problem: str) -> int:
    """Length of a safetensors file's header; raises `FileFormatError` where it is longer, or fuller, than allowed."""
    size = int.from_bytes(content[:8], "little")
    allowed = min(MAX_HEADER, len(content) - 8)
    if len(content) < 8 or size > allowed:
        raise FileFormatError(problem, expected=f"a header of at most {allowed} bytes", got=size)
    values = sum(content.count(mark, 8, 8 + size) for mark in b"[{,")
    if values > MAX_VALUES:
        raise FileFormatError(problem, expected=f"a header of at most {MAX_VALUES} values", got=values)
    return size


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _canonical(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(tensors: Mapping[str, Tensor], tree: Any) -> str:
    digest = hashlib.sha256(_canonical(tree).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
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
    if is_dataclass(value) or isinstance(value, Gate):
        _require_known(value)
    raise InputError(f"cannot save {name}", expected="tensors, numbers, text or fitted values", got=kind)


def _require_known(value: Any) -> None:
    """Raise `InputError` unless the value is of a class that `load` builds."""
    kind = type(value)
    if CLASSES.get(kind.__name__) is not kind:
        raise InputError(
            f"cannot save a {kind.__name__}",
            expected=f"classes of fsteer_lens: {', '.join(CLASSES)}",
            got=f"{kind.__module__}.{kind.__qualname__}",
            fix="A file holds no code, so that loading one runs none: keep your class in your program, save what it is"
            " made of, and put it together again after loading, with_gate(...) for a gate.",
        )


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

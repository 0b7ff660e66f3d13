"""Sealed files: tensors and a tree of plain values in one safetensors file, never pickle.

The metadata holds the format's version, a JSON tree in which every tensor is a reference, and the SHA-256 of tensor
bytes and tree. Values are rebuilt through a fixed list of classes, whose constructors check what they are given.

A file is believed as little as possible: its header may have so many bytes and hold so many values and no more, so that
what is built from it stays small whatever it says, and its tensors take as much memory again as the file itself.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsteer_lens.errors import FileFormatError, InputError
from fsteer_lens.ground.files import path_of, read_bytes, write_atomically

MAX_HEADER = 2**20
"""Bytes that the header of a file may have: enough for some thousand tensors."""
MAX_VALUES = 2**16
"""Values that it may hold: an empty list takes two bytes in a file, and thirty times as many in memory."""
READERS = {"fsteer_lens": "fsteer_lens.load", "fsteer_lens_activations": "fsteer_lens.Activations.load"}
"""What reads each kind of file, by its name."""


@dataclass(frozen=True)
class Format:
    """One kind of sealed file.

    Attributes:
        name: what its metadata is found under.
        version: of the format.
        holds: what is in it, in words.
        writer: the call that writes it.
        classes: of the values that it may hold, by name.
        older: what fields are in files that were written before there were such fields, by class.
    """

    name: str
    version: int
    holds: str
    writer: str
    classes: Mapping[str, Any]
    older: Mapping[type, Mapping[str, Any]] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str], tree: Any, tensors: Mapping[str, Tensor]) -> None:
        """Write a tree and the tensors that it refers to, atomically: an interrupted write leaves the old file whole.

        Raises:
            InputError: no such folder, or no leave to write there.
            FileFormatError: more parts than a file may have.
        """
        from safetensors.torch import save as to_bytes

        header = {"version": self.version, "tree": tree, "sha256": _digest(tensors, tree)}
        content = to_bytes(dict(tensors), metadata={self.name: _canonical(header)})
        _require_modest(content, f"{self.writer}: {self.holds} with too many parts for one file")
        write_atomically(path, content)

    def read(self, path: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
        """The tree and the tensors of a file.

        Raises:
            FileFormatError: no such file, not one of ours, of another kind or version, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load as from_bytes

        path, ours = path_of(path), f"a file written by {self.writer}"
        if not path.is_file():
            got = "a folder, a device or a pipe" if path.exists() else "no such file"
            raise FileFormatError(f"{path}", expected=ours, got=got)
        try:
            content = read_bytes(path)
            size = _require_modest(content, f"{path} is truncated, damaged or no safetensors file")
            metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
            text = metadata.get(self.name)
            if text is None:
                raise self._foreign(path, metadata)
            header = json.loads(text, parse_constant=_no_constant)
            version, tree, checksum = header["version"], header["tree"], header["sha256"]
            if version != self.version:
                raise FileFormatError(
                    f"{path} is of another version",
                    expected=self.version,
                    got=version,
                    fix=f"Upgrade fsteer_lens, or write it again with {self.writer}.",
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
                expected=ours,
                got=f"{type(error).__name__}: {error}",
            ) from error
        if not matches:
            raise FileFormatError(f"{path} is damaged", expected=f"SHA-256 {checksum}", got="another")
        return tree, tensors

    def _foreign(self, path: Path, metadata: Mapping[str, Any]) -> FileFormatError:
        for name, reader in READERS.items():
            if name in metadata:
                fix = f"Read it with {reader}."
                return FileFormatError(f"{path} holds something else", expected=self.holds, got=name, fix=fix)
        return FileFormatError(
            f"{path} is a safetensors file of another program",
            expected=f"{self.name!r} in its metadata",
            got=sorted(metadata),
            fix=f"Give a file written by {self.writer}.",
        )

    def encode(self, value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
        """The tree of a value; its tensors are added to `tensors`, under names that begin with `name`."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": name}
        kind = type(value).__name__
        if self.classes.get(kind) is type(value):
            names = [item.name for item in fields(value)] if is_dataclass(value) else value._fields
            parts = {part: self.encode(getattr(value, part), f"{name}.{part}", tensors) for part in names}
            return {"class": kind, "fields": parts}
        if isinstance(value, tuple | list):
            return {"tuple": [self.encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
        if isinstance(value, Mapping):
            return {"map": [[key, self.encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
        if type(value).__module__ not in ("builtins", "numpy"):
            self.require_known(value)
        raise InputError(f"cannot save {name}", expected="tensors, numbers, text or fitted values", got=kind)

    def require_known(self, value: Any) -> None:
        """Raise `InputError` unless the value is of a class that is rebuilt."""
        kind = type(value)
        if self.classes.get(kind.__name__) is not kind:
            raise InputError(
                f"cannot save a {kind.__name__}",
                expected=f"classes of fsteer_lens: {', '.join(self.classes)}",
                got=f"{kind.__module__}.{kind.__qualname__}",
                fix="A file holds no code, so that loading one runs none: keep your class in your program, save what it"
                " is made of, and put it together again after loading, with_gate(...) for a gate.",
            )

    def decode(self, tree: Any, tensors: Mapping[str, Tensor]) -> Any:
        """The value of a tree; raises whatever goes wrong in putting it together."""
        if not isinstance(tree, dict):
            return tree
        if set(tree) == {"tensor"}:
            return tensors[tree["tensor"]]
        if set(tree) == {"tuple"}:
            return tuple(self.decode(item, tensors) for item in tree["tuple"])
        if set(tree) == {"map"}:
            return {key: self.decode(item, tensors) for key, item in tree["map"]}
        parts = {name: self.decode(item, tensors) for name, item in tree["fields"].items()}
        kind = self.classes[tree["class"]]
        for older, fields_before in self.older.items():
            parts = {**fields_before, **parts} if issubclass(kind, older) else parts
        return kind(**parts)


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

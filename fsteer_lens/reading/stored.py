"""Files of activations: sealed, as `ground.sealed` writes them, with texts of any number beside the tensors.

A header holds some ten thousand values and no more, so the labels of a large set cannot stand there: they are bytes and
lengths, and what is read of them is as much as the file holds, whatever it says.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from fsteer_lens.errors import FileFormatError, InputError
from fsteer_lens.ground.sealed import Format
from fsteer_lens.prompts.formats import PromptFormat
from fsteer_lens.reading.fingerprints import Fingerprint

TEXTS = ("labels", "groups")
"""Fields that are texts, or None, one for each row."""


class Texts(NamedTuple):
    """Texts as tensors: their UTF-8 bytes one after the other, and the length of each, −1 for None."""

    content: UInt8[Tensor, " bytes"]
    lengths: Int64[Tensor, " n"]


FORMAT = Format(
    "fsteer_lens_activations",
    1,
    "activations",
    "Activations.save",
    {one.__name__: one for one in (Fingerprint, PromptFormat, Texts)},
)


def write(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write the fields of activations; errors as in `Format.write`."""
    tensors: dict[str, Tensor] = {}
    parts = {name: _packed(value) if name in TEXTS else value for name, value in fields.items()}
    FORMAT.write(path, FORMAT.encode(parts, "activations", tensors), tensors)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of activations that `write` wrote.

    Raises:
        FileFormatError: no such file, not one of ours, damaged, or of a newer version.
    """
    tree, tensors = FORMAT.read(path)
    try:
        fields = dict(FORMAT.decode(tree, tensors))
        return {name: _unpacked(value) if name in TEXTS else value for name, value in fields.items()}
    except Exception as error:  # whatever goes wrong in putting it together, the file is at fault
        raise no_activations(path, error) from error


def no_activations(path: str | os.PathLike[str], error: Exception) -> FileFormatError:
    """What is raised where a file's fields make no activations."""
    return FileFormatError(f"{path} does not hold valid activations", got=f"{type(error).__name__}: {error}")


def _packed(texts: Sequence[str | None]) -> Texts:
    encoded = [b"" if text is None else text.encode() for text in texts]
    content = torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy())
    lengths = [-1 if text is None else len(one) for text, one in zip(texts, encoded, strict=True)]
    return Texts(content, torch.tensor(lengths, dtype=torch.long, device="cpu"))


def _unpacked(packed: Texts) -> tuple[str | None, ...]:
    lengths = packed.lengths.tolist()
    if packed.content.dtype != torch.uint8 or packed.lengths.dtype != torch.int64 or min(lengths, default=0) < -1:
        raise InputError("texts", expected="bytes, and lengths of at least -1")
    content, place, found = packed.content.numpy().tobytes(), 0, []
    for length in lengths:
        found.append(None if length < 0 else content[place : place + length].decode())
        place += max(0, length)
    if place != len(content):
        raise InputError("texts", expected=f"lengths that add up to {len(content)}", got=place)
    return tuple(found)

"""SHA-256 of values, the same in every process, by which a folder knows what it was made from."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from fsteer_lens.errors import InputError


def digest(value: Any) -> str:
    """SHA-256 of a value's parts: numbers, texts, tensors, and what is made of them; of a function, its name alone.

    Raises:
        InputError: something that has no parts to compare.
    """
    found = hashlib.sha256()
    try:
        for part in _parts(value):
            found.update(len(part).to_bytes(8, "little") + part)
    except RecursionError as error:
        raise InputError(
            "cannot be told from others", expected="a value that does not hold itself", got=type(value).__name__
        ) from error
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """Bytes that tell a value from others, its type first."""
    yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        yield repr(value).encode()
    elif isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        yield f"{plain.dtype}{list(plain.shape)}".encode()
        yield plain.flatten().view(torch.uint8).numpy().tobytes()
    elif hasattr(value, "tolist"):
        yield from _parts(value.tolist())
    elif isinstance(value, functools.partial):
        yield from _several([value.func, value.args, value.keywords])
    elif isinstance(value, Mapping):
        yield from _several(part for item in value.items() for part in item)
    elif isinstance(value, list | tuple | range):
        yield from _several(value)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _several(getattr(value, item.name) for item in fields(value))
    elif isinstance(value, Callable) and hasattr(value, "__qualname__"):
        yield f"{value.__module__}.{value.__qualname__}".encode()
    elif hasattr(value, "__dict__"):
        yield from _parts(vars(value))
    else:
        raise InputError("cannot be told from others", expected="numbers, texts, tensors", got=type(value).__name__)


def _several(values: Iterable[Any]) -> Iterator[bytes]:
    every = list(values)
    yield str(len(every)).encode()
    for value in every:
        yield from _parts(value)

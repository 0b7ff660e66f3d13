"""Checks and linear algebra shared by the numerics."""

from copy import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import NonFiniteError, ShapeError
from fsteer_lens.ground.checks import instance, whole
from fsteer_lens.ground.devices import require_device, require_float

Value = TypeVar("Value")


def require_matrix(value: Any, name: str, *, d_model: int | None = None, min_rows: int = 1) -> Float[Tensor, "n d"]:
    """Return `value` as a detached float32 (or float64) copy of shape [n, d], or say what is wrong with it.

    Raises:
        ShapeError: not a floating matrix, too few rows, or another width than `d_model`.
        NonFiniteError: holds NaN or infinity; names the first bad row.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != 2:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(name, expected="a floating-point tensor [n, d]", got=got)
    if value.shape[0] < min_rows:
        raise ShapeError(name, expected=f"at least {min_rows} rows", got=value.shape[0], fix="Collect more prompts.")
    require_width(value, name, d_model)
    bad = ~value.isfinite().all(dim=1)
    if bad.any():
        raise NonFiniteError(
            name,
            expected="finite numbers",
            got=f"NaN or infinity in {int(bad.sum())} of {len(bad)} rows, first in row {int(bad.nonzero()[0])}",
            fix="Look at that prompt's activations; half precision overflows on some models (use bfloat16 or float32).",
        )
    return value.detach().clone().to(torch.promote_types(value.dtype, torch.float32))


def require_tensor(value: Any, name: str) -> Tensor:
    """A tensor, or `InputError`."""
    return instance(name, value, Tensor, "a tensor")


def require_width(value: Tensor, name: str, d_model: int | None) -> None:
    """Raise `ShapeError` unless this is a tensor whose last axis is `d_model` wide."""
    require_tensor(value, name)
    if d_model is not None and (value.ndim == 0 or value.shape[-1] != d_model):
        raise ShapeError(
            name,
            expected=f"width d_model={d_model}",
            got=list(value.shape),
            fix="Was it collected on another model than this was fitted on?",
        )


def require_shapes(owner: str, **tensors: tuple[Any, str]) -> None:
    """Raise `ShapeError` or `NonFiniteError` unless named tensors are finite and agree on their named axes.

    >>> require_shapes("subspace", mean=(torch.zeros(3), "d"), basis=(torch.zeros(3, 2), "d r"))
    """
    sizes: dict[str, int] = {}
    for name, (tensor, axes) in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ShapeError(f"{owner} {name}", expected="a floating-point tensor", got=type(tensor).__name__)
        wanted = axes.split()
        if tensor.ndim != len(wanted) or any(
            sizes.setdefault(a, n) != n for a, n in zip(wanted, tensor.shape, strict=True)
        ):
            raise ShapeError(f"{owner} {name}", expected=f"[{axes}] with {sizes}", got=list(tensor.shape))
        if not tensor.isfinite().all():
            raise NonFiniteError(f"{owner} {name}", expected="finite numbers", got="NaN or infinity")


def require_rank(rank: Any, limit: int, why: str, *, fix: str = "Choose a rank within.") -> int:
    """A rank in 1..limit as an int, or `InputError`."""
    return whole("rank", rank, 1, limit, why=why, fix=fix)


def principal_directions(
    rows: Float[Tensor, "n d"], rank: int
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d r"], Float[Tensor, " r"]]:
    """Mean, first `rank` right singular vectors of the centred rows, and the share of variance of each.

    Computed in float64 and returned in the dtype of `rows`. The sign of a direction is fixed by making its largest
    entry positive, so that two fits of equal data are equal.
    """
    exact = rows.double()
    mean = exact.mean(dim=0)
    _, singular, right = torch.linalg.svd(exact - mean, full_matrices=False)
    directions = right[:rank]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    basis = (directions * torch.where(largest < 0, -1.0, 1.0)).T.contiguous()
    total = singular.square().sum()
    explained = singular[:rank].square() / total if total > 0 else torch.zeros_like(singular[:rank])
    return mean.to(rows), basis.to(rows), explained.to(rows)


def variant(value: Value, **changes: Any) -> Value:
    """A frozen dataclass with some fields changed, sharing the rest.

    Takes microseconds, since nothing is checked again: the caller checks what it changes.
    """
    changed = copy(value)
    for name, item in changes.items():
        object.__setattr__(changed, name, item)
    return changed


def move(value: Value, device: Any = None, dtype: torch.dtype | None = None) -> Value:
    """Return `value` (a tensor, or a frozen dataclass, dict or tuple of them) on another device or in another dtype.

    Raises:
        InputError: no device that is here, or no floating-point dtype.
    """
    if device is not None:
        require_device(device)
    if dtype is not None:
        require_float(dtype)
    return _moved(value, device, dtype)


def _moved(value: Value, device: Any, dtype: torch.dtype | None) -> Value:
    if isinstance(value, Tensor):
        moved: Any = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        return moved
    if isinstance(value, dict):
        return type(value)({key: _moved(item, device, dtype) for key, item in value.items()})
    if isinstance(value, tuple):
        items = [_moved(item, device, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.init]
        return replace(value, **{name: _moved(getattr(value, name), device, dtype) for name in names})
    return value

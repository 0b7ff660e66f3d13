"""Devices and dtypes that are given."""

from typing import Any

import torch

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import brief
from fsteer_lens.ground.foreign import told


def require_device(device: Any) -> None:
    """Raise `InputError` unless this is a device that is here."""
    known = '"cpu", or a GPU that PyTorch finds here, such as "cuda"'
    if not isinstance(device, str | torch.device):
        raise InputError("device", expected=known, got=brief(device))
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError("device", expected=known, got=f"{device}, {told(error)}") from error


def require_float(dtype: Any) -> None:
    """Raise `InputError` unless this is a dtype of floating-point numbers."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError("dtype", expected="a floating-point dtype, such as torch.float32", got=brief(dtype))

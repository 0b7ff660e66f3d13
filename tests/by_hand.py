"""Steering by a plain hook of PyTorch, as anybody would write it: what the package's hooks are compared with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fsteer_lens import FineSteer


@contextmanager
def steered_by_hand(layer: Any, number: int, steering: FineSteer) -> Iterator[None]:
    """Add to all that leaves a decoder layer what is decided at the last token of the first pass in this block."""
    edits: list[Tensor] = []

    def add(module: Any, args: Any, output: Any) -> Any:
        stream = output if isinstance(output, Tensor) else output[0]
        if not edits:
            decision = steering.decide(number, stream[:, -1].float())
            edits.append(steering.strength * decision.gate[:, None, None] * decision.vector[:, None])
        edited = (stream.float() + edits[0]).to(stream.dtype)
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    handle = layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()

"""Which tokens of a forward pass are real, read off the attention mask that a model hands to its blocks.

The model's own `generate` pads a list of texts by itself and tells nobody outside; its blocks know.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from fsteer_lens.models.classes import SteerableModel

See = Callable[[Bool[Tensor, "b s"] | None], None]
"""Is told, before a block runs, which tokens are real; None where nothing is masked, or nobody can tell."""


class PaddingWatch:
    """Watches the attention mask of one block of a model until `remove` is called."""

    def __init__(self, model: SteerableModel, layer: int, see: See) -> None:
        blocks: Any = model
        self._see = see
        self._handle = blocks.blocks[layer].register_forward_pre_hook(self._look, with_kwargs=True)

    def remove(self) -> None:
        """Stop watching; calling it twice does nothing more."""
        self._handle.remove()

    def _look(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._see(real_tokens(_mask_of(block, args, kwargs)))


def _mask_of(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The attention mask among a block's arguments, wherever its class puts it."""
    if "attention_mask" in kwargs:
        return kwargs["attention_mask"]
    names = list(signature(getattr(block, "original_component", block).forward).parameters)
    place = names.index("attention_mask") if "attention_mask" in names else len(args)
    return args[place] if place < len(args) else None


def real_tokens(mask: Any) -> Bool[Tensor, "b s"] | None:
    """Which tokens, cached ones included, an attention mask lets be seen.

    It is [b s], 1 at real tokens, or [b 1 queries s], what each query sees: true, or 0 and not a large negative number.
    A token is real where the last query sees it, or, beyond that one's sliding window, where it sees itself.
    """
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 2:
        return mask.bool()
    seen = (mask if mask.dtype == torch.bool else mask > -1)[:, 0]
    queries, whole = seen.shape[1:]
    real = seen[:, -1].clone()
    if queries <= whole:
        real[:, whole - queries :] |= seen[:, :, whole - queries :].diagonal(dim1=1, dim2=2)
    return real

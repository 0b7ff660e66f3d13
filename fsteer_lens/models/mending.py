"""What TransformerLens does wrong and can be set right from outside, without a branch by version."""

from functools import cache
from typing import Any


def with_kv_cache(bridge: Any) -> Any:
    """Let MPT's attention put its keys and values into the KV cache, in place.

    In TransformerLens 3.9 it does not, so that each new token sees itself alone; 4.3 does. Every conversion is compared
    with the Hugging Face model afterwards, so what this does not set right is refused.
    """
    for block in getattr(bridge, "blocks", ()):
        attention = getattr(block, "attn", None)
        build = getattr(type(attention), "_reconstruct_attention", None)
        forgets = build is not None and "_update_kv_cache" not in build.__code__.co_names
        if forgets and type(attention).__name__ == "MPTALiBiAttentionBridge":
            attention.__class__ = _caching(type(attention))
    return bridge


@cache
def _caching(attention: type) -> type:
    """That class of attention, but with keys and values from the cache."""

    def _reconstruct_attention(self: Any, q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        q, k, v = (one.unflatten(-1, (self.config.n_heads, -1)) for one in (q, k, v))  # [b s heads d_head]
        k, v = self._update_kv_cache(k.transpose(1, 2), v.transpose(1, 2), **kwargs)
        return attention._reconstruct_attention(self, q, k.transpose(1, 2), v.transpose(1, 2), **kwargs)  # pyright: ignore

    return type(attention.__name__, (attention,), {"_reconstruct_attention": _reconstruct_attention})

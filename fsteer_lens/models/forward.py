"""Forward passes, the same for both model classes."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.models.attaching import hooks_added
from fsteer_lens.models.classes import SteerableModel, kind_of, require_decoder


class Forward:
    """Forward passes over one batch that grows, with or without a KV cache; the same for both model classes.

    Call it with the new tokens; with a cache only these are run, without one the whole rectangle is run again. Returns
    the logits of the new tokens, [b new vocab]; with `layers` it stops after that many, for what hooks see, and returns
    nothing that is of use.
    """

    def __init__(self, model: SteerableModel, *, cache: bool, layers: int | None = None) -> None:
        require_decoder(model)
        self.model, self.kind, self.use_cache, self.layers = model, kind_of(model), cache, layers
        self.tokens: Tensor | None = None
        self.mask: Tensor | None = None
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, "b new"], mask: Bool[Tensor, "b new"]) -> Float[Tensor, "b new vocab"]:
        """Append `tokens` (real where `mask` is true) and return their logits."""
        new = tokens.shape[1]
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=1)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        options = {"return_type": "logits", "stop_at_layer": self.layers}
        if not self.use_cache:
            return self.model(self.tokens, attention_mask=self.mask.long(), **options)[:, -new:]
        if self._cache is None:
            self._cache = self._new_cache(len(tokens))
        if self.kind == "hooked":
            return self.model(tokens, attention_mask=mask.long(), past_kv_cache=self._cache, **options)
        return self.model(
            tokens, attention_mask=self.mask.long(), past_key_values=self._cache, use_cache=True, **options
        )

    def fork(self, times: int) -> "Forward":
        """Passes that go on from here with every row `times` times: of two rows, twice, come a, a, b, b.

        These here stay where they are, and can be forked again.
        """
        assert self.tokens is not None and self.mask is not None and self._cache is not None
        other = Forward(self.model, cache=True, layers=self.layers)
        other.tokens, other.mask = (rows.repeat_interleave(times, dim=0) for rows in (self.tokens, self.mask))
        other._cache = cache = deepcopy(self._cache)
        if self.kind == "bridge":
            cache.batch_repeat_interleave(times)
            return other
        cache.previous_attention_mask = cache.previous_attention_mask.repeat_interleave(times, dim=0)
        for entry in cache.entries:
            entry.past_keys = entry.past_keys.repeat_interleave(times, dim=0)
            entry.past_values = entry.past_values.repeat_interleave(times, dim=0)
        return other

    def _new_cache(self, batch_size: int) -> Any:
        if self.kind == "hooked":
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            return TransformerLensKeyValueCache.init_cache(self.model.cfg, self.model.cfg.device, batch_size)
        from transformers import DynamicCache

        return DynamicCache(config=self.model.original_model.config)  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def run_up_to(
    model: SteerableModel,
    tokens: Int[Tensor, "b s"],
    mask: Bool[Tensor, "b s"],
    layer: int,
    hooks: Sequence[tuple[str, Any]],
) -> None:
    """Run token rows (real where `mask` is true) through the layers 0..`layer`, for what the hooks see."""
    with hooks_added(model, hooks):
        model(tokens, attention_mask=mask.long(), stop_at_layer=layer + 1)

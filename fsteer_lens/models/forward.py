"""Forward passes, the same for both model classes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from threading import current_thread
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
    def __call__(
        self, tokens: Int[Tensor, "b new"], mask: Bool[Tensor, "b new"], keep: Int[Tensor, "b kept"] | None = None
    ) -> Float[Tensor, "b new_or_kept vocab"]:
        """Append `tokens` (real where `mask` is true) and return their logits; with `keep` those at these places alone.

        Places are counted among the new tokens. The model's head then sees no other: over a large vocabulary it costs
        as much as several layers.
        """
        new = tokens.shape[1]
        if keep is None:
            return self._run(tokens, mask)[:, -new:]
        before = 0 if self.use_cache or self.tokens is None else self.tokens.shape[1]
        with _head_at(self.model, before + keep) as narrowed:
            logits = self._run(tokens, mask)
        return logits if narrowed else _at(logits, before + keep)

    def last(
        self, tokens: Int[Tensor, "b new"], mask: Bool[Tensor, "b new"], count: int = 1
    ) -> Float[Tensor, "b count vocab"]:
        """The same, with the logits of the last `count` of the new tokens alone."""
        new = tokens.shape[1]
        if self.use_cache and new == count:
            return self(tokens, mask)
        return self(tokens, mask, torch.arange(new - count, new, device=tokens.device).expand(len(tokens), count))

    def _run(self, tokens: Tensor, mask: Tensor) -> Tensor:
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], dim=1)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        options = {"return_type": "logits", "stop_at_layer": self.layers}
        if not self.use_cache:
            return self.model(self.tokens, attention_mask=self.mask.long(), **options)
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
        assert self.tokens is not None
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        return self.fork_rows(rows.repeat_interleave(times))

    def fork_rows(
        self,
        rows: Int[Tensor, " n"],
        *,
        seen: Int[Tensor, " n"] | None = None,
        below: "Forward | None" = None,
        layer: int = 0,
    ) -> "Forward":
        """Passes that go on from here, each row of them from the row of this number here.

        Args:
            rows: numbers of rows, as often as wanted, in any order.
            seen: of each of them only so many columns are seen, from the first on; the others still take up room in an
                attention window. None is all.
            below: passes over the same tokens, whose keys and values are taken for the layers below `layer`, where
                these here began there (`layers.begun_at`) and have none of their own.
            layer: the first layer that these here ran.
        """
        assert self.tokens is not None and self.mask is not None and self._cache is not None
        other = Forward(self.model, cache=True, layers=self.layers)
        other.tokens, other.mask = self.tokens[rows], self.mask[rows]
        if seen is not None:
            columns = torch.arange(other.mask.shape[1], device=other.mask.device)
            other.mask &= columns < seen.to(columns.device).unsqueeze(1)
        other._cache = cache = copy(self._cache)
        name = "layers" if self.kind == "bridge" else "entries"
        held = list(getattr(self._cache, name))
        if below is not None:
            held[:layer] = getattr(below._cache, name)[:layer]
        setattr(cache, name, [_rows_of(entry, rows) for entry in held])
        if self.kind == "hooked":
            cache.previous_attention_mask = other.mask.to(cache.previous_attention_mask)
        return other

    def _new_cache(self, batch_size: int) -> Any:
        if self.kind == "hooked":
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            return TransformerLensKeyValueCache.init_cache(self.model.cfg, self.model.cfg.device, batch_size)
        from transformers import DynamicCache

        return DynamicCache(config=self.model.original_model.config)  # pyright: ignore[reportAttributeAccessIssue]


def _rows_of(entry: Any, rows: Int[Tensor, " n"]) -> Any:
    """Keys and values of one layer, with these rows; those given stay as they are."""
    entry = copy(entry)
    if hasattr(entry, "batch_select_indices"):  # of transformers, which has kinds of them
        keys = getattr(entry, "keys", None)
        entry.batch_select_indices(rows if keys is None else rows.to(keys.device))
        return entry
    entry.past_keys = entry.past_keys[rows.to(entry.past_keys.device)]
    entry.past_values = entry.past_values[rows.to(entry.past_values.device)]
    return entry


@contextmanager
def _head_at(model: Any, places: Int[Tensor, "b kept"]) -> Iterator[list[Any]]:
    """Have the head of this thread's passes see these places of each row alone; the list stays empty if it was not
    asked, as a model does that multiplies by its embedding."""
    here, done = current_thread(), []

    def narrow(head: Any, args: tuple[Any, ...]) -> Any:
        if current_thread() is not here:
            return None
        done.append(head)
        return (_at(args[0], places), *args[1:])

    head = getattr(model, "unembed", None)
    handle = head.register_forward_pre_hook(narrow) if isinstance(head, torch.nn.Module) else None
    try:
        yield done
    finally:
        if handle is not None:
            handle.remove()


def _at(stream: Tensor, places: Tensor) -> Tensor:
    """The stream [b t d] at these places [b kept]; the compiler of a model, which may trace this, checks no shapes."""
    places = places.to(stream.device)
    return stream[torch.arange(len(places), device=stream.device).unsqueeze(1), places]


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

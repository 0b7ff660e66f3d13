"""Where an activation lies: which prompt it belongs to, and which positions of its rows.

A hook sees the prompt as [b, P, d] and then [b, 1, d] a token with a KV cache, or [b, P + k, d] without one; and the
next prompt may follow at any time.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.errors import HookError, InputError
from fsteer_lens.ground.checks import brief
from fsteer_lens.reading.readings import at

PREFIX_TOLERANCE = 1e-3
HALF_PREFIX_TOLERANCE = 2e-2
"""In half precision an activation depends that much on how many tokens follow it in the same forward pass."""


class View(NamedTuple):
    """Where the activation of one forward pass lies in its rows.

    Attributes:
        columns: absolute columns of the activation, [t].
        n_new: how many of them, at the end, were not seen before.
        fresh: whether this is a new prompt.
        query: column of each row's last prompt token, [b].
        first: column of each row's first real token, [b].
        real: which columns hold real tokens, [b t].
    """

    columns: Int[Tensor, " t"]
    n_new: int
    fresh: bool
    query: Int[Tensor, " b"]
    first: Int[Tensor, " b"]
    real: Bool[Tensor, "b t"]


class Positions:
    """Position counter of one site.

    A forward is a new prompt if the batch size changes, or if it has more than one token and is not the last rectangle
    plus one token, with the same (unedited) activation at the prompts' last tokens and at the rectangle's last column.
    One-token prompts look like decoding steps: call `reset` between them.
    """

    def __init__(self, prompt_lengths: Tensor | None, attention_mask: Tensor | None) -> None:
        self.lengths = None if prompt_lengths is None else _tensor("prompt_lengths", prompt_lengths, "[b]").long()
        self.mask = None if attention_mask is None else _tensor("attention_mask", attention_mask, "[b s]").bool()
        self.seen = 0
        self.coming = 0  # new tokens that the next forward brings at once, of a fork
        self.last = 0  # the last column of any prompt, on the host: a query of its own would wait for the device
        self.back = 0  # tokens that the model has taken back before the latest forward, as assisted decoding does
        self.query: Tensor
        self.first: Tensor
        self.at_end: Tensor
        self.at_query: Tensor | None = None

    def reset(self) -> None:
        """Take the next forward as a new prompt."""
        self.at_query = None

    def fork(self, rows: Int[Tensor, " n"], mask: Bool[Tensor, "n new"]) -> "Positions":
        """A counter that goes on from the prompts of these numbers, each with new tokens, real where `mask` is true."""
        assert self.mask is not None and self.mask.shape[1] == self.seen
        other = Positions(None, torch.cat([self.mask[rows.to(self.mask.device)], mask.to(self.mask.device)], dim=1))
        other.seen, other.coming = self.seen, mask.shape[1]
        other.query, other.first = (held[rows.to(held.device)] for held in (self.query, self.first))
        return other

    def observe(
        self,
        activation: Float[Tensor, "b t d"],
        fresh: bool | None = None,
        real: Bool[Tensor, "b s"] | None = None,
        cached: int | None = None,
    ) -> View:
        """Place an activation, before any edit.

        Args:
            activation: of one forward pass.
            fresh: whether it is a new prompt, where the caller knows.
            real: which tokens the model takes for real, cached ones included; counts where no mask was given.
            cached: how many tokens the model has in its cache, where it tells; decides what `fresh` leaves open.

        Raises:
            HookError: the forward does not go on where the last one ended.
        """
        rows, width = activation.shape[:2]
        if cached is not None and fresh is None:
            fresh = cached == 0
            if not fresh:
                self._require_followed(width, cached)
        if fresh is None:
            fresh = self._is_fresh(activation)
        mask = real if self.mask is None and _usable(real, rows, width, fresh) else self.mask
        if fresh:
            self.query, self.first = self._locate(rows, width, activation.device, mask)
        with torch.inference_mode(False):
            if fresh:
                self.at_query = at(activation, self.query).detach().clone()
            self.at_end = activation[:, -1].detach().clone()
        self.back = 0
        if fresh:
            start, n_new, self.seen = 0, width, width
        elif cached is not None:
            start, n_new, self.back, self.seen = cached, width, self.seen - cached, cached + width
        elif self.coming:
            start, n_new, self.seen = self.seen, width, self.seen + width
        else:
            start = self.seen if width == 1 else 0
            n_new, self.seen = 1, self.seen + 1
        columns = torch.arange(start, start + width, device=activation.device)
        return View(columns, n_new, fresh, self.query, self.first, _real(start, activation, mask))

    def _require_followed(self, width: int, cached: int) -> None:
        """Raise unless tokens after so many cached ones go on with the prompts at hand."""
        if self.at_query is None or not self.last < cached <= self.seen:
            raise HookError(
                "this forward does not go on with the last prompts",
                expected=f"a new prompt, or tokens after {self.seen} cached ones",
                got=f"{width} after {cached}",
                fix="Run the prompts with the hooks on: a cache from elsewhere was decided on by nobody.",
            )
        if width > 1 and self.lengths is None:
            raise HookError(
                f"{width} tokens at once after {cached} cached ones",
                expected="one token, as long as nobody has told where the prompts end",
                fix="They may be a prompt's, run in parts (prefill_chunk_size): generate without that. For assisted"
                " decoding give prompt_lengths=.",
            )

    def _is_fresh(self, activation: Tensor) -> bool:
        rows, width = activation.shape[:2]
        if self.at_query is None or len(self.at_query) != rows:
            return True
        if width == 1:
            return False
        if width != self.seen + 1:
            return True
        same = self._like(at(activation, self.query), self.at_query)
        same &= self._like(activation[:, self.seen - 1], self.at_end)
        if same.any() and not same.all():
            raise HookError(
                "cannot tell whether this forward goes on with the last prompts: some rows do, others do not",
                fix="Call handle.reset() between batches, or open a new context for each with prompt_lengths=.",
            )
        return not bool(same.all())

    @staticmethod
    def _like(found: Float[Tensor, "b d"], stored: Float[Tensor, "b d"]) -> Bool[Tensor, " b"]:
        tolerance = HALF_PREFIX_TOLERANCE if found.element_size() < 4 else PREFIX_TOLERANCE
        return (found - stored).float().norm(dim=-1) <= tolerance * stored.float().norm(dim=-1)

    def _locate(self, rows: int, width: int, device: torch.device, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        first = torch.zeros(rows, dtype=torch.long, device="cpu")
        last = torch.full((rows,), width - 1, dtype=torch.long, device="cpu")
        if mask is not None:
            if mask.shape != (rows, width):
                raise HookError(
                    "attention_mask does not fit this forward",
                    expected=[rows, width],
                    got=list(mask.shape),
                    fix="Open a new context for every batch that has its own mask.",
                )
            mask = mask.cpu().long()
            if not mask.any(dim=1).all():
                raise HookError(
                    "attention_mask",
                    expected="a real token in every row",
                    got=f"none in row {int(mask.sum(1).argmin())}",
                )
            first, last = mask.argmax(dim=1), width - 1 - mask.flip(1).argmax(dim=1)
        if self.lengths is not None:
            lengths = self.lengths.cpu()
            ends = first + lengths - 1
            if lengths.shape != (rows,) or (lengths < 1).any() or (ends > last).any():
                raise HookError(
                    "prompt_lengths do not fit this forward",
                    expected=f"{rows} lengths between 1 and {(last - first + 1).tolist()}",
                    got=lengths.tolist(),
                    fix="Open a new context for every batch that has its own lengths.",
                )
            last = ends
        self.last = int(last.max())
        return last.to(device), first.to(device)


def _tensor(name: str, values: Any, axes: str) -> Tensor:
    """A tensor as it is, or anything else as one on the CPU, whatever the default device."""
    try:
        return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(name, expected=f"whole numbers {axes}", got=brief(values)) from error


def _usable(real: Tensor | None, rows: int, width: int, fresh: bool) -> bool:
    """Whether what the model masks fits the rows at hand, and leaves each of them a token."""
    if real is None or len(real) not in (1, rows):
        return False
    return real.shape[1] >= width and (not fresh or (real.shape[1] == width and bool(real.any(dim=1).all())))


def _real(start: int, activation: Float[Tensor, "b t d"], mask: Bool[Tensor, "b s"] | None) -> Bool[Tensor, "b t"]:
    """Which columns from `start` on hold real tokens; those beyond the mask do. Asks nothing of the device."""
    rows, width = activation.shape[:2]
    known = torch.ones(rows, 0, dtype=torch.bool, device=activation.device)
    if mask is not None:
        known = mask[:, start : start + width].to(activation.device).expand(rows, -1)
    return torch.nn.functional.pad(known, (0, width - known.shape[1]), value=True)

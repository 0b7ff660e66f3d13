"""How far a fit reaches: beyond the queries that it knows, what it adds by regression is held back.

A regression says nothing of queries unlike those that it was fitted to, and says it the louder the farther they are.
Let d(h) be the distance of h from the mean in the leading principal directions, each in units of its own spread, and R
the largest that a query had, held out or not. β is divided by max(1, d(h)²/R²): unchanged where the fit knows queries,
next to nothing far from them. On the tutor, whose general prompts lie at 3 R, steering without a gate then leaves .93
of them alone, in place of .71.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.method.folds import Fold
from fsteer_lens.method.ridge import Spectrum

DIRECTIONS: Final = 64
ROWS_A_DIRECTION: Final = 4
"""Fewer queries than this for each direction do not tell how much they spread in it."""


class Reach(NamedTuple):
    """d(h)/R = ‖h · weight + bias‖, [d r] and [r]."""

    weight: Float[Tensor, "d r"]
    bias: Float[Tensor, " r"]


def reach_of(rows: Float[Tensor, "n p"], folds: Sequence[Fold]) -> Reach:
    """The reach of a fit to these rows; of no direction where they do not vary."""
    smallest = min((len(train) for train, _ in folds), default=len(rows))
    kept = min(DIRECTIONS, smallest // ROWS_A_DIRECTION)
    weight, bias = whole = _whitening(rows, kept)
    if not len(bias):
        return Reach(*whole)
    apart = [(rows[held_out], _whitening(rows[train], kept)) for train, held_out in folds]
    farthest = max(float((seen @ weight + bias).norm(dim=1).max()) for seen, (weight, bias) in [(rows, whole), *apart])
    return Reach(weight / farthest, bias / farthest)


def _whitening(rows: Float[Tensor, "n p"], kept: int) -> tuple[Float[Tensor, "p r"], Float[Tensor, " r"]]:
    """The map to the leading principal coordinates, each of variance 1."""
    spectrum = Spectrum.of(rows)
    first = max(0, len(spectrum.values) - kept)
    weight = spectrum.basis[:, first:] / (spectrum.values[first:] / len(rows)).sqrt()
    return weight, -rows.mean(dim=0) @ weight

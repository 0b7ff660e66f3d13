"""The experts in closed form: v(h) = C α(h) + U β(h) without training, every strength chosen on held-out queries.

1. K: clusters of the unit shifts that come out again in other halves of the data, leave less spread than one cloud
   would, and are told by the queries (`clusters`); one cluster where there are none.
2. C: the mean shift of each cluster.
3. α(h) = softmax(log π + τ (h − h̄) A): A is ridge regression of the cluster indicators, π the clusters' shares. The
   weight of the ridge and τ are those of the least cross-entropy on held-out queries; τ = 0 is the mean shift.
4. U β(h): ridge regression of what the cross-fitted α leaves, δ − C α, its weight that of the least held-out error; U
   are the first m directions of what it predicts.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.method.clusters import CLEARED, STRONG, cluster_labels, gap, prediction_strengths, unit_points
from fsteer_lens.method.controller import LinearController
from fsteer_lens.method.folds import Fold
from fsteer_lens.method.ridge import STRENGTHS, Spectrum

DIMENSIONS: Final = 256
TEMPERATURES: Final = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 40.0)
TOLD: Final = 0.2
"""Share of the clusters' entropy that held-out queries must tell: less, and there is nothing to route by."""


class Split(NamedTuple):
    """One fold: who is fitted and who is held out, the spectrum of the former and the latter seen in it."""

    train: Int[Tensor, "_"]
    held_out: Int[Tensor, "_"]
    spectrum: Spectrum
    seen: Float[Tensor, "_ r"]


class Queries(NamedTuple):
    """Queries reduced to the directions in which they vary most, decomposed as a whole and fold by fold."""

    mean: Float[Tensor, " d"]
    directions: Float[Tensor, "d p"]
    rows: Float[Tensor, "n p"]
    spectrum: Spectrum
    splits: list[Split]

    @classmethod
    def of(cls, h: Float[Tensor, "n d"], folds: Sequence[Fold]) -> "Queries":
        """Reduce and decompose."""
        whole = Spectrum.of(h)
        directions = whole.basis[:, -DIMENSIONS:]
        rows = (h - h.mean(dim=0)) @ directions
        splits = []
        for train, held_out in folds:
            spectrum = Spectrum.of(rows[train])
            splits.append(Split(train, held_out, spectrum, spectrum.seen(rows[held_out])))
        return cls(h.mean(dim=0), directions, rows, Spectrum.of(rows), splits)


class Routing(NamedTuple):
    """α as fitted, and as it is for queries that it was not fitted to.

    Attributes:
        weight, bias: of the logits, in the reduced queries, [p k] and [k].
        held_out: cross-fitted α, [n k].
        told: 1 − held-out cross-entropy / entropy of the clusters; 0 for one cluster.
    """

    weight: Float[Tensor, "p k"]
    bias: Float[Tensor, " k"]
    held_out: Float[Tensor, "n k"]
    told: float


class Residual(NamedTuple):
    """U β as fitted, and what is left of the shifts of queries that it was not fitted to.

    Attributes:
        weight, bias: of the predicted residual, in the reduced queries, [p d] and [d].
        strength: of the ridge.
        left: cross-fitted δ − v, [n d].
    """

    weight: Float[Tensor, "p d"]
    bias: Float[Tensor, " d"]
    strength: float
    left: Float[Tensor, "n d"]


class ClosedForm(NamedTuple):
    """The fit with what it took to choose the number of experts.

    Attributes:
        clusters: of every shift, [n].
        modes: whether there are clusters by the three tests; one cluster, and a number that was asked for, need none.
        strengths: prediction strength of every number of experts that was tried.
    """

    clusters: Int[Tensor, " n"]
    modes: bool
    prototypes: Float[Tensor, "k d"]
    routing: Routing
    residual: Residual
    strengths: dict[int, float]


def choose_and_fit(
    queries: Queries,
    delta: Float[Tensor, "n d"],
    counts: range,
    groups: Sequence[str | None] | None,
    seed: int,
) -> ClosedForm:
    """Choose K among `counts`, and fit prototypes, routing and residual.

    The number whose gap is largest among those that are found again is taken, if the queries tell its clusters; else
    the next, and where none is left one expert, or, if `counts` begin later, the number that is best found again.
    """
    points = unit_points(delta)
    strengths = prediction_strengths(points, counts, groups, seed) if len(counts) > 1 else {}
    gaps = {count: gap(points, count, seed) for count, found in strengths.items() if count > 1 and found >= STRONG}
    for count in sorted(gaps, key=lambda count: -gaps[count]):
        labels = cluster_labels(points, count, seed).to(delta.device)
        routing = fit_routing(queries, labels)
        if gaps[count] >= CLEARED and routing.told >= TOLD:
            return _fitted(queries, delta, labels, routing, strengths, modes=True)
    best = max(counts, key=lambda count: (strengths.get(count, 0.0), -count))
    labels = cluster_labels(points, best, seed).to(delta.device)
    return _fitted(queries, delta, labels, fit_routing(queries, labels), strengths, modes=False)


def _fitted(
    queries: Queries,
    delta: Float[Tensor, "n d"],
    clusters: Int[Tensor, " n"],
    routing: Routing,
    strengths: dict[int, float],
    *,
    modes: bool,
) -> ClosedForm:
    prototypes = cluster_means(F.one_hot(clusters).to(delta), delta)
    residual = fit_residual(queries, delta, clusters, routing)
    return ClosedForm(clusters, modes, prototypes, routing, residual, strengths)


def fit_routing(queries: Queries, clusters: Int[Tensor, " n"]) -> Routing:
    """α of the least held-out cross-entropy; ties go to the more even weights."""
    hot = F.one_hot(clusters).to(queries.rows)
    n, count = hot.shape
    if count == 1:
        return Routing(hot.new_zeros(queries.rows.shape[1], 1), hot.new_zeros(1), hot, 0.0)
    scores, shares = hot.new_zeros(len(STRENGTHS), n, count), hot.new_zeros(n, count)
    for train, held_out, spectrum, seen in queries.splits:
        inner = spectrum.seen(queries.rows[train]).T @ (hot[train] - hot[train].mean(dim=0))
        shares[held_out] = _log_shares(hot[train])
        for index, strength in enumerate(STRENGTHS):
            scores[index, held_out] = (seen * spectrum.shrink(strength)) @ inner
    best = (float("inf"), 0, 0.0)
    for temperature in TEMPERATURES:
        for index in reversed(range(len(STRENGTHS))):
            loss = float(F.cross_entropy(shares + temperature * scores[index], clusters))
            if loss < best[0] - 1e-9:
                best = (loss, index, temperature)
    loss, index, temperature = best
    weight = temperature * queries.spectrum.coefficients(hot, STRENGTHS[index])
    prior = hot.mean(dim=0)
    held_out = (shares + temperature * scores[index]).softmax(dim=1)
    return Routing(weight, _log_shares(hot), held_out, 1 - loss / float(-(prior * prior.log()).sum()))


def _log_shares(hot: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """log π, half a member being added to each cluster so that an empty one is no impossible one."""
    return ((hot.sum(dim=0) + 0.5) / (len(hot) + 0.5 * hot.shape[1])).log()


def fit_residual(
    queries: Queries, delta: Float[Tensor, "n d"], clusters: Int[Tensor, " n"], routing: Routing
) -> Residual:
    """Ridge regression of what the cross-fitted routing leaves, at the strength of the least held-out error."""
    hot, alpha = F.one_hot(clusters).to(delta), routing.held_out
    errors, fitted = delta.new_zeros(len(STRENGTHS)), []
    for train, held_out, spectrum, seen in queries.splits:
        prototypes = cluster_means(hot[train], delta[train])
        targets = delta[train] - alpha[train] @ prototypes
        mean = targets.mean(dim=0)
        inner = spectrum.seen(queries.rows[train]).T @ (targets - mean)
        remaining = delta[held_out] - alpha[held_out] @ prototypes
        for index, strength in enumerate(STRENGTHS):
            errors[index] += (remaining - mean - (seen * spectrum.shrink(strength)) @ inner).square().sum()
        fitted.append((mean, inner, remaining))
    index = min(range(len(STRENGTHS)), key=lambda index: (float(errors[index]), -STRENGTHS[index]))
    left = torch.empty_like(delta)
    for (_, held_out, spectrum, seen), (mean, inner, remaining) in zip(queries.splits, fitted, strict=True):
        left[held_out] = remaining - mean - (seen * spectrum.shrink(STRENGTHS[index])) @ inner
    targets = delta - alpha @ cluster_means(hot, delta)
    weight = queries.spectrum.coefficients(targets, STRENGTHS[index])
    return Residual(weight, targets.mean(dim=0), STRENGTHS[index], left)


def cluster_means(hot: Float[Tensor, "n k"], delta: Float[Tensor, "n d"]) -> Float[Tensor, "k d"]:
    """The mean shift of each cluster; 0 for one without members."""
    return hot.T @ delta / hot.sum(dim=0).clamp(min=1).unsqueeze(1)


def residual_directions(queries: Queries, residual: Residual, rank: int) -> Float[Tensor, "d m"]:
    """The first `rank` directions of the predicted residuals, not centred; fewer where the rest is rounding."""
    predicted = queries.rows @ residual.weight + residual.bias
    _, lengths, directions = torch.linalg.svd(predicted, full_matrices=False)
    kept = max(1, int((lengths > 1e-9 * lengths[0]).sum()))
    basis = directions[: min(rank, kept)]
    largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
    return (basis * torch.where(largest < 0, -1.0, 1.0)).T.contiguous()


def controller_of(
    queries: Queries, routing: Routing, residual: Residual, basis: Float[Tensor, "d m"]
) -> LinearController:
    """The fitted maps of raw queries."""
    route = (queries.directions @ routing.weight).T.contiguous()
    output = (queries.directions @ residual.weight @ basis).T.contiguous()
    return LinearController(
        route, routing.bias - route @ queries.mean, output, basis.T @ residual.bias - output @ queries.mean
    )

"""The experts in closed form: v(h) = C α(h) + U β(h) without training, every strength chosen on held-out queries.

1. K: clusters of the unit shifts that come out again in other halves of the data, leave less spread than one cloud
   would, and are told by the queries (`clusters`); one cluster where there are none.
2. C: the mean shift of each cluster.
3. α(h) = softmax(log π + τ (h − h̄) A): A is ridge regression of the cluster indicators, π the clusters' shares. The
   weight of the ridge and τ are those of the least cross-entropy on held-out queries; τ = 0 is the mean shift.
4. U β(h): ridge regression of what the cross-fitted α leaves, δ − C α, its weight that of the least held-out error; U
   are the first m directions of what it predicts. β is affine in h, or quadratic where that is clearly better on
   held-out queries (`quadratic`), and is held back far from the queries (`reach`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.method.clusters import CLEARED, STRONG, cluster_labels, gap, prediction_strengths, unit_points
from fsteer_lens.method.controller import QuadraticController
from fsteer_lens.method.folds import Fold
from fsteer_lens.method.quadratic import View, forms_of, view_of
from fsteer_lens.method.reach import Reach, reach_of
from fsteer_lens.method.ridge import NEGLIGIBLE, STRENGTHS, Spectrum

DIMENSIONS: Final = 256
TEMPERATURES: Final = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 40.0)
TOLD: Final = 0.2
"""Share of the clusters' entropy that held-out queries must tell: less, and there is nothing to route by."""


class Split(NamedTuple):
    """One fold: who is fitted and who is held out, both as seen in the spectrum of the former, and times their shifts.

    Attributes:
        train, held_out: which rows.
        spectrum: of the fitted rows.
        fitted, seen: the fitted and the held-out rows in it.
        fitted_shifts, seen_shifts: the transposes of these times the shifts, [r d].
        fitted_gram, seen_gram: inner products of the former's rows, and of the columns of `seen`, [r r].
    """

    train: Int[Tensor, "_"]
    held_out: Int[Tensor, "_"]
    spectrum: Spectrum
    fitted: Float[Tensor, "_ r"]
    seen: Float[Tensor, "_ r"]
    fitted_shifts: Float[Tensor, "r d"]
    seen_shifts: Float[Tensor, "r d"]
    fitted_gram: Float[Tensor, "r r"]
    seen_gram: Float[Tensor, "r r"]


@dataclass(frozen=True, eq=False)
class Rows:
    """What is regressed on, one row a query, decomposed fold by fold and, when that is needed, as a whole."""

    rows: Float[Tensor, "n p"]
    splits: list[Split]

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of all rows."""
        return Spectrum.of(self.rows)

    @classmethod
    def of(cls, rows: Float[Tensor, "n p"], delta: Float[Tensor, "n d"], folds: Sequence[Fold]) -> "Rows":
        """Decompose."""
        splits = []
        for train, held_out in folds:
            spectrum = Spectrum.of(rows[train])
            fitted, seen = spectrum.seen(rows[train]), spectrum.seen(rows[held_out])
            met, others = fitted.T @ delta[train], seen.T @ delta[held_out]
            splits.append(Split(train, held_out, spectrum, fitted, seen, met, others, met @ met.T, seen.T @ seen))
        return cls(rows, splits)


class Queries(NamedTuple):
    """Queries reduced to the directions in which they vary most; by themselves, and with products beside them.

    Attributes:
        mean, directions: what was taken off and what was kept, [d] and [d p].
        view: the coordinates whose products are taken.
        alone: h − h̄ in the directions, p columns.
        squared: these, and the products after them.
        reach: how far a fit to `alone` reaches.
    """

    mean: Float[Tensor, " d"]
    directions: Float[Tensor, "d p"]
    view: View
    alone: Rows
    squared: Rows
    reach: Reach

    @classmethod
    def of(cls, h: Float[Tensor, "n d"], delta: Float[Tensor, "n d"], folds: Sequence[Fold]) -> "Queries":
        """Reduce and decompose."""
        mean, directions = h.mean(dim=0), Spectrum.of(h).basis[:, -DIMENSIONS:]
        rows = (h - mean) @ directions
        view = view_of(h, float(rows.square().sum(dim=1).mean()))
        alone, squared = (Rows.of(one, delta, folds) for one in (rows, torch.cat([rows, view(h)], dim=1)))
        return cls(mean, directions, view, alone, squared, reach_of(rows, folds))


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
        rows: what it is a map of, [n p].
        weight, bias: of the predicted residual, in the centred rows, [p d] and [d].
        left: cross-fitted δ − v, [n d].
    """

    rows: Float[Tensor, "n p"]
    weight: Float[Tensor, "p d"]
    bias: Float[Tensor, " d"]
    left: Float[Tensor, "n d"]


class ClosedForm(NamedTuple):
    """The fit with what it took to choose the number of experts.

    Attributes:
        clusters: of every shift, [n].
        modes: whether there are clusters by the three tests; one cluster, and a number that was asked for, need none.
        quadratic: whether β is.
        strengths: prediction strength of every number of experts that was tried, where there was a choice.
        curve: share of held-out shifts that every number of experts explains, with β affine.
    """

    clusters: Int[Tensor, " n"]
    modes: bool
    prototypes: Float[Tensor, "k d"]
    routing: Routing
    residual: Residual
    quadratic: bool
    strengths: dict[int, float]
    curve: dict[int, float]


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
    labels = {count: cluster_labels(points, count, seed).to(delta.device) for count in counts}
    routings = {count: fit_routing(queries.alone, labels[count]) for count in counts}
    total = float(delta.square().sum())
    curve = {
        count: 1 - float(residual_errors(queries.alone, delta, labels[count], routings[count]).min()) / total
        for count in counts
    }
    strengths = prediction_strengths(points, counts, groups, seed) if len(counts) > 1 else {}
    gaps = {count: gap(points, count, seed) for count, found in strengths.items() if count > 1 and found >= STRONG}
    clear = (count for count in gaps if gaps[count] >= CLEARED and routings[count].told >= TOLD)
    chosen = max(clear, key=lambda count: gaps[count], default=None)
    best = max(counts, key=lambda count: (strengths.get(count, 0.0), -count)) if chosen is None else chosen
    prototypes = cluster_means(F.one_hot(labels[best]).to(delta), delta)
    (strength, left), (other, left_by_products) = (
        best_strength(rows, delta, labels[best], routings[best]) for rows in (queries.alone, queries.squared)
    )
    quadratic = clearly_less(left_by_products, left)
    rows, strength, left = (queries.squared, other, left_by_products) if quadratic else (queries.alone, strength, left)
    targets = delta - routings[best].held_out @ prototypes
    weight = rows.spectrum.coefficients(targets, strength)
    residual = Residual(rows.rows, weight, targets.mean(dim=0), left)
    return ClosedForm(
        labels[best], chosen is not None, prototypes, routings[best], residual, quadratic, strengths, curve
    )


def clearly_less(left: Float[Tensor, "n d"], other: Float[Tensor, "n d"]) -> bool:
    """Whether an error is smaller than another by more than two standard errors of the difference, over queries."""
    gains = other.square().sum(dim=1) - left.square().sum(dim=1)
    return float(gains.mean()) > 2 * float(gains.std()) / len(gains) ** 0.5


def fit_routing(queries: Rows, clusters: Int[Tensor, " n"]) -> Routing:
    """α of the least held-out cross-entropy; ties go to the more even weights."""
    hot = F.one_hot(clusters).to(queries.rows)
    n, count = hot.shape
    if count == 1:
        return Routing(hot.new_zeros(queries.rows.shape[1], 1), hot.new_zeros(1), hot, 0.0)
    scores, shares = hot.new_zeros(len(STRENGTHS), n, count), hot.new_zeros(n, count)
    for train, held_out, spectrum, fitted, seen, *_ in queries.splits:
        inner = fitted.T @ hot[train]  # the rows are centred, so the shares need not be taken off
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


def residual_errors(
    queries: Rows, delta: Float[Tensor, "n d"], clusters: Int[Tensor, " n"], routing: Routing
) -> Float[Tensor, " s"]:
    """Held-out error at every strength of ridge regression of what the cross-fitted routing leaves.

    With R what is to be predicted of the held-out rows A, and Z what the fitted ones have in common with their targets,
    ‖R − A S Z‖² = ‖R‖² − 2 tr(S Z Rᵀ A) + tr(S AᵀA S ZZᵀ) is that of every diagonal S at the price of one.
    """
    errors = delta.new_zeros(len(STRENGTHS))
    for split in queries.splits:
        inner, remaining, part = _to_predict(split, delta, clusters, routing)
        shrunk = torch.stack([split.spectrum.shrink(strength) for strength in STRENGTHS])
        routed, prototypes, mean = part
        met = split.seen_shifts - (split.seen.T @ routing.held_out[split.held_out]) @ prototypes
        met = met - torch.outer(split.seen.sum(dim=0), mean)
        crossed = (split.fitted_shifts - routed @ prototypes / 2) @ prototypes.T @ routed.T  # Z is a difference
        spent = split.seen_gram * (split.fitted_gram - crossed - crossed.T)
        gained = shrunk @ (met * inner).sum(dim=1)
        errors += remaining.square().sum() - 2 * gained + ((shrunk @ spent) * shrunk).sum(dim=1)
    return errors


def best_strength(
    queries: Rows, delta: Float[Tensor, "n d"], clusters: Int[Tensor, " n"], routing: Routing
) -> tuple[float, Float[Tensor, "n d"]]:
    """The strength of the least held-out error, ties going to the larger, and the cross-fitted δ − v, [n d]."""
    errors = residual_errors(queries, delta, clusters, routing).tolist()
    strength = min(zip(errors, STRENGTHS, strict=True), key=lambda pair: (pair[0], -pair[1]))[1]
    left = torch.empty_like(delta)
    for split in queries.splits:
        inner, remaining, _ = _to_predict(split, delta, clusters, routing)
        left[split.held_out] = remaining - (split.seen * split.spectrum.shrink(strength)) @ inner
    return strength, left


def _to_predict(
    split: Split, delta: Float[Tensor, "n d"], clusters: Int[Tensor, " n"], routing: Routing
) -> tuple[Float[Tensor, "r d"], Float[Tensor, "_ d"], tuple[Tensor, Tensor, Tensor]]:
    """Z, fitted rows times what the routing leaves of their shifts; what it leaves of the held-out ones, less the mean
    of the former; and what was taken off: fitted rows times weights, the prototypes, the mean."""
    train, held_out, alpha = split.train, split.held_out, routing.held_out
    hot = F.one_hot(clusters, alpha.shape[1]).to(delta)
    prototypes = cluster_means(hot[train], delta[train])
    mean = delta[train].mean(dim=0) - alpha[train].mean(dim=0) @ prototypes
    routed = split.fitted.T @ alpha[train]
    remaining = delta[held_out] - alpha[held_out] @ prototypes - mean
    return split.fitted_shifts - routed @ prototypes, remaining, (routed, prototypes, mean)


def cluster_means(hot: Float[Tensor, "n k"], delta: Float[Tensor, "n d"]) -> Float[Tensor, "k d"]:
    """The mean shift of each cluster; 0 for one without members."""
    return hot.T @ delta / hot.sum(dim=0).clamp(min=1).unsqueeze(1)


def residual_directions(residual: Residual, rank: int) -> Float[Tensor, "d m"]:
    """The first `rank` directions of the predicted residuals, not centred; fewer where the rest is rounding."""
    predicted = (residual.rows - residual.rows.mean(dim=0)) @ residual.weight + residual.bias
    values, vectors = torch.linalg.eigh(predicted.T @ predicted)
    kept = max(1, int((values > NEGLIGIBLE * values[-1]).sum()))
    basis = vectors.T.flip(0)[: min(rank, kept)]
    largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
    return (basis * torch.where(largest < 0, -1.0, 1.0)).T.contiguous()


def controller_of(
    queries: Queries, routing: Routing, residual: Residual, basis: Float[Tensor, "d m"], *, quadratic: bool
) -> QuadraticController:
    """The fitted maps of raw queries."""
    p = queries.directions.shape[1]
    route = (queries.directions @ routing.weight).T.contiguous()
    weight = residual.weight @ basis
    output = (queries.directions @ weight[:p]).T.contiguous()
    view, forms = forms_of(queries.view, weight[p:]) if quadratic else forms_of(queries.view.without(), weight[:0])
    start = basis.T @ residual.bias - residual.rows.mean(dim=0) @ weight - output @ queries.mean
    reach = (queries.directions @ queries.reach.weight).T.contiguous()
    return QuadraticController(
        route,
        routing.bias - route @ queries.mean,
        output,
        start,
        view.weight.T.contiguous(),
        view.bias,
        forms,
        reach,
        queries.reach.bias - reach @ queries.mean,
    )

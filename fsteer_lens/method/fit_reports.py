"""What fitted experts came to, on what they were fitted to and on what they did not see."""

from collections.abc import Mapping
from typing import Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.method.closed_form import ClosedForm, Queries, fit_routing, residual_errors
from fsteer_lens.method.experts import Experts, FitReport, HeldOut

BINS: Final = 10


def report_of(
    experts: Experts,
    h: Float[Tensor, "n d"],
    delta: Float[Tensor, "n d"],
    clusters: Int[Tensor, " n"],
    valid_rows: Int[Tensor, " n_valid"] | None = None,
    *,
    criterion: Mapping[int, float],
    epochs: int = 0,
    doubts: tuple[str, ...] = (),
    held_out: HeldOut | None = None,
) -> FitReport:
    """The report on the queries and shifts that experts were fitted to; `valid_rows` were kept for early stopping."""
    parts = experts.parts(h)
    strongest = parts.weights.argmax(dim=-1)
    error = (parts.vector - delta).square().sum(dim=1)
    valid = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    if valid_rows is not None:
        valid[valid_rows] = True
    ratio = parts.prototype_part.norm(dim=1) / parts.vector.norm(dim=1).clamp(min=1e-12)
    return FitReport(
        agreement=float((strongest == clusters).float().mean()),
        dead=1 - len(strongest.unique()) / experts.n_experts,
        prototype_share=float(ratio.mean()),
        explained=float(1 - error.mean() / delta.square().sum(dim=1).mean()),
        train_loss=float(error[~valid].mean()),
        valid_loss=float(error[valid].mean()) if valid.any() else None,
        epochs=epochs,
        criterion=dict(criterion),
        clusters=clusters.cpu(),
        held_out=held_out,
        doubts=doubts,
    )


def held_out_of(queries: Queries, delta: Float[Tensor, "n d"], found: ClosedForm) -> HeldOut:
    """What a fit in closed form came to on the folds that each part of it did not see."""
    total = delta.square().sum()

    def explained(left: Tensor) -> float:
        return float(1 - left.square().sum() / total)

    ridge = found.curve.get(1)  # all that a single expert leaves to be fitted
    if ridge is None:
        one = torch.zeros_like(found.clusters)
        ridge = 1 - float(residual_errors(queries.alone, delta, one, fit_routing(queries.alone, one)).min() / total)
    mean_left = torch.empty_like(delta)
    for split in queries.alone.splits:
        mean_left[split.held_out] = delta[split.held_out] - delta[split.train].mean(dim=0)
    gains = mean_left.square().sum(dim=1) - found.residual.left.square().sum(dim=1)
    alpha = found.routing.held_out
    largest, strongest = alpha.max(dim=1)
    right = strongest == found.clusters
    return HeldOut(
        explained=explained(found.residual.left),
        mean_shift=explained(mean_left),
        ridge=ridge,
        standard_error=float(gains.std() * len(gains) ** 0.5 / total),
        agreement=float(right.double().mean()),
        calibration=_calibration_error(largest, right),
        told=found.routing.told,
        curve=found.curve,
        quadratic=found.quadratic,
        removal=_removal(delta, found),
    )


def _calibration_error(largest: Float[Tensor, " n"], right: Bool[Tensor, " n"]) -> float:
    """Expected calibration error: mean distance of weight and hit rate over bins of the weight."""
    bins = (largest * BINS).long().clamp(max=BINS - 1)
    error = 0.0
    for index in bins.unique():
        inside = bins == index
        error += float(inside.double().mean() * (largest[inside].mean() - right[inside].double().mean()).abs())
    return error


def _removal(delta: Float[Tensor, "n d"], found: ClosedForm) -> tuple[float, ...]:
    """What each expert's own cluster loses without it, its weight going to the others, on held-out queries."""
    alpha, prototypes = found.routing.held_out, found.prototypes
    if len(prototypes) == 1:
        return ()
    costs = []
    for index in range(len(prototypes)):
        own = found.clusters == index
        # a weight that was 1 to the last bit leaves nothing to share out: the others then have equal weights
        kept = alpha[own] + 1e-12
        kept[:, index] = 0
        kept = kept / kept.sum(dim=1, keepdim=True)
        left = found.residual.left[own]
        without = left + (alpha[own] - kept) @ prototypes
        rise = without.square().sum(dim=1) - left.square().sum(dim=1)
        costs.append(float(rise.sum() / delta[own].square().sum()))
    return tuple(costs)

"""From the closed form to experts: put together, reported on held-out queries, and warned about."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.method.closed_form import (
    ClosedForm,
    Queries,
    choose_and_fit,
    controller_of,
    residual_directions,
)
from fsteer_lens.method.controller import QuadraticController
from fsteer_lens.method.experts import Experts, HeldOut
from fsteer_lens.method.fit_reports import held_out_of, report_of
from fsteer_lens.method.folds import FOLDS, cut_folds
from fsteer_lens.method.linalg import move


def fit_closed_form(
    h: Float[Tensor, "n d"],
    delta: Float[Tensor, "n d"],
    counts: range,
    residual_rank: int,
    groups: Sequence[str | None] | None,
    seed: int,
) -> Experts:
    """Experts in closed form, with a report; the arguments are those of `fit_experts`, checked.

    Raises:
        DataError: groups that cannot be cut into folds.
    """
    exact, target = h.double(), delta.double()
    folds = [move(fold, h.device) for fold in cut_folds(len(h), groups, FOLDS, seed)]
    queries = Queries.of(exact, target, folds)
    found = choose_and_fit(queries, target, counts, groups, seed)
    basis = residual_directions(found.residual, residual_rank)
    controller = controller_of(queries, found.routing, found.residual, basis, quadratic=found.quadratic)
    experts = Experts(
        found.prototypes.to(h),
        basis.to(h),
        QuadraticController(*(part.to(h) for part in controller)),
        (True,) * len(found.prototypes),
    )
    held_out = held_out_of(queries, target, found)
    doubts = tuple(_doubts(held_out, counts, found))
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=3)  # where fit_experts was called
    report = report_of(experts, h, delta, found.clusters, criterion=found.strengths, doubts=doubts, held_out=held_out)
    return replace(experts, report=report)


def _doubts(held_out: HeldOut, counts: range, found: ClosedForm) -> Iterator[str]:
    """What the numbers mean where they mean that the fit is not to be trusted."""
    count, tried = len(found.prototypes), len(counts) > 1
    if not held_out.beats_mean_shift:
        yield (
            f"the experts explain {held_out.explained:.3f} of held-out shifts, the mean shift"
            f" {held_out.mean_shift:.3f}: one vector may do as well; use fit_mean_shift, or give more contrasts"
        )
    elif tried and count == counts[-1] and count > 1:
        yield f"{count} experts, the most that were tried: there may be more; raise the upper end of n_experts"
    if tried and not found.modes and counts[0] > 1:
        yield (
            f"no number of experts in {counts[0]}..{counts[-1]} gives clusters that are found again, are more than one"
            f" cloud, and are told by the queries; took {count}. Begin n_experts at 1"
        )

"""The fit of gates on the energy ratio of a subspace, calibrated on queries that their basis did not see."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.ground import checks
from fsteer_lens.method.folds import FOLDS, Fold, cut_folds
from fsteer_lens.method.linalg import require_matrix, require_rank
from fsteer_lens.method.subspace import Subspace, fit_subspace
from fsteer_lens.method.subspace_gates import CalibrationRange, EnergyGate, LogisticGate, QuantileGate, SubspaceGate

MAX_RANK: Final = 64
NEWTON_STEPS: Final = 100
HALVINGS: Final = 40
ROUNDING: Final = 1e-12
NEGLIGIBLE_STEP: Final = 1e-9
"""A step of Newton's, in standard deviations, after which no other is taken."""
QUANTILE: Final = {"epsilon": 0.003, "gamma": 4.0, "cdf": "linear"}


def fit_subspace_gate(
    kind: str,
    queries: Float[Tensor, "n d"],
    general: Float[Tensor, "m d"] | None,
    rank: int | None,
    groups: Sequence[str | None] | None,
    placed: Mapping[str, Any],
    options: Mapping[str, Any],
) -> SubspaceGate:
    """A gate of one of these kinds; arguments and errors as of `fit_gate`, `placed` tells where it reads."""
    rows = require_matrix(queries, "queries", min_rows=3)
    if rank is None:
        raise InputError(f"fit_gate(kind={kind!r})", expected="rank=, of the subspace", got=None)
    folds, seed, calibration = options.get("folds", FOLDS), options.get("seed"), options.get("calibration")
    if calibration is not None:
        replaced = {"folds": "folds" in options or None, "seed": seed, "groups": groups}
        checks.require_unset("calibration=, which replaces the folds", **replaced)
    if folds is None:
        checks.require_unset("folds=None, which cuts none", seed=seed, groups=groups)
    folding = _Folding(folds, groups, calibration, checks.seed_of(0 if seed is None else seed))
    subspace, ratios, distance = _cross_fitted(rows, rank, options.get("max_rank"), folding)
    if general is not None:
        others = require_matrix(general, "general", d_model=rows.shape[1]).to(rows)
        beside = subspace.energy_ratios(others)
        spanned = _range(torch.cat([ratios, beside]), torch.cat([distance, subspace.distance(others)]))
        return LogisticGate(subspace, rank, *_fit_logistic(ratios, beside), calibrated=spanned, **placed)
    placed = {**placed, "calibrated": _range(ratios, distance)}
    if kind == "energy":
        return EnergyGate(subspace, rank, **placed)
    shape: dict[str, Any] = {name: options.get(name, value) for name, value in QUANTILE.items()}
    return QuantileGate(subspace, rank, ratios.sort(dim=0).values, **shape, **placed)


class _Folding(NamedTuple):
    """How the energy ratios that a gate is calibrated on are taken; fields as in `fit_gate`."""

    folds: int | None
    groups: Sequence[str | None] | None
    calibration: Float[Tensor, "n_calibration d"] | None
    seed: int


def _cross_fitted(
    rows: Float[Tensor, "n d"], rank: int, max_rank: int | None, folding: _Folding
) -> tuple[Subspace, Float[Tensor, "m r"], Float[Tensor, " m"]]:
    """The subspace of the queries; energy ratios at every rank and distances of queries that no basis saw."""
    n, d_model = rows.shape
    in_sample = folding.folds is None
    cuts = [] if in_sample or folding.calibration is not None else _folds(n, folding)
    smallest = min([n] + [len(train) for train, _ in cuts])
    limit = min(smallest - 1, d_model)
    rank = require_rank(
        rank,
        limit,
        f"min(n - 1, d) of the smallest training fold, {smallest} of {n} queries",
        fix="Choose a rank within." if limit == d_model else "Choose a rank within, or fit on more queries.",
    )
    kept = min(limit, max(MAX_RANK, rank))
    if max_rank is not None:
        fix = f"Leave it out, or choose within {rank} to {limit}, what {smallest} of {n} queries allow."
        kept = checks.whole("max_rank", max_rank, rank, limit, fix=fix)
    subspace = fit_subspace(rows, rank=kept)
    if folding.calibration is not None or in_sample:
        seen = rows
        if folding.calibration is not None:
            seen = require_matrix(folding.calibration, "calibration", d_model=d_model)
        return subspace, subspace.energy_ratios(seen), subspace.distance(seen)
    ratios, distance = rows.new_empty(n, subspace.rank), rows.new_empty(n)
    for train, held_out in cuts:
        other = fit_subspace(rows[train], rank=subspace.rank)
        ratios[held_out], distance[held_out] = other.energy_ratios(rows[held_out]), other.distance(rows[held_out])
    return subspace, ratios, distance


def _range(ratios: Float[Tensor, "n r"], distance: Float[Tensor, " n"]) -> CalibrationRange:
    return CalibrationRange(torch.stack(distance.aminmax()), torch.stack(ratios.aminmax(dim=0)))


def _folds(n: int, folding: _Folding) -> list[Fold]:
    folds = checks.whole("folds", folding.folds, 2, why="or None for in-sample calibration")
    return cut_folds(n, folding.groups, folds, folding.seed)


def _fit_logistic(
    positive: Float[Tensor, "n r"], negative: Float[Tensor, "m r"]
) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"]]:
    """Slope and intercept of a logistic regression on the energy ratio at each rank, standardised, classes balanced.

    Each minimises ½ w² + Σ c (log(1 + exp(z)) − y z) with z = w x + b, as scikit-learn's LogisticRegression does with
    C = 1; all ranks at once, by Newton steps that are halved where they would not go down.
    """
    ratios = torch.cat([positive, negative]).double()
    location, scale = ratios.mean(dim=0), ratios.std(dim=0).clamp(min=1e-12)
    x = (ratios - location) / scale
    y = torch.cat([x.new_ones(len(positive), 1), x.new_zeros(len(negative), 1)])
    share = len(x) / (2 * (y * len(positive) + (1 - y) * len(negative)))

    def loss(w: Tensor, b: Tensor) -> Float[Tensor, " r"]:
        z = w * x + b
        return w.square() / 2 + (share * (torch.nn.functional.softplus(z) - y * z)).sum(dim=0)

    w, b = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(w * x + b)
        off, bend = share * (p - y), share * p * (1 - p)
        slope_w, slope_b = w + (off * x).sum(dim=0), off.sum(dim=0)
        ww, wb, bb = 1 + (bend * x.square()).sum(dim=0), (bend * x).sum(dim=0), bend.sum(dim=0)
        area = (ww * bb - wb.square()).clamp(min=1e-300)
        step_w, step_b = (bb * slope_w - wb * slope_b) / area, (ww * slope_b - wb * slope_w) / area
        if float(torch.stack([step_w, step_b]).abs().max()) < NEGLIGIBLE_STEP:
            break
        before, size = loss(w, b), torch.ones_like(w)
        for _ in range(HALVINGS):
            rises = ~(loss(w - size * step_w, b - size * step_b) <= before + ROUNDING * before)  # true of NaN as well
            if not bool(rises.any()):
                break
            size = torch.where(rises, size / 2, size)
        w, b = w - size * step_w, b - size * step_b
    slope = w / scale
    return slope.to(positive.dtype), (b - slope * location).to(positive.dtype)

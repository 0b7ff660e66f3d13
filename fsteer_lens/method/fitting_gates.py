"""`fit_gate`: the subspace of the queries that need intervention, and a gate calibrated on its energy ratio."""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.method.gates import CalibrationRange, EnergyGate, Gate, LogisticGate, QuantileGate
from fsteer_lens.method.linalg import require_matrix, require_rank
from fsteer_lens.method.subspace import fit_subspace


def fit_gate(
    queries: Float[Tensor, "n d"],
    *,
    rank: int,
    kind: Literal["quantile", "logistic", "energy"] = "quantile",
    general: Float[Tensor, "n_general d"] | None = None,
    epsilon: float = 0.003,
    gamma: float = 4.0,
    cdf: Literal["linear", "step"] = "linear",
    folds: int | None = 5,
    groups: Sequence[str | None] | None = None,
    calibration: Float[Tensor, "n_calibration d"] | None = None,
    max_rank: int = 64,
    seed: int = 0,
) -> Gate:
    """Fit the subspace of the IR queries and a gate on its energy ratio.

    Args:
        queries: activations of the queries that need intervention, at the last prompt token, [n d].
        rank: rank of the subspace whose energy ratio decides; at most (smallest training fold) − 1.
        kind: "quantile" (paper Eq. 8), "logistic" (Eq. 9) or "energy" (Eq. 15).
        general: activations of queries to be left alone; the logistic gate needs them, and any other kind raises if
            they are given.
        epsilon: ε of the quantile gate. The paper's value is not public; the default is what measured best on the
            tutor's valid split (docs/tutor_model_card.md).
        gamma: γ of the quantile gate, likewise.
        cdf: "linear" interpolates F, "step" is the paper's.
        folds: calibrate on ratios from that many cross-fitting folds; None calibrates in-sample, which is biased and
            is here for comparison only.
        groups: fold group of every query (the template it was made from); a group is never split. None: random folds.
        calibration: IR queries that the basis does not see; replaces cross-fitting.
        max_rank: keep this many ranks (or as many as the data allow) for `.at_rank`.
        seed: of the random folds.

    Raises:
        InputError: `rank` too high, unknown `kind`, or options that contradict each other.
        ShapeError, NonFiniteError: a tensor is no finite floating matrix of the queries' width.
        DataError: fewer than two groups to cut folds from.
    """
    rows = require_matrix(queries, "queries", min_rows=3)
    n, d_model = rows.shape
    if kind not in ("quantile", "logistic", "energy"):
        raise InputError("gate kind", expected="'quantile', 'logistic' or 'energy'", got=repr(kind))
    if (kind == "logistic") != (general is not None):
        needs = "needs general=, activations of queries to leave alone" if general is None else "takes no general="
        raise InputError(f"the {kind} gate {needs}", fix="Use kind='logistic' together with general=.")
    cuts = [] if folds is None or calibration is not None else list(_folds(n, folds, groups, seed))
    smallest = min([n] + [len(train) for train, _ in cuts])
    limit = min(smallest - 1, d_model)
    why = f"min(n - 1, d) of the smallest training fold, {smallest} of {n} queries"
    require_rank(rank, limit, why)
    subspace = fit_subspace(rows, rank=min(limit, max(rank, max_rank)))
    if calibration is not None:
        seen = require_matrix(calibration, "calibration", d_model=d_model)
        ratios, distance = subspace.energy_ratios(seen), subspace.distance(seen)
    elif folds is None:
        ratios, distance = subspace.energy_ratios(rows), subspace.distance(rows)
    else:
        ratios, distance = rows.new_empty(n, subspace.rank), rows.new_empty(n)
        for train, held_out in cuts:
            other = fit_subspace(rows[train], rank=subspace.rank)
            ratios[held_out], distance[held_out] = other.energy_ratios(rows[held_out]), other.distance(rows[held_out])
    if general is None:
        calibrated = _range(ratios, distance)
        if kind == "energy":
            return EnergyGate(subspace, rank, calibrated=calibrated)
        return QuantileGate(subspace, rank, ratios.sort(dim=0).values, epsilon, gamma, cdf, calibrated=calibrated)
    alone = require_matrix(general, "general", d_model=d_model)
    others = subspace.energy_ratios(alone)
    calibrated = _range(torch.cat([ratios, others]), torch.cat([distance, subspace.distance(alone)]))
    return LogisticGate(subspace, rank, *_fit_logistic(ratios, others), calibrated=calibrated)


def _range(ratios: Float[Tensor, "n r"], distance: Float[Tensor, " n"]) -> CalibrationRange:
    return CalibrationRange(torch.stack(distance.aminmax()), torch.stack(ratios.aminmax(dim=0)))


def _folds(n: int, folds: int, groups: Sequence[str | None] | None, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    from sklearn.model_selection import GroupKFold, KFold

    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise InputError("folds", expected="an int of at least 2, or None for in-sample calibration", got=folds)
    if groups is None or all(group is None for group in groups):
        splits = KFold(min(folds, n), shuffle=True, random_state=seed).split(range(n))
    else:
        if len(groups) != n or any(group is None for group in groups):
            raise DataError(
                "groups",
                expected=f"a group for each of {n} queries",
                got=f"{len(groups)} groups, {sum(group is None for group in groups)} of them None",
                fix="Give every contrast a group=, or none of them.",
            )
        n_groups = len(set(groups))
        if n_groups < 2:
            raise DataError("groups", expected="at least 2 different groups", got=n_groups, fix="Pass groups=None.")
        splits = GroupKFold(min(folds, n_groups)).split(range(n), groups=groups)
    for train, held_out in splits:
        yield torch.from_numpy(train), torch.from_numpy(held_out)


def _fit_logistic(
    positive: Float[Tensor, "n r"], negative: Float[Tensor, "m r"]
) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"]]:
    from sklearn.linear_model import LogisticRegression

    ratios = torch.cat([positive, negative]).double().cpu()
    location, scale = ratios.mean(dim=0), ratios.std(dim=0).clamp(min=1e-12)
    labels = [1] * len(positive) + [0] * len(negative)
    slopes, intercepts = [], []
    for column, centre, width in zip(ratios.T, location, scale, strict=True):
        model = LogisticRegression(C=1.0, class_weight="balanced")
        model.fit(((column - centre) / width)[:, None].numpy(), labels)
        slope = float(model.coef_[0, 0] / width)
        slopes.append(slope)
        intercepts.append(float(np.ravel(model.intercept_)[0] - slope * centre))
    return positive.new_tensor(slopes), positive.new_tensor(intercepts)

"""`fit_gate`: from activations to a gate, on the energy ratio of a subspace, on a direction, or a null space."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.ground import checks
from fsteer_lens.method.fitting_null_space import fit_null_space_gate
from fsteer_lens.method.folds import Fold, cut_folds
from fsteer_lens.method.gates import Gate
from fsteer_lens.method.linalg import require_matrix, require_rank
from fsteer_lens.method.linear_gates import CosineGate, LinearGate
from fsteer_lens.method.subspace import Subspace, fit_subspace
from fsteer_lens.method.subspace_gates import CalibrationRange, EnergyGate, LogisticGate, QuantileGate

MAX_RANK: Final = 64
QUANTILE: Final = {"epsilon": 0.003, "gamma": 4.0, "cdf": "linear"}
FOLDS: Final = 5
SUBSPACE_KINDS = ("quantile", "logistic", "energy")
DIRECTION_KINDS = ("linear", "cosine")
NULL_SPACE = "null_space"
Kind = Literal["quantile", "logistic", "energy", "linear", "cosine", "null_space"]


class GateOptions(TypedDict, total=False):
    """What `fit_gate` takes beside its own arguments: see there."""

    folds: int | None
    seed: int
    epsilon: float
    gamma: float
    cdf: Literal["linear", "step"]
    max_rank: int
    domains: Iterable[str | None] | None


ALLOWED: Final = {
    "quantile": frozenset(GateOptions.__annotations__) - {"domains"},
    "logistic": frozenset(GateOptions.__annotations__) - {"domains", *QUANTILE},
    "energy": frozenset(GateOptions.__annotations__) - {"domains", *QUANTILE},
    "linear": frozenset(),
    "cosine": frozenset(),
    "null_space": frozenset({"folds", "seed", "domains"}),
}
"""Options that have an effect, by kind of gate."""


def fit_gate(
    queries: Float[Tensor, "n d"],
    *,
    rank: int | None = None,
    kind: Kind = "quantile",
    general: Float[Tensor, "n_general d"] | None = None,
    groups: Iterable[str | None] | None = None,
    calibration: Float[Tensor, "n_calibration d"] | None = None,
    layer: int | None = None,
    **options: Unpack[GateOptions],
) -> Gate:
    """Fit a gate: on the energy ratio of the queries' subspace, or on a direction that tells them from general ones.

    Args:
        queries: activations of the queries that need intervention, at the last prompt token, [n d].
        rank: rank of the subspace whose energy ratio decides; at most (smallest training fold) − 1. Of the first three
            kinds.
        kind: "quantile" (paper Eq. 8), "logistic" (Eq. 9) or "energy" (Eq. 15), on the energy ratio of a subspace;
            "linear", a linear probe, logistic regression of the two kinds of query, standardised, classes balanced, L2
            with C = 1; "cosine", the gate of CAST (Lee et al. 2024, arXiv 2409.05907); "null_space", a map that is 0
            on general queries and 1 on these, see `NullSpaceGate`.
        general: activations of queries to be left alone; "logistic", "linear", "cosine" and "null_space" need them, and
            the others raise if they are given.
        groups: fold group of every query (the template it was made from); a group is never split. None: random folds.
        calibration: IR queries that the basis does not see; replaces cross-fitting.
        layer: where the queries were read; the gate then refuses to act or to combine elsewhere.
        options: for subspaces `folds` (5): calibrate on ratios from that many cross-fitting folds (or one for each
            query or group); None calibrates in-sample, which is biased and is here for comparison only. `seed` (0) of
            random folds. `max_rank` (64): keep this many ranks (or as many as the data allow) for `.at_rank`. For
            kind="quantile" `epsilon` (0.003), `gamma` (4.0) and `cdf` ("linear" interpolates F, "step" is the
            paper's). The paper's ε and γ are not public; the defaults are what measured best on the tutor's valid split
            (docs/tutor_model_card.md). For kind="null_space" `folds`, `seed`, and `domains`: of each general query
            where it is from, so that the gate knows what is left of the steering there.

    Raises:
        InputError: `rank` too high or missing, unknown `kind`, or options that contradict each other or have no effect.
        ShapeError, NonFiniteError: a tensor is no finite floating matrix of the queries' width.
        DataError: fewer than two groups to cut folds from.
    """
    checks.choice("gate kind", kind, (*SUBSPACE_KINDS, *DIRECTION_KINDS, NULL_SPACE))
    unused = sorted(set(options) - ALLOWED[kind])
    if groups is not None:
        listed = checks.several("groups", groups, "a group for each query")
        groups = [None if checks.is_missing(group) else group for group in listed]
    grouped = groups is not None and any(group is not None for group in groups)
    if kind not in SUBSPACE_KINDS:
        cut = grouped and kind != NULL_SPACE
        own = {"rank": rank is not None, "calibration": calibration is not None, "groups": cut}
        unused += [name for name, given in own.items() if given]
    if unused:
        raise InputError(
            f"fit_gate(kind={kind!r})", expected=f"no other options than {sorted(ALLOWED[kind])}", got=unused
        )
    if (kind in ("quantile", "energy")) == (general is not None):
        needs, got = ("needs", None) if general is None else ("takes no", "activations of queries to leave alone")
        raise InputError(
            f"the {kind} gate {needs} general=",
            expected="general= with kind='logistic', 'linear', 'cosine' or 'null_space', and no other",
            got=got,
        )
    if general is not None and kind == NULL_SPACE:
        given: dict[str, Any] = dict(options)
        return fit_null_space_gate(queries, general, groups=groups if grouped else None, layer=layer, **given)
    rows = require_matrix(queries, "queries", min_rows=3)
    others = None if general is None else require_matrix(general, "general", d_model=rows.shape[1]).to(rows)
    if others is not None and kind in DIRECTION_KINDS:
        return (_fit_linear if kind == "linear" else _fit_cosine)(rows, others, layer)
    if rank is None:
        raise InputError(f"fit_gate(kind={kind!r})", expected="rank=, of the subspace", got=None)
    folds, cut_by = options.get("folds", FOLDS), groups if grouped else None
    if calibration is not None:
        given = {"folds": "folds" in options or None, "seed": options.get("seed"), "groups": cut_by}
        checks.require_unset("calibration=, which replaces the folds", **given)
    if folds is None:
        checks.require_unset("folds=None, which cuts none", seed=options.get("seed"), groups=cut_by)
    if grouped:
        checks.require_unset("groups=, which cut the folds, so that none is random", seed=options.get("seed"))
    folding = _Folding(folds, groups, calibration, checks.seed_of(options.get("seed", 0)))
    subspace, ratios, distance = _cross_fitted(rows, rank, options.get("max_rank"), folding)
    placed: dict[str, Any] = {"layer": layer}
    if others is not None:
        beside = subspace.energy_ratios(others)
        spanned = torch.cat([ratios, beside]), torch.cat([distance, subspace.distance(others)])
        placed["calibrated"] = _range(*spanned)
        return LogisticGate(subspace, rank, *_fit_logistic(ratios, beside), **placed)
    placed["calibrated"] = _range(ratios, distance)
    if kind == "energy":
        return EnergyGate(subspace, rank, **placed)
    shape = {name: options.get(name, value) for name, value in QUANTILE.items()}
    return QuantileGate(subspace, rank, ratios.sort(dim=0).values, **shape, **placed)  # pyright: ignore[reportArgumentType]


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
    kept = max(MAX_RANK, rank)
    if max_rank is not None:
        kept = checks.whole("max_rank", max_rank, rank, fix=f"Leave it out, or let it be at least rank={rank}.")
    subspace = fit_subspace(rows, rank=min(limit, kept))
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


def _fit_linear(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"], layer: int | None) -> LinearGate:
    """Logistic regression; the scale is folded into the weight, so that the gate reads raw activations."""
    from sklearn.linear_model import LogisticRegression

    both = torch.cat([rows, others]).double().cpu()
    centre, scale = both.mean(dim=0), both.std(dim=0).clamp(min=1e-12)
    model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=5000)
    model.fit(((both - centre) / scale).numpy(), [1] * len(rows) + [0] * len(others))
    weight = torch.from_numpy(model.coef_[0]) / scale
    return LinearGate(weight.to(rows), float(np.ravel(model.intercept_)[0] - weight @ centre), layer=layer)


def _fit_cosine(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"], layer: int | None) -> CosineGate:
    """The condition vector c is the first principal direction of both kinds of query around the middle between their
    two means; θ and the side are what gives the best F1 on these very queries, as the authors choose them. They average
    activations over all tokens of a prompt; here both are taken where the gate reads."""
    middle = (rows.mean(dim=0) + others.mean(dim=0)) / 2
    both = torch.cat([rows, others]) - middle
    gate = CosineGate(torch.linalg.svd(both.double(), full_matrices=False).Vh[0].to(rows), 0.0, layer=layer)
    wanted, unwanted = gate.score(rows), gate.score(others)
    cuts = torch.cat([wanted, unwanted]).unique()
    sides = []
    for above, beyond in ((True, torch.ge), (False, torch.lt)):
        hits, alarms = (beyond(scores, cuts.unsqueeze(1)).sum(dim=1) for scores in (wanted, unwanted))
        f1 = 2 * hits.float() / (hits + alarms + len(rows))
        sides.append((float(f1.max()), above, float(cuts[f1.argmax()])))
    _, above, cut = max(sides, key=lambda side: side[:2])
    return replace(gate, cut=cut, above=above)

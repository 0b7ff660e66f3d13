"""`fit_gate`: from activations to a gate, on the energy ratio of a subspace or on what parts two kinds of query."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal, NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError, ShapeError
from fsteer_lens.ground import checks
from fsteer_lens.method.contrasting import Cutting, Fit, Side, fit_cosine, fit_cut, fit_linear, fit_residual_ratio
from fsteer_lens.method.fitting_null_space import fit_null_space_gate
from fsteer_lens.method.folds import Fold, cut_folds
from fsteer_lens.method.gates import Gate, Reading, require_reading
from fsteer_lens.method.linalg import require_matrix, require_rank
from fsteer_lens.method.subspace import Subspace, fit_subspace
from fsteer_lens.method.subspace_gates import CalibrationRange, EnergyGate, LogisticGate, QuantileGate

MAX_RANK: Final = 64
QUANTILE: Final = {"epsilon": 0.003, "gamma": 4.0, "cdf": "linear"}
FOLDS: Final = 5
FALSE_ALARMS: Final = 0.05
RANK: Final = 8
SUBSPACE_KINDS = ("quantile", "logistic", "energy")
CONTRASTING_KINDS = ("linear", "residual_ratio", "cosine")
NULL_SPACE: Final = "null_space"
NEED_GENERAL = ("logistic", *CONTRASTING_KINDS, NULL_SPACE)
Kind = Literal["quantile", "logistic", "energy", "linear", "residual_ratio", "cosine", "null_space"]


class GateOptions(TypedDict, total=False):
    """What `fit_gate` takes beside its own arguments: see there."""

    calibration: Float[Tensor, "n_calibration d"] | None
    folds: int | None
    seed: int
    epsilon: float
    gamma: float
    cdf: Literal["linear", "step"]
    max_rank: int
    false_alarms: float | None
    augment: Mapping[str, Float[Tensor, "_ d"]] | None
    domains: Iterable[str | None] | None


FOLDED: Final = {"folds", "seed"}
ALLOWED: Final = {
    "quantile": frozenset({"calibration", "max_rank"} | FOLDED | set(QUANTILE)),
    "logistic": frozenset({"calibration", "max_rank"} | FOLDED),
    "energy": frozenset({"calibration", "max_rank"} | FOLDED),
    "linear": frozenset({"false_alarms", "augment"} | FOLDED),
    "residual_ratio": frozenset({"false_alarms", "augment"} | FOLDED),
    "cosine": frozenset({"augment"}),
    NULL_SPACE: frozenset({"domains"} | FOLDED),
}
"""Options that have an effect, by kind of gate."""


def fit_gate(
    queries: Float[Tensor, "n d"],
    *,
    rank: int | None = None,
    kind: Kind | None = None,
    general: Float[Tensor, "n_general d"] | None = None,
    near_misses: Float[Tensor, "n_near d"] | None = None,
    groups: Iterable[str | None] | None = None,
    layer: int | None = None,
    read: Reading = "last",
    **options: Unpack[GateOptions],
) -> Gate:
    """Fit a gate: on the energy ratio of the queries' subspace, or on what parts them from those to be left alone.

    Args:
        queries: activations of the queries that need intervention, [n d].
        rank: rank of the subspace whose energy ratio decides, or of both subspaces of "residual_ratio" (None is 8 or
            what the data allow there); at most (smallest training fold) − 1.
        kind: None is "linear" where `general` is given, else "quantile". On the energy ratio of one subspace:
            "quantile" (paper Eq. 8), "logistic" (Eq. 9), "energy" (Eq. 15). On both kinds of query: "linear", a linear
            probe, logistic regression, standardised, classes balanced, L2 with C = 1; "residual_ratio", the log ratio
            of the energies that the subspaces of either kind leave; "cosine", the gate of CAST (Lee et al. 2024,
            arXiv 2409.05907); "null_space", a map that is 0 on general queries and 1 on these, see `NullSpaceGate`.
        general: activations of queries to be left alone; "quantile" and "energy" take none, all others need them.
        near_misses: of queries to be left alone that look like those that need intervention; count as general ones,
            and are reported apart. For the kinds that know both kinds of query.
        groups: fold group of every query (the template it was made from); a group is never split. None: random folds.
        layer: where the queries were read; the gate then refuses to act or to combine elsewhere.
        read: what they are of a prompt, as in `collect`; hook objects and reports ask the gate about the same.
        options: `folds` (5), cross-fitting folds that a gate is calibrated by (or one for each query or group), and
            `seed` (0) of random ones; for subspaces None calibrates in-sample, which is biased and is here for
            comparison only. For subspaces `calibration` (None), IR queries that the basis does not see, in place of
            folds; `max_rank` (None), keep this many ranks for `.at_rank`: 64, or as many as the data allow. For
            "linear" and "residual_ratio" `false_alarms` (0.05): open for at most this share of new prompts like the
            general ones and near misses together; None cuts "linear" at even odds, and needs no folds. For all three
            that know both kinds `augment` (None), activations of perturbed copies by name of what they are copies of
            ("queries", "general", "near_misses"): all prompts said in one way, then all in the next; they are fitted
            to, and never calibrated on. For "quantile" `epsilon` (0.003), `gamma` (4.0) and `cdf` ("linear"
            interpolates F, "step" is the paper's). The paper's ε and γ are not public; the defaults are what measured
            best on the tutor's valid split (docs/tutor_model_card.md). For "null_space" `domains` (None): of each
            general query where it is from, so that the gate knows what is left of the steering there.

    Raises:
        InputError: `rank` too high or missing, unknown `kind`, too few general queries for the rate, or options that
            contradict each other or have no effect.
        ShapeError, NonFiniteError: a tensor is no finite floating matrix of the queries' width.
        DataError: fewer than two groups to cut folds from.
    """
    by_default = "quantile" if general is None else "linear"
    kind = checks.choice("gate kind", kind or by_default, (*SUBSPACE_KINDS, *CONTRASTING_KINDS, NULL_SPACE))
    require_reading(read)
    given: dict[str, Any] = {
        name: value for name, value in options.items() if value is not None or name in ("folds", "false_alarms")
    }
    cut = kind in ("linear", "residual_ratio") and given.get("false_alarms", FALSE_ALARMS) is not None
    if groups is not None:
        listed = checks.several("groups", groups, "a group for each query")
        groups = [None if checks.is_missing(group) else group for group in listed]
    grouped = groups is not None and any(group is not None for group in groups)
    allowed = ALLOWED[kind] - (FOLDED if kind == "linear" and not cut else set())
    unused = sorted(set(given) - allowed)
    if kind in ("linear", "cosine", NULL_SPACE):
        unused += ["rank"] * (rank is not None)
    if grouped and not (cut or kind in (*SUBSPACE_KINDS, NULL_SPACE)):
        unused.append("groups")
    if near_misses is not None and kind not in CONTRASTING_KINDS:
        unused.append("near_misses")
    if unused:
        raise InputError(f"fit_gate(kind={kind!r})", expected=f"no other options than {sorted(allowed)}", got=unused)
    if (kind in NEED_GENERAL) == (general is None):
        needs, got = ("needs", None) if general is None else ("takes no", "activations of queries to leave alone")
        kinds = ", ".join(map(repr, NEED_GENERAL))
        raise InputError(
            f"the {kind} gate {needs} general=", expected=f"general= with kind={kinds}, and no other", got=got
        )
    placed: dict[str, Any] = {"layer": layer, "read": read}
    if general is not None and kind == NULL_SPACE:
        return replace(fit_null_space_gate(queries, general, groups=groups if grouped else None, **given), **placed)
    rows = require_matrix(queries, "queries", min_rows=3)
    others = None if general is None else require_matrix(general, "general", d_model=rows.shape[1]).to(rows)
    if grouped:
        checks.require_unset("groups=, which cut the folds, so that none is random", seed=options.get("seed"))
    seed = checks.seed_of(options.get("seed", 0))
    if others is not None and kind in CONTRASTING_KINDS:
        parts = {"queries": rows, "general": others}
        if near_misses is not None:
            parts["near_misses"] = require_matrix(near_misses, "near_misses", d_model=rows.shape[1]).to(rows)
        cutting = None
        if cut:
            rate = checks.finite("false_alarms", given.get("false_alarms", FALSE_ALARMS), above=0, below=1)
            folds = checks.whole("folds", options.get("folds", FOLDS), 2)
            cutting = Cutting(rate, folds, groups if grouped else None, seed)
        return replace(_fit_contrasting(kind, parts, options.get("augment") or {}, rank, cutting), **placed)
    if rank is None:
        raise InputError(f"fit_gate(kind={kind!r})", expected="rank=, of the subspace", got=None)
    folds, cut_by, calibration = options.get("folds", FOLDS), groups if grouped else None, options.get("calibration")
    if calibration is not None:
        replaced = {"folds": "folds" in options or None, "seed": options.get("seed"), "groups": cut_by}
        checks.require_unset("calibration=, which replaces the folds", **replaced)
    if folds is None:
        checks.require_unset("folds=None, which cuts none", seed=options.get("seed"), groups=cut_by)
    folding = _Folding(folds, groups, calibration, seed)
    subspace, ratios, distance = _cross_fitted(rows, rank, options.get("max_rank"), folding)
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


def _fit_contrasting(
    kind: Kind,
    parts: Mapping[str, Float[Tensor, "_ d"]],
    augment: Mapping[str, Any],
    rank: int | None,
    cutting: Cutting | None,
) -> Any:
    """A gate of both kinds of query; by name, `parts` are activations and `augment` copies of them."""
    copies = {name: _copies(name, rows, augment.get(name)) for name, rows in parts.items()}
    unknown = sorted(set(augment) - set(parts))
    if unknown:
        raise InputError("augment", expected=f"copies of what is given, by name: {list(parts)}", got=unknown)
    wanted = Side(parts["queries"], *copies.pop("queries"))
    beside = [parts[name] for name in copies]
    starts = [sum(map(len, beside[:place])) for place in range(len(beside))]
    made = list(copies.values())
    source = torch.cat([start + of for start, (_, of) in zip(starts, made, strict=True)])
    others = Side(torch.cat(beside), torch.cat([rows for rows, _ in made]), source)
    fit: Fit = fit_cosine if kind == "cosine" else fit_linear
    if kind == "residual_ratio":
        folds = 1 if cutting is None else cutting.folds
        smallest = min(len(side.rows) - -(-len(side.rows) // folds) * (folds > 1) for side in (wanted, others))
        limit = min(smallest - 1, wanted.rows.shape[1] - 1)
        what = f"min(n, d) - 1 of the smallest training fold, {smallest} queries"
        fit = partial(fit_residual_ratio, rank=min(RANK, limit) if rank is None else require_rank(rank, limit, what))
    if cutting is None:
        return fit(torch.cat([wanted.rows, wanted.copies]), torch.cat([others.rows, others.copies]))
    return fit_cut(fit, wanted, others, len(parts.get("near_misses", ())), cutting)


def _copies(name: str, rows: Float[Tensor, "n d"], given: Any) -> tuple[Float[Tensor, "c d"], Tensor]:
    """Copies of rows, and which row each is of."""
    if given is None:
        return rows[:0], torch.empty(0, dtype=torch.long, device=rows.device)
    copies = require_matrix(given, f"augment[{name!r}]", d_model=rows.shape[1]).to(rows)
    if len(copies) % len(rows):
        expected = f"a whole number of copies of each of {len(rows)} {name}"
        raise ShapeError(f"augment[{name!r}]", expected=expected, got=f"{len(copies)} rows")
    return copies, torch.arange(len(copies), device=rows.device) % len(rows)


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

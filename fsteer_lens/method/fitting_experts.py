"""`fit_experts`: clusters, prototypes, a residual basis, and the controller, trained or in closed form."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.checks import choice, listed, require_unset, seed_of, whole
from fsteer_lens.method.controller import Training, train_controller
from fsteer_lens.method.experts import Experts
from fsteer_lens.method.fit_reports import report_of
from fsteer_lens.method.fitting_closed_form import fit_closed_form
from fsteer_lens.method.linalg import principal_directions, require_matrix

CLUSTERING_DIMENSIONS = 256

Preset = Literal["paper", "0.1"]

_TRAINED = {
    "n_experts": (4, 10),
    "residual_rank": 10,
    "learning_rate": 5e-4,
    "weight_decay": 1e-5,
    "validation": 0.1,
    "clip": 1.0,
}
PRESETS: Mapping[str | None, Mapping[str, Any]] = {
    "paper": {
        **_TRAINED,
        "prototype_scale": "unit",
        "route_loss": 0.0,
        "epochs": 100,
        "patience": 8,
        "standardize": False,
    },
    "0.1": {
        **_TRAINED,
        "prototype_scale": "shift",
        "route_loss": 1.0,
        "epochs": 300,
        "patience": 30,
        "standardize": True,
    },
    None: {"n_experts": (1, 10), "residual_rank": 32, "groups": None},
}
"""What each preset sets; every entry can be given to `fit_experts` by name instead."""


def fit_experts(
    queries: Float[Tensor, "n d"],
    shifts: Float[Tensor, "n d"],
    *,
    preset: Preset | None = None,
    n_experts: int | tuple[int, int] | None = None,
    residual_rank: int | None = None,
    prototype_scale: Literal["unit", "shift"] | None = None,
    route_loss: float | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    epochs: int | None = None,
    patience: int | None = None,
    standardize: bool | None = None,
    validation: float | None = None,
    clip: float | None = None,
    groups: Sequence[str | None] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Experts:
    """Cluster the shifts, take prototypes and a residual basis, and fit the controller: in closed form, or trained.

    Every option that is None is as the preset says, see `PRESETS`.

    Args:
        queries: query activations ĥ, [n d].
        shifts: response shifts δ of the same queries, [n d].
        preset: None, our default, is in closed form and trains nothing: ridge regressions whose strengths are those of
            the least held-out error, see `closed_form`; its report knows what the fit is worth on queries that it did
            not see. "paper" is Eq. 11-14 to the letter (AdamW, full batch). "0.1" is the default of version 0.1: the
            same with raw prototypes, a routing loss, longer and on standardised activations.
        n_experts: K, or the range (low, high) in which it is chosen: in closed form by whether clusters are found
            again, are more than one cloud, and are told by the queries, else 1 (or `low`, with a warning); trained, by
            the Calinski-Harabasz index. A single number in closed form is taken as it is.
        residual_rank: m, cut to what the data hold. In closed form U are the first m directions of what the residual
            regression predicts, trained those of the shifts.
        groups: fold group of every query (the template it was made from), which is never split; in closed form.
        prototype_scale: trained: "unit" averages unit shifts (paper Eq. 11), "shift" the raw ones, as the closed form
            always does.
        route_loss: trained: weight of the cross-entropy of α against the clusters; 0 is the paper.
        learning_rate, weight_decay, epochs, patience, validation, clip: trained: AdamW's rate and decay, the number of
            full-batch epochs, early stopping on a share of the queries, and gradient clipping; the fixed ones are
            those of the authors' code.
        standardize: trained: on centred and scaled queries and shifts; the scaling is then folded into the learned
            maps, so that the fitted formula is the same.
        seed: of the clustering and random folds, or of the initial weights and the validation split; the global
            generators are not touched.
        progress: show a progress bar while training; the closed form takes a second or two and shows none.

    Warns:
        UserWarning: the fit is not to be trusted; the sentences are in `report.doubts` too. In closed form it explains
            no more of held-out shifts than their mean, or K stands at an edge of the range (not at 1, which says that
            there are no modes); trained, it was best after its first epoch.

    Raises:
        ShapeError, NonFiniteError: not two finite floating matrices of one shape.
        DataError: fewer shifts than experts, a shift of length zero, or groups that cannot be cut into folds.
        InputError: options out of range, or one that has no effect on this kind of fit.
    """
    h, delta = require_matrix(queries, "queries", min_rows=2), require_matrix(shifts, "shifts", min_rows=2)
    delta = delta.to(h)
    if h.shape != delta.shape:
        raise DataError("shifts", expected=f"the shape of the queries {list(h.shape)}", got=list(delta.shape))
    choice("preset", preset, PRESETS)
    given = {
        "n_experts": n_experts,
        "residual_rank": residual_rank,
        "prototype_scale": prototype_scale,
        "route_loss": route_loss,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "epochs": epochs,
        "patience": patience,
        "standardize": standardize,
        "validation": validation,
        "clip": clip,
        "groups": groups,
    }
    idle = [name for name, value in given.items() if value is not None and name not in PRESETS[preset]]
    if idle:
        closed = 'The closed form trains nothing: leave them out, or train with preset="0.1".'
        raise InputError(
            f"fit_experts(preset={preset!r})",
            expected=f"options among {sorted(PRESETS[preset])}",
            got=idle,
            fix=closed if preset is None else "Only the closed form, preset=None, cuts folds: leave it out.",
        )
    options = {**PRESETS[preset], **{name: value for name, value in given.items() if value is not None}}
    residual_rank = whole("residual_rank", options.pop("residual_rank"), 1)
    low, high = _range_of(options.pop("n_experts"))
    if validation == 0:
        require_unset("validation=0, so that nothing stops early", patience=patience)
    if high == 1:
        require_unset("n_experts=1, so that nothing is routed", route_loss=route_loss or None)
    counts = _counts(low, high, len(h))
    zero = (delta.norm(dim=1) == 0).nonzero()
    if len(zero):
        raise DataError(
            "shifts",
            expected="shifts longer than zero",
            got=f"zero in row {int(zero[0, 0])}",
            fix="Drop contrasts whose two sides give the same activation.",
        )
    if preset is None:
        return fit_closed_form(h, delta, counts, residual_rank, groups, seed_of(seed))
    scale = choice("prototype_scale", options.pop("prototype_scale"), ("unit", "shift"))
    return _trained(h, delta, counts, residual_rank, scale, Training(seed=seed, **options), progress)


def _trained(
    h: Float[Tensor, "n d"],
    delta: Float[Tensor, "n d"],
    counts: range,
    residual_rank: int,
    prototype_scale: str,
    training: Training,
    progress: bool,
) -> Experts:
    unit = delta / delta.norm(dim=1, keepdim=True)
    clusters, criterion = _cluster(unit, counts, training.seed)
    sources = unit if prototype_scale == "unit" else delta
    prototypes = torch.stack([sources[clusters == index].mean(dim=0) for index in range(int(clusters.max()) + 1)])
    _, residual_basis, _ = principal_directions(delta, min(residual_rank, h.shape[0] - 1, h.shape[1]))
    controller, best_epoch, valid_rows = train_controller(
        h, delta, prototypes, residual_basis, clusters, training, progress=progress
    )
    doubts = []
    if len(valid_rows) and best_epoch == 1 and training.epochs > training.patience:
        doubts.append(
            "training the experts: the first epoch was the best on the validation part, so little was learnt; give more"
            " contrasts, or leave preset= out, which trains nothing"
        )
        warnings.warn(doubts[0], stacklevel=3)
    if len(counts) > 1 and len(prototypes) in (counts[0], counts[-1]):  # true of half of all fits: no warning
        doubts.append(
            f"{len(prototypes)} experts, at an edge of the {counts[0]} to {counts[-1]} that were tried: the index may"
            " be larger outside"
        )
    experts = Experts(prototypes, residual_basis, controller, (True,) * len(prototypes))
    told = {"epochs": best_epoch, "criterion": criterion, "doubts": tuple(doubts)}
    return replace(experts, report=report_of(experts, h, delta, clusters, valid_rows, **told))


def _range_of(n_experts: Any) -> tuple[int, int]:
    """The least and the largest number of experts."""
    given = listed(n_experts)
    given = given if isinstance(given, Sequence) else (given, given)
    ends = [whole("n_experts", end, 1, why="or a range (low, high)") for end in given]
    if len(ends) != 2 or ends[0] > ends[1]:
        raise InputError("n_experts", expected="an int >= 1 or a range (low, high)", got=n_experts)
    return ends[0], ends[1]


def _counts(low: int, high: int, n: int) -> range:
    """The numbers of experts that are tried: no more than n − 1 of them where there is a choice."""
    if low > n or (low != high and low > n - 1):
        raise DataError(
            "fewer shifts than experts need",
            expected=f"at least {low if low == high else low + 1} shifts for {low} to {high} experts",
            got=n,
            fix="Give more contrasts or a smaller n_experts.",
        )
    return range(low, high + 1 if low == high else min(high, n - 1) + 1)


def _cluster(unit: Float[Tensor, "n d"], counts: range, seed: int) -> tuple[Int[Tensor, " n"], dict[int, float]]:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import calinski_harabasz_score

    n, d_model = unit.shape
    dimensions = min(CLUSTERING_DIMENSIONS, n - 1, d_model)
    solver = "covariance_eigh" if n >= d_model else "full"
    # in float64: scikit-learn would convert float32 anew for every distance
    points = PCA(dimensions, svd_solver=solver).fit_transform(unit.double().cpu().numpy())
    best: tuple[float, Any] | None = None
    criterion: dict[int, float] = {}
    for count in counts:
        kmeans = KMeans(count, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
        labels = kmeans.fit_predict(points)
        defined = 2 <= len(set(labels)) <= n - 1
        criterion[count] = float(calinski_harabasz_score(points, labels)) if defined else 0.0
        if best is None or criterion[count] > best[0]:
            best = (criterion[count], labels)
    assert best is not None
    labels = torch.from_numpy(best[1]).long().unique(return_inverse=True)[1]
    return labels.to(unit.device), criterion

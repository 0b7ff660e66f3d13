"""`fit_experts`: clusters, prototypes, a residual basis, and the training of the controller."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.checks import choice, listed, require_unset, whole
from fsteer_lens.method.controller import Training, train_controller
from fsteer_lens.method.experts import Experts, FitReport
from fsteer_lens.method.linalg import principal_directions, require_matrix

CLUSTERING_DIMENSIONS = 256

PRESETS: Mapping[str | None, Mapping[str, Any]] = {
    "paper": {"prototype_scale": "unit", "route_loss": 0.0, "epochs": 100, "patience": 8, "standardize": False},
    None: {"prototype_scale": "shift", "route_loss": 1.0, "epochs": 300, "patience": 30, "standardize": True},
}
"""What each preset sets; every entry can be given to `fit_experts` by name instead."""


def fit_experts(
    queries: Float[Tensor, "n d"],
    shifts: Float[Tensor, "n d"],
    *,
    n_experts: int | tuple[int, int] = (4, 10),
    residual_rank: int = 10,
    prototype_scale: Literal["unit", "shift"] | None = None,
    route_loss: float | None = None,
    preset: Literal["paper"] | None = None,
    learning_rate: float = 5e-4,
    weight_decay: float = 1e-5,
    epochs: int | None = None,
    patience: int | None = None,
    standardize: bool | None = None,
    validation: float = 0.1,
    clip: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> Experts:
    """Cluster the shifts, take prototypes and a residual basis, and train the controller (AdamW, full batch).

    Args:
        queries: query activations ĥ, [n d].
        shifts: response shifts δ of the same queries, [n d].
        n_experts: K, or the range (low, high) in which the Calinski-Harabasz index chooses it.
        residual_rank: m, cut to min(n − 1, d).
        prototype_scale: "unit" averages unit shifts (paper Eq. 11), "shift" the raw ones. None: as the preset says.
        route_loss: weight of the cross-entropy of α against the clusters; 0 is the paper. None: as the preset says.
        preset: "paper" is Eq. 11-14 to the letter; None is our default. See `PRESETS`.
        learning_rate, weight_decay, epochs, patience, validation, clip: AdamW's rate and decay, the number of
            full-batch epochs, early stopping on a share of the queries, and gradient clipping; the fixed ones are
            those of the authors' code. None: as the preset says.
        standardize: train on centred and scaled queries and shifts, then fold the scaling into the learned maps, so
            that the fitted formula is the same. None: as the preset says.
        seed: of the clustering, the initial weights and the validation split; the global generators are not touched.
        progress: show a progress bar.

    Raises:
        ShapeError, NonFiniteError: not two finite floating matrices of one shape.
        DataError: fewer shifts than experts, or a shift of length zero.
        InputError: options out of range.
    """
    h, delta = require_matrix(queries, "queries", min_rows=2), require_matrix(shifts, "shifts", min_rows=2)
    delta = delta.to(h)
    if h.shape != delta.shape:
        raise DataError("shifts", expected=f"the shape of the queries {list(h.shape)}", got=list(delta.shape))
    choice("preset", preset, PRESETS)
    given = {
        "prototype_scale": prototype_scale,
        "route_loss": route_loss,
        "epochs": epochs,
        "patience": patience,
        "standardize": standardize,
    }
    options = {**PRESETS[preset], **{name: value for name, value in given.items() if value is not None}}
    scale = choice("prototype_scale", options.pop("prototype_scale"), ("unit", "shift"))
    residual_rank = whole("residual_rank", residual_rank, 1)
    if validation == 0:
        require_unset("validation=0, so that nothing stops early", patience=patience)
    low, high = _range_of(n_experts)
    if high == 1:
        require_unset("n_experts=1, so that nothing is routed", route_loss=route_loss or None)
    training = Training(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        validation=validation,
        clip=clip,
        seed=seed,
        **options,
    )
    norms = delta.norm(dim=1, keepdim=True)
    if (norms == 0).any():
        raise DataError(
            "shifts",
            expected="shifts longer than zero",
            got=f"zero in row {int((norms == 0).nonzero()[0, 0])}",
            fix="Drop contrasts whose two sides give the same activation.",
        )
    unit = delta / norms
    clusters, criterion = _cluster(unit, low, high, training.seed)
    sources = unit if scale == "unit" else delta
    prototypes = torch.stack([sources[clusters == index].mean(dim=0) for index in range(int(clusters.max()) + 1)])
    _, residual_basis, _ = principal_directions(delta, min(residual_rank, h.shape[0] - 1, h.shape[1]))
    controller, best_epoch, valid_rows = train_controller(
        h, delta, prototypes, residual_basis, clusters, training, progress=progress
    )
    experts = Experts(prototypes, residual_basis, controller, (True,) * len(prototypes))
    return replace(experts, report=_report(experts, h, delta, clusters, criterion, best_epoch, valid_rows))


def _range_of(n_experts: Any) -> tuple[int, int]:
    """The least and the largest number of experts."""
    given = listed(n_experts)
    given = given if isinstance(given, Sequence) else (given, given)
    ends = [whole("n_experts", end, 1, why="or a range (low, high)") for end in given]
    if len(ends) != 2 or ends[0] > ends[1]:
        raise InputError("n_experts", expected="an int >= 1 or a range (low, high)", got=n_experts)
    return ends[0], ends[1]


def _cluster(unit: Float[Tensor, "n d"], low: int, high: int, seed: int) -> tuple[Int[Tensor, " n"], dict[int, float]]:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import calinski_harabasz_score

    n, d_model = unit.shape
    if low > n or (low != high and low > n - 1):
        raise DataError(
            "fewer shifts than experts need",
            expected=f"at least {low if low == high else low + 1} shifts for {low} to {high} experts",
            got=n,
            fix="Give more contrasts or a smaller n_experts.",
        )
    dimensions = min(CLUSTERING_DIMENSIONS, n - 1, d_model)
    solver = "covariance_eigh" if n >= d_model else "full"
    # in float64: scikit-learn would convert float32 anew for every distance
    points = PCA(dimensions, svd_solver=solver).fit_transform(unit.double().cpu().numpy())
    best: tuple[float, Any] | None = None
    criterion: dict[int, float] = {}
    for count in range(low, min(high, n - 1) + 1 if low != high else high + 1):
        kmeans = KMeans(count, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
        labels = kmeans.fit_predict(points)
        defined = 2 <= len(set(labels)) <= n - 1
        criterion[count] = float(calinski_harabasz_score(points, labels)) if defined else 0.0
        if best is None or criterion[count] > best[0]:
            best = (criterion[count], labels)
    assert best is not None
    labels = torch.from_numpy(best[1]).long().unique(return_inverse=True)[1]
    return labels.to(unit.device), criterion


def _report(
    experts: Experts,
    h: Float[Tensor, "n d"],
    delta: Float[Tensor, "n d"],
    clusters: Int[Tensor, " n"],
    criterion: Mapping[int, float],
    epochs: int,
    valid_rows: Int[Tensor, " n_valid"],
) -> FitReport:
    parts = experts.parts(h)
    strongest = parts.weights.argmax(dim=-1)
    error = (parts.vector - delta).square().sum(dim=1)
    valid = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    valid[valid_rows] = True
    ratio = parts.prototype_part.norm(dim=1) / parts.vector.norm(dim=1).clamp(min=1e-12)
    return FitReport(
        agreement=float((strongest == clusters).float().mean()),
        dead=1 - len(strongest.unique()) / experts.n_experts,
        prototype_share=float(ratio.mean()),
        explained=float(1 - error.mean() / delta.square().sum(dim=1).mean()),
        train_loss=float(error[~valid].mean()),
        valid_loss=float(error[valid].mean()) if len(valid_rows) else None,
        epochs=epochs,
        criterion=dict(criterion),
        clusters=clusters.cpu(),
    )

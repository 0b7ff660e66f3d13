"""MoSE, the experts: how to steer.

1. Divide every response shift δ by its norm; K-means on these, K chosen by the Calinski-Harabasz index.
2. A prototype per cluster: the mean of its members' shifts. C holds them, frozen.
3. U: the first m principal directions of the raw shifts, frozen.
4. Learn the routing and the residual coefficients on mean ‖v(ĥ) − δ‖²:

    α(h) = softmax((W_K C)ᵀ (W_Q h) / √d)      v(h) = C α(h) + U β(h)      β(h) = Linear → ReLU → Linear

(FineSteer, arXiv 2604.15488, Eq. 11-14.) Trained by that loss alone the routing can collapse on few experts, so our
default adds `route_loss` times the cross-entropy of α against the clusters; `preset="paper"` is the published method.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.controller import Controller, train_controller
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.linalg import move, principal_directions, require_matrix, require_shapes, require_width, variant

CLUSTERING_DIMENSIONS = 256

PRESETS: Mapping[str | None, Mapping[str, Any]] = {
    "paper": {"prototype_scale": "unit", "route_loss": 0.0, "epochs": 100, "patience": 8, "standardize": False},
    None: {"prototype_scale": "shift", "route_loss": 1.0, "epochs": 300, "patience": 30, "standardize": True},
}
"""What each preset sets; every entry can be given to `fit_experts` by name instead."""


class Parts(NamedTuple):
    """A steering vector and what it is made of, for a batch of query activations."""

    weights: Float[Tensor, "*batch k"]
    prototype_part: Float[Tensor, "*batch d"]
    coefficients: Float[Tensor, "*batch m"]
    residual_part: Float[Tensor, "*batch d"]
    vector: Float[Tensor, "*batch d"]


@dataclass(frozen=True, eq=False)
class FitReport:
    """What the fit of the experts came to, on its own training set.

    Attributes:
        agreement: share of queries whose strongest expert is their cluster.
        dead: share of experts that are nobody's strongest.
        prototype_share: mean of ‖C α‖ / ‖v‖.
        explained: 1 − mean ‖v − δ‖² / mean ‖δ‖².
        train_loss: mean ‖v − δ‖² over the training part.
        valid_loss: the same over the validation part, None where there is none.
        epochs: epochs until the best validation loss.
        criterion: Calinski-Harabasz index of every K that was tried.
        clusters: the cluster of every query, [n].
    """

    agreement: float
    dead: float
    prototype_share: float
    explained: float
    train_loss: float
    valid_loss: float | None
    epochs: int
    criterion: Mapping[int, float]
    clusters: Int[Tensor, " n"] = field(repr=False)


@dataclass(frozen=True, eq=False, repr=False)
class Experts:
    """Prototype vectors, a residual basis, and the learned controller that mixes them for a query.

    Attributes:
        prototypes: C, one row per expert, [k d].
        residual_basis: U, orthonormal columns, [d m].
        controller: the learned maps.
        enabled: which experts take part; the weights of the others are 0.
        use_residual: whether U β(h) is added.
        report: what the fit came to; None for experts that were put together by hand.
    """

    prototypes: Float[Tensor, "k d"]
    residual_basis: Float[Tensor, "d m"]
    controller: Controller
    enabled: tuple[bool, ...]
    use_residual: bool = True
    report: FitReport | None = None

    def __post_init__(self) -> None:
        learned = self.controller
        require_shapes(
            "experts",
            prototypes=(self.prototypes, "k d"),
            residual_basis=(self.residual_basis, "d m"),
            query_weight=(learned.query_weight, "d_k d"),
            query_bias=(learned.query_bias, "d_k"),
            key_weight=(learned.key_weight, "d_k d"),
            key_bias=(learned.key_bias, "d_k"),
            hidden_weight=(learned.hidden_weight, "hidden d"),
            hidden_bias=(learned.hidden_bias, "hidden"),
            output_weight=(learned.output_weight, "m hidden"),
            output_bias=(learned.output_bias, "m"),
        )
        self._require_switches(self.enabled)
        if not isinstance(self.use_residual, bool):
            raise InputError("experts use_residual", expected="True or False", got=repr(self.use_residual))
        if not isinstance(self.report, FitReport | None):
            raise InputError("experts report", expected="a FitReport or None", got=type(self.report).__name__)

    def __repr__(self) -> str:
        off = [index for index, on in enumerate(self.enabled) if not on]
        switched = (f", without={off}" if off else "") + ("" if self.use_residual else ", residual=off")
        return (
            f"Experts(n_experts={self.n_experts}, d_model={self.d_model}, residual_rank={self.residual_rank}{switched})"
        )

    @property
    def n_experts(self) -> int:
        """Number of experts, switched off ones included."""
        return self.prototypes.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.prototypes.shape[1]

    @property
    def residual_rank(self) -> int:
        """m, the number of residual directions."""
        return self.residual_basis.shape[1]

    def route(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch k"]:
        """Weight α of each expert: dense, non-negative, summing to 1 over the enabled ones."""
        require_width(h, "activation", self.d_model)
        logits = self.controller.logits(h.to(self.prototypes), self.prototypes)
        return logits.masked_fill(self._off(logits.device), -math.inf).softmax(dim=-1)

    def parts(self, h: Float[Tensor, "*batch d"]) -> Parts:
        """The steering vector of each query activation with its parts, in the experts' dtype."""
        weights = self.route(h)
        coefficients = self.controller.coefficients(h.to(self.prototypes)) * self.use_residual
        prototype_part = weights @ self.prototypes
        residual_part = coefficients @ self.residual_basis.T
        return Parts(weights, prototype_part, coefficients, residual_part, prototype_part + residual_part)

    def vector(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The steering vector v(h) = C α(h) + U β(h)."""
        return self.parts(h).vector

    def nearest(self, shifts: Float[Tensor, "*batch d"]) -> Int[Tensor, "*batch"]:
        """The expert, of those that are on, whose prototype has the largest cosine with each shift."""
        cosines = shifts.to(self.prototypes) @ F.normalize(self.prototypes, dim=-1).T
        return cosines.masked_fill(self._off(cosines.device), -math.inf).argmax(dim=-1)

    def without_expert(self, index: int) -> "Experts":
        """The same experts with one switched off: its logit is masked and the other weights renormalised."""
        self._check(index)
        return self._switched(tuple(on and other != index for other, on in enumerate(self.enabled)))

    def only_expert(self, index: int) -> "Experts":
        """The same experts with one of them at weight 1."""
        self._check(index)
        return self._switched(tuple(other == index for other in range(self.n_experts)))

    def without_residual(self) -> "Experts":
        """The same experts without U β(h)."""
        return variant(self, use_residual=False)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Experts":
        """The same experts on another device or in another dtype."""
        return move(self, device, dtype)

    def _off(self, device: torch.device) -> Bool[Tensor, " k"]:
        return torch.tensor([not on for on in self.enabled], device=device)

    def _switched(self, enabled: tuple[bool, ...]) -> "Experts":
        self._require_switches(enabled)
        return variant(self, enabled=enabled)

    def _require_switches(self, enabled: tuple[bool, ...]) -> None:
        if len(enabled) != self.n_experts or not any(enabled) or not all(isinstance(on, bool) for on in enabled):
            raise InputError(
                "experts enabled", expected=f"{self.n_experts} switches, at least one of them on", got=enabled
            )

    def _check(self, index: int) -> None:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.n_experts:
            raise InputError("expert", expected=f"an int in 0..{self.n_experts - 1}", got=index)


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
    if preset not in PRESETS:
        raise InputError("preset", expected="'paper' or None", got=repr(preset))
    given = {
        "prototype_scale": prototype_scale,
        "route_loss": route_loss,
        "epochs": epochs,
        "patience": patience,
        "standardize": standardize,
    }
    options = {**PRESETS[preset], **{name: value for name, value in given.items() if value is not None}}
    if options["prototype_scale"] not in ("unit", "shift"):
        raise InputError("prototype_scale", expected="'unit' or 'shift'", got=repr(prototype_scale))
    ranges = {
        "route_loss >= 0": options["route_loss"] >= 0,
        "epochs >= 1": options["epochs"] >= 1,
        "patience >= 1": options["patience"] >= 1,
        "residual_rank >= 1": residual_rank >= 1,
        "0 <= validation < 1": 0 <= validation < 1,
        "learning_rate > 0": learning_rate > 0,
        "weight_decay >= 0": weight_decay >= 0,
        "clip > 0": clip > 0,
    }
    broken = [name for name, holds in ranges.items() if not holds]
    if broken:
        raise InputError("fit_experts", expected=", ".join(broken), got="a value outside")
    norms = delta.norm(dim=1, keepdim=True)
    if (norms == 0).any():
        raise DataError(
            "shifts",
            expected="shifts longer than zero",
            got=f"zero in row {int((norms == 0).nonzero()[0, 0])}",
            fix="Drop contrasts whose two sides give the same activation.",
        )
    unit = delta / norms
    clusters, criterion = _cluster(unit, n_experts, seed)
    sources = unit if options["prototype_scale"] == "unit" else delta
    prototypes = torch.stack([sources[clusters == index].mean(dim=0) for index in range(int(clusters.max()) + 1)])
    _, residual_basis, _ = principal_directions(delta, min(residual_rank, h.shape[0] - 1, h.shape[1]))
    controller, best_epoch, valid_rows = train_controller(
        h,
        delta,
        prototypes,
        residual_basis,
        clusters,
        route_loss=options["route_loss"],
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        epochs=options["epochs"],
        patience=options["patience"],
        standardize=options["standardize"],
        n_valid=min(round(validation * h.shape[0]), h.shape[0] - 1),
        clip=clip,
        seed=seed,
        progress=progress,
    )
    experts = Experts(prototypes, residual_basis, controller, (True,) * len(prototypes))
    return replace(experts, report=_report(experts, h, delta, clusters, criterion, best_epoch, valid_rows))


def _cluster(
    unit: Float[Tensor, "n d"], n_experts: int | tuple[int, int], seed: int
) -> tuple[Int[Tensor, " n"], dict[int, float]]:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import calinski_harabasz_score

    n, d_model = unit.shape
    low, high = (n_experts, n_experts) if isinstance(n_experts, int) else n_experts
    if not 1 <= low <= high:
        raise InputError("n_experts", expected="an int >= 1 or a range (low, high)", got=n_experts)
    if low > n or (low != high and low > n - 1):
        raise DataError(
            "fewer shifts than experts need",
            expected=f"at least {low if low == high else low + 1} shifts for n_experts={n_experts}",
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

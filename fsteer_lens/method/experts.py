"""MoSE, the experts: how to steer.

1. Divide every response shift δ by its norm; K-means on these, K chosen by the Calinski-Harabasz index.
2. A prototype per cluster: the mean of its members' shifts. C holds them, frozen.
3. U: the first m principal directions of the raw shifts, frozen.
4. Learn the routing and the residual coefficients on mean ‖v(ĥ) − δ‖²:

    α(h) = softmax((W_K C)ᵀ (W_Q h) / √d)      v(h) = C α(h) + U β(h)      β(h) = Linear → ReLU → Linear

(FineSteer, arXiv 2604.15488, Eq. 11-14.) That is `preset="paper"`. By that loss alone the routing can collapse on few
experts, so `preset="0.1"` adds `route_loss` times the cross-entropy of α against the clusters.
Both are trained; our default keeps v(h) = C α(h) + U β(h) and fits it without training: see `closed_form`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import brief, clean_text, instance, normalised, optional, several, switch, whole
from fsteer_lens.method.controller import Controller, QuadraticController
from fsteer_lens.method.linalg import move, require_shapes, require_width, variant


class Parts(NamedTuple):
    """A steering vector and what it is made of, for a batch of query activations."""

    weights: Float[Tensor, "*batch k"]
    prototype_part: Float[Tensor, "*batch d"]
    coefficients: Float[Tensor, "*batch m"]
    residual_part: Float[Tensor, "*batch d"]
    vector: Float[Tensor, "*batch d"]


@dataclass(frozen=True)
class HeldOut:
    """What the fit of the experts came to on queries that it did not see, by cross-validation within the training set.

    The clusters were found on all shifts, and the strengths chosen on these very folds: the numbers are a little too
    good, and a set that was kept aside knows better.

    Attributes:
        explained: 1 − mean ‖v − δ‖² / mean ‖δ‖².
        mean_shift: the same of one vector for all queries.
        ridge: the same of ridge regression, one linear map of the query without experts.
        standard_error: of the difference between `explained` and `mean_shift`, over queries.
        agreement: share of queries whose strongest expert is their cluster.
        calibration: mean distance of the strongest weight from the share of queries in which it is right, in ten bins.
        told: share of the clusters' entropy that the queries tell; 0 or less where they tell nothing.
        removal: of each expert, by how much ‖v − δ‖² / ‖δ‖² rises on its own cluster when it is switched off; not known
            of a single one.
        curve: of every number of experts that was tried, `explained` with the residual affine in the query.
        quadratic: whether the residual is quadratic in the query, which is taken where it explains clearly more.
    """

    explained: float
    mean_shift: float
    ridge: float
    standard_error: float
    agreement: float
    calibration: float
    told: float
    removal: tuple[float, ...] = ()
    curve: Mapping[int, float] = field(default_factory=dict)
    quadratic: bool = False

    @property
    def beats_mean_shift(self) -> bool:
        """Whether more is explained than by one vector, by more than two standard errors."""
        return self.explained - self.mean_shift > 2 * self.standard_error

    @property
    def curve_text(self) -> str:
        """The curve in words, empty where only one number of experts was tried."""
        told = ", ".join(f"{count}: {explained:.3f}" for count, explained in self.curve.items())
        return f"explained by number of experts {told}" if len(self.curve) > 1 else ""

    def __str__(self) -> str:
        least = f", removal costs {min(self.removal):.2f} or more" if self.removal else ""
        return (
            f"explained {self.explained:.3f} (mean shift {self.mean_shift:.3f}, ridge {self.ridge:.3f}), "
            f"expert = cluster {self.agreement:.2f}, calibration error {self.calibration:.2f}{least}"
        )


@dataclass(frozen=True, eq=False)
class FitReport:
    """What the fit of the experts came to, on its own training set; what it is worth on others is `held_out`.

    Attributes:
        agreement: share of queries whose strongest expert is their cluster.
        dead: share of experts that are nobody's strongest.
        prototype_share: mean of ‖C α‖ / ‖v‖.
        explained: 1 − mean ‖v − δ‖² / mean ‖δ‖².
        train_loss: mean ‖v − δ‖² over the training part.
        valid_loss: the same over the validation part, None where there is none.
        epochs: epochs until the best validation loss; 0 in closed form.
        criterion: of every K that was tried the number by which it was chosen: the Calinski-Harabasz index, in closed
            form the prediction strength.
        clusters: the cluster of every query, [n].
        held_out: what it came to on queries that it did not see; None where the fit did no cross-validation.
        doubts: what speaks against trusting it, in sentences.
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
    held_out: HeldOut | None = None
    doubts: tuple[str, ...] = ()


def called(n_experts: int, names: Sequence[str] | None) -> list[str]:
    """What to call each expert: its name, or "expert 0", "expert 1", ..."""
    return [f"expert {index}" for index in range(n_experts)] if names is None else list(names)


def mentioned(expert: int, names: Sequence[str] | None) -> str:
    """An expert within a sentence: a name that begins with a number has the word before it."""
    name = str(expert) if names is None else names[expert]
    return f"expert {name}" if name[:1].isdigit() else name


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
        names: what to call each of them; None is not known. `fsteer_lens.fit` takes the label that most of a cluster
            have, as in "5 · weapons".
    """

    prototypes: Float[Tensor, "k d"]
    residual_basis: Float[Tensor, "d m"]
    controller: Controller | QuadraticController
    enabled: tuple[bool, ...]
    use_residual: bool = True
    report: FitReport | None = None
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        learned = self.controller
        if not isinstance(learned, Controller | QuadraticController):
            raise InputError("experts controller", expected="a controller", got=brief(learned))
        require_shapes(
            "experts",
            prototypes=(self.prototypes, "k d"),
            residual_basis=(self.residual_basis, "d m"),
            **{name: (getattr(learned, name), axes) for name, axes in learned.axes.items()},
        )
        normalised(
            self,
            enabled=self._switches(self.enabled),
            use_residual=switch("experts use_residual", self.use_residual),
            names=None if self.names is None else self._named(self.names),
        )
        optional(instance, "experts report", self.report, FitReport, "a FitReport or None")

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
        require_width(shifts, "shifts", self.d_model)
        cosines = shifts.to(self.prototypes) @ F.normalize(self.prototypes, dim=-1).T
        return cosines.masked_fill(self._off(cosines.device), -math.inf).argmax(dim=-1)

    def without_expert(self, index: int) -> "Experts":
        """The same experts with one switched off: its logit is masked and the other weights renormalised."""
        off = self._number(index)
        return self._switched(tuple(on and other != off for other, on in enumerate(self.enabled)))

    def only_expert(self, index: int) -> "Experts":
        """The same experts with one of them at weight 1."""
        only = self._number(index)
        return self._switched(tuple(other == only for other in range(self.n_experts)))

    def without_residual(self) -> "Experts":
        """The same experts without U β(h)."""
        return variant(self, use_residual=False)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Experts":
        """The same experts on another device or in another dtype."""
        return move(self, device, dtype)

    def _off(self, device: torch.device) -> Bool[Tensor, " k"]:
        return torch.tensor([not on for on in self.enabled], dtype=torch.bool, device=device)

    def _switched(self, enabled: tuple[bool, ...]) -> "Experts":
        return variant(self, enabled=self._switches(enabled))

    def _switches(self, enabled: Sequence[bool]) -> tuple[bool, ...]:
        given = several("experts enabled", enabled, "a list of switches")
        switches = tuple(switch("experts enabled", on) for on in given)
        if len(switches) != self.n_experts or not any(switches):
            raise InputError(
                "experts enabled", expected=f"{self.n_experts} switches, at least one of them on", got=enabled
            )
        return switches

    def _named(self, names: Sequence[str]) -> tuple[str, ...]:
        given = several("names of experts", names, "a list of texts")
        if len(given) != self.n_experts:
            raise InputError("names of experts", expected=f"one for each of {self.n_experts}", got=len(given))
        return tuple(clean_text("name of an expert", name) for name in given)

    def _number(self, index: int) -> int:
        return whole("expert", index, 0, self.n_experts - 1)

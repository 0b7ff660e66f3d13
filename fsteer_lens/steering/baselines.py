"""What FineSteer is compared with: the same protocol, trace and files.

- mean shift, or contrastive activation addition (Rimsky et al. 2024, arXiv 2312.06681): `fit_mean_shift`
- principal direction of the shifts, a reading vector of RepE (Zou et al. 2023, arXiv 2310.01405): `fit_pca_direction`
- conditional steering, a cosine gate on a condition vector (CAST, Lee et al. 2024, arXiv 2409.05907):
  `fit_gate(kind="cosine")` gives the gate, for any of the others
- directional ablation (Arditi et al. 2024, arXiv 2406.11717): `fit_directional_ablation`
- a linear map of the query in the null space of general queries (AlphaSteer, Sheng et al. 2025, arXiv 2506.07022):
  `fit_null_space`; `fit_gate(kind="null_space")` makes such a map of a number, a gate for any of the others
- the mean shift of the nearest cluster, experts without a learned router: `fit_nearest_centroid`
- a linear map of the query to its shift by ridge regression, the honest rival of any mixture: `fit_ridge`
"""

from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.checks import finite, instance, seed_of, whole
from fsteer_lens.hooks.probes import SubspaceAblation
from fsteer_lens.method.experts import Experts
from fsteer_lens.method.folds import cut_folds
from fsteer_lens.method.gates import Gate
from fsteer_lens.method.linalg import require_matrix, require_shapes, require_width
from fsteer_lens.method.ridge import STRENGTHS, Spectrum, cross_validated
from fsteer_lens.method.subspace import Subspace
from fsteer_lens.reading.activations import Activations
from fsteer_lens.steering.lengths import mean_shift_length
from fsteer_lens.steering.steering import Decision, Steering


class _OneLayer(Steering):
    """A method at one layer, behind an optional gate."""

    gate: Gate | None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.layer is None:
            raise InputError(name, expected="layer=", got=None)
        if self.gate is not None:
            self._require_gate(self.gate, self.layer)
        super().__post_init__()

    @property
    def layers(self) -> tuple[int, ...]:
        """The one layer."""
        assert self.layer is not None
        return (self.layer,)

    def gate_at(self, layer: int) -> Gate | None:
        """The gate; None is always open."""
        return self.gate


@dataclass(frozen=True, eq=False, repr=False)
class _OneVector(_OneLayer):
    """One vector for every query."""

    vector: Float[Tensor, " d"]
    gate: Gate | None = None

    def __post_init__(self) -> None:
        require_shapes(type(self).__name__, vector=(self.vector, "d"))
        super().__post_init__()

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return len(self.vector)

    def vectors(self, layer: int, h: Float[Tensor, "*batch d"]) -> Decision:
        """The same vector for every activation."""
        require_width(h, "activation", self.d_model)
        return Decision(h.new_ones(h.shape[:-1]), self.vector.to(h).expand(h.shape))


@final
@dataclass(frozen=True, eq=False, repr=False)
class MeanShift(_OneVector):
    """One vector for every query, the mean response shift: h ← h + λ · g(ĥ) · mean δ.

    Contrastive activation addition (Rimsky et al. 2024, arXiv 2312.06681) with an optional gate.

    Attributes:
        vector: what is added, [d].
        gate: when to add it; None for always.
    """


@final
@dataclass(frozen=True, eq=False, repr=False)
class PcaDirection(_OneVector):
    """One vector for every query, the direction in which the shifts are longest: h ← h + λ · g(ĥ) · w.

    A reading vector of representation engineering (Zou et al. 2023, arXiv 2310.01405), used for control.

    Attributes:
        vector: what is added, [d].
        gate: when to add it; None for always.
    """


@final
@dataclass(frozen=True, eq=False, repr=False)
class NullSpaceSteering(_OneLayer):
    """A vector that is linear in the query: h ← h + λ · g(ĥ) · M ĥ, with M = 0 on the span of general queries.

    AlphaSteer (Sheng et al. 2025, arXiv 2506.07022), M = Δ P.

    Attributes:
        matrix: M, [d d].
        gate: when to add it; None for always: the null space is this method's own way of leaving prompts alone.
    """

    matrix: Float[Tensor, "d d"]
    gate: Gate | None = None

    def __post_init__(self) -> None:
        require_shapes("NullSpaceSteering", matrix=(self.matrix, "d d"))
        super().__post_init__()

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return len(self.matrix)

    def vectors(self, layer: int, h: Float[Tensor, "*batch d"]) -> Decision:
        """M h for every activation."""
        require_width(h, "activation", self.d_model)
        return Decision(h.new_ones(h.shape[:-1]), h @ self.matrix.to(h).T)


@final
@dataclass(frozen=True, eq=False, repr=False)
class RidgeSteering(_OneLayer):
    """A vector that is affine in the query, fitted to the shifts: h ← h + λ · g(ĥ) · (M ĥ + b).

    Attributes:
        matrix: M, [d d].
        bias: b, [d].
        gate: when to add it; None for always.
    """

    matrix: Float[Tensor, "d d"]
    bias: Float[Tensor, " d"]
    gate: Gate | None = None

    def __post_init__(self) -> None:
        require_shapes("RidgeSteering", matrix=(self.matrix, "d d"), bias=(self.bias, "d"))
        super().__post_init__()

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return len(self.bias)

    def vectors(self, layer: int, h: Float[Tensor, "*batch d"]) -> Decision:
        """M h + b for every activation."""
        require_width(h, "activation", self.d_model)
        return Decision(h.new_ones(h.shape[:-1]), F.linear(h, self.matrix.to(h), self.bias.to(h)))


@final
@dataclass(frozen=True, eq=False, repr=False)
class NearestCentroid(_OneLayer):
    """The mean shift of the cluster whose mean query is nearest: experts without a learned router.

    Attributes:
        centroids: mean query of each cluster, [k d].
        shifts: mean shift of each cluster, [k d].
        gate: when to add it; None for always.
    """

    centroids: Float[Tensor, "k d"]
    shifts: Float[Tensor, "k d"]
    gate: Gate | None = None

    def __post_init__(self) -> None:
        require_shapes("NearestCentroid", centroids=(self.centroids, "k d"), shifts=(self.shifts, "k d"))
        super().__post_init__()

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.centroids.shape[1]

    def vectors(self, layer: int, h: Float[Tensor, "*batch d"]) -> Decision:
        """The nearest cluster's shift; its weight is 1, that of the others 0."""
        require_width(h, "activation", self.d_model)
        rows = h.to(self.centroids)
        nearest = torch.cdist(rows.reshape(-1, self.d_model), self.centroids).argmin(dim=-1).reshape(rows.shape[:-1])
        weights = F.one_hot(nearest, len(self.centroids)).to(h)
        return Decision(h.new_ones(h.shape[:-1]), weights @ self.shifts.to(h), weights=weights)


def fit_mean_shift(activations: Activations, *, gate: Gate | None = None, **options: Any) -> MeanShift:
    """The mean of the response shifts as a steering; `options` (strength, scope, schedule) as in `MeanShift`.

    Raises:
        DataError: activations without shifts.
    """
    return MeanShift(_shifts(activations).mean(dim=0), gate, **_about(activations), **options)


def fit_pca_direction(activations: Activations, *, gate: Gate | None = None, **options: Any) -> PcaDirection:
    """The first right singular vector of the shifts, which are not centred, as a steering.

    That is their first principal direction where every pair is as likely to be subtracted the other way round, as
    RepE does. The direction is known up to sign and length: it points to the side of the mean shift and is as long as
    that, so that equal strengths mean equal lengths.

    Args:
        activations: from `collect`, one layer.
        gate: when to steer; None for always.
        options: strength, scope, schedule and the other fields of a steering.

    Raises:
        DataError: activations without shifts.
    """
    shifts = require_matrix(_shifts(activations), "shifts")
    mean = shifts.mean(dim=0)
    direction = torch.linalg.svd(shifts.double(), full_matrices=False).Vh[0].to(shifts)
    sign = -1.0 if float(direction @ mean) < 0 else 1.0
    return PcaDirection(sign * mean.norm() * direction, gate, **_about(activations), **options)


def fit_directional_ablation(activations: Activations) -> SubspaceAblation:
    """Take the direction of the undesired behaviour out of every token: h ← h − r̂ r̂ᵀ h, r̂ along the mean shift.

    Directional ablation (Arditi et al. 2024, arXiv 2406.11717) at one layer; `chain` several for more. It removes what
    the mean shift adds or takes away, so it silences a behaviour and cannot call one up.

    Raises:
        DataError: activations without shifts, or with a mean shift of zero.
    """
    mean = _shifts(activations).mean(dim=0)
    if not float(mean.norm()) > 0:
        raise DataError("mean shift", expected="a vector longer than zero", got="zero")
    basis = (mean / mean.norm()).unsqueeze(1)
    space = Subspace(torch.zeros_like(mean), basis, torch.ones_like(mean[:1]))
    return SubspaceAblation(space, layer=activations.layer, site=activations.site, fingerprint=activations.fingerprint)


def fit_null_space(
    activations: Activations,
    general: Float[Tensor, "m d"],
    *,
    kept: float = 0.6,
    ridge: float = 10.0,
    gate: Gate | None = None,
    **options: Any,
) -> NullSpaceSteering:
    """Map queries that need steering to the mean shift, linearly, and general queries to nothing.

    P projects on the `kept` share of the directions along which general queries are shortest. Δ minimises
    ‖Δ P H − R‖² + ridge · ‖Δ P‖² with the queries in the columns of H and the mean shift in those of R, in closed
    form, and M = Δ P (AlphaSteer, Sheng et al. 2025, arXiv 2506.07022).

    Args:
        activations: from `collect`, one layer.
        general: activations of prompts to be left alone, [m d].
        kept: share of the directions that P keeps, in (0, 1]; the authors vary it by layer.
        ridge: weight of the penalty, > 0.
        gate: when to steer; None for always.
        options: strength, scope, schedule and the other fields of a steering.

    Raises:
        DataError: activations without shifts.
        InputError: options out of range.
        ShapeError, NonFiniteError: `general` is no finite floating matrix of the same width.
    """
    target = _shifts(activations).double().mean(dim=0)
    h = activations.queries.double()
    others = require_matrix(general, "general", d_model=h.shape[1]).double()
    kept, ridge = finite("kept", kept, most=1, above=0), finite("ridge", ridge, above=0)
    directions = torch.linalg.eigh(others.T @ others / len(others)).eigenvectors  # the shortest first
    basis = directions[:, : max(1, round(kept * h.shape[1]))]
    inside = h @ basis
    # with D = Δ · basis: D = R inside (insideᵀ inside + ridge)⁻¹ and M = D basisᵀ
    gram = inside.T @ inside + ridge * torch.eye(inside.shape[1], dtype=h.dtype, device=h.device)
    inner = torch.linalg.solve(gram, inside.sum(dim=0))
    matrix = torch.outer(target, basis @ inner).to(activations.queries)
    return NullSpaceSteering(matrix, gate, **_about(activations), **options)


def fit_ridge(
    activations: Activations,
    *,
    ridge: float | None = None,
    folds: int = 5,
    seed: int = 0,
    gate: Gate | None = None,
    **options: Any,
) -> RidgeSteering:
    """Map queries to their shifts by one linear map, ridge regression in closed form.

    M minimises Σ ‖M (ĥ − h̄) + δ̄ − δ‖² + ridge · s · ‖M‖², with means h̄ and δ̄ and the queries' mean eigenvalue s,
    so that a weight means the same on every model; b = δ̄ − M h̄. One of the weights that are tried is infinite: then the
    mean shift is all that the queries tell.

    Args:
        activations: from `collect`, one layer; folds never split its groups.
        ridge: weight of the penalty, > 0; None: the one with the least error in cross-validation.
        folds: for that choice, at most; there are no more than queries or groups.
        seed: of random folds.
        gate: when to steer; None for always.
        options: strength, scope, schedule and the other fields of a steering.

    Raises:
        DataError: activations without shifts, with fewer than two, or with only one group to cut folds from.
        InputError: options out of range.
    """
    if ridge is not None:
        ridge = finite("ridge", ridge, above=0)
    folds, seed = whole("folds", folds, 2), seed_of(seed)
    shifts = require_matrix(_shifts(activations), "shifts", min_rows=2).double()
    h = activations.queries.double()
    if ridge is None:
        ridge = cross_validated(h, shifts, cut_folds(len(h), activations.groups, folds, seed), STRENGTHS).best
    matrix = Spectrum.of(h).coefficients(shifts, ridge).T
    bias = shifts.mean(dim=0) - matrix @ h.mean(dim=0)
    own = activations.queries
    return RidgeSteering(matrix.to(own), bias.to(own), gate, **_about(activations), **options)


def fit_nearest_centroid(
    activations: Activations, experts: Experts, *, gate: Gate | None = None, **options: Any
) -> NearestCentroid:
    """Send each query to the nearest mean query of the clusters that experts were fitted with.

    Args:
        activations: those that the experts were fitted to.
        experts: fitted experts; their report knows the clusters.
        gate: when to steer; None for always.
        options: strength, scope, schedule and the other fields of a steering.

    Raises:
        DataError: activations without shifts, or others than the experts were fitted to.
    """
    shifts = _shifts(activations)
    instance("experts", experts, Experts, "Experts")
    clusters = None if experts.report is None else experts.report.clusters
    if clusters is None or len(clusters) != len(shifts):
        got = "none" if clusters is None else f"{len(clusters)} of {len(shifts)}"
        raise DataError("clusters", expected="one for each of the activations that the experts were fitted to", got=got)
    members = F.one_hot(clusters.to(shifts.device), experts.n_experts).to(shifts)
    share = members / members.sum(dim=0)
    return NearestCentroid(share.T @ activations.queries, share.T @ shifts, gate, **_about(activations), **options)


def _shifts(activations: Activations) -> Float[Tensor, "n d"]:
    if instance("activations", activations, Activations, "Activations").shifts is None:
        raise DataError("activations", expected="response shifts", got="queries only", fix="Use collect().")
    return activations.shifts  # pyright: ignore[reportReturnType]


def _about(activations: Activations) -> dict[str, Any]:
    """Where the activations come from, as fields of a steering."""
    shared = ("layer", "shift", "site", "fingerprint", "prompt_format", "read")
    about = {name: getattr(activations, name) for name in shared}
    return {**about, "shift_lengths": {activations.layer: mean_shift_length(activations)}}

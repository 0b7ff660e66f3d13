"""SCS, the subspace: how much of an activation lies where the intervention-relevant queries vary.

1. Centre the IR queries (activations at the last prompt token) on their mean.
2. Keep the first r right singular vectors V_r.
3. The subspace energy ratio of an activation h is s(h; r) = ‖V_rᵀ(h − μ)‖² / ‖h − μ‖²  (FineSteer, arXiv 2604.15488).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.method.linalg import (
    move,
    principal_directions,
    require_matrix,
    require_rank,
    require_shapes,
    require_width,
    variant,
)


@dataclass(frozen=True, eq=False, repr=False)
class Subspace:
    """The subspace spanned by the queries that need intervention.

    Attributes:
        mean: μ, the mean of the queries it was fitted to, [d].
        basis: V_r, orthonormal columns in order of variance, [d r].
        explained: share of the queries' variance along each column, [r].
    """

    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "d r"]
    explained: Float[Tensor, " r"]

    def __post_init__(self) -> None:
        require_shapes("subspace", mean=(self.mean, "d"), basis=(self.basis, "d r"), explained=(self.explained, "r"))

    def __repr__(self) -> str:
        return f"Subspace(d_model={self.d_model}, rank={self.rank})"

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.basis.shape[1]

    def coordinates(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch r"]:
        """V_rᵀ(h − μ): coordinates in the subspace, in the subspace's dtype."""
        require_width(h, "activation", self.d_model)
        return (h.to(self.mean) - self.mean) @ self.basis

    def distance(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """‖h − μ‖, in the subspace's dtype."""
        require_width(h, "activation", self.d_model)
        return (h.to(self.mean) - self.mean).norm(dim=-1)

    def energy_ratios(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch r"]:
        """Energy ratio s(h; r) at every rank 1..r, in [0, 1] and non-decreasing; 0/0 counts as 1.

        All ranks come from one product: the cumulative sum of the squared coordinates over ‖h − μ‖².
        """
        energy = self.coordinates(h).square().cumsum(dim=-1)
        total = (h.to(self.mean) - self.mean).square().sum(dim=-1, keepdim=True)
        ratio = energy / total.clamp(min=torch.finfo(total.dtype).tiny)
        return torch.where(total == 0, torch.ones_like(ratio), ratio.clamp(0, 1))  # NaN stays NaN

    def energy_ratio(self, h: Float[Tensor, "*batch d"], rank: int | None = None) -> Float[Tensor, "*batch"]:
        """Energy ratio s(h; rank); `rank=None` is the full rank of this subspace."""
        return self.energy_ratios(h)[..., (self.rank if rank is None else self._checked(rank)) - 1]

    def at_rank(self, rank: int) -> "Subspace":
        """The same subspace cut to its first `rank` directions; shares the tensors."""
        kept = self._checked(rank)
        return variant(self, basis=self.basis[:, :kept], explained=self.explained[:kept])

    def project(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """μ + V_r V_rᵀ(h − μ): the nearest point of the affine subspace."""
        return self.mean + self.coordinates(h) @ self.basis.T

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Subspace":
        """The same subspace on another device or in another dtype."""
        return move(self, device, dtype)

    def _checked(self, rank: int) -> int:
        return require_rank(rank, self.rank, "the fitted rank", fix="For more, fit it again with a larger rank=.")


def fit_subspace(queries: Float[Tensor, "n d"], *, rank: int | None = None) -> Subspace:
    """Fit the subspace of the IR queries.

    Args:
        queries: activations at the last prompt token, [n d].
        rank: number of directions, at most min(n − 1, d); None keeps all of them.

    Raises:
        ShapeError, NonFiniteError: `queries` is no finite floating matrix of at least two rows.
        InputError: `rank` is above min(n − 1, d).
    """
    rows = require_matrix(queries, "queries", min_rows=2)
    limit = min(rows.shape[0] - 1, rows.shape[1])
    why = f"min(n - 1, d) of {rows.shape[0]} queries of width {rows.shape[1]}"
    fix = "Choose a rank within." if limit == rows.shape[1] else "Choose a rank within, or fit on more queries."
    return Subspace(*principal_directions(rows, limit if rank is None else require_rank(rank, limit, why, fix=fix)))

"""SCS made contrastive: which of two subspaces an activation fits worse, of queries to be steered or left alone."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import ShapeError
from fsteer_lens.ground.checks import instance
from fsteer_lens.method.gates import Reading, cut_at
from fsteer_lens.method.linear_gates import CutScoreGate, OutOfFold
from fsteer_lens.method.subspace import Subspace


@final
@dataclass(frozen=True, eq=False, repr=False)
class ResidualRatioGate(CutScoreGate):
    """g = 1 where log(ρ_general(h) / ρ(h)) ≥ t, else 0; ρ is the energy that a subspace leaves, (1 − s(h)) ‖h − μ‖².

    The published gates ask how much of an activation lies in the subspace of the queries to be steered. Most of the
    variance there is of text of any kind, so that other queries lie in it too; this gate asks which of two subspaces
    leaves less.

    Attributes:
        subspace: of the queries to be steered.
        general: of those to be left alone.
        cut: t, in nats.
        layer: where it reads.
        read: what it reads of a prompt.
        out_of_fold: how it did on prompts that it was not fitted to; None where it was not cut that way.
    """

    subspace: Subspace
    general: Subspace
    cut: float = 0.0
    layer: int | None = None
    read: Reading = "last"
    out_of_fold: OutOfFold | None = None

    def __post_init__(self) -> None:
        for name in ("subspace", "general"):
            instance(f"residual ratio gate {name}", getattr(self, name), Subspace, "a Subspace")
        if self.general.d_model != self.subspace.d_model:
            expected = f"width d_model={self.subspace.d_model}"
            raise ShapeError("subspace of general queries", expected=expected, got=self.general.d_model)
        self._check_cut()

    def __repr__(self) -> str:
        ranks = f"ranks {self.subspace.rank} and {self.general.rank}"
        return f"ResidualRatioGate({ranks}, d_model={self.d_model}, threshold={self.cut:g}{self._told})"

    @property
    def d_model(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Width of the activations."""
        return self.subspace.d_model

    @property
    def score_name(self) -> str:
        """A log ratio."""
        return "log ratio of residual energies (nats)"

    def score(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """log(ρ_general(h) / ρ(h)), in nats; finite for every finite activation."""
        return _log_residual(self.general, h) - _log_residual(self.subspace, h)

    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """1 from the threshold on."""
        return cut_at(self.score(h), self.cut, above=True)


def _log_residual(space: Subspace, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """log of ‖h − μ‖² − ‖V_rᵀ(h − μ)‖², taken from what is left, which is exact where little is."""
    left = (h.to(space.mean) - space.project(h)).square().sum(dim=-1)
    return left.clamp(min=torch.finfo(left.dtype).tiny).log()

"""Gates that know both kinds of query: a linear probe, and the cosine with a condition vector.

Both are fitted by `fit_gate` with general queries. A subspace gate is told what needs intervention alone; these are
told what does not as well, and look for what parts the two.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.ground.checks import finite, normalised, optional, switch, whole
from fsteer_lens.method.gates import Gate, cut_at
from fsteer_lens.method.linalg import require_shapes, require_width, variant


class _DirectionGate(Gate):
    """A gate on one direction, [d], with a threshold of its own."""

    def at_threshold(self, threshold: float) -> Gate:
        """The same gate with another threshold; shares the tensors."""
        return variant(self, cut=finite("threshold", threshold))

    @property
    def threshold(self) -> float:
        """The score at which the gate opens."""
        return self.cut  # pyright: ignore[reportAttributeAccessIssue]


@final
@dataclass(frozen=True, eq=False, repr=False)
class LinearGate(_DirectionGate):
    """A linear probe, g = σ(w·h + b − t): logistic regression of queries against general ones.

    Attributes:
        weight: w, [d].
        bias: b.
        cut: t, the log-odds at which the gate opens; 0 where both kinds are equally frequent.
        layer: where it reads.
    """

    weight: Float[Tensor, " d"]
    bias: float
    cut: float = 0.0
    layer: int | None = None

    def __post_init__(self) -> None:
        require_shapes("linear gate", weight=(self.weight, "d"))
        normalised(
            self,
            bias=finite("linear gate bias", self.bias),
            cut=finite("linear gate cut", self.cut),
            layer=optional(whole, "linear gate layer", self.layer),
        )

    def __repr__(self) -> str:
        return f"LinearGate(d_model={self.d_model}, threshold={self.cut:g})"

    @property
    def d_model(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Width of the activations."""
        return len(self.weight)

    @property
    def score_name(self) -> str:
        """Log-odds."""
        return "log-odds w·h + b (nats)"

    def score(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """w·h + b: log-odds that an activation needs steering, with both kinds equally frequent."""
        require_width(h, "activation", self.d_model)
        return h.to(self.weight) @ self.weight + self.bias

    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """σ(w·h + b − t)."""
        return torch.sigmoid(self.score(h) - self.cut)


@final
@dataclass(frozen=True, eq=False, repr=False)
class CosineGate(_DirectionGate):
    """The gate of CAST (Lee et al. 2024, arXiv 2409.05907): 1 where cos(h, proj_c h) = abs(c·h)/(‖c‖ ‖h‖) ≥ θ, else 0.

    Attributes:
        condition: c, the condition vector, [d].
        cut: θ, in [0, 1].
        above: whether the gate opens above θ; otherwise below it.
        layer: where it reads.
    """

    condition: Float[Tensor, " d"]
    cut: float
    above: bool = True
    layer: int | None = None

    def __post_init__(self) -> None:
        require_shapes("cosine gate", condition=(self.condition, "d"))
        normalised(
            self,
            cut=finite("cosine gate cut", self.cut),
            above=switch("cosine gate above", self.above),
            layer=optional(whole, "cosine gate layer", self.layer),
        )

    def __repr__(self) -> str:
        return f"CosineGate(d_model={self.d_model}, {'above' if self.above else 'below'} {self.cut:.3g})"

    @property
    def d_model(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Width of the activations."""
        return len(self.condition)

    @property
    def score_name(self) -> str:
        """A cosine."""
        return "cosine with the condition vector (0 to 1)"

    @property
    def opens_above(self) -> bool:
        """Whether it opens above θ."""
        return self.above

    def score(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """abs(c·h)/(‖c‖ ‖h‖), in [0, 1]; 0 for an activation of zero."""
        require_width(h, "activation", self.d_model)
        rows = h.to(self.condition)
        lengths = (rows.norm(dim=-1) * self.condition.norm()).clamp(min=torch.finfo(rows.dtype).tiny)
        return (rows @ self.condition).abs() / lengths

    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """1 on the open side of θ, else 0."""
        return cut_at(self.score(h), self.cut, self.above)

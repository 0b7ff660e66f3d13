"""Gates that know both kinds of query: a linear probe, and the cosine with a condition vector.

Both are fitted by `fit_gate` with general queries. A subspace gate is told what needs intervention alone; these are
told what does not as well, and look for what parts the two.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.ground.checks import finite, instance, normalised, optional, switch, whole
from fsteer_lens.method.gates import Gate, Reading, cut_at, require_reading
from fsteer_lens.method.linalg import require_shapes, require_width, variant


@dataclass(frozen=True)
class OutOfFold:
    """How a gate did on prompts that it was fitted without, each in the fold that was held out.

    Attributes:
        false_alarm_rate: at which it was cut, on all prompts to be left alone together.
        missed: share of the queries to be steered for which it stayed shut.
        general: share of the general queries for which it opened.
        near_misses: share of the near misses for which it opened; None where there were none.
        sizes: how many queries, general queries and near misses.
    """

    false_alarm_rate: float
    missed: float
    general: float
    near_misses: float | None
    sizes: tuple[int, int, int]

    def __str__(self) -> str:
        queries, general, near = self.sizes
        told = f"missed {self.missed:.1%} of {queries}, opened for {self.general:.1%} of {general} general queries"
        return told if self.near_misses is None else f"{told} and {self.near_misses:.1%} of {near} near misses"


class CutScoreGate(Gate):
    """A gate that was fitted to both kinds of query, with a threshold that is a field of its own."""

    cut: float
    out_of_fold: OutOfFold | None

    def _check_cut(self) -> None:
        require_reading(self.read)
        optional(instance, "out_of_fold", self.out_of_fold, OutOfFold, "an OutOfFold or None")
        normalised(self, cut=finite("gate's cut", self.cut), layer=optional(whole, "gate's layer", self.layer))

    @property
    def _told(self) -> str:
        return "" if self.out_of_fold is None else f"; out of fold: {self.out_of_fold}"

    def at_threshold(self, threshold: float) -> Gate:
        """The same gate with another threshold, of which nothing is known out of fold; shares the tensors."""
        return variant(self, cut=finite("threshold", threshold), out_of_fold=None)

    @property
    def threshold(self) -> float:
        """The score at which the gate opens."""
        return self.cut


def out_of_fold(gate: Gate) -> OutOfFold | None:
    """How a gate did on prompts that it was not fitted to, where that is known."""
    return gate.out_of_fold if isinstance(gate, CutScoreGate) else None


@final
@dataclass(frozen=True, eq=False, repr=False)
class LinearGate(CutScoreGate):
    """A linear probe, g = σ(w·h + b − t): logistic regression of queries against general ones.

    Attributes:
        weight: w, [d].
        bias: b.
        cut: t, the log-odds at which the gate opens; 0 where both kinds are equally frequent.
        layer: where it reads.
        read: what it reads of a prompt.
        out_of_fold: how it did on prompts that it was not fitted to; None where it was not cut that way.
    """

    weight: Float[Tensor, " d"]
    bias: float
    cut: float = 0.0
    layer: int | None = None
    read: Reading = "last"
    out_of_fold: OutOfFold | None = None

    def __post_init__(self) -> None:
        require_shapes("linear gate", weight=(self.weight, "d"))
        normalised(self, bias=finite("linear gate bias", self.bias))
        self._check_cut()

    def __repr__(self) -> str:
        return f"LinearGate(d_model={self.d_model}, threshold={self.cut:g}{self._told})"

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
class CosineGate(CutScoreGate):
    """The gate of CAST (Lee et al. 2024, arXiv 2409.05907): 1 where cos(h, proj_c h) = abs(c·h)/(‖c‖ ‖h‖) ≥ θ, else 0.

    Attributes:
        condition: c, the condition vector, [d].
        cut: θ, in [0, 1].
        above: whether the gate opens above θ; otherwise below it.
        layer: where it reads.
        read: what it reads of a prompt.
        out_of_fold: how it did on prompts that it was not fitted to; None where it was not cut that way.
    """

    condition: Float[Tensor, " d"]
    cut: float
    above: bool = True
    layer: int | None = None
    read: Reading = "last"
    out_of_fold: OutOfFold | None = None

    def __post_init__(self) -> None:
        require_shapes("cosine gate", condition=(self.condition, "d"))
        normalised(self, above=switch("cosine gate above", self.above))
        self._check_cut()

    def __repr__(self) -> str:
        side = "above" if self.above else "below"
        return f"CosineGate(d_model={self.d_model}, {side} {self.cut:.3g}{self._told})"

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

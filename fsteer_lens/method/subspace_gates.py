"""Gates on the energy ratio of one subspace, and what each of their ranks decides.

A gate maps a query activation to a number in [0, 1] through its subspace energy ratio s (see `subspace`):

- quantile gate, one-class: F is the empirical CDF of s over IR queries that the basis did not see;
  g = 1 where F(s) ≥ ε, else (F(s)/ε)^γ
- logistic gate, needs general queries too: g = σ(a·s + b)
- energy gate: g = s
- threshold gate: g = 1 where s ≥ t, else 0; ours, for a threshold that somebody chose

(FineSteer, arXiv 2604.15488, Eq. 8, 9 and 15.) The basis is fitted to the IR queries, so their own ratios are too
high; `fit_gate` therefore calibrates on ratios from cross-fitting.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import choice, finite, instance, normalised, optional, whole
from fsteer_lens.method.gates import OPEN, Gate, Reading, cut_at, require_reading
from fsteer_lens.method.linalg import require_rank, require_shapes, require_tensor, variant
from fsteer_lens.method.subspace import Subspace

FITTED = "the ranks that were fitted"
MORE_RANKS = "For more, fit again with a larger max_rank=, and on more queries than that."


class Drift(NamedTuple):
    """How activations compare with those that a gate was calibrated on.

    Attributes:
        distance: ‖h − μ‖.
        distance_outside: whether that lies outside the range of the calibration queries; None where the range is not
            known.
        energy_outside: the same for the energy ratio at the gate's rank. For a one-class gate that is true of most
            queries that need no intervention.
    """

    distance: Float[Tensor, "*batch"]
    distance_outside: Bool[Tensor, "*batch"] | None = None
    energy_outside: Bool[Tensor, "*batch"] | None = None


@dataclass(frozen=True, eq=False)
class CalibrationRange:
    """Lowest and highest value over the queries that a gate was calibrated on, which its basis did not see.

    Attributes:
        distance: of ‖h − μ‖, [2].
        ratios: of the energy ratio at every rank, [2 r].
    """

    distance: Float[Tensor, "2"]
    ratios: Float[Tensor, "2 r"]

    def __repr__(self) -> str:
        return f"CalibrationRange(distance={self.distance.tolist()}, ranks={self.ratios.shape[1]})"


@dataclass(frozen=True, eq=False, repr=False)
class SubspaceGate(Gate):
    """A gate on the energy ratio of one subspace.

    Attributes:
        subspace: every rank that was fitted.
        rank: the rank whose energy ratio decides.
        calibrated: what the calibration queries spanned, general ones included where they were given; None for a gate
            that was put together by hand.
        layer: where it reads; None where nobody has said.
        read: what it reads of a prompt.
    """

    subspace: Subspace
    rank: int
    calibrated: CalibrationRange | None = field(default=None, kw_only=True)
    layer: int | None = field(default=None, kw_only=True)
    read: Reading = field(default="last", kw_only=True)

    def __post_init__(self) -> None:
        require_reading(self.read)
        instance("gate's subspace", self.subspace, Subspace, "a Subspace")
        rank = require_rank(self.rank, self.subspace.rank, FITTED, fix=MORE_RANKS)
        normalised(self, rank=rank, layer=optional(whole, "gate's layer", self.layer))
        if self.calibrated is not None:
            instance("gate's calibration", self.calibrated, CalibrationRange, "a CalibrationRange or None")
            require_shapes(
                "gate's calibration",
                basis=(self.subspace.basis, "d r"),
                ratios=(self.calibrated.ratios, "ends r"),
                distance=(self.calibrated.distance, "ends"),
            )
            if len(self.calibrated.distance) != 2:
                raise InputError("gate's calibration", expected="two ends", got=len(self.calibrated.distance))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank} of {self.ranks}, d_model={self.d_model})"

    @property
    def d_model(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Width of the activations."""
        return self.subspace.d_model

    @property
    def ranks(self) -> int:
        """How many ranks were fitted."""
        return self.subspace.rank

    def at_rank(self, rank: int) -> "SubspaceGate":
        """The same gate at another of the fitted ranks; shares the tensors."""
        return variant(self, rank=require_rank(rank, self.ranks, FITTED, fix=MORE_RANKS))

    def at_threshold(self, threshold: float) -> Gate:
        """A gate on the same subspace and rank that is 1 from this energy ratio on (or down) and 0 elsewhere."""
        if not self.opens_above:
            return super().at_threshold(threshold)
        placed: dict[str, Any] = {"calibrated": self.calibrated, "layer": self.layer, "read": self.read}
        return ThresholdGate(self.subspace, self.rank, threshold, **placed)

    def score(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The energy ratio at this gate's rank, in [0, 1]."""
        return self.subspace.energy_ratio(h, self.rank)

    @property
    def score_name(self) -> str:
        """The energy ratio, with its rank."""
        return f"energy ratio s at rank {self.rank} (share, 0 to 1)"

    def drift(self, h: Float[Tensor, "*batch d"]) -> Drift:
        """Compare activations with the calibration queries."""
        return self._drift(self.subspace.distance(h), self.score(h))

    def _drift(self, distance: Float[Tensor, "*batch"], ratio: Float[Tensor, "*batch"]) -> Drift:
        if self.calibrated is None:
            return Drift(distance)
        low, high = self.calibrated.distance
        least, most = self.calibrated.ratios[:, self.rank - 1]
        return Drift(distance, (distance < low) | (distance > high), (ratio < least) | (ratio > most))

    def readings(self, h: Float[Tensor, "*batch d"]) -> dict[str, Tensor]:
        """Energy ratio at every rank (`ser`), that at the gate's own (`score`), and the drift as far as it is known."""
        ratios = self.subspace.energy_ratios(h)
        score = ratios[..., self.rank - 1]
        drift = self._drift(self.subspace.distance(h), score)._asdict()
        return {"ser": ratios, "score": score} | {name: value for name, value in drift.items() if value is not None}

    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Gate value of each activation, in [0, 1]."""
        return self.gate_of_ratio(self.score(h))

    def gates(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch r"]:
        """Gate value of each activation at every fitted rank; the ratios come from one product."""
        ratios = self.subspace.energy_ratios(h).unbind(dim=-1)
        return torch.stack([self.at_rank(r).gate_of_ratio(ratio) for r, ratio in enumerate(ratios, 1)], dim=-1)

    @abstractmethod
    def gate_of_ratio(self, ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Gate value for energy ratios at this gate's rank."""

    @property
    @abstractmethod
    def threshold(self) -> float:
        """The energy ratio at which the gate opens (reaches 0.5); may lie outside [0, 1] where it never does."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class QuantileGate(SubspaceGate):
    """g = 1 where F(s) ≥ ε, else (F(s)/ε)^γ.

    F interpolates linearly between the order statistics of the calibration ratios: 0 up to the smallest, 1 from the
    largest on, and the upper value at ties. `cdf="step"` is the paper's F(s) = share of ratios ≤ s.

    Attributes:
        ratios: calibration ratios of IR queries at every rank, each column sorted, [n r].
        epsilon: ε in (0, 1], about the share of IR queries that are let go by.
        gamma: γ > 0, how sharply the gate closes below ε.
        cdf: "linear" or "step".
    """

    ratios: Float[Tensor, "n r"]
    epsilon: float
    gamma: float
    cdf: Literal["linear", "step"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_shapes("quantile gate", basis=(self.subspace.basis, "d r"), ratios=(self.ratios, "n r"))
        epsilon, gamma = finite("epsilon", self.epsilon, most=1, above=0), finite("gamma", self.gamma, above=0)
        normalised(self, epsilon=epsilon, gamma=gamma, cdf=choice("cdf", self.cdf, ("linear", "step")))

    def quantile(self, ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """F(s): where an energy ratio lies among those of the calibration queries, in [0, 1]."""
        require_tensor(ratio, "ratio")
        ordered = self.ratios[:, self.rank - 1].contiguous()
        n = len(ordered)
        at_or_below = torch.searchsorted(ordered, ratio.to(ordered).contiguous(), right=True)
        if self.cdf == "step" or n == 1:
            return torch.where(ratio.isnan(), ratio, at_or_below.to(ordered) / n)
        below = ordered[(at_or_below - 1).clamp(0, n - 1)]
        above = ordered[at_or_below.clamp(0, n - 1)]
        within = (ratio - below) / (above - below).clamp(min=torch.finfo(ordered.dtype).tiny)
        inside = (at_or_below - 1 + within.clamp(0, 1)) / (n - 1)
        linear = torch.where(at_or_below == 0, 0.0, torch.where(at_or_below == n, 1.0, inside))
        return torch.where(ratio.isnan(), ratio, linear)

    def gate_of_ratio(self, ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """1 where F(s) ≥ ε, else (F(s)/ε)^γ."""
        return (self.quantile(ratio) / self.epsilon).clamp(max=1).pow(self.gamma)

    @property
    def threshold(self) -> float:
        """The energy ratio at which F(s) = ε · 0.5^(1/γ), that is g = 0.5."""
        ordered = self.ratios[:, self.rank - 1]
        place = self.epsilon * OPEN ** (1 / self.gamma)
        if self.cdf == "step" or len(ordered) == 1:
            return float(ordered[max(0, -int(-place * len(ordered) // 1) - 1)])
        return float(torch.quantile(ordered, place))


@final
@dataclass(frozen=True, eq=False, repr=False)
class LogisticGate(SubspaceGate):
    """g = σ(a·s + b), one (a, b) per rank.

    Attributes:
        slopes: a at every rank, [r].
        intercepts: b at every rank, [r].
    """

    slopes: Float[Tensor, " r"]
    intercepts: Float[Tensor, " r"]

    def __post_init__(self) -> None:
        super().__post_init__()
        basis = (self.subspace.basis, "d r")
        require_shapes("logistic gate", basis=basis, slopes=(self.slopes, "r"), intercepts=(self.intercepts, "r"))

    def gate_of_ratio(self, ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """σ(a·s + b)."""
        return torch.sigmoid(self.slopes[self.rank - 1] * ratio + self.intercepts[self.rank - 1])

    @property
    def opens_above(self) -> bool:
        """Whether the slope rises."""
        return bool(self.slopes[self.rank - 1] > 0)

    @property
    def threshold(self) -> float:
        """−b / a."""
        return float(-self.intercepts[self.rank - 1] / self.slopes[self.rank - 1])


@final
@dataclass(frozen=True, eq=False, repr=False)
class EnergyGate(SubspaceGate):
    """g = s: the energy ratio itself."""

    def gate_of_ratio(self, ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The ratio."""
        return ratio

    @property
    def threshold(self) -> float:
        """0.5."""
        return OPEN


@final
@dataclass(frozen=True, eq=False, repr=False)
class ThresholdGate(SubspaceGate):
    """g = 1 where s ≥ t, else 0; `SubspaceGate.at_threshold` makes one.

    Attributes:
        cut: t, the energy ratio from which on the gate is open; the same at every rank.
    """

    cut: float

    def __post_init__(self) -> None:
        super().__post_init__()
        normalised(self, cut=finite("threshold", self.cut))

    def gate_of_ratio(self, ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """1 from the threshold on."""
        return cut_at(ratio, self.cut, above=True)

    @property
    def threshold(self) -> float:
        """t."""
        return self.cut


def subspace_leaves(gate: Gate) -> tuple[SubspaceGate, ...]:
    """The leaves of a gate that have a subspace, and so ranks and energy ratios; left to right."""
    return tuple(leaf for leaf in gate.leaves if isinstance(leaf, SubspaceGate))

"""SCS, the gates: when to steer.

A gate maps a query activation to a number in [0, 1] through its subspace energy ratio s (see `subspace`):

- quantile gate, one-class: F is the empirical CDF of s over IR queries that the basis did not see;
  g = 1 where F(s) ≥ ε, else (F(s)/ε)^γ
- logistic gate, needs general queries too: g = σ(a·s + b)
- energy gate: g = s
- threshold gate: g = 1 where s ≥ t, else 0; ours, for a threshold that somebody chose

(FineSteer, arXiv 2604.15488, Eq. 8, 9 and 15.) The basis is fitted to the IR queries, so their own ratios are too
high; `fit_gate` therefore calibrates on ratios from cross-fitting. Gates combine: `a & b` is the smaller, `a | b` the
larger, `~a` one minus it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.method.linalg import move, require_rank, require_shapes, require_width, variant
from fsteer_lens.method.subspace import Subspace

OPEN = 0.5
"""A gate counts as open from this value on."""


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


class Gate(ABC):
    """When to steer: a value in [0, 1] for every activation."""

    subspace: Subspace
    """With every rank that was fitted; of the first leaf where the gate is composed."""

    @abstractmethod
    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Gate value of each activation, in [0, 1]."""

    @abstractmethod
    def gates(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch r"]:
        """Gate value of each activation at every rank that all leaves have, as `at_rank(r).gate(h)` gives it."""

    @abstractmethod
    def at_rank(self, rank: int) -> "Gate":
        """The same gate, every leaf recalibrated for another rank from what its fit stored; microseconds."""

    @property
    @abstractmethod
    def leaves(self) -> "tuple[SubspaceGate, ...]":
        """The fitted gates that this one is made of, left to right."""

    def drift(self, h: Float[Tensor, "*batch d"]) -> Drift:
        """Compare activations with the calibration queries, of the first leaf where the gate is composed."""
        leaf = self.leaves[0]
        distance = leaf.subspace.distance(h)
        if leaf.calibrated is None:
            return Drift(distance)
        low, high = leaf.calibrated.distance
        least, most = leaf.calibrated.ratios[:, leaf.rank - 1]
        ratio = leaf.subspace.energy_ratio(h, leaf.rank)
        return Drift(distance, (distance < low) | (distance > high), (ratio < least) | (ratio > most))

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Gate":
        """The same gate on another device or in another dtype."""
        return move(self, device, dtype)

    def __and__(self, other: "Gate") -> "Gate":
        return MinGate(self, other)

    def __or__(self, other: "Gate") -> "Gate":
        return MaxGate(self, other)

    def __invert__(self) -> "Gate":
        return NotGate(self)


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
    """

    subspace: Subspace
    rank: int
    calibrated: CalibrationRange | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        require_rank(self.rank, self.subspace.rank, "the ranks that were fitted")
        if self.calibrated is not None:
            if not isinstance(self.calibrated, CalibrationRange):
                got = type(self.calibrated).__name__
                raise InputError("gate's calibration", expected="a CalibrationRange or None", got=got)
            require_shapes(
                "gate's calibration",
                basis=(self.subspace.basis, "d r"),
                ratios=(self.calibrated.ratios, "ends r"),
                distance=(self.calibrated.distance, "ends"),
            )
            if len(self.calibrated.distance) != 2:
                raise InputError("gate's calibration", expected="two ends", got=len(self.calibrated.distance))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank} of {self.subspace.rank}, d_model={self.subspace.d_model})"

    @property
    def leaves(self) -> "tuple[SubspaceGate, ...]":
        """This gate alone."""
        return (self,)

    def at_rank(self, rank: int) -> "SubspaceGate":
        """The same gate at another of the fitted ranks; shares the tensors."""
        require_rank(rank, self.subspace.rank, "the ranks that were fitted")
        return variant(self, rank=rank)

    def at_threshold(self, threshold: float) -> "ThresholdGate":
        """A gate on the same subspace and rank that is 1 from this energy ratio on and 0 below it."""
        return ThresholdGate(self.subspace, self.rank, threshold, calibrated=self.calibrated)

    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Gate value of each activation, in [0, 1]."""
        return self.gate_of_ratio(self.subspace.energy_ratio(h, self.rank))

    def gates(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch r"]:
        """Gate value of each activation at every fitted rank; the ratios come from one product."""
        ratios = self.subspace.energy_ratios(h).unbind(dim=-1)
        return torch.stack([self.at_rank(r).gate_of_ratio(ratio) for r, ratio in enumerate(ratios, 1)], dim=-1)

    @abstractmethod
    def gate_of_ratio(self, ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Gate value for energy ratios at this gate's rank."""

    @property
    def opens_above(self) -> bool:
        """Whether the gate opens from its threshold upwards; a logistic gate with a falling slope opens below it."""
        return True

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
        if not (0 < self.epsilon <= 1 and 0 < self.gamma < 1e300):
            raise InputError("quantile gate", expected="0 < epsilon <= 1 and gamma > 0", got=(self.epsilon, self.gamma))
        if self.cdf not in ("linear", "step"):
            raise InputError("cdf", expected="'linear' or 'step'", got=repr(self.cdf))

    def quantile(self, ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """F(s): where an energy ratio lies among those of the calibration queries, in [0, 1]."""
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
        number = isinstance(self.cut, int | float) and not isinstance(self.cut, bool)
        if not number or not abs(self.cut) < math.inf:
            raise InputError("threshold", expected="a finite number", got=repr(self.cut))

    def gate_of_ratio(self, ratio: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """1 from the threshold on."""
        return torch.where(ratio.isnan(), ratio, (ratio >= self.cut).to(ratio))

    @property
    def threshold(self) -> float:
        """t."""
        return self.cut


class _ComposedGate(Gate):
    @property
    def subspace(self) -> Subspace:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The subspace of the first leaf."""
        return self.leaves[0].subspace


@dataclass(frozen=True, eq=False)
class _PairGate(_ComposedGate):
    """Two gates that decide together."""

    left: Gate
    right: Gate

    def __post_init__(self) -> None:
        for gate in (self.left, self.right):
            if not isinstance(gate, Gate):
                raise InputError("a combination of gates", expected="two gates", got=type(gate).__name__)
        require_width(self.right.subspace.mean, "the second gate", self.left.subspace.d_model)

    @property
    def leaves(self) -> tuple[SubspaceGate, ...]:
        """The leaves of both, left first."""
        return self.left.leaves + self.right.leaves

    def at_rank(self, rank: int) -> "Gate":
        """Both at another rank."""
        return variant(self, left=self.left.at_rank(rank), right=self.right.at_rank(rank))

    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Both values, combined."""
        return self._combined(self.left.gate(h), self.right.gate(h))

    def gates(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch r"]:
        """Both values at every rank that both have, combined."""
        left, right = self.left.gates(h), self.right.gates(h)
        ranks = min(left.shape[-1], right.shape[-1])
        return self._combined(left[..., :ranks], right[..., :ranks])

    @staticmethod
    @abstractmethod
    def _combined(left: Tensor, right: Tensor) -> Tensor:
        """One value of two."""


@final
class MinGate(_PairGate):
    """`a & b`: the smaller of two gates."""

    @staticmethod
    def _combined(left: Tensor, right: Tensor) -> Tensor:
        return torch.minimum(left, right)


@final
class MaxGate(_PairGate):
    """`a | b`: the larger of two gates."""

    @staticmethod
    def _combined(left: Tensor, right: Tensor) -> Tensor:
        return torch.maximum(left, right)


@final
@dataclass(frozen=True, eq=False)
class NotGate(_ComposedGate):
    """`~a`: one minus a gate."""

    inner: Gate

    @property
    def leaves(self) -> tuple[SubspaceGate, ...]:
        """The leaves of the inner gate."""
        return self.inner.leaves

    def at_rank(self, rank: int) -> "Gate":
        """The inner gate at another rank."""
        return NotGate(self.inner.at_rank(rank))

    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """1 − a."""
        return 1 - self.inner.gate(h)

    def gates(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch r"]:
        """1 − a at every rank."""
        return 1 - self.inner.gates(h)

"""SCS, the gates: when to steer.

A gate gives every activation a number in [0, 1]. It is anything with `gate(h)`: those on the energy ratio of a subspace
are in `subspace_gates`, a linear probe and a cosine in `linear_gates`, and one of your own is a subclass of `Gate` with
that one method. Gates combine: `a & b` is the smaller, `a | b` the larger, `~a` one minus it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError, ShapeError
from fsteer_lens.ground.checks import choice, finite, instance, normalised
from fsteer_lens.method.linalg import move, variant

OPEN = 0.5
"""A gate counts as open from this value on."""
SHUT = 0.005
"""A gate below this adds so little that it is told as shut."""

Reading = Literal["last", "mean", "turn_end"]
"""What is read of a prompt: its last token (the paper), the mean over all its tokens but the first, or the token that
ends the user's turn of a chat, which is the last one elsewhere."""
READINGS: tuple[Reading, ...] = ("last", "mean", "turn_end")


def require_reading(read: Any) -> Reading:
    """One of `READINGS`; raises `InputError` for anything else."""
    return choice("read", read, READINGS)


class Gate(ABC):
    """When to steer: a value in [0, 1] for every activation.

    A gate of your own needs one method::

        class Longer(fs.Gate):
            def gate(self, h):
                return (h.norm(dim=-1) > 40).float()

    It steers, combines, is recorded and monitored as any other. Where it compares a number with a threshold, give it
    `score` and `threshold` as well, and figures, explorer and `gate_report` look at that number in place of the value.
    Make it a frozen dataclass where it holds tensors, so that `.to` finds them. A file cannot hold it: see `save`.

    Attributes:
        layer: where it reads; None where nobody has said.
        read: what it reads of a prompt, "last", "mean" or "turn_end"; see `Reading`. A hook object that holds it reads
            so.
        d_model: width of the activations; None takes any.
        scans: whether what it is asked about is the nearest of several windows of a prompt, as of a `ScanGate`.
    """

    layer: int | None = None
    read: Reading = "last"
    d_model: int | None = None
    scans: bool = False

    @abstractmethod
    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Gate value of each activation, in [0, 1]."""

    def __call__(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Gate value of each activation, in [0, 1]."""
        return self.gate(h)

    def score(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The number that is compared with `threshold`; the gate value, unless a gate says otherwise."""
        return self.gate(h)

    @property
    def score_name(self) -> str:
        """What the score is, with its unit where it has one."""
        return "gate value g"

    @property
    def threshold(self) -> float:
        """The score at which the gate opens (reaches 0.5)."""
        return OPEN

    @property
    def opens_above(self) -> bool:
        """Whether the gate opens from its threshold upwards; otherwise below it."""
        return True

    def at_threshold(self, threshold: float) -> "Gate":
        """A gate that is 1 from this score on (below it, where this one opens below) and 0 elsewhere."""
        return CutGate(self, threshold)

    @property
    def ranks(self) -> int:
        """How many ranks `at_rank` has to choose from; 0 for a gate that has none."""
        return 0

    def at_rank(self, rank: int) -> "Gate":
        """The same gate, every leaf that has ranks recalibrated for this one; microseconds.

        Raises:
            InputError: it has no ranks, or not this one.
        """
        raise InputError("at_rank", expected="a gate on a subspace", got=f"{type(self).__name__}, which has no ranks")

    def gates(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch r"]:
        """Gate value of each activation at every rank, as `at_rank(r).gate(h)` gives it; one column without ranks."""
        return self.gate(h).unsqueeze(-1)

    @property
    def leaves(self) -> "tuple[Gate, ...]":
        """The gates that this one is made of, left to right."""
        return (self,)

    def readings(self, h: Float[Tensor, "*batch d"]) -> dict[str, Tensor]:
        """What the trace records beside the gate value, fields of `Trace` by name: the score, where there is one."""
        return {} if type(self).score is Gate.score else {"score": self.score(h)}

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Gate":
        """The same gate on another device or in another dtype."""
        return move(self, device, dtype)

    def __and__(self, other: "Gate") -> "Gate":
        return MinGate(self, other)

    def __or__(self, other: "Gate") -> "Gate":
        return MaxGate(self, other)

    def __invert__(self) -> "Gate":
        return NotGate(self)


def require_gate(gate: Any, what: str, d_model: int | None = None, layer: int | None = None) -> None:
    """Raise unless this is a gate for activations of this width at this layer; None is any.

    Raises:
        InputError: no gate, or one that reads at another layer.
        ShapeError: one of another width.
    """
    instance(what, gate, Gate, "a gate", fix="Give one of fit_gate, or a subclass of fsteer_lens.Gate.")
    if None not in (d_model, gate.d_model) and gate.d_model != d_model:
        fix = "Was it fitted on another model?"
        raise ShapeError(what, expected=f"width d_model={d_model}", got=gate.d_model, fix=fix)
    if None not in (layer, gate.layer) and gate.layer != layer:
        fix = "Fit it there, or let it decide with gate_layer=."
        raise InputError(what, expected=f"a gate of layer {layer}", got=f"one of layer {gate.layer}", fix=fix)


def require_still(gate: Gate, what: str, fix: str) -> None:
    """Raise `InputError` where a gate scans windows of a prompt, for what looks at one activation of each."""
    if gate.scans:
        raise InputError(
            what, expected="a gate that is asked about one activation of a prompt", got=repr(gate), fix=fix
        )


def _require_part(gate: Gate, what: str) -> None:
    """Raise unless this is a gate that can be a part of another."""
    require_gate(gate, what)
    require_still(gate, what, "Combine gates first, and scan with the whole: fit_scan(model, a & b, ...).")


def oriented(gate: Gate, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """A gate's score, or minus that where it opens below its threshold: larger opens."""
    score = instance("gate", gate, Gate, "a gate").score(h)
    return score if gate.opens_above else -score


class _ComposedGate(Gate):
    """A gate made of others: `parts` are its fields that are gates."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Gate, ...]:
        """The gates that this one asks."""

    @property
    def layer(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The layer that a part knows."""
        return next((part.layer for part in self.parts if part.layer is not None), None)

    @property
    def read(self) -> Reading:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What all parts read."""
        return self.parts[0].read

    @property
    def d_model(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The width that a part knows."""
        return next((part.d_model for part in self.parts if part.d_model is not None), None)

    @property
    def ranks(self) -> int:
        """The largest rank that every part with ranks has; 0 where none has any."""
        return min((part.ranks for part in self.parts if part.ranks), default=0)

    @property
    def leaves(self) -> tuple[Gate, ...]:
        """The leaves of all parts, left first."""
        return tuple(leaf for part in self.parts for leaf in part.leaves)

    def at_rank(self, rank: int) -> Gate:
        """The same with every part that has ranks at another one."""
        if not self.ranks:
            return super().at_rank(rank)
        names = [name for name, part in vars(self).items() if isinstance(part, Gate) and part.ranks]
        return variant(self, **{name: getattr(self, name).at_rank(rank) for name in names})

    def readings(self, h: Float[Tensor, "*batch d"]) -> dict[str, Tensor]:
        """Of each field, what the first part has that has it; two gates that decide together have no common score."""
        found: dict[str, Tensor] = {}
        for part in reversed(self.parts):
            found |= part.readings(h)
        return found if len(self.parts) == 1 else {name: one for name, one in found.items() if name != "score"}


@dataclass(frozen=True, eq=False)
class _PairGate(_ComposedGate):
    """Two gates that decide together."""

    left: Gate
    right: Gate

    def __post_init__(self) -> None:
        for gate in self.parts:
            _require_part(gate, "a combination of gates")
        if None not in (self.left.layer, self.right.layer) and self.left.layer != self.right.layer:
            raise InputError(
                "a combination of gates",
                expected="two gates that read at one layer",
                got=f"layers {self.left.layer} and {self.right.layer}",
                fix="Steer both layers with a gate each, or fit both gates at one layer.",
            )
        if self.left.read != self.right.read:
            raise InputError(
                "a combination of gates",
                expected="two gates that read the same of a prompt",
                got=f"read={self.left.read!r} and {self.right.read!r}",
                fix="Fit both on activations that were read in one way: activations.reading(...).",
            )
        require_gate(self.right, "the second gate", self.left.d_model)

    @property
    def parts(self) -> tuple[Gate, ...]:
        """Both."""
        return (self.left, self.right)

    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Both values, combined."""
        return self._combined(self.left.gate(h), self.right.gate(h))

    def gates(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch r"]:
        """Both values at every rank that both have, combined; a part without ranks is the same at all of them."""
        ranks = max(1, self.ranks)
        return self._combined(*(part.gates(h)[..., :ranks] for part in self.parts))

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


class InnerGate(_ComposedGate):
    """A gate that asks one other, its `inner`, and looks at that one's score."""

    inner: Gate

    def __post_init__(self) -> None:
        _require_part(self.inner, type(self).__name__)

    @property
    def parts(self) -> tuple[Gate, ...]:
        """The inner gate."""
        return (self.inner,)

    def score(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The inner gate's."""
        return self.inner.score(h)

    @property
    def score_name(self) -> str:
        """The inner gate's."""
        return self.inner.score_name


@final
@dataclass(frozen=True, eq=False)
class NotGate(InnerGate):
    """`~a`: one minus a gate."""

    inner: Gate

    @property
    def threshold(self) -> float:
        """The inner gate's."""
        return self.inner.threshold

    @property
    def opens_above(self) -> bool:
        """Where the inner gate does not."""
        return not self.inner.opens_above

    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """1 − a."""
        return 1 - self.inner.gate(h)

    def gates(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch r"]:
        """1 − a at every rank."""
        return 1 - self.inner.gates(h)


class InnerCutGate(InnerGate):
    """A gate that cuts another gate's score: 1 on the side of `cut` where that gate opens, else 0."""

    cut: float

    def __post_init__(self) -> None:
        super().__post_init__()
        normalised(self, cut=finite("threshold", self.cut))

    @property
    def ranks(self) -> int:
        """None: the cut belongs to the score as it was."""
        return 0

    @property
    def threshold(self) -> float:
        """The cut."""
        return self.cut

    @property
    def opens_above(self) -> bool:
        """Where the inner gate does."""
        return self.inner.opens_above

    def gate(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """1 from the cut on."""
        return cut_at(self.inner.score(h), self.cut, self.opens_above)


@final
@dataclass(frozen=True, eq=False)
class CutGate(InnerCutGate):
    """Another gate's score, cut: 1 on the side of `cut` where that gate opens, else 0; `Gate.at_threshold` makes one.

    Attributes:
        inner: whose score.
        cut: from where on the gate is open.
    """

    inner: Gate
    cut: float


def cut_at(score: Float[Tensor, "*batch"], cut: float, above: bool) -> Float[Tensor, "*batch"]:
    """1 from a cut upwards, or below it, else 0; NaN stays NaN."""
    inside = score >= cut if above else score < cut
    return torch.where(score.isnan(), score, inside.to(score))

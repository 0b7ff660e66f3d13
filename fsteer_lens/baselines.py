"""What FineSteer is compared with: the same protocol, trace and files."""

from dataclasses import dataclass
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.activations import Activations
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.gates import Gate
from fsteer_lens.linalg import require_shapes, require_width
from fsteer_lens.steering import Decision, Steering


@final
@dataclass(frozen=True, eq=False, repr=False)
class MeanShift(Steering):
    """One vector for every query, the mean response shift: h ← h + λ · g(ĥ) · mean δ.

    Contrastive activation addition (Rimsky et al. 2024, arXiv 2312.06681) with an optional gate.

    Attributes:
        vector: what is added, [d].
        gate: when to add it; None for always.
    """

    vector: Float[Tensor, " d"]
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if self.layer is None:
            raise InputError("MeanShift", expected="layer=", got=None)
        require_shapes("MeanShift", vector=(self.vector, "d"))
        if self.gate is not None:
            if not isinstance(self.gate, Gate):
                raise InputError("MeanShift gate", expected="a gate or None", got=type(self.gate).__name__)
            require_width(self.gate.subspace.mean, "gate", self.d_model)
        super().__post_init__()

    @property
    def layers(self) -> tuple[int, ...]:
        """The one layer."""
        assert self.layer is not None
        return (self.layer,)

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return len(self.vector)

    def gate_at(self, layer: int) -> Gate | None:
        """The gate; None is always open."""
        return self.gate

    def vectors(self, layer: int, h: Float[Tensor, "*batch d"]) -> Decision:
        """The mean shift for every activation."""
        require_width(h, "activation", self.d_model)
        return Decision(h.new_ones(h.shape[:-1]), self.vector.to(h).expand(h.shape))


def fit_mean_shift(activations: Activations, *, gate: Gate | None = None, **options: Any) -> MeanShift:
    """The mean of the response shifts as a steering; `options` (strength, scope, schedule) as in `MeanShift`.

    Raises:
        DataError: activations without shifts.
    """
    if activations.shifts is None:
        raise DataError("activations", expected="response shifts", got="queries only", fix="Use collect().")
    return MeanShift(
        activations.shifts.mean(dim=0),
        gate,
        layer=activations.layer,
        shift=activations.shift,
        site=activations.site,
        fingerprint=activations.fingerprint,
        **options,
    )

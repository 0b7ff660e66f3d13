"""What FineSteer is compared with: the same protocol, trace and files."""

from dataclasses import dataclass
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.activations import Activations
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.gates import Gate
from fsteer_lens.linalg import require_width
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
        if self.vector.ndim != 1 or not self.vector.isfinite().all():
            raise InputError("MeanShift vector", expected="a finite vector [d]", got=list(self.vector.shape))
        if self.gate is not None:
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

    def vectors(self, layer: int, h: Float[Tensor, "b d"]) -> Decision:
        """The mean shift for every row."""
        require_width(h, "activation", self.d_model)
        return Decision(h.new_ones(len(h)), self.vector.to(h).expand(len(h), -1))


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

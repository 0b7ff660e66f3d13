"""Probes, which read every token and change nothing, and the ablation of a subspace."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from fsteer_lens.ground.checks import instance, normalised, optional, whole
from fsteer_lens.hooks.objects import Link
from fsteer_lens.hooks.positions import View
from fsteer_lens.hooks.session import State
from fsteer_lens.method.experts import Experts
from fsteer_lens.method.linalg import require_rank
from fsteer_lens.method.subspace import Subspace
from fsteer_lens.models.points import DEFAULT_SITE
from fsteer_lens.reading.fingerprints import Fingerprint


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class _TokenHook(Link):
    """A hook object that reads every token at one layer, and unless it says otherwise edits none."""

    layer: int
    site: str = DEFAULT_SITE
    fingerprint: Fingerprint | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layer={self.layer}, site={self.site})"

    @property
    def hooked_layers(self) -> tuple[int, ...]:
        """The one layer."""
        return (self.layer,)

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """None."""
        return ()

    @property
    def forks(self) -> bool:
        """Yes: nothing is kept of a prompt."""
        return True


@final
@dataclass(frozen=True, eq=False, repr=False)
class SubspaceProbe(_TokenHook):
    """Reads the energy ratio of every token at every rank into `trace.ser`, [b s r]; changes nothing."""

    subspace: Subspace

    def __post_init__(self) -> None:
        _require_parts(self, subspace=Subspace)

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.subspace.d_model

    def edit(self, state: State, layer: int, activation: Tensor, view: View) -> None:
        """Record."""
        state.extend(layer, view, ser=self.subspace.energy_ratios(activation.float()))


@final
@dataclass(frozen=True, eq=False, repr=False)
class ExpertProbe(_TokenHook):
    """Reads the expert weights that every token would get into `trace.weights`, [b s k]; changes nothing."""

    experts: Experts

    def __post_init__(self) -> None:
        _require_parts(self, experts=Experts)

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.experts.d_model

    def edit(self, state: State, layer: int, activation: Tensor, view: View) -> None:
        """Record."""
        state.extend(layer, view, weights=self.experts.route(activation.float()))
        if self.experts.names is not None:
            state.trace.names[layer] = self.experts.names


@final
@dataclass(frozen=True, eq=False, repr=False)
class SubspaceAblation(_TokenHook):
    """Takes the subspace out of every token: h ← h − V_r V_rᵀ (h − μ)."""

    subspace: Subspace
    rank: int = -1

    def __post_init__(self) -> None:
        _require_parts(self, subspace=Subspace)
        if whole("rank", self.rank) == -1:
            normalised(self, rank=self.subspace.rank)
        normalised(self, rank=require_rank(self.rank, self.subspace.rank, "the subspace's own rank"))

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.subspace.d_model

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """The one layer."""
        return (self.layer,)

    def edit(self, state: State, layer: int, activation: Tensor, view: View) -> Tensor:
        """The component in the subspace, negative."""
        space = self.subspace.at_rank(self.rank)
        return -(space.coordinates(activation.float()) @ space.basis.T)


def _require_parts(link: _TokenHook, **parts: type) -> None:
    """Raise `InputError` unless these fields, the layer and the fingerprint are what they should be."""
    owner = type(link).__name__
    normalised(link, layer=whole(f"{owner} layer", link.layer))
    for name, kind in parts.items():
        instance(f"{owner} {name}", getattr(link, name), kind, kind.__name__)
    instance(f"{owner} site", link.site, str, "text")
    optional(instance, f"{owner} fingerprint", link.fingerprint, Fingerprint, "a fingerprint or None")

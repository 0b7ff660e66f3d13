"""What the explorer's controls are set to, and the steering that this amounts to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import choice, finite, normalised, switch, whole
from fsteer_lens.hooks.probes import SubspaceAblation
from fsteer_lens.method.experts import Experts
from fsteer_lens.method.gates import Gate, require_still
from fsteer_lens.method.subspace_gates import SubspaceGate, subspace_leaves
from fsteer_lens.steering.steering import FineSteer

Mode = Literal["gate", "ablation"]


@dataclass(frozen=True)
class Settings:
    """Where the controls stand.

    Attributes:
        rank: of the gate's subspace; None for a steering without a gate, or with one that has no ranks.
        threshold: score from which on the gate is open, of a gate on a subspace its energy ratio; None is the gate's
            own calibration.
        strength: λ.
        experts: which experts are on; at least one.
        residual: whether U β(h) is added.
        gate: False is always open.
        mode: what the rank is of: "gate", or "ablation" of the subspace in the steering's stead.
    """

    rank: int | None
    threshold: float | None
    strength: float
    experts: tuple[bool, ...]
    residual: bool
    gate: bool
    mode: Mode = "gate"

    def message(self) -> dict[str, Any]:
        """The settings as the browser has them."""
        return {**vars(self), "experts": list(self.experts)}


@dataclass(frozen=True, eq=False)
class Subject:
    """The layer of a steering that is explored, and what can be changed there.

    Everything that is changed is changed at this layer alone, and at the layer whose gate decides for it; only the
    strength is one for all layers.

    Attributes:
        steering: as it was given.
        layer: one of its layers.
    """

    steering: FineSteer
    layer: int

    def __post_init__(self) -> None:
        normalised(self, layer=choice("layer", self.layer, self.steering.layers, "a steered layer, one of"))
        if self.gate is not None:
            require_still(self.gate, "explore", "Explore the gate without its scan: steering.with_gate(gate.inner).")
        ranks = [leaf.rank for leaf in self.leaves]
        if ranks and not (len(set(ranks)) == 1 and ranks[0] <= self.ranks):
            raise InputError(
                "explore",
                expected="a composed gate whose parts are at one rank, which all of them have",
                got=f"ranks {ranks} of {[leaf.ranks for leaf in self.leaves]} fitted",
                fix="Put them at one rank, steering.at_rank(r), or explore each part: steering.with_gate(part).",
            )

    @property
    def gate_layer(self) -> int:
        """The layer whose gate decides."""
        return self.layer if self.steering.gate_layer is None else self.steering.gate_layer

    @property
    def gate(self) -> Gate | None:
        """The gate that decides; None is always open."""
        return self.steering.gate_at(self.gate_layer)

    @property
    def experts(self) -> Experts:
        """The layer's experts."""
        return self.steering.experts_at(self.layer)

    @property
    def ranks(self) -> int:
        """The largest rank that every leaf with a subspace has; 0 without any."""
        return 0 if self.gate is None else self.gate.ranks

    @property
    def leaves(self) -> tuple[SubspaceGate, ...]:
        """The gate's leaves that have a subspace."""
        return () if self.gate is None else subspace_leaves(self.gate)

    @property
    def has_threshold(self) -> bool:
        """Whether the gate has one threshold; composed gates have none."""
        return self.gate is not None and self.gate.leaves == (self.gate,)

    def start(self) -> Settings:
        """The steering's own settings."""
        gate, experts = self.gate, self.experts
        return Settings(
            rank=self.leaves[0].rank if self.leaves else None,
            threshold=None,
            strength=float(self.steering.strength),
            experts=experts.enabled,
            residual=experts.use_residual,
            gate=gate is not None,
        )

    def checked(self, values: Any) -> Settings:
        """The settings that a browser, or `Explorer.choose`, gives as a mapping; the experts are any sequence.

        Raises:
            InputError: they are none, or do not fit this steering.
        """
        names = set(Settings.__dataclass_fields__)
        if not isinstance(values, Mapping) or set(values) != names:
            raise InputError("settings", expected=f"a mapping of {sorted(names)}", got=repr(values)[:200])
        on, n_experts = values["experts"], self.experts.n_experts
        fits = isinstance(on, Sequence) and len(on) == n_experts and any(on)
        _require(fits, "experts", f"{n_experts} switches, at least one of them on", on)
        return Settings(
            **self._gate_settings(**{name: values[name] for name in ("rank", "threshold", "gate", "mode")}),
            strength=finite("strength", values["strength"]),
            experts=tuple(switch("experts", one) for one in on),
            residual=switch("residual", values["residual"]),
        )

    def _gate_settings(self, rank: Any, threshold: Any, gate: Any, mode: Any) -> dict[str, Any]:
        """The settings of the gate, checked."""
        gate, mode = switch("gate", gate), choice("mode", mode, ("gate", "ablation"))
        checked = {"rank": rank, "threshold": threshold, "gate": gate, "mode": mode}
        if self.gate is None:
            fits = rank is None and threshold is None and not gate and mode == "gate"
            _require(fits, "a steering without a gate", "rank=None, threshold=None, gate=False, mode='gate'", checked)
            return checked
        if self.ranks:
            checked["rank"] = whole("rank", rank, 1, self.ranks)
        else:
            fits = rank is None and mode == "gate"
            _require(fits, "a gate without ranks", "rank=None, mode='gate'", {"rank": rank, "mode": mode})
        if threshold is not None:
            _require(self.has_threshold, "threshold", "None: a composed gate has no single one", threshold)
            checked["threshold"] = finite("threshold", threshold)
        return checked

    def state(self, settings: Settings) -> FineSteer | SubspaceAblation:
        """The steering, or the ablation of the gate's subspace, that these settings amount to."""
        gate, steering = self.gate, self.steering.with_strength(settings.strength)
        if settings.mode == "ablation":
            assert settings.rank is not None
            return SubspaceAblation(
                self.leaves[0].subspace,
                layer=self.gate_layer,
                rank=settings.rank,
                site=steering.site,
                fingerprint=steering.fingerprint,
            )
        steering = self._with_experts(steering, settings)
        if gate is None:
            return steering
        if not settings.gate:
            return self._always_open(steering)
        if settings.rank is not None:
            gate = gate.at_rank(settings.rank)
        if settings.threshold is not None:
            gate = gate.at_threshold(settings.threshold)
        return self._with_gate(steering, gate)

    def _with_experts(self, steering: FineSteer, settings: Settings) -> FineSteer:
        changed = replace(self.experts, enabled=settings.experts, use_residual=settings.residual)
        return steering.with_experts(changed, self.layer)

    def _with_gate(self, steering: FineSteer, gate: Gate) -> FineSteer:
        if len(steering.hooked_layers) == 1:
            return steering.with_gate(gate)
        return steering.with_gate({**self._gates(), self.gate_layer: gate})

    def _always_open(self, steering: FineSteer) -> FineSteer:
        """Without the gate; where it decided for all layers, all of them are open."""
        others = {layer: gate for layer, gate in self._gates().items() if layer != self.gate_layer}
        return steering.with_gate(others if others and steering.gate_layer is None else None)

    def _gates(self) -> dict[int, Gate]:
        """The gate of every layer that has one."""
        gates = {layer: self.steering.gate_at(layer) for layer in self.steering.hooked_layers}
        return {layer: gate for layer, gate in gates.items() if gate is not None}


def _require(fits: bool, what: str, expected: str, got: Any) -> None:
    if not fits:
        raise InputError(what, expected=expected, got=repr(got))

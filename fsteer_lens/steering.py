"""Steering: a gate and experts as a hook object.

On a new prompt the query activation ĥ of every row is read at its last prompt token, before the edit, and decided upon:
gate g(ĥ), vector v(ĥ). Until the row's generation ends, λ · g · v is added at the positions that the scope names:

    H ← H + λ · g(ĥ) · v(ĥ)                          (FineSteer, arXiv 2604.15488)

Adding happens in float32 and is cast back; where every row is closed nothing is returned, so the stream stays
bit-identical.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.errors import InputError, NonFiniteError, ShapeError
from fsteer_lens.experts import Experts
from fsteer_lens.fingerprints import Fingerprint
from fsteer_lens.gates import Gate
from fsteer_lens.hooks import HookObject, Session
from fsteer_lens.linalg import move
from fsteer_lens.models import DEFAULT_SITE
from fsteer_lens.positions import View, at

Scope = Literal["all", "prompt", "generated"]
SCOPES = ("all", "prompt", "generated")
SCOPE_OF_SHIFT: Mapping[str | None, Scope] = {"last_prompt": "prompt", "response_mean": "all", None: "all"}


@final
@dataclass(frozen=True)
class Schedule:
    """How the strength changes over generated tokens.

    Attributes:
        factors: factor of the strength at step 0, 1, ...; the last one holds for all later steps. Step k is the
            position that predicts generated token k; earlier positions use step 0.
    """

    factors: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.factors or any(factor != factor for factor in self.factors):
            raise InputError("schedule", expected="at least one number", got=self.factors)

    def at(self, steps: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Factor at each step."""
        table = torch.tensor(self.factors, device=steps.device)
        return table[steps.clamp(0, len(self.factors) - 1)]


class Decision(NamedTuple):
    """What a steering decided for each row of a batch at one layer; kept until the rows' generation ends."""

    gate: Float[Tensor, " b"]
    vector: Float[Tensor, "b d"]
    ser: Float[Tensor, "b r"] | None = None
    weights: Float[Tensor, "b k"] | None = None
    coefficients: Float[Tensor, "b m"] | None = None


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Steering(HookObject):
    """What every method that adds a gated vector to the residual stream has in common.

    Attributes:
        layer: where it acts; None for a method given per layer.
        strength: λ.
        scope: "all" every real position, "prompt" the prompt's, "generated" those that predict a generated token
            (from the prompt's last on). None: "prompt" for last-prompt shifts, else "all", the paper's.
        schedule: factors of the strength over generated tokens.
        gate_layer: the layer whose gate decides for all; at most the first steered layer.
        shift: how the shifts were taken that this was fitted on.
        site: hook point within a layer.
        fingerprint: of the model it was fitted on; checked when it is put on a model.
    """

    layer: int | None = None
    strength: float = 1.0
    scope: Scope | None = None
    schedule: Schedule | None = None
    gate_layer: int | None = None
    shift: str | None = None
    site: str = DEFAULT_SITE
    fingerprint: Fingerprint | None = None

    def __post_init__(self) -> None:
        if self.scope is None:
            object.__setattr__(self, "scope", SCOPE_OF_SHIFT[self.shift])
        if self.scope not in SCOPES:
            raise InputError("scope", expected=f"one of {SCOPES}", got=repr(self.scope))
        if not torch.tensor(float(self.strength)).isfinite():
            raise InputError("strength", expected="a finite number", got=self.strength)
        if self.gate_layer is not None:
            if self.gate_layer > min(self.layers):
                raise InputError(
                    "gate_layer", expected=f"at most the first steered layer, {min(self.layers)}", got=self.gate_layer
                )
            if self.gate_at(self.gate_layer) is None:
                raise InputError(f"gate_layer={self.gate_layer} has no gate", fix="Give gates={layer: gate}.")

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Steered layers, in order."""

    @abstractmethod
    def gate_at(self, layer: int) -> Gate | None:
        """The gate of one layer; None is always open."""

    @abstractmethod
    def vectors(self, layer: int, h: Float[Tensor, "b d"]) -> Decision:
        """The vector for each query activation with what it is made of; its gate is all ones."""

    @property
    def hooked_layers(self) -> tuple[int, ...]:
        """Steered layers and the gate's."""
        extra = () if self.gate_layer is None else (self.gate_layer,)
        return tuple(sorted({*self.layers, *extra}))

    def __repr__(self) -> str:
        gates = {type(gate).__name__ if (gate := self.gate_at(layer)) else "no gate" for layer in self.layers}
        where = self.layers[0] if len(self.layers) == 1 else list(self.layers)
        return (
            f"{type(self).__name__}(layer={where}, {' / '.join(sorted(gates))}, strength={self.strength:g},"
            f" scope={self.scope})"
        )

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Steering":
        """The same steering on another device or in another dtype."""
        return move(self, device, dtype)

    def with_strength(self, strength: float) -> "Steering":
        """The same steering at another strength; shares all tensors."""
        return replace(self, strength=strength)

    def with_scope(self, scope: Scope | None) -> "Steering":
        """The same steering at other positions; shares all tensors."""
        return replace(self, scope=scope)

    def decide(self, layer: int, h: Float[Tensor, "b d"], gate: Float[Tensor, " b"] | None = None) -> Decision:
        """Decide for query activations at one layer; `gate` overrides the layer's own gate."""
        decision = self.vectors(layer, h)
        own = self.gate_at(layer)
        if own is not None:
            decision = decision._replace(ser=own.subspace.energy_ratios(h))
        if gate is None and own is not None:
            gate = own.gate(h)
        return decision if gate is None else decision._replace(gate=gate)

    def respond(self, session: Session, layer: int, activation: Tensor, view: View) -> Tensor | None:
        """Decide on a new prompt, then add the vector where the scope says."""
        if view.fresh:
            self._take_decision(session, layer, activation, view)
        if layer not in self.layers:
            return None
        decision = session.decisions[layer]
        factor = self._factors(view)
        scaled = (self.strength * decision.gate.unsqueeze(-1) * decision.vector).to(activation.device)
        size = factor * scaled.norm(dim=-1, keepdim=True)
        change = size / activation.float().norm(dim=-1).clamp(min=1e-12)
        session.extend(layer, view, change=change.masked_fill(~view.real, float("nan")))
        if not bool(size.any()):
            return None
        precise = torch.promote_types(activation.dtype, torch.float32)
        edited = activation.to(precise) + factor.unsqueeze(-1).to(precise) * scaled.unsqueeze(1).to(precise)
        return edited.to(activation.dtype)

    def _take_decision(self, session: Session, layer: int, activation: Tensor, view: View) -> None:
        live = session.queries is None
        h = at(activation, view.query).float() if live else session.queries[layer].to(activation.device)  # pyright: ignore[reportOptionalSubscript]
        if layer not in self.layers:
            gate = self.gate_at(layer)
            assert gate is not None
            session.decisions[layer] = Decision(gate.gate(h), h.new_zeros(h.shape), gate.subspace.energy_ratios(h))
        else:
            shared = None
            if self.gate_layer is not None and self.gate_layer != layer:
                shared = session.decisions[self.gate_layer].gate.to(h.device)
            session.decisions[layer] = self.decide(layer, h, shared)
        taken = session.decisions[layer]
        if not bool(taken.gate.isfinite().all() and taken.vector.isfinite().all()):
            raise NonFiniteError(
                f"the decision at layer {layer}",
                expected="finite gate values and vectors",
                got="NaN or infinity: the activation there is not finite",
                fix="Half precision overflows on some models: load in bfloat16 or float32.",
            )
        session.record(layer, ser=taken.ser, gate=taken.gate, weights=taken.weights, coefficients=taken.coefficients)

    def _factors(self, view: View) -> Float[Tensor, "b t"]:
        """Schedule times scope at every position of a forward, 0 at pads."""
        steps = view.columns - view.query.unsqueeze(-1)
        inside = {"all": steps == steps, "prompt": steps <= 0, "generated": steps >= 0}[str(self.scope)]
        factor = (inside & view.real).float()
        return factor if self.schedule is None else factor * self.schedule.at(steps)


@final
@dataclass(frozen=True, eq=False, repr=False)
class FineSteer(Steering):
    """FineSteer: h ← h + λ · g(ĥ) · v(ĥ), gate and vector decided once per row at its last prompt token.

    Attributes:
        experts: how to steer: one `Experts` with `layer=`, or {layer: Experts}.
        gate: when to steer: one `Gate`, {layer: Gate}, or None for always.
    """

    experts: Experts | Mapping[int, Experts]
    gate: Gate | Mapping[int, Gate] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.experts, Mapping) != (self.layer is None):
            raise InputError(
                "FineSteer",
                expected="experts with layer=, or {layer: experts} without it",
                got=f"{type(self.experts).__name__} with layer={self.layer}",
            )
        if isinstance(self.experts, Mapping) and not self.experts:
            raise InputError("FineSteer", expected="at least one layer", got="none")
        widths = {self.experts_at(layer).d_model for layer in self.layers}
        widths |= {gate.subspace.d_model for gate in _values(self.gate)}
        if len(widths) > 1:
            raise ShapeError("experts and gates", expected="one d_model", got=sorted(widths))
        super().__post_init__()

    @property
    def layers(self) -> tuple[int, ...]:
        """Steered layers, in order."""
        return (self.layer,) if self.layer is not None else tuple(sorted(self.experts))  # pyright: ignore[reportArgumentType]

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.experts_at(self.layers[0]).d_model

    @property
    def n_experts(self) -> int:
        """Number of experts (of the first layer where there are several)."""
        return self.experts_at(self.layers[0]).n_experts

    def experts_at(self, layer: int) -> Experts:
        """The experts of one layer."""
        return self.experts[layer] if isinstance(self.experts, Mapping) else self.experts

    def gate_at(self, layer: int) -> Gate | None:
        """The gate of one layer; None is always open."""
        return self.gate.get(layer) if isinstance(self.gate, Mapping) else self.gate

    def vectors(self, layer: int, h: Float[Tensor, "b d"]) -> Decision:
        """The experts' vector for each query activation."""
        parts = self.experts_at(layer).parts(h)
        return Decision(h.new_ones(len(h)), parts.vector, None, parts.weights, parts.coefficients)

    def at_rank(self, rank: int) -> "FineSteer":
        """The same steering with its gates at another rank; shares all tensors."""
        if self.gate is None:
            raise InputError("at_rank", expected="a steering with a gate", got=repr(self))
        return replace(self, gate=_each(self.gate, lambda gate: gate.at_rank(rank)))

    def with_gate(self, gate: Gate | Mapping[int, Gate] | None) -> "FineSteer":
        """The same steering behind another gate; None is always open."""
        return replace(self, gate=gate, gate_layer=None if gate is None else self.gate_layer)

    def without_expert(self, index: int) -> "FineSteer":
        """The same steering with one expert switched off, at every layer."""
        return replace(self, experts=_each(self.experts, lambda experts: experts.without_expert(index)))

    def only_expert(self, index: int) -> "FineSteer":
        """The same steering with one expert at weight 1, at every layer."""
        return replace(self, experts=_each(self.experts, lambda experts: experts.only_expert(index)))

    def without_residual(self) -> "FineSteer":
        """The same steering without the residual part U β(h)."""
        return replace(self, experts=_each(self.experts, lambda experts: experts.without_residual()))


def _values(item: Any) -> Sequence[Any]:
    return [] if item is None else list(item.values()) if isinstance(item, Mapping) else [item]


def _each(item: Any, change: Any) -> Any:
    return {key: change(value) for key, value in item.items()} if isinstance(item, Mapping) else change(item)

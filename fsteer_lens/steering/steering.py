"""Steering: a gate and experts as a hook object.

On a new prompt the query activation ĥ of every row is read at its last prompt token, before the edit, and decided upon:
gate g(ĥ), vector v(ĥ). Until the row's generation ends, λ · g · v is added at the positions that the scope names:

    H ← H + λ · g(ĥ) · v(ĥ)                          (FineSteer, arXiv 2604.15488)

Where every row is closed nothing is added, so the stream stays bit-identical.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fsteer_lens.errors import HookError, InputError, NonFiniteError, ShapeError
from fsteer_lens.ground.checks import choice, finite, instance, normalised, optional, switch, whole
from fsteer_lens.hooks.objects import Link
from fsteer_lens.hooks.positions import View
from fsteer_lens.hooks.scopes import Schedule, Scope, in_scope, require_scope
from fsteer_lens.hooks.session import State
from fsteer_lens.method.experts import Experts
from fsteer_lens.method.gates import Gate, Reading, require_gate, require_reading
from fsteer_lens.models.points import DEFAULT_SITE
from fsteer_lens.prompts.formats import PromptFormat
from fsteer_lens.reading.fingerprints import Fingerprint
from fsteer_lens.trace.trace import Trace

Own = TypeVar("Own", bound="Steering")

Refresh = Literal["prompt", "step"]
SCOPE_OF_SHIFT: Mapping[str | None, Scope] = {"last_prompt": "prompt", "response_mean": "all", None: "all"}


class Decision(NamedTuple):
    """What a steering decided for activations at one layer.

    Attributes:
        gate: g, in [0, 1].
        vector: v.
        score: the number that the gate compares with its threshold; None without a gate.
        ser: energy ratio at every fitted rank; None without a gate on a subspace, as are the next three.
        distance: ‖h − μ‖.
        distance_outside: whether that lies outside what the gate's calibration queries spanned.
        energy_outside: the same of the energy ratio at the gate's rank.
        weights: α, weight of each expert.
        coefficients: β, coefficient of each residual direction.
    """

    gate: Float[Tensor, "*batch"]
    vector: Float[Tensor, "*batch d"]
    score: Float[Tensor, "*batch"] | None = None
    ser: Float[Tensor, "*batch r"] | None = None
    distance: Float[Tensor, "*batch"] | None = None
    distance_outside: Bool[Tensor, "*batch"] | None = None
    energy_outside: Bool[Tensor, "*batch"] | None = None
    weights: Float[Tensor, "*batch k"] | None = None
    coefficients: Float[Tensor, "*batch m"] | None = None


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Steering(Link):
    """What every method that adds a gated vector to the residual stream has in common.

    Attributes:
        layer: where it acts; None for a method given per layer.
        strength: λ.
        scope: "all" every real position, "prompt" the prompt's, "generated" those that predict a generated token
            (from the prompt's last on), or a `Window` of generated tokens. None: "prompt" for last-prompt shifts, else
            "all", the paper's.
        schedule: factors of the strength over generated tokens; the first one is the prompt's too, and the only one
            that counts with scope="prompt".
        refresh: "prompt" decides once, at the prompt's last token (the paper); "step" decides again at every later
            position, from the activation there.
        gate_layer: the layer whose gate decides for all; at most the first steered layer.
        monitor: decide and record, and edit nothing.
        shift: how the shifts were taken that this was fitted on.
        site: hook point within a layer.
        fingerprint: of the model it was fitted on; checked when it is put on a model.
        prompt_format: how the prompts became tokens that it was fitted on: chat template or not. What runs prompts
            follows it where nothing else is asked for, and refuses what contradicts it.
        read: what the query activation ĥ is of a prompt, as in `Activations`; a gate reads by its own `read`.
        shift_lengths: length of the mean shift at every layer that it was fitted at: the unit in which what this adds
            compares with what other methods add; None where nobody knows.
    """

    layer: int | None = None
    strength: float = 1.0
    scope: Scope | None = None
    schedule: Schedule | None = None
    refresh: Refresh = "prompt"
    gate_layer: int | None = None
    monitor: bool = False
    shift: str | None = None
    site: str = DEFAULT_SITE
    fingerprint: Fingerprint | None = None
    prompt_format: PromptFormat | None = None
    read: Reading = "last"
    shift_lengths: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        require_reading(self.read)
        if self.scope is None:
            normalised(self, scope=SCOPE_OF_SHIFT.get(self.shift))
        require_scope(self.scope)
        normalised(
            self,
            layer=optional(whole, "layer", self.layer),
            strength=finite("strength", self.strength),
            refresh=choice("refresh", self.refresh, ("prompt", "step")),
            gate_layer=optional(whole, "gate_layer", self.gate_layer),
            monitor=switch("monitor", self.monitor),
        )
        optional(instance, "schedule", self.schedule, Schedule, "a Schedule or None")
        optional(instance, "fingerprint", self.fingerprint, Fingerprint, "a Fingerprint or None")
        optional(instance, "prompt_format", self.prompt_format, PromptFormat, "a PromptFormat or None")
        if self.shift_lengths is not None:
            known = instance("shift_lengths", self.shift_lengths, Mapping, "{layer: length} or None")
            lengths = {whole("layer", layer): finite("shift length", length, 0) for layer, length in known.items()}
            normalised(self, shift_lengths=lengths)
        if self.refresh == "step" and self.scope == "prompt":
            raise InputError(
                'refresh="step" has no effect with scope="prompt"',
                fix='Use scope="all", "generated" or a Window.',
            )
        if self.refresh == "step" and self.reads != ("last",):
            raise InputError(
                'refresh="step" decides at single tokens',
                expected='gate and vector that read="last"',
                got=self.reads,
                fix='Fit them on activations.reading("last"), or leave refresh= out.',
            )
        if self.refresh == "step" and self.scanning:
            raise InputError(
                'refresh="step" decides at single tokens',
                expected="gates that do not scan windows of the prompt",
                got=list(self.scanning.values()),
                fix="Leave refresh= out, or give the gate without its scan: gate.inner.",
            )
        if self.gate_layer is not None:
            if self.gate_layer > min(self.layers):
                raise InputError(
                    "gate_layer", expected=f"at most the first steered layer, {min(self.layers)}", got=self.gate_layer
                )
            if self.gate_at(self.gate_layer) is None:
                raise InputError(
                    f"gate_layer={self.gate_layer} has no gate", fix="Give one for that layer: gate={layer: ...}."
                )

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Steered layers, in order."""

    @abstractmethod
    def gate_at(self, layer: int) -> Gate | None:
        """The gate of one layer; None is always open."""

    @abstractmethod
    def vectors(self, layer: int, h: Float[Tensor, "*batch d"]) -> Decision:
        """The vector for each activation with what it is made of; its gate is all ones."""

    def _require_gate(self, gate: Any, layer: int | None) -> None:
        """Raise unless this is a gate for the stream at a layer: what enters a layer is what leaves the one below."""
        if layer is not None and self.site == "hook_resid_pre":
            layer -= 1
        require_gate(gate, f"{type(self).__name__} gate", self.d_model, layer)

    @property
    def hooked_layers(self) -> tuple[int, ...]:
        """Steered layers and the gate's."""
        extra = () if self.gate_layer is None else (self.gate_layer,)
        return tuple(sorted({*self.layers, *extra}))

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """Steered layers."""
        return self.layers

    @property
    def reads(self) -> tuple[Reading, ...]:
        """What vector and gates read of a prompt."""
        gates = [self.gate_at(layer) for layer in self.hooked_layers]
        return tuple(dict.fromkeys([self.read, *(gate.read for gate in gates if gate is not None)]))

    @property
    def scanning(self) -> Mapping[int, Gate]:
        """Gates that decide on windows of the prompts, by layer."""
        asked = self.hooked_layers if self.gate_layer is None else (self.gate_layer,)
        gates = {layer: self.gate_at(layer) for layer in asked}
        return {layer: gate for layer, gate in gates.items() if gate is not None and gate.scans}

    @property
    def stepwise(self) -> bool:
        """Whether it decides again at every later position."""
        return self.refresh == "step"

    @property
    def forks(self) -> bool:
        """Yes: a `Decision` holds a value for each row. Not where a class of one's own edits in another way."""
        return type(self).edit is Steering.edit

    def __repr__(self) -> str:
        gates = {type(gate).__name__ if (gate := self.gate_at(layer)) else "no gate" for layer in self.layers}
        where = self.layers[0] if len(self.layers) == 1 else list(self.layers)
        more = (", refresh=step" if self.stepwise else "") + (", monitor" if self.monitor else "")
        return (
            f"{type(self).__name__}(layer={where}, {' / '.join(sorted(gates))}, strength={self.strength:g},"
            f" scope={self.scope}{more})"
        )

    def with_strength(self: Own, strength: float) -> Own:
        """The same steering at another strength; shares all tensors."""
        return replace(self, strength=strength)

    def with_scope(self: Own, scope: Scope | None) -> Own:
        """The same steering at other positions; shares all tensors."""
        return replace(self, scope=scope)

    def with_schedule(self: Own, schedule: Schedule | None) -> Own:
        """The same steering whose strength changes over generated tokens; None keeps it; shares all tensors."""
        return replace(self, schedule=schedule)

    def with_monitor(self: Own, monitor: bool = True) -> Own:
        """The same steering that decides and records and edits nothing, or one that acts again; shares all tensors."""
        return replace(self, monitor=monitor)

    def decide(
        self,
        layer: int,
        h: Float[Tensor, "*batch d"],
        gate: Float[Tensor, "*batch"] | None = None,
        asked: Float[Tensor, "*batch d"] | None = None,
    ) -> Decision:
        """Decide for activations at one layer.

        Args:
            layer: a hooked one.
            h: what the vector is made from.
            gate: overrides the layer's own gate.
            asked: what the gate is asked about, where it reads prompts in another way, or scans windows of them; None
                is `h`.

        Raises:
            NonFiniteError: an activation is NaN or infinite.
            InputError: no `asked` for a gate that reads in another way than the vector, or that scans.
        """
        layer = whole("layer", layer)
        if gate is not None:
            instance("gate", gate, Tensor, "gate values, a tensor")
        steered = layer in self.layers
        decision = self.vectors(layer, h) if steered else Decision(h.new_ones(h.shape[:-1]), torch.zeros_like(h))
        own = self.gate_at(layer)
        if own is not None:
            if asked is None and gate is None and own.scans:
                expected, got = "asked=, the windows nearest to opening it", "activations of the prompts alone"
                raise InputError(f"the gate of layer {layer}, which scans", expected=expected, got=got)
            if asked is None and own.read != self.read:
                expected, got = f"asked=, the prompts read by {own.read!r}", f"what was read by {self.read!r} alone"
                raise InputError(f"the gate of layer {layer}", expected=expected, got=got)
            asked = h if asked is None else asked
            decision = decision._replace(**own.readings(asked))
        if gate is None and own is not None:
            assert asked is not None
            gate = own(asked).to(h)
            if gate.shape != h.shape[:-1]:
                expected = f"a gate value for each activation, {list(h.shape[:-1])}"
                raise ShapeError(f"{type(own).__name__} at layer {layer}", expected=expected, got=list(gate.shape))
        if gate is not None:
            decision = decision._replace(gate=gate)
        in_range = (decision.gate >= 0) & (decision.gate <= 1)  # false for NaN as well
        if not bool(in_range.all() and decision.vector.isfinite().all()):
            self._refuse(layer, h, decision, own)
        return decision

    def _refuse(self, layer: int, h: Tensor, decision: Decision, own: Gate | None) -> NoReturn:
        """Say what is wrong with a decision: the activation, or the gate."""
        if bool(h.isfinite().all() and decision.vector.isfinite().all()):
            wrong = decision.gate[~((decision.gate >= 0) & (decision.gate <= 1))].flatten()[:3].tolist()
            raise InputError(f"{type(own).__name__} at layer {layer}", expected="gate values in [0, 1]", got=wrong)
        raise NonFiniteError(
            f"the decision at layer {layer}",
            expected="finite gate values and vectors",
            got="NaN or infinity: the activation there is not finite",
            fix="Half precision overflows on some models: load in bfloat16 or float32.",
        )

    def edit(self, state: State, layer: int, activation: Tensor, view: View) -> Tensor | None:
        """Decide on a new prompt (with refresh="step" at every later position too), and scale by scope and schedule."""
        if view.fresh:
            self.open(state, layer, activation, view)
        decision = state.decisions[layer]
        gate, vector = decision.gate.unsqueeze(1), decision.vector.unsqueeze(1)  # [b 1], [b 1 d]
        if self.stepwise:
            gate, vector = self._refreshed(state, layer, activation, view)
        if layer not in self.layers or self.monitor or layer in state.shut:
            return None
        factor = self.strength * self._factors(view) * gate.to(activation.device)
        return factor.unsqueeze(-1) * vector.to(activation.device)

    def open(self, state: State, layer: int, activation: Tensor, view: View) -> None:
        """Decide on the prompts, whose last tokens are in this activation or in `state.queries`, and record it."""
        h = state.query(layer, activation, view, self.read)
        asked = self._asked(state, layer, h, activation, view)
        decision = self.decide(layer, h, self._shared_gate(layer, state.decisions, h), asked)
        state.decisions[layer] = decision
        if self.stepwise or (self.strength and bool(decision.gate.any())):
            state.shut.discard(layer)
        else:
            state.shut.add(layer)
        kept = decision._asdict()
        del kept["vector"]
        state.record(layer, **kept)
        self._tell(layer, state.trace)

    def _tell(self, layer: int, trace: Trace) -> None:
        """Note in a trace what the vector and the gate of a layer read of the prompts."""
        own = self.gate_at(layer)
        if layer in self.layers:
            trace.read[layer] = self.read
        if own is not None:
            trace.gate_read[layer] = own.read

    def _asked(self, state: State, layer: int, h: Tensor, activation: Tensor, view: View) -> Tensor:
        """What a layer's gate is asked about: what it reads of each prompt, or of the nearest of its windows."""
        if layer in self.scanning:
            if state.scanned is None:
                fix = "Use generate or stream, or the gate without its scan: steering.with_gate(gate.inner)."
                raise HookError(f"{self!r} scans windows of the prompts", got="a session without them", fix=fix)
            return state.scanned[layer].to(h.device)
        own = self.gate_at(layer)
        return h if own is None or own.read == self.read else state.query(layer, activation, view, own.read)

    def _shared_gate(self, layer: int, decisions: Mapping[int, Decision], h: Tensor) -> Tensor | None:
        """The deciding layer's gate values; None where this layer decides itself."""
        if self.gate_layer is None or self.gate_layer == layer:
            return None
        return decisions[self.gate_layer].gate.to(h.device)

    def _refreshed(
        self, state: State, layer: int, activation: Tensor, view: View
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t d"]]:
        """Gate and vector at every position: up to the prompt's last token the prompt's, then each position's own."""
        first = state.decisions[layer]
        start = int((view.columns < view.query.min()).sum())
        h = activation[:, start:].float().masked_fill(~view.real[:, start:, None], 0.0)
        own = self.decide(layer, h, self._shared_gate(layer, state.steps, h))
        state.steps[layer] = own
        steps = view.columns - view.query.unsqueeze(-1)

        def spread(prompts: Tensor, later: Tensor) -> Tensor:
            whole = prompts.to(h.device).unsqueeze(1).repeat_interleave(steps.shape[1], dim=1)
            place = (steps[:, start:] > 0).reshape(*later.shape[:2], *[1] * (later.ndim - 2))
            whole[:, start:] = torch.where(place, later.to(h.device), whole[:, start:])
            return whole

        gate, vector = spread(first.gate, own.gate), spread(first.vector, own.vector)
        known = view.real & (steps >= 0)
        state.extend(layer, view, step_gate=gate.masked_fill(~known, float("nan")))
        if first.weights is not None and own.weights is not None:
            weights = spread(first.weights, own.weights)
            state.extend(layer, view, step_weights=weights.masked_fill(~known.unsqueeze(-1), float("nan")))
        return gate, vector

    def _factors(self, view: View) -> Float[Tensor, "b t"]:
        """Schedule times scope at every position of a forward, 0 at pads."""
        steps = view.columns - view.query.unsqueeze(-1)
        assert self.scope is not None
        factor = (in_scope(self.scope, steps) & view.real).float()
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
        wrong = [type(one).__name__ for one in _values(self.experts) if not isinstance(one, Experts)]
        if wrong or not _values(self.experts):
            raise InputError("FineSteer", expected="Experts at one layer at least", got=wrong or "none")
        for name in ("experts", "gate"):
            held = getattr(self, name)
            if isinstance(held, Mapping):  # a copy: what the caller does to his changes nothing here
                normalised(self, **{name: {whole("layer", layer): one for layer, one in held.items()}})
        unused = set(self.gate) - {*self.layers, self.gate_layer} if isinstance(self.gate, Mapping) else set()
        if unused:
            raise InputError(
                "gates at layers that are not steered",
                expected=f"gates at layers among {list(self.layers)}",
                got=f"gates at {sorted(unused)}",
                fix="Leave them out, or let one decide with gate_layer=.",
            )
        widths = {self.experts_at(layer).d_model for layer in self.layers}
        if len(widths) > 1:
            raise ShapeError("experts", expected="one d_model", got=sorted(widths))
        gates = self.gate if isinstance(self.gate, Mapping) else {optional(whole, "layer", self.layer): self.gate}
        for layer, gate in gates.items():
            if gate is not None:
                self._require_gate(gate, layer)
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

    def layer_of(self, layer: int | None = None) -> int:
        """The steered layer that is meant: the given one, or the only one.

        Raises:
            InputError: it is not steered, or there are several to choose from.
        """
        only = self.layers[0] if len(self.layers) == 1 else None
        return choice("layer", only if layer is None else layer, self.layers, "one of the steered layers,")

    def experts_at(self, layer: int) -> Experts:
        """The experts of one layer."""
        return self.experts[layer] if isinstance(self.experts, Mapping) else self.experts

    def gate_at(self, layer: int) -> Gate | None:
        """The gate of one layer; None is always open."""
        return self.gate.get(layer) if isinstance(self.gate, Mapping) else self.gate

    def _tell(self, layer: int, trace: Trace) -> None:
        """Note what was read, and what the experts are called."""
        super()._tell(layer, trace)
        names = self.experts_at(layer).names if layer in self.layers else None
        if names is not None:
            trace.names[layer] = names

    def vectors(self, layer: int, h: Float[Tensor, "*batch d"]) -> Decision:
        """The experts' vector for each activation."""
        parts = self.experts_at(layer).parts(h)
        ones = h.new_ones(h.shape[:-1])
        return Decision(ones, parts.vector, weights=parts.weights, coefficients=parts.coefficients)

    def at_rank(self, rank: int) -> "FineSteer":
        """The same steering with its gates at another rank; shares all tensors."""
        if self.gate is None:
            raise InputError("at_rank", expected="a steering with a gate", got=repr(self))
        return replace(self, gate=_each(self.gate, lambda gate: gate.at_rank(rank)))

    def with_gate(self, gate: Gate | Mapping[int, Gate] | None) -> "FineSteer":
        """The same steering behind another gate; None is always open."""
        return replace(self, gate=gate, gate_layer=None if gate is None else self.gate_layer)

    def with_experts(self, experts: Experts, layer: int | None = None) -> "FineSteer":
        """The same steering with other experts at one layer; `layer=None` is the only one."""
        known = self.experts
        where = self.layer_of(layer)
        return replace(self, experts={**known, where: experts} if isinstance(known, Mapping) else experts)

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

"""Hook objects: a gate and experts, a probe or an ablation, put on a TransformerLens model.

A hook object is a frozen value. Each `.on(model)`, `.attach(model)` or `.fwd_hooks()` makes a session, which keeps the
positions seen so far, the decisions taken, and the trace. In a session, every site does the same for every forward:

1. Tell a new prompt from the continuation of the last one (`Positions`).
2. On a new prompt, read the query activation ĥ and decide, row by row: gate g, vector v.
3. Add λ · g · v at the positions that the scope names, and write the size of the change into the trace.

Adding happens in float32 and is cast back; where every row is closed nothing is returned, so the stream stays
bit-identical.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.errors import HookError, InputError, ShapeError
from fsteer_lens.experts import Experts
from fsteer_lens.fingerprints import Fingerprint, fingerprint
from fsteer_lens.gates import Gate
from fsteer_lens.linalg import move, require_rank
from fsteer_lens.models import DEFAULT_SITE, SteerableModel, add_hooks, site_name
from fsteer_lens.subspace import Subspace
from fsteer_lens.trace import Trace

Scope = Literal["all", "prompt", "generated"]
SCOPES = ("all", "prompt", "generated")
SCOPE_OF_SHIFT: Mapping[str | None, Scope] = {"last_prompt": "prompt", "response_mean": "all", None: "all"}
PREFIX_TOLERANCE = 1e-3


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


# ---------------------------------------------------------------------------------------------------------- positions


class View(NamedTuple):
    """Where the activation of one forward pass lies in its rows.

    Attributes:
        columns: absolute columns of the activation, [t].
        n_new: how many of them, at the end, were not seen before.
        fresh: whether this is a new prompt.
        query: column of each row's last prompt token, [b].
        first: column of each row's first real token, [b].
        real: which columns hold real tokens, [b t].
    """

    columns: Int[Tensor, " t"]
    n_new: int
    fresh: bool
    query: Int[Tensor, " b"]
    first: Int[Tensor, " b"]
    real: Bool[Tensor, "b t"]


class Positions:
    """Position counter of one site.

    A forward is a new prompt if the batch size changes, or if it has more than one token and is not the last rectangle
    plus one token with the same (unedited) activation at the prompts' last tokens. One-token prompts under a cache
    look like decoding steps: call `reset` between them.
    """

    def __init__(self, prompt_lengths: Tensor | None, attention_mask: Tensor | None) -> None:
        self.lengths = None if prompt_lengths is None else torch.as_tensor(prompt_lengths).long()
        self.mask = None if attention_mask is None else torch.as_tensor(attention_mask).bool()
        self.seen = 0
        self.query: Tensor
        self.first: Tensor
        self.at_query: Tensor | None = None

    def reset(self) -> None:
        """Take the next forward as a new prompt."""
        self.at_query = None

    def observe(self, activation: Float[Tensor, "b t d"]) -> View:
        """Place an activation, before any edit."""
        rows, width = activation.shape[:2]
        fresh = self._is_fresh(activation)
        if fresh:
            self.query, self.first = self._locate(rows, width, activation.device)
            with torch.inference_mode(False):
                self.at_query = at(activation, self.query).clone()
            start, n_new, self.seen = 0, width, width
        else:
            start = self.seen if width == 1 else 0
            n_new, self.seen = 1, self.seen + 1
        columns = torch.arange(start, start + width, device=activation.device)
        return View(columns, n_new, fresh, self.query, self.first, self._real(columns, rows))

    def _is_fresh(self, activation: Tensor) -> bool:
        rows, width = activation.shape[:2]
        if self.at_query is None or len(self.at_query) != rows:
            return True
        if width == 1:
            return False
        if width != self.seen + 1:
            return True
        distance = (at(activation, self.query) - self.at_query).float().norm(dim=-1)
        same = distance <= PREFIX_TOLERANCE * self.at_query.float().norm(dim=-1)
        if same.any() and not same.all():
            raise HookError(
                "cannot tell whether this forward goes on with the last prompts: some rows do, others do not",
                fix="Call handle.reset() between batches, or open a new context for each with prompt_lengths=.",
            )
        return not bool(same.all())

    def _locate(self, rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        first = torch.zeros(rows, dtype=torch.long)
        last = torch.full((rows,), width - 1)
        if self.mask is not None:
            if self.mask.shape != (rows, width):
                raise HookError(
                    "attention_mask does not fit this forward",
                    expected=[rows, width],
                    got=list(self.mask.shape),
                    fix="Open a new context for every batch that has its own mask.",
                )
            mask = self.mask.cpu().long()
            first, last = mask.argmax(dim=1), width - 1 - mask.flip(1).argmax(dim=1)
        if self.lengths is not None:
            lengths = self.lengths.cpu()
            ends = first + lengths - 1
            if lengths.shape != (rows,) or (lengths < 1).any() or (ends > last).any():
                raise HookError(
                    "prompt_lengths do not fit this forward",
                    expected=f"{rows} lengths between 1 and {(last - first + 1).tolist()}",
                    got=lengths.tolist(),
                    fix="Open a new context for every batch that has its own lengths.",
                )
            last = ends
        return last.to(device), first.to(device)

    def _real(self, columns: Tensor, rows: int) -> Tensor:
        real = torch.ones(rows, len(columns), dtype=torch.bool, device=columns.device)
        if self.mask is not None:
            inside = columns < self.mask.shape[1]
            real[:, inside] = self.mask.to(columns.device)[:, columns[inside]]
        return real


def at(activation: Float[Tensor, "b t d"], positions: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
    """The activation at one position of each row."""
    return activation[torch.arange(len(positions), device=activation.device), positions]


# ----------------------------------------------------------------------------------------------------------- sessions


class Session:
    """One use of a hook object on one model: positions, decisions and trace.

    Not thread-safe: a model with hooks runs in one thread at a time.
    """

    def __init__(
        self,
        hook_object: "HookObject",
        prompt_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        queries: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.hook_object = hook_object
        self.queries = queries
        self.trace = Trace()
        self.decisions: dict[int, Decision] = {}
        self.fired = False
        self._positions = {layer: Positions(prompt_lengths, attention_mask) for layer in hook_object.hooked_layers}

    def reset(self) -> None:
        """Take the next forward as a new prompt."""
        for positions in self._positions.values():
            positions.reset()

    def hooks(self, model: SteerableModel | None = None) -> list[tuple[str, "SiteHook"]]:
        """(name, function) pairs; with a model, names are checked against it."""
        site = self.hook_object.site
        return [
            (f"blocks.{layer}.{site}" if model is None else site_name(model, layer, site), SiteHook(self, layer))
            for layer in self.hook_object.hooked_layers
        ]

    def respond(self, layer: int, activation: Tensor) -> Tensor | None:
        """React to the activation at one layer; None leaves it as it is."""
        self.fired = True
        if activation.shape[-1] != self.hook_object.d_model:
            raise ShapeError(
                f"activation at layer {layer}",
                expected=f"width d_model={self.hook_object.d_model}",
                got=list(activation.shape),
                fix="Was this fitted on another model?",
            )
        view = self._positions[layer].observe(activation)
        if view.fresh:
            self.trace.prompt_lengths = (view.query - view.first + 1).cpu()
            self.trace.first = view.first.cpu()
        return self.hook_object.respond(self, layer, activation, view)

    def record(self, layer: int, **values: Tensor | None) -> None:
        """Put values into the trace, replacing what is there; None is left out."""
        for name, value in values.items():
            if value is not None:
                getattr(self.trace, name)[layer] = _kept(value)

    def extend(self, layer: int, view: View, **values: Tensor) -> None:
        """Append the values of new positions, [b t ...], to the trace."""
        for name, value in values.items():
            log, value = getattr(self.trace, name), _kept(value)
            if view.fresh or layer not in log:
                log[layer] = value
            else:
                log[layer] = torch.cat([log[layer], value[:, value.shape[1] - view.n_new :]], dim=1)


class SiteHook:
    """The function that TransformerLens calls; its short repr is what TransformerLens prints and times."""

    def __init__(self, session: Session, layer: int) -> None:
        self.session, self.layer = session, layer

    def __repr__(self) -> str:
        return f"{type(self.session.hook_object).__name__}@{self.layer}"

    def __call__(self, activation: Tensor, hook: Any = None) -> Tensor | None:
        """Return the edited activation, or None to leave it."""
        return self.session.respond(self.layer, activation)


def _kept(value: Tensor) -> Tensor:
    """A copy that outlives inference mode."""
    with torch.inference_mode(False):
        return value.detach().clone()


@final
class Hooks(list[tuple[str, SiteHook]]):
    """(name, function) pairs for `run_with_hooks(fwd_hooks=...)`, with the trace that they fill."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.hooks())
        self.trace = session.trace


@final
class Handle:
    """What `.attach` returns: detaches exactly its own hooks, resets the position counters, holds the trace."""

    def __init__(self, model: SteerableModel, session: Session) -> None:
        self._session = session
        self._remove = add_hooks(model, session.hooks(model))

    @property
    def trace(self) -> Trace:
        """What the hooks recorded for the latest prompt."""
        return self._session.trace

    def reset(self) -> None:
        """Take the next forward as a new prompt."""
        self._session.reset()

    def detach(self) -> None:
        """Remove the hooks; calling it twice does nothing more."""
        self._remove()


# ------------------------------------------------------------------------------------------------------- hook objects


_matched: "WeakKeyDictionary[Any, set[Fingerprint]]" = WeakKeyDictionary()


class HookObject(ABC):
    """Something that can be put on a model: `.on`, `.attach`, `.fwd_hooks`."""

    site: str = DEFAULT_SITE
    fingerprint: Fingerprint | None = None

    @property
    @abstractmethod
    def hooked_layers(self) -> tuple[int, ...]:
        """Layers whose hook points are used."""

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the activations."""

    @abstractmethod
    def respond(self, session: Session, layer: int, activation: Tensor, view: View) -> Tensor | None:
        """React to one activation; None leaves it as it is."""

    def fwd_hooks(self, prompt_lengths: Any = None, attention_mask: Any = None) -> Hooks:
        """Hooks for `model.run_with_hooks(tokens, fwd_hooks=...)`; the list's `.trace` is filled as they run.

        Args:
            prompt_lengths: real prompt tokens of each row, [b]; needed where the rows hold more than the prompt
                (scoring) or are padded on the right. None: a row's last token is its query.
            attention_mask: 1 at real tokens, [b s]; needed for padded rectangles.
        """
        return Hooks(Session(self, prompt_lengths, attention_mask))

    @contextmanager
    def on(self, model: SteerableModel, prompt_lengths: Any = None, attention_mask: Any = None) -> Iterator[Trace]:
        """Put the hooks on a model for the length of a `with` block; yields the trace, which fills as the model runs.

        Args as in `fwd_hooks`.

        Raises:
            MismatchError: fitted on another model.
            SiteError: the model has no such layer.
            HookError: at the end, if the model never ran through the hooks.
        """
        session = self.session_on(model, prompt_lengths, attention_mask)
        remove = add_hooks(model, session.hooks(model))
        try:
            yield session.trace
        finally:
            remove()
        if not session.fired:
            raise HookError(
                f"{self!r} never fired",
                expected="a forward pass through its layers inside the with block",
                got="none",
                fix="Run the model inside the block, and look at stop_at_layer.",
            )

    def attach(self, model: SteerableModel, prompt_lengths: Any = None, attention_mask: Any = None) -> Handle:
        """Put the hooks on a model until `handle.detach()`; arguments and errors as in `on`."""
        return Handle(model, self.session_on(model, prompt_lengths, attention_mask))

    def session_on(
        self,
        model: SteerableModel,
        prompt_lengths: Any = None,
        attention_mask: Any = None,
        queries: Mapping[int, Tensor] | None = None,
    ) -> Session:
        """A session for a model that was checked against the fingerprint (once per model).

        `queries` gives the query activations, {layer: [b d]}, where they are not to be read from the running stream.
        """
        for layer in self.hooked_layers:
            site_name(model, layer, self.site)
        if model.cfg.d_model != self.d_model:
            raise ShapeError(
                repr(self),
                expected=f"a model with d_model={self.d_model}",
                got=model.cfg.d_model,
                fix="Was this fitted on another model?",
            )
        known = _matched.setdefault(model, set())
        if self.fingerprint is not None and self.fingerprint not in known:
            self.fingerprint.require_match(fingerprint(model, sorted(self.fingerprint.probe), self.site))
            known.add(self.fingerprint)
        return Session(self, prompt_lengths, attention_mask, queries)


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


@dataclass(frozen=True, eq=False, kw_only=True)
class _SubspaceHook(HookObject):
    """A hook object that reads every token at one layer."""

    layer: int
    site: str = DEFAULT_SITE
    fingerprint: Fingerprint | None = None

    @property
    def hooked_layers(self) -> tuple[int, ...]:
        """The one layer."""
        return (self.layer,)


@final
@dataclass(frozen=True, eq=False)
class SubspaceProbe(_SubspaceHook):
    """Reads the energy ratio of every token at every rank into `trace.ser`, [b s r]; changes nothing."""

    subspace: Subspace

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.subspace.d_model

    def respond(self, session: Session, layer: int, activation: Tensor, view: View) -> None:
        """Record."""
        session.extend(layer, view, ser=self.subspace.energy_ratios(activation.float()))


@final
@dataclass(frozen=True, eq=False)
class ExpertProbe(_SubspaceHook):
    """Reads the expert weights that every token would get into `trace.weights`, [b s k]; changes nothing."""

    experts: Experts

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.experts.d_model

    def respond(self, session: Session, layer: int, activation: Tensor, view: View) -> None:
        """Record."""
        session.extend(layer, view, weights=self.experts.route(activation.float()))


@final
@dataclass(frozen=True, eq=False)
class SubspaceAblation(_SubspaceHook):
    """Takes the subspace out of every token: h ← h − V_r V_rᵀ (h − μ)."""

    subspace: Subspace
    rank: int = -1

    def __post_init__(self) -> None:
        if self.rank == -1:
            object.__setattr__(self, "rank", self.subspace.rank)
        require_rank(self.rank, self.subspace.rank, "the fitted rank")

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.subspace.d_model

    def respond(self, session: Session, layer: int, activation: Tensor, view: View) -> Tensor:
        """Remove the component in the subspace."""
        space = self.subspace.at_rank(self.rank)
        h = activation.float()
        edit = space.coordinates(h) @ space.basis.T
        change = edit.norm(dim=-1) / h.norm(dim=-1).clamp(min=1e-12)
        session.extend(layer, view, change=change.masked_fill(~view.real, float("nan")))
        return (h - edit).to(activation.dtype)

"""Hook objects: what can be put on a TransformerLens model, and the probes and the ablation among them.

A hook object is a frozen value. Each `.on(model)`, `.attach(model)` or `.fwd_hooks()` makes a session, which keeps the
positions seen so far, the decisions taken, and the trace.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fsteer_lens.errors import HookError, ShapeError
from fsteer_lens.experts import Experts
from fsteer_lens.fingerprints import Fingerprint, fingerprint
from fsteer_lens.linalg import require_rank
from fsteer_lens.models import DEFAULT_SITE, SteerableModel, add_hooks, site_name
from fsteer_lens.positions import Positions, View
from fsteer_lens.subspace import Subspace
from fsteer_lens.trace import Trace

# ----------------------------------------------------------------------------------------------------------- sessions


class Session:
    """One use of a hook object on one model: positions, decisions (what the hook object remembers per layer) and trace.

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
        self.decisions: dict[int, Any] = {}
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

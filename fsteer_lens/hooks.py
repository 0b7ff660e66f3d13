"""Hook objects: what can be put on a TransformerLens model, and the probes and the ablation among them.

A hook object is a frozen value. Each `.on(model)`, `.attach(model)` or `.fwd_hooks()` makes a session, which keeps the
positions seen so far, the decisions taken, and the trace.

1. A hook of TransformerLens hands the session the activation at one point of the residual stream.
2. The session places it: new prompt or continuation, which columns, where each row's last prompt token is.
3. Every hook object at that point reads the same activation and names its edit, in float32.
4. The session records the size of the edits, adds them up, and casts back.

Hooks of several objects that are put on a model one after another run in the order in which they were put there, and a
later one reads what an earlier one has edited. Objects in one `chain` all read the activation that enters the chain.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread, current_thread
from typing import Any, NamedTuple, TypeVar, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fsteer_lens.errors import HookError, InputError, MismatchError, ShapeError
from fsteer_lens.experts import Experts
from fsteer_lens.fingerprints import Fingerprint, fingerprint
from fsteer_lens.linalg import move, require_rank
from fsteer_lens.models import DEFAULT_SITE, AddedHooks, SteerableModel, hooks_added, site_name
from fsteer_lens.positions import Positions, View
from fsteer_lens.subspace import Subspace
from fsteer_lens.trace import Trace

# ----------------------------------------------------------------------------------------------------------- sessions


class Point(NamedTuple):
    """A place in the residual stream."""

    layer: int
    site: str

    @property
    def name(self) -> str:
        """Its name in TransformerLens."""
        return f"blocks.{self.layer}.{self.site}"


class State:
    """What one link remembers of the prompts at hand."""

    def __init__(self, link: "Link") -> None:
        self.link = link
        self.trace = Trace()
        self.decisions: dict[int, Any] = {}
        """What was decided on the prompts, per layer."""
        self.steps: dict[int, Any] = {}
        """What was decided at the latest positions, per layer, where a link decides at every step."""
        self.queries: dict[int, Tensor] | None = None
        """Query activations, {layer: [b d]}, where they are not to be read from the running stream."""

    def record(self, layer: int, **values: Tensor | None) -> None:
        """Put values into the trace, replacing what is there; None is left out."""
        for name, value in values.items():
            if value is not None:
                getattr(self.trace, name)[layer] = _kept(value)

    def extend(self, layer: int, view: View, **values: Tensor) -> None:
        """Append the values of new positions, [b t ...], to the trace."""
        for name, value in values.items():
            _extend(getattr(self.trace, name), layer, view, value)


class Session:
    """One use of a hook object on one model.

    A session belongs to the thread that first runs the model through it: two threads that take turns would each go on
    with the other's prompt, so a forward from a second thread raises until the first has ended or `reset` is called.
    """

    def __init__(
        self, hook_object: "HookObject", prompt_lengths: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> None:
        self.hook_object = hook_object
        self.states = [State(link) for link in hook_object.links]
        parts = tuple(state.trace for state in self.states)
        self.trace = parts[0] if len(parts) == 1 else Trace(parts=parts)
        self._points = hook_object.points
        self.unfired = set(self._points)
        self._acting = {point: [one for one in self.states if point in one.link.points] for point in self.unfired}
        self._positions = {point: Positions(prompt_lengths, attention_mask) for point in self._points}
        edited = {Point(layer, link.site) for link in hook_object.links for layer in link.edited_layers}
        layers = [point.layer for point in edited]
        self._alone = {layer for layer in layers if layers.count(layer) == 1}
        self._thread: Thread | None = None
        self._fresh: bool | None = None
        self._forward_is_fresh = True

    def reset(self) -> None:
        """Take the next forward, from whichever thread, as a new prompt."""
        self._thread = None
        for positions in self._positions.values():
            positions.reset()

    def hooks(self) -> "list[tuple[str, PointHook]]":
        """(name, function) pairs for the model."""
        return [(point.name, PointHook(self, point)) for point in self._points]

    @contextmanager
    def step(self, model: SteerableModel, *, fresh: bool) -> Iterator[None]:
        """Have the hooks on the model for one forward pass of this thread's, whichever thread ran the last one.

        `fresh` says whether it runs the prompts, or goes on with them: here that need not be guessed.
        """
        with hooks_added(model, self.hooks()):
            self._thread, self._fresh = current_thread(), fresh
            try:
                yield
            finally:
                self._fresh = None

    def respond(self, point: Point, activation: Tensor) -> Tensor | None:
        """React to the activation at one point; None leaves it as it is.

        Where that fails the prompt is forgotten, so that nothing goes on with a decision that was never taken.
        """
        self._require_own_thread()
        try:
            return self._respond(point, activation)
        except BaseException:
            self.reset()
            raise

    def _respond(self, point: Point, activation: Tensor) -> Tensor | None:
        if activation.shape[-1] != self.hook_object.d_model:
            raise ShapeError(
                f"activation at layer {point.layer}",
                expected=f"width d_model={self.hook_object.d_model}",
                got=list(activation.shape),
                fix="Was this fitted on another model?",
            )
        self.unfired.discard(point)
        view = self._positions[point].observe(activation, self._fresh)
        if point == self._points[0]:
            self._forward_is_fresh = view.fresh
        elif view.fresh != self._forward_is_fresh:
            raise HookError(
                f"at {point.name} this forward {'opens a new prompt' if view.fresh else 'goes on with the last one'}",
                expected=f"the same as at {self._points[0].name}",
                fix="A forward was broken off between the layers: call handle.reset(), or open a new context.",
            )
        acting = self._acting[point]
        if view.fresh:
            for trace in {id(one): one for one in (self.trace, *(state.trace for state in acting))}.values():
                trace.prompt_lengths = (view.query - view.first + 1).cpu()
                trace.first = view.first.cpu()
        edits = [state.link.edit(state, point.layer, activation, view) for state in acting]
        edits = [None if edit is None else edit.to(activation.device) for edit in edits]
        acted = [edit for edit in edits if edit is not None]
        total = sum(acted[1:], acted[0]) if acted else None
        editing = [pair for pair in zip(acting, edits, strict=True) if point.layer in pair[0].link.edited_layers]
        if editing:
            size = activation.float().norm(dim=-1).clamp(min=1e-12)
            for state, edit in editing:
                state.extend(point.layer, view, change=_change(edit, size, view))
            if len(self.states) > 1 and point.layer in self._alone:
                _extend(self.trace.change, point.layer, view, _change(total, size, view))
        if total is None:
            return None
        precise = torch.promote_types(activation.dtype, torch.float32)
        return (activation.to(precise) + total.to(precise)).to(activation.dtype)

    def _require_own_thread(self) -> None:
        here, owner = current_thread(), self._thread
        if owner is not None and owner is not here and owner.is_alive():
            raise HookError(
                f"{self.hook_object!r} is in use by thread {owner.name!r}",
                got=f"a forward pass from thread {here.name!r}",
                fix="One thread at a time may run a model that has hooks: take a lock, or load a model for each thread;"
                " to hand an attached hook over, call handle.reset().",
            )
        self._thread = here


class PointHook:
    """The function that TransformerLens calls; its short repr is what TransformerLens prints and times."""

    def __init__(self, session: Session, point: Point) -> None:
        self.session, self.point = session, point

    def __repr__(self) -> str:
        return f"{type(self.session.hook_object).__name__}@{self.point.layer}"

    def __deepcopy__(self, memo: Any) -> "PointHook":
        return self  # a copy of a model shares its hooks: TransformerLens wraps them in closures, which are not copied

    def __call__(self, activation: Tensor, hook: Any = None) -> Tensor | None:
        """Return the edited activation, or None to leave it."""
        return self.session.respond(self.point, activation)


def is_ours(function: Any) -> bool:
    """Whether a hook function belongs to a hook object of this package."""
    return isinstance(function, PointHook)


def _change(edit: Tensor | None, size: Tensor, view: View) -> Tensor:
    """‖edit‖ / ‖residual stream‖ at every position, NaN at pads, [b t]."""
    change = torch.zeros_like(size) if edit is None else edit.norm(dim=-1) / size
    return change.masked_fill(~view.real, float("nan"))


def _extend(log: dict[int, Tensor], layer: int, view: View, value: Tensor) -> None:
    value = _kept(value)
    if view.fresh or layer not in log:
        log[layer] = value
    else:
        log[layer] = torch.cat([log[layer], value[:, value.shape[1] - view.n_new :]], dim=1)


def _kept(value: Tensor) -> Tensor:
    """A copy that outlives inference mode."""
    with torch.inference_mode(False):
        return value.detach().clone()


@final
class Hooks(list[tuple[str, PointHook]]):
    """(name, function) pairs for `run_with_hooks(fwd_hooks=...)`, with the trace that they fill."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.hooks())
        self._session = session

    @property
    def trace(self) -> Trace:
        """What the hooks recorded for the latest prompt.

        Raises:
            HookError: one of them has not run, say because the model ignores hooks at names that it does not know.
        """
        _require_fired(self._session)
        return self._session.trace


@final
class Handle:
    """What `.attach` returns: detaches exactly its own hooks, resets the position counters, holds the trace."""

    def __init__(self, model: SteerableModel, session: Session) -> None:
        self._session = session
        self._hooks = AddedHooks(model, session.hooks())

    @property
    def trace(self) -> Trace:
        """What the hooks recorded for the latest prompt.

        Raises:
            HookError: as `detach`.
        """
        if not self._hooks.in_place():
            raise _removed_by_others(self._session.hook_object)
        return self._session.trace

    def reset(self) -> None:
        """Take the next forward, from whichever thread, as a new prompt."""
        self._session.reset()

    def detach(self) -> None:
        """Remove the hooks; calling it twice does nothing more.

        Raises:
            HookError: somebody else has removed them already, say by `model.reset_hooks()`, or has put something
                else in the place of their hook points, say an SAE; the model is clean.
        """
        in_place = self._hooks.in_place()
        self._hooks.remove()
        if not in_place:
            raise _removed_by_others(self._session.hook_object)


def _require_fired(session: Session) -> None:
    if session.unfired:
        raise HookError(
            f"{session.hook_object!r} never fired",
            expected="a forward pass through its layers with the hooks on",
            got=f"none through {', '.join(point.name for point in sorted(session.unfired))}",
            fix="Run the model inside the block, or with these fwd_hooks, and look at stop_at_layer; a Bridge ignores"
            " fwd_hooks at names that it does not know, SAELens' Bridge these: use .on or .attach.",
        )


def _removed_by_others(hook_object: "HookObject") -> HookError:
    return HookError(
        f"{hook_object!r} was taken off the model by somebody else",
        expected="its hooks still in place",
        got="none: what ran since then ran without them",
        fix="Keep model.reset_hooks(), and SAEs at the same hook point, out of the time in which the hooks are on, or"
        " put them on again after it.",
    )


# ------------------------------------------------------------------------------------------------------- hook objects


Own = TypeVar("Own", bound="HookObject")

_matched: "WeakKeyDictionary[Any, set[Fingerprint]]" = WeakKeyDictionary()


class HookObject(ABC):
    """Something that can be put on a model: `.on`, `.attach`, `.fwd_hooks`."""

    @property
    @abstractmethod
    def links(self) -> "tuple[Link, ...]":
        """What it is made of: itself, or the links of a chain."""

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the activations."""

    @property
    def points(self) -> tuple[Point, ...]:
        """Places in the residual stream where a hook is put, in the order in which a forward pass reaches them."""
        places = {Point(layer, link.site) for link in self.links for layer in link.hooked_layers}
        return tuple(sorted(places, key=lambda point: (point.layer, point.site != "hook_resid_pre")))

    def to(self: Own, device: Any = None, dtype: torch.dtype | None = None) -> Own:
        """The same on another device or in another dtype."""
        return move(self, device, dtype)

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
            HookError: at the end, if the model never ran through one of the hooks, or somebody else took them away.
        """
        session = self.session_on(model, prompt_lengths, attention_mask)
        added = AddedHooks(model, session.hooks())
        in_place = True
        try:
            yield session.trace
        finally:
            in_place = added.in_place()
            added.remove()
        if not in_place:
            raise _removed_by_others(self)
        _require_fired(session)

    def attach(self, model: SteerableModel, prompt_lengths: Any = None, attention_mask: Any = None) -> Handle:
        """Put the hooks on a model until `handle.detach()`; arguments and errors as in `on`."""
        return Handle(model, self.session_on(model, prompt_lengths, attention_mask))

    def session_on(self, model: SteerableModel, prompt_lengths: Any = None, attention_mask: Any = None) -> Session:
        """A session for a model that was checked against the fingerprints (once per model)."""
        for point in self.points:
            site_name(model, point.layer, point.site)
        if model.cfg.d_model != self.d_model:
            raise ShapeError(
                repr(self),
                expected=f"a model with d_model={self.d_model}",
                got=model.cfg.d_model,
                fix="Was this fitted on another model?",
            )
        known = _matched.setdefault(model, set())
        for link in self.links:
            if link.fingerprint is None:
                continue
            elsewhere = sorted(set(link.hooked_layers) - set(link.fingerprint.probe))
            if elsewhere:
                raise MismatchError(
                    repr(link),
                    expected=f"the layers that it was fitted at, {sorted(link.fingerprint.probe)}",
                    got=f"layers {elsewhere}",
                    fix="Fit at these layers, or take the fingerprint off: replace(steering, fingerprint=None).",
                )
            if link.fingerprint not in known:
                link.fingerprint.require_match(fingerprint(model, sorted(link.fingerprint.probe), link.site))
                known.add(link.fingerprint)
        return Session(self, prompt_lengths, attention_mask)


class Link(HookObject):
    """A hook object that acts by itself: it reads the stream at layers of one site, and edits it at some of them."""

    site: str = DEFAULT_SITE
    fingerprint: Fingerprint | None = None

    @property
    def links(self) -> "tuple[Link, ...]":
        """Itself."""
        return (self,)

    @property
    @abstractmethod
    def hooked_layers(self) -> tuple[int, ...]:
        """Layers whose hook points are used."""

    @property
    @abstractmethod
    def edited_layers(self) -> tuple[int, ...]:
        """Those of them where the stream may be edited; the others are only read."""

    @abstractmethod
    def edit(self, state: State, layer: int, activation: Tensor, view: View) -> Tensor | None:
        """What to add to one activation, [b t d] in float32; None is nothing."""


@final
@dataclass(frozen=True, eq=False, repr=False)
class Chain(HookObject):
    """Hook objects that act together; made by `chain`.

    Attributes:
        hooks: the links; at each point all of them read the activation that enters the chain, and their edits add up.
            The trace of the chain has their common `change` (where it edits one site of a layer only), and in `parts`
            the trace of each.
    """

    hooks: tuple[Link, ...]

    def __post_init__(self) -> None:
        wrong = [type(link).__name__ for link in self.hooks if not isinstance(link, Link)]
        if wrong or len(self.hooks) < 2:
            raise InputError("chain", expected="at least two hook objects", got=wrong or len(self.hooks))
        widths = {link.d_model for link in self.hooks}
        if len(widths) > 1:
            raise ShapeError("chain", expected="hook objects of one d_model", got=sorted(widths))

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.hooks))})"

    @property
    def links(self) -> tuple[Link, ...]:
        """The links, in the order of the trace's `parts`."""
        return self.hooks

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.hooks[0].d_model


def chain(*hooks: HookObject) -> Chain:
    """Compose hook objects: at each point all of them read the activation that enters it, and their edits add up.

    So the order of the links does not matter, unlike that of nested `.on` blocks, where a later one reads what an
    earlier one has edited. In every link every row decides for itself. A chain in a chain counts as its links.

    Raises:
        InputError: fewer than two, or something that is no hook object.
        ShapeError: hook objects of several widths.
    """
    links: list[Any] = [link for hook in hooks for link in getattr(hook, "links", [hook])]
    return Chain(tuple(links))


# ---------------------------------------------------------------------------------------------- probes and the ablation


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


@final
@dataclass(frozen=True, eq=False, repr=False)
class SubspaceAblation(_TokenHook):
    """Takes the subspace out of every token: h ← h − V_r V_rᵀ (h − μ)."""

    subspace: Subspace
    rank: int = -1

    def __post_init__(self) -> None:
        _require_parts(self, subspace=Subspace)
        if self.rank == -1:
            object.__setattr__(self, "rank", self.subspace.rank)
        require_rank(self.rank, self.subspace.rank, "the fitted rank")

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
    for name, kind in {**parts, "layer": int, "fingerprint": Fingerprint | None}.items():
        value = getattr(link, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = getattr(kind, "__name__", "a fingerprint or None")
            raise InputError(f"{type(link).__name__} {name}", expected=wanted, got=type(value).__name__)

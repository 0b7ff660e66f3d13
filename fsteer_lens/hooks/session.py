"""A session: one use of a hook object on one model, with positions, decisions and the trace that it fills."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread, current_thread
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.errors import HookError, ShapeError
from fsteer_lens.hooks.positions import Positions, View
from fsteer_lens.method.gates import Reading
from fsteer_lens.models.attaching import AddedHooks, OwnHook, hooks_added
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.plain import PlainModel
from fsteer_lens.models.points import Point
from fsteer_lens.reading.readings import at, of_prompt
from fsteer_lens.trace.trace import Trace


@runtime_checkable
class Acts(Protocol):
    """What a session asks of a link; `hooks.Link` is the class that has it."""

    @property
    def points(self) -> tuple[Point, ...]:
        """Where it is put."""
        ...

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """Layers where it may edit the stream."""
        ...

    def edit(self, state: "State", layer: int, activation: Tensor, view: View) -> Tensor | None:
        """What to add to one activation."""
        ...


@runtime_checkable
class Acted(Protocol):
    """What a session asks of a hook object; `hooks.HookObject` is the class that has it."""

    @property
    def links(self) -> tuple[Any, ...]:
        """What it is made of, each of which `Acts`."""
        ...

    @property
    def points(self) -> tuple[Point, ...]:
        """Where it is put."""
        ...

    @property
    def d_model(self) -> int | None:
        """Width of the activations; None takes any."""
        ...


class State:
    """What one link remembers of the prompts at hand, and where it puts what the trace is to hold.

    Attributes:
        decisions: what was decided on the prompts, {layer: anything}; the link's own to fill and to read.
        steps: what was decided at the latest positions, likewise, where a link decides at every step.
        queries: query activations, {way of reading: {layer: [b d]}}, where they are not to be read from the running
            stream; else None.
        shut: layers at which nothing is added to any of the prompts, which the host knows without asking the device.
        scanned: for gates that scan, of each prompt the window that comes nearest to opening them, {layer: [b d]}; None
            where nobody knows the prompts' windows.
        tails: how many tokens of each prompt come after the one that ends the user's turn, [b] or [1]; None is unknown.
    """

    def __init__(self, link: Acts, tails: Int[Tensor, " _"] | None = None) -> None:
        self.link, self.tails = link, tails
        self.trace = Trace()
        self.decisions: dict[int, Any] = {}
        self.steps: dict[int, Any] = {}
        self.shut: set[int] = set()
        self.queries: dict[Reading, dict[int, Tensor]] | None = None
        self.scanned: dict[int, Tensor] | None = None

    def query(
        self, layer: int, activation: Float[Tensor, "b t d"], view: View, read: Reading = "last"
    ) -> Float[Tensor, "b d"]:
        """What is read of each row's prompt, by default at its last token, float32; where `view.fresh`.

        Raises:
            HookError: nobody knows where the user's turns end.
        """
        if self.queries is not None:
            return self.queries[read][layer].to(activation.device)
        if read == "last":
            return at(activation, view.query).float()
        if read == "turn_end" and self.tails is None:
            fix = "Fit on prompts collected with chat=True, or read the last token or the mean."
            raise HookError('read="turn_end"', expected="prompts that are known to be chats, or not", fix=fix)
        prompt = view.real & (view.columns <= view.query.unsqueeze(1))
        tails = None if self.tails is None else self.tails.expand(len(activation))
        return of_prompt(read, activation, prompt, tails)

    def fork(self, rows: Int[Tensor, " n"], into: "State") -> None:
        """Hand the decisions of these rows to another session's state of the same link."""
        into.decisions = {layer: _rows_of(one, rows) for layer, one in self.decisions.items()}
        into.shut = set(self.shut)
        into.steps = {layer: _rows_of(one, rows) for layer, one in self.steps.items()}

    def record(self, layer: int, **values: Tensor | None) -> None:
        """Put a value of each row, [b ...], into the trace, replacing what is there; None is left out.

        A name that is no field of `Trace` goes to `trace.own[name][layer]`.
        """
        for name, value in values.items():
            if value is not None:
                self.trace.holder(name, by_token=False)[layer] = _kept(value)

    def extend(self, layer: int, view: View, **values: Tensor) -> None:
        """Append a value of each position, [b t ...], to the trace.

        A name that is no field of `Trace` goes to `trace.own_by_token[name][layer]`.
        """
        for name, value in values.items():
            _extend(self.trace.holder(name, by_token=True), layer, view, value)


class Session:
    """One use of a hook object on one model.

    A session belongs to the thread that first runs the model through it: two threads that take turns would each go on
    with the other's prompt, so a forward from a second thread raises until the first has ended or `reset` is called.
    """

    def __init__(
        self,
        hook_object: Acted,
        prompt_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        tails: Sequence[Int[Tensor, " _"] | None] | None = None,
    ) -> None:
        self.hook_object = hook_object
        ends = [None] * len(hook_object.links) if tails is None else tails
        self.states = [State(link, end) for link, end in zip(hook_object.links, ends, strict=True)]
        parts = tuple(state.trace for state in self.states)
        self.trace = parts[0] if len(parts) == 1 else Trace(parts=parts)
        self._points = hook_object.points
        self.unfired = set(self._points)
        self._acting = {point: [one for one in self.states if point in one.link.points] for point in self.unfired}
        self._positions = {point: Positions(prompt_lengths, attention_mask) for point in self._points}
        edited = {Point(layer, link.site) for link in hook_object.links for layer in link.edited_layers}
        layers = [point.layer for point in edited]
        self._alone = {layer for layer in layers if layers.count(layer) == 1}
        self._knows_padding = attention_mask is not None
        self._thread: Thread | None = None
        self._fresh: bool | None = None
        self._forward_is_fresh = True
        self._place = len(self._points)
        self._real: Tensor | None = None
        self._cached: int | None = None

    def reset(self) -> None:
        """Take the next forward, from whichever thread, as a new prompt."""
        self._thread, self._place = None, len(self._points)
        for positions in self._positions.values():
            positions.reset()

    def fork(self, rows: Int[Tensor, " n"], mask: Bool[Tensor, "n new"]) -> "Session":
        """A session that goes on from the prompts: each of its rows from the prompt of that number, with new tokens.

        Its first step, and the only one, runs all of the new tokens (real where `mask` is true). Its trace holds these
        alone. For links whose decisions can be repeated (`hooks.Link.forks`).
        """
        other = Session(self.hook_object)
        other._knows_padding = True
        other._positions = {point: held.fork(rows, mask) for point, held in self._positions.items()}
        for mine, its in zip(self.states, other.states, strict=True):
            mine.fork(rows, its)
        held = other._positions[self._points[0]]
        other.begin(held.query, held.first)
        return other

    def hooks(self) -> "list[tuple[str, PointHook]]":
        """(name, function) pairs for the model."""
        return [(point.name, PointHook(self, point)) for point in self._points]

    def added_to(self, model: SteerableModel) -> AddedHooks:
        """The hooks on a model, until they are removed; the model is asked what nobody has told: which tokens are
        padding, and, of a model of transformers, how many of them are cached."""
        asked = not self._knows_padding or isinstance(model, PlainModel)
        watched = (self._points[0].layer, self._see) if asked else None
        return AddedHooks(model, self.hooks(), watched)

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
        if self.hook_object.d_model not in (None, activation.shape[-1]):
            raise ShapeError(
                f"activation at layer {point.layer}",
                expected=f"width d_model={self.hook_object.d_model}",
                got=list(activation.shape),
                fix="Was this fitted on another model?",
            )
        self.unfired.discard(point)
        positions = self._positions[point]
        view = positions.observe(activation, self._fresh, self._real, self._cached)
        place, before = self._points.index(point), self._place
        new_forward, self._place = place <= before, place
        if not new_forward and place > before + 1:
            skipped = ", ".join(one.name for one in self._points[before + 1 : place])
            raise HookError(
                f"this forward went from {self._points[before].name} to {point.name}",
                expected=f"to run through {skipped} on the way",
                got="nothing there",
                fix="Has that hook point been replaced, or does the model skip the layer?",
            )
        if new_forward:
            self._forward_is_fresh = view.fresh
            if view.fresh:
                self.begin(view.query, view.first)
        elif view.fresh != self._forward_is_fresh:
            raise HookError(
                f"at {point.name} this forward {'opens a new prompt' if view.fresh else 'goes on with the last one'}",
                expected=f"the same as at {self._points[0].name}",
                fix="A forward was broken off between the layers: call handle.reset(), or open a new context.",
            )
        self.take_back(point, positions.back)
        total = self.act(point, activation, view)
        if total is None:
            return None
        precise = torch.promote_types(activation.dtype, torch.float32)
        return (activation.to(precise) + total.to(precise)).to(activation.dtype)

    def take_back(self, point: Point, n: int) -> None:
        """Forget what was recorded of the last n positions at a point, which the model has taken back."""
        common = [self.trace] if len(self.states) > 1 and point.layer in self._alone else []
        for trace in [*(state.trace for state in self._acting[point]), *common] if n else ():
            trace.take_back(point.layer, n)

    def act(
        self, point: Point, activation: Float[Tensor, "b t d"], view: View, waiting: Collection[State] = ()
    ) -> Float[Tensor, "b t d"] | None:
        """What all links add to an activation of which is known where it lies; None is nothing. It is recorded.

        Those that are `waiting` take no part.
        """
        acting = [state for state in self._acting[point] if state not in waiting]
        edits = [_checked(state.link.edit(state, point.layer, activation, view), state, activation) for state in acting]
        acted = [edit for edit in edits if edit is not None]
        total = sum(acted[1:], acted[0]) if acted else None
        editing = [pair for pair in zip(acting, edits, strict=True) if point.layer in pair[0].link.edited_layers]
        if editing:
            size = activation.float().norm(dim=-1).clamp(min=1e-12)
            for state, edit in editing:
                state.extend(point.layer, view, change=_change(edit, size, view))
            if len(self.states) > 1 and point.layer in self._alone:
                _extend(self.trace.change, point.layer, view, _change(total, size, view))
        return total

    def begin(self, query: Int[Tensor, " b"], first: Int[Tensor, " b"]) -> None:
        """Begin to record prompts that reach from columns `first` to `query`; what was handed out before stays."""
        lengths, first = (query - first + 1).cpu(), first.cpu()
        for trace in {id(one): one for one in (self.trace, *(state.trace for state in self.states))}.values():
            trace.begin(lengths, first)

    def _see(self, real: Bool[Tensor, "b s"] | None, cached: int | None) -> None:
        self._real, self._cached = real, cached

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


class PointHook(OwnHook):
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


def _checked(edit: Any, state: State, activation: Tensor) -> Tensor | None:
    """An edit on the activation's device and in its shape; raises `ShapeError` where it is none."""
    if edit is None:
        return None
    try:
        return edit.to(activation.device).expand(activation.shape)
    except (AttributeError, RuntimeError) as error:
        raise ShapeError(
            f"what {type(state.link).__name__}.edit gave",
            expected=f"None, or a tensor to add to the activation {list(activation.shape)}",
            got=list(edit.shape) if isinstance(edit, Tensor) else type(edit).__name__,
        ) from error


def _rows_of(decision: Any, rows: Int[Tensor, " n"]) -> Any:
    """The same decision for these rows: a named tuple of tensors, [b ...], or None."""
    values = [None if value is None else value[rows.to(value.device)] for value in decision]
    return type(decision)(*values)


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

"""Hook objects: what can be put on a TransformerLens model, and taken off again.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, final
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Int
from torch import Tensor

from fsteer_lens.errors import HookError, MismatchError, ShapeError
from fsteer_lens.hooks.positions import View
from fsteer_lens.hooks.session import Acted, Point, PointHook, Session, State
from fsteer_lens.method.gates import Gate, Reading
from fsteer_lens.method.linalg import move
from fsteer_lens.models.attaching import is_compiled, why_idle
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.plain import steerable
from fsteer_lens.models.points import DEFAULT_SITE, site_name
from fsteer_lens.prompts.chat import NO_ARGUMENTS
from fsteer_lens.prompts.formats import PromptFormat, merge_formats
from fsteer_lens.prompts.tokens import Tokenisation
from fsteer_lens.reading.fingerprints import Fingerprint, require_model
from fsteer_lens.trace.trace import Trace


@final
class Hooks(list[tuple[str, PointHook]]):
    """(name, function) pairs for `run_with_hooks(fwd_hooks=...)`, with the trace that they fill."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.hooks())
        self._session = session

    @property
    def trace(self) -> Trace:
        """What the hooks have recorded of the latest prompt, as it stands: what comes later does not change it.

        Raises:
            HookError: one of them has not run, say because the model ignores hooks at names that it does not know.
        """
        _require_fired(self._session)
        return self._session.trace.copy()


@final
class Handle:
    """What `.attach` returns: detaches exactly its own hooks, resets the position counters, holds the trace."""

    def __init__(self, model: SteerableModel, session: Session) -> None:
        self._session, self._model = session, ref(model)
        self._hooks = session.added_to(model)

    @property
    def trace(self) -> Trace:
        """What the hooks have recorded of the latest prompt, as it stands: what comes later does not change it.

        Raises:
            HookError: as `detach`, or one of the hooks has not run.
        """
        if not self._hooks.in_place():
            raise _removed_by_others(self._session.hook_object)
        _require_fired(self._session, self._model())
        return self._session.trace.copy()

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


def _require_fired(session: Session, model: SteerableModel | None = None) -> None:
    if session.unfired:
        compiled = f" {why_idle(model)}" if model is not None and is_compiled(model) else ""
        raise HookError(
            f"{session.hook_object!r} never fired",
            expected="a forward pass through its layers with the hooks on",
            got=f"none through {', '.join(point.name for point in sorted(session.unfired))}",
            fix="Run the model inside the block, or with these fwd_hooks, and look at stop_at_layer; a Bridge ignores"
            " fwd_hooks at names that it does not know, SAELens' Bridge these: use .on or .attach." + compiled,
        )


def _removed_by_others(hook_object: Acted) -> HookError:
    return HookError(
        f"{hook_object!r} was taken off the model by somebody else",
        expected="its hooks still in place",
        got="none: what ran since then ran without them",
        fix="Keep model.reset_hooks(), and SAEs at the same hook point, out of the time in which the hooks are on, or"
        " put them on again after it.",
    )


Own = TypeVar("Own", bound="HookObject")

_matched: "WeakKeyDictionary[Any, set[Fingerprint]]" = WeakKeyDictionary()


class HookObject(ABC):
    """Something that can be put on a model: `.on`, `.attach`, `.fwd_hooks`."""

    @property
    @abstractmethod
    def links(self) -> "tuple[Link, ...]":
        """What it is made of: itself, or the links of a chain."""

    @property
    def d_model(self) -> int | None:
        """Width of the activations; None takes any."""
        return None

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

        Raises:
            HookError: a gate scans windows of the prompts, which these hooks do not know.
        """
        self._require_no_scan("fwd_hooks")
        return Hooks(Session(self, prompt_lengths, attention_mask))

    @contextmanager
    def on(
        self, model: SteerableModel | torch.nn.Module, prompt_lengths: Any = None, attention_mask: Any = None
    ) -> Iterator[Trace]:
        """Put the hooks on a model for the length of a `with` block; yields the trace, which fills as the model runs.

        It follows the model: while the block is open it is that of the latest prompt, and `trace.copy()` is what it is
        now. Where no `attention_mask` is given the model's own tells which tokens are padding, as far as it has one.

        The model is one of TransformerLens, or a causal language model of transformers as it is, whose own `generate`
        then runs steered; that has no tokenizer, so nobody looks whether it is the one that was fitted with.

        Args as in `fwd_hooks`.

        Raises:
            MismatchError: fitted on another model.
            SiteError: the model has no such layer.
            HookError: at the end, if the model never ran through one of the hooks, or somebody else took them away; at
                once, if a gate scans windows of the prompts, which these hooks do not know.
        """
        self._require_no_scan("on")
        seen = steerable(model)
        session = self.session_on(seen, prompt_lengths, attention_mask)
        added = session.added_to(seen)
        in_place = True
        try:
            yield session.trace
        finally:
            in_place = added.in_place()
            added.remove()
        if not in_place:
            raise _removed_by_others(self)
        _require_fired(session, seen)

    def attach(
        self, model: SteerableModel | torch.nn.Module, prompt_lengths: Any = None, attention_mask: Any = None
    ) -> Handle:
        """Put the hooks on a model until `handle.detach()`; arguments as in `on`.

        Raises:
            MismatchError: fitted on another model.
            SiteError: the model has no such layer.
            HookError: the model is compiled, so that its hooks may or may not run, and nobody looks at every forward.
                Elsewhere `handle.trace` raises where one of them has never run. Or a gate scans, as in `on`.
        """
        self._require_no_scan("attach")
        seen = steerable(model)
        if is_compiled(seen):
            raise HookError(f"{self!r} cannot stay on this model", fix=why_idle(seen))
        return Handle(seen, self.session_on(seen, prompt_lengths, attention_mask))

    def _require_no_scan(self, how: str) -> None:
        """Raise where something is to be asked about windows of the prompts, which nobody knows here."""
        for link in self.links:
            if link.scanning:
                raise HookError(
                    f".{how} with {link!r}",
                    expected="gates that read the prompt alone",
                    got="one that scans windows of it, which takes the prompt as text or messages",
                    fix="Use generate or stream, or the gate without its scan: steering.with_gate(gate.inner).",
                )

    def session_on(
        self,
        model: SteerableModel,
        prompt_lengths: Any = None,
        attention_mask: Any = None,
        tails: Int[Tensor, " b"] | None = None,
    ) -> Session:
        """A session for a model that was checked against the fingerprints (once per model).

        `tails` are the numbers of tokens after the user's turn; None takes every prompt for one of the format that the
        links remember.
        """
        for point in self.points:
            site_name(model, point.layer, point.site)
        if self.d_model not in (None, model.cfg.d_model):
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
                require_model(link.fingerprint, model, link.site)
                known.add(link.fingerprint)
        own = [_tail(link, model) for link in self.links] if tails is None else [tails] * len(self.links)
        return Session(self, prompt_lengths, attention_mask, own)


def _tail(link: "Link", model: SteerableModel) -> Tensor | None:
    """The number of tokens after a user's turn, [1], for a link that has to know it; None where nobody does."""
    known = link.prompt_format
    if "turn_end" not in link.reads or known is None or known.chat is None:
        return None
    told = Tokenisation(model, known.chat, known.arguments or NO_ARGUMENTS)
    return torch.tensor([told.opening_tail], dtype=torch.long, device="cpu")


def remembered(*fitted: Any) -> PromptFormat:
    """How the prompts became tokens that hook objects were fitted on; what is none of them remembers nothing.

    Raises:
        MismatchError: they contradict each other.
    """
    links = (link for one in fitted if isinstance(one, HookObject) for link in one.links)
    return merge_formats(getattr(link, "prompt_format", None) for link in links)


class Link(HookObject):
    """A hook object that acts by itself: it reads the stream at layers of one site, and edits it at some of them.

    One of your own needs `hooked_layers` and `edit`; it then has `.on`, `.attach` and `.fwd_hooks`, goes to `generate`,
    `chain` and whatever takes a steering, and its values are in the trace. Make it a frozen dataclass: a session
    keeps what changes. A file cannot hold it: see `save`::

        @dataclass(frozen=True, eq=False)
        class Shorten(fs.hooks.Link):
            layer: int
            most: float

            @property
            def hooked_layers(self):
                return (self.layer,)

            def edit(self, state, layer, activation, view):
                h = activation.float()
                length = h.norm(dim=-1)
                state.extend(layer, view, length=length)  # trace.own_by_token["length"][layer], [b s]
                factor = (self.most / length).clamp(max=1)
                return (factor - 1).unsqueeze(-1) * h

    Attributes:
        site: hook point within a layer, "hook_resid_pre" or "hook_resid_post".
        fingerprint: of the model that it was fitted on, checked when it is put on one; None fits any.
        prompt_format: how the prompts became tokens that it was fitted on; what runs prompts follows it.
    """

    site: str = DEFAULT_SITE
    fingerprint: Fingerprint | None = None
    prompt_format: PromptFormat | None = None

    @property
    def links(self) -> "tuple[Link, ...]":
        """Itself."""
        return (self,)

    @property
    @abstractmethod
    def hooked_layers(self) -> tuple[int, ...]:
        """Layers whose hook points are used."""

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """Those of them where the stream may be edited, all of them unless it says otherwise; others are only read."""
        return self.hooked_layers

    @property
    def reads(self) -> tuple[Reading, ...]:
        """What it reads of a prompt: the arguments that it gives to `state.query`."""
        return ("last",)

    @property
    def scanning(self) -> Mapping[int, Gate]:
        """Gates that are to be asked about windows of the prompts, by layer: `state.scanned` then has what to ask."""
        return {}

    @property
    def stepwise(self) -> bool:
        """Whether it decides again at every later position, from the activation there."""
        return False

    @property
    def forks(self) -> bool:
        """Whether several answers may go on from one pass of their prompt, with what was decided on it.

        What `edit` keeps in `state` is then nothing, or named tuples of tensors [b ...], a value for each row. Where
        it is something else, each answer is run with its prompt.
        """
        return False

    @abstractmethod
    def edit(self, state: State, layer: int, activation: Tensor, view: View) -> Tensor | None:
        """What to add to one activation of one forward pass; None is nothing.

        Args:
            state: remembers what was decided on the prompts, takes what the trace is to hold (`record` for a value of
                each row, `extend` for one of each position), and gives the query activation (`query`).
            layer: one of `hooked_layers`.
            activation: the residual stream there before any edit at this point, [b t d], in the model's dtype; not to
                be written to.
            view: where it lies in its rows: which columns, whether a new prompt, where each row's last prompt token
                is, and which positions are real.

        Returns:
            What to add, float32, that shape or one that expands to it. Pads may be given anything.
        """

"""Putting hooks on a model and taking exactly these off again, one thread at a time.

A hook that does not run changes nothing and says nothing. So whatever this package runs with hooks on goes through
`hooks_added`, which counts, on the CPU alone, that each of them ran once in that forward pass, and raises where not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from fsteer_lens.errors import HookError
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.padding import PaddingWatch
from fsteer_lens.models.plain import PlainModel, Told
from fsteer_lens.models.points import hook_point, standing

NAMED = 3
"""Hook points that a message names; there may be hundreds."""


class AddedHooks:
    """Hooks that were added to a model; `remove` takes away exactly these, in whatever order others come and go.

    With `watched`, a layer and a function, that function is told before the layer runs which tokens are real, and of a
    model of transformers how many are cached.
    """

    _model: Any = None

    def __init__(
        self, model: SteerableModel, hooks: Sequence[tuple[str, Any]], watched: tuple[int, Told] | None = None
    ) -> None:
        self._added: list[tuple[str, Any, Any]] = []
        self._connected: list[str] = []
        self._watch: Any = None
        with lock_of(model):
            self._model = model
            try:
                self._watch = None if watched is None else _watch(model, *watched)
                for name, function in hooks:
                    point = hook_point(model, name)
                    self._added.append((name, point, function))  # first, so that an interrupt leaves nothing behind
                    point.add_hook(function)
                    if isinstance(model, PlainModel):
                        model.connect(name)
                        self._connected.append(name)
            except BaseException:
                self.remove()
                raise

    def in_place(self) -> bool:
        """Whether the model runs through all of them; not after `reset_hooks`, nor where their point was replaced."""
        return all(
            standing(self._model, name) is point and any(handle.user_hook is function for handle in point.fwd_hooks)
            for name, point, function in self._added
        )

    def remove(self) -> None:
        """Take the hooks away; calling it twice does nothing more."""
        if self._model is not None:
            with lock_of(self._model):
                if self._watch is not None:
                    self._watch.remove()
                for _, point, function in self._added:
                    self._pop(point, function)
                for name in self._connected:
                    self._model.disconnect(name)
        self._added, self._connected, self._watch, self._model = [], [], None, None

    @staticmethod
    def _pop(point: Any, function: Any) -> None:
        own = [handle for handle in point.fwd_hooks if handle.user_hook is function]
        for handle in own:
            handle.hook.remove()
        point.fwd_hooks = [handle for handle in point.fwd_hooks if handle.user_hook is not function]


class _ForOnePass(AddedHooks):
    """Hooks that go with whoever added them: Ctrl-C may come between any two lines, also where they are taken off."""

    def __del__(self) -> None:
        self.remove()


def _watch(model: SteerableModel, layer: int, told: Told) -> Any:
    """Have a function told what is known of each forward pass; has `.remove()`."""
    if isinstance(model, PlainModel):
        return model.watch(told)
    return PaddingWatch(model, layer, lambda real: told(real, None))


@contextmanager
def hooks_added(model: SteerableModel, hooks: Sequence[tuple[str, Any]]) -> Iterator[None]:
    """Add hooks for one forward pass and take away exactly these at its end, whatever happens in between.

    One thread at a time: another one that comes here with the same model waits until the first has taken its hooks
    away.

    Raises:
        HookError: the pass ended without an error, and one of the hooks has not run in it, or more than once.
    """
    counted = [(name, _Counted(function)) for name, function in hooks]
    with lock_of(model):
        added = _ForOnePass(model, counted)
        try:
            yield
        finally:
            added.remove()
    _require_ran(model, counted)


def _require_ran(model: SteerableModel, counted: "Sequence[tuple[str, _Counted]]") -> None:
    idle = [name for name, hook in counted if hook.runs == 0]
    if idle:
        raise HookError(
            f"{len(idle)} of {len(counted)} hooks did not run in this forward pass",
            expected="each of them once",
            got=f"none at {_listed(idle)}",
            fix=why_idle(model),
        )
    again = [name for name, hook in counted if hook.runs > 1]
    if again:
        raise HookError(
            f"{len(again)} of {len(counted)} hooks ran more than once in this forward pass",
            expected="each of them once, so that each position is edited once",
            got=f"{max(hook.runs for _, hook in counted)} times at {_listed(again)}",
            fix="A model that runs a layer several times for one token cannot be steered or read there; while hooks are"
            " on for a pass no other thread may run the model.",
        )


def why_idle(model: SteerableModel) -> str:
    """The likeliest reason why hooks on this model do not run, and what helps."""
    if is_compiled(model):
        return (
            "The model, or a part of it, is compiled, and what is compiled ignores hooks: use the model as it was"
            ' before torch.compile, or run this in `with torch.compiler.set_stance("force_eager"):`.'
        )
    return (
        "Has something taken the hooks away meanwhile (reset_hooks), replaced these hook points, or does the model skip"
        " these layers (layer drop, an early exit, a replaced forward)?"
    )


def is_compiled(model: SteerableModel) -> bool:
    """Whether torch.compile has been at the model or at a part of it."""
    modules: Any = getattr(model, "modules", tuple)()
    marks = ("_compiled_call_impl", "_orig_mod")  # of module.compile(), and of what torch.compile(module) gives
    return any(getattr(module, mark, None) is not None for module in modules for mark in marks)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def hooks_suspended(model: SteerableModel, which: Callable[[Any], bool] = lambda function: True) -> Iterator[None]:
    """Run the model without the hooks that `which` holds for; every hook is back in its place and order at the end.

    What is put on or taken off in between stays on or off.
    """
    with lock_of(model):
        stashed = []
        for point in {id(point): point for point in model.hook_dict.values()}.values():
            idle = [handle.hook.id for handle in point.fwd_hooks if which(handle.user_hook)]
            if idle:
                stashed.append((point, dict(point._forward_hooks), idle))
        try:
            for point, _, idle in stashed:
                for key in idle:
                    point._forward_hooks.pop(key, None)
            yield
        finally:
            for point, before, idle in stashed:
                now = dict(point._forward_hooks)
                back = set(idle) & {handle.hook.id for handle in point.fwd_hooks}
                kept = {key: hook for key, hook in before.items() if key in now or key in back}
                point._forward_hooks.clear()
                point._forward_hooks.update({**kept, **now})


class OwnHook:
    """A hook function of this package: what `unsteered` takes off the model for a while."""


class _Counted(OwnHook):
    """A hook function that counts how often it has run; its repr is that of the function."""

    def __init__(self, function: Any) -> None:
        self.function, self.runs = function, 0

    def __repr__(self) -> str:
        return repr(self.function)

    def __call__(self, activation: Tensor, hook: Any = None) -> Tensor | None:
        edited = self.function(activation, hook=hook)
        self.runs += 1  # not where it refused, as it does a forward of another thread
        return edited


def unsteered(model: SteerableModel) -> AbstractContextManager[None]:
    """The model without any hook of this package; those of others stay on."""
    return hooks_suspended(model, lambda function: isinstance(function, OwnHook))


_locks: "WeakKeyDictionary[Any, AbstractContextManager[Any]]" = WeakKeyDictionary()


def lock_of(model: SteerableModel) -> AbstractContextManager[Any]:
    """The lock under which this package puts hooks on a model for a moment; one thread may take it several times."""
    return _locks.setdefault(model, RLock())  # one step of a dict: a lock of its own could be left shut by an interrupt

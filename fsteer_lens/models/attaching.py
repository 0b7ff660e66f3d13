"""Putting hooks on a model and taking exactly these off again, one thread at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.padding import PaddingWatch, See
from fsteer_lens.models.points import hook_point, standing


class AddedHooks:
    """Hooks that were added to a model; `remove` takes away exactly these, in whatever order others come and go.

    With `padding`, a layer and a function, that function is told before the layer runs which tokens are real.
    """

    def __init__(
        self, model: SteerableModel, hooks: Sequence[tuple[str, Any]], padding: tuple[int, See] | None = None
    ) -> None:
        self._model: Any = model
        self._added: list[tuple[str, Any, Any]] = []
        self._watch: PaddingWatch | None = None
        with lock_of(model):
            try:
                self._watch = None if padding is None else PaddingWatch(model, *padding)
                for name, function in hooks:
                    point = hook_point(model, name)
                    self._added.append((name, point, function))  # first, so that an interrupt leaves nothing behind
                    point.add_hook(function)
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
        self._added, self._watch, self._model = [], None, None

    @staticmethod
    def _pop(point: Any, function: Any) -> None:
        own = [handle for handle in point.fwd_hooks if handle.user_hook is function]
        for handle in own:
            handle.hook.remove()
        point.fwd_hooks = [handle for handle in point.fwd_hooks if handle.user_hook is not function]


@contextmanager
def hooks_added(model: SteerableModel, hooks: Sequence[tuple[str, Any]]) -> Iterator[None]:
    """Add hooks to a model and take away exactly these at the end, whatever happens in between.

    One thread at a time: another one that comes here with the same model waits until the first has taken its hooks
    away.
    """
    with lock_of(model):
        added = AddedHooks(model, hooks)
        try:
            yield
        finally:
            added.remove()


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


def unsteered(model: SteerableModel) -> AbstractContextManager[None]:
    """The model without any hook of this package; those of others stay on."""
    return hooks_suspended(model, lambda function: isinstance(function, OwnHook))


_locks: "WeakKeyDictionary[Any, AbstractContextManager[Any]]" = WeakKeyDictionary()
_lock_of_locks = Lock()


def lock_of(model: SteerableModel) -> AbstractContextManager[Any]:
    """The lock under which this package puts hooks on a model for a moment; one thread may take it several times."""
    with _lock_of_locks:
        return _locks.setdefault(model, RLock())

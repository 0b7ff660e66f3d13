"""Chains: hook objects that act together, each of which reads the activation that enters the chain."""

from dataclasses import dataclass
from typing import Any, final

from fsteer_lens.errors import InputError, ShapeError
from fsteer_lens.hooks.objects import HookObject, Link


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
        widths = {link.d_model for link in self.hooks if link.d_model is not None}
        if len(widths) > 1:
            raise ShapeError("chain", expected="hook objects of one d_model", got=sorted(widths))

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.hooks))})"

    @property
    def links(self) -> tuple[Link, ...]:
        """The links, in the order of the trace's `parts`."""
        return self.hooks

    @property
    def d_model(self) -> int | None:
        """Width of the activations; None takes any."""
        return next((link.d_model for link in self.hooks if link.d_model is not None), None)


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

"""What a search measures: a function of the items, or a measure of the suite that the items are."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.effects.answers import (
    DIVERGENCE,
    MARGIN,
    Effect,
    divergences_of_each,
    margins_of_each,
    name_of,
    one_each,
)
from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import brief, function
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.hooks.scopes import Schedule, Scope
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.passes import Passes, PassOptions
from fsteer_lens.reading.activations import Shift
from fsteer_lens.selection.splits import Measured

Utility = Callable[[SteerableModel, HookObject | None, Sequence[Any]], Float[Tensor, " n"]]
"""A number for each general item under a hook object, or None for the bare model; larger is better kept."""
ROLES = ("effect", "utility")


class SearchOptions(PassOptions, total=False):
    """What `search` takes beside the grid and its data: see there."""

    effect: Effect | str | None
    utility: Utility | str | None
    scopes: Iterable[Scope | None] | None
    schedules: Iterable[Schedule | None] | None
    shift: Shift
    resume: str | os.PathLike[str] | None


@dataclass(frozen=True)
class Searching(Passes):
    """How the settings of a grid are measured; fields as in `search`."""

    effect: Effect | str | None = None
    utility: Utility | str | None = None
    scopes: Iterable[Any] | None = None
    schedules: Iterable[Any] | None = None
    shift: Shift = "response_mean"
    resume: str | os.PathLike[str] | None = None

    def told(self, role: str, items: Any) -> str:
        """What is measured of these items, with its unit where that is known.

        Raises:
            InputError: a measure by name of items that are no suite, a function of a suite's items, no such measure, or
                a suite with none or several for this role.
        """
        given = getattr(self, role)
        if not isinstance(items, Measured):
            if isinstance(given, str):
                expected = "a function; a measure by name is one of a suite, given in place of these items"
                raise InputError(f"{role}=", expected=expected, got=repr(given))
            if given is None:
                return {"effect": MARGIN, "utility": DIVERGENCE}[role]
            return name_of(function(role, given), role)
        names = {measure.name: measure.role for measure in items.measures}
        fitting = [name for name, has in names.items() if has == role]
        if given is None and len(fitting) == 1:
            return fitting[0]
        if not isinstance(given, str) or given not in names:
            raise InputError(f"{role}= on {items!r}", expected=f"one of {list(names)}", got=brief(given))
        return given

    def measured(
        self, role: str, model: SteerableModel, steering: HookObject | None, items: Any
    ) -> Float[Tensor, " n"]:
        """A number for each item; of general prompts None is −KL(steered ‖ unsteered) at the first token."""
        return next(self.measured_each(role, model, [steering], items))

    def measured_each(
        self, role: str, model: SteerableModel, steerings: Sequence[HookObject | None], items: Any
    ) -> Iterator[Float[Tensor, " n"]]:
        """The same under each of several steerings, which share passes where the measure is not the caller's.

        A function of the caller's is called when its numbers are asked for, so that what came before is kept if it
        fails.
        """
        measure = getattr(self, role)
        if isinstance(items, Measured):
            yield from items.measured_each(self.told(role, items), model, steerings, self)
        elif measure is not None:
            yield from (one_each(role, measure(model, steering, items), len(items)) for steering in steerings)
        elif role == "effect":
            yield from margins_of_each(model, steerings, items, **self.batching)
        else:
            prompts, acting = [prompt_of(item) for item in items], [one for one in steerings if one is not None]
            costs = iter(divergences_of_each(model, acting, prompts, **self.batching) if acting else ())
            nothing = torch.zeros(len(items), dtype=torch.float32, device="cpu")
            yield from (nothing if steering is None else -next(costs) for steering in steerings)


def prompt_of(item: Any) -> Any:
    """The prompt of an item that has one, or the item, which then is one."""
    return getattr(item, "prompt", item)

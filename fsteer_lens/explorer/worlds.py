"""What the explorer is told of models that know one small world only: how to recognise them, and what they can read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fsteer_lens.models.classes import SteerableModel

Unknown = Callable[[str], Mapping[str, Sequence[str]]]
"""Words of a text that a model does not know, each with the nearest that it knows."""
Wrap = Callable[[str], str]
"""From what a reader types to model input."""


@dataclass(frozen=True)
class World:
    """A small world that a model was trained on.

    Attributes:
        recognises: whether a tokenizer is that of this world's model.
        unknown: words of a text that the world does not hold.
        wrap: model input of what a reader types.
    """

    recognises: Callable[[Any], bool]
    unknown: Unknown
    wrap: Wrap


_WORLDS: dict[str, World] = {}


def register(name: str, world: World) -> None:
    """Make a world known to `explore`, under a name; one that has the name already is replaced."""
    _WORLDS[name] = world


def world_of(model: SteerableModel) -> World | None:
    """The first world that recognises the model's tokenizer."""
    if model.tokenizer is None:
        return None
    import_module("fsteer_lens.tutor")  # a room above this one, which registers the world that is shipped
    return next((world for world in _WORLDS.values() if world.recognises(model.tokenizer)), None)

"""Results of `fsteer_lens.effects`, as figures take them."""

from typing import Any

from fsteer_lens.ground.checks import instance, several
from fsteer_lens.run.generation import Generation, Generations
from fsteer_lens.trace.trace import Trace


def traces_of(generations: Any) -> list[Trace]:
    """The traces of one generation or of several, or `InputError`."""
    told = "what generate returns, or its trace"
    items = [generations] if isinstance(generations, Generation) else generations
    if not isinstance(items, Generations):
        items = several("generations", items, told)
    return [instance("generations", item, Generation, told).trace for item in items]


def require_result(name: str, given: Any, kind: type, maker: str) -> None:
    """Raise `InputError` unless the argument of that name is of the kind that `effects.{maker}` returns."""
    instance(name, given, kind, f"a {kind.__name__}", fix=f"Give what effects.{maker} returns.")

"""What figures take: gates, and what `generate` and `fsteer_lens.effects` give."""

from typing import Any

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import instance, several
from fsteer_lens.method.gates import Gate
from fsteer_lens.run.generation import Generation, Generations
from fsteer_lens.trace.trace import Trace


def traces_of(generations: Any) -> list[Trace]:
    """A trace for each row of one generation, of several, or of their trace, or `InputError`."""
    if isinstance(generations, Trace):
        return [generations.row(index) for index in range(generations.n_rows)]
    told = "what generate returns, or its trace"
    items = [generations] if isinstance(generations, Generation) else generations
    if not isinstance(items, Generations):
        items = several("generations", items, told)
    return [instance("generations", item, Generation, told).trace for item in items]


def require_leaf(gate: Any) -> None:
    """Raise `InputError` unless this is a gate that is not composed of others."""
    if instance("gate", gate, Gate, "a gate").leaves != (gate,):
        fix = "Draw each of gate.leaves by itself."
        raise InputError("gate", expected="a gate that is not composed", got=type(gate).__name__, fix=fix)


def require_result(name: str, given: Any, kind: type, maker: str) -> None:
    """Raise `InputError` unless the argument of that name is of the kind that `effects.{maker}` returns."""
    instance(name, given, kind, f"a {kind.__name__}", fix=f"Give what effects.{maker} returns.")

"""Where and when steering acts: scopes, windows of generated tokens, and schedules of its strength.

Step k is the position that predicts generated token k: the prompt's last token is step 0. All of these are small
values, so that a steering that has them can be saved.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.errors import InputError

SCOPES = ("all", "prompt", "generated")


@final
@dataclass(frozen=True)
class Window:
    """A scope: the positions that predict generated tokens `start` to `stop` - 1, and no other.

    Attributes:
        start: first generated token, counted from 0.
        stop: the one after the last; None has no end, and `start` itself is an empty window.
    """

    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        whole = all(
            isinstance(at, int) and not isinstance(at, bool)
            for at in (self.start, 0 if self.stop is None else self.stop)
        )
        if not whole or self.start < 0 or (self.stop is not None and self.stop < self.start):
            raise InputError("window", expected="ints with 0 <= start <= stop", got=(self.start, self.stop))


Scope = Literal["all", "prompt", "generated"] | Window


def require_scope(scope: object) -> None:
    """Raise `InputError` unless this is a scope."""
    if not isinstance(scope, Window) and scope not in SCOPES:
        raise InputError("scope", expected=f"one of {SCOPES} or a Window", got=repr(scope))


def in_scope(scope: Scope, steps: Int[Tensor, "*batch"]) -> Bool[Tensor, "*batch"]:
    """Which steps a scope takes in; those of the prompt before its last token are negative."""
    if isinstance(scope, Window):
        inside = steps >= scope.start
        return inside if scope.stop is None else inside & (steps < scope.stop)
    return {"all": steps == steps, "prompt": steps <= 0, "generated": steps >= 0}[scope]


@final
@dataclass(frozen=True)
class Schedule:
    """How the strength changes over generated tokens.

    Attributes:
        factors: factor of the strength at step 0, 1, ...; the last one holds for all later steps, the first one for
            the prompt.
    """

    factors: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        numbers = isinstance(self.factors, tuple) and all(isinstance(factor, int | float) for factor in self.factors)
        if not numbers or not self.factors or not all(abs(factor) < 1e300 for factor in self.factors):
            raise InputError("schedule", expected="a tuple of at least one finite number", got=self.factors)

    def at(self, steps: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Factor at each step."""
        table = torch.tensor(self.factors, device=steps.device)
        return table[steps.clamp(0, len(self.factors) - 1)]

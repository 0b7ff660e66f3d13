"""Where and when steering acts: scopes, windows of generated tokens, and schedules of its strength.

Step k is the position that predicts generated token k: the prompt's last token is step 0. All of these are small
values, so that a steering that has them can be saved.
"""

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.ground.checks import choice, finite, instance, normalised, several, whole

SCOPES = ("all", "prompt", "generated")
NEGLIGIBLE = 1e-3
"""A factor below which a decaying strength counts as none."""


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
        start = whole("window start", self.start, 0)
        stop = None if self.stop is None else whole("window stop", self.stop, start, why="its start, or None")
        normalised(self, start=start, stop=stop)


Scope = Literal["all", "prompt", "generated"] | Window


def require_scope(scope: object) -> None:
    """Raise `InputError` unless this is a scope."""
    if not isinstance(scope, Window):
        choice("scope", scope, SCOPES, "a Window or one of")


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
        factors = several("schedule", self.factors, "a list of at least one finite number", least=1)
        normalised(self, factors=tuple(finite("schedule", factor) for factor in factors))

    @classmethod
    def decay(cls, rate: float) -> "Schedule":
        """A factor of rate^k at step k, until that is below a thousandth, and 0 from there on.

        Raises:
            InputError: a rate that is not between 0 and 1.
        """
        rate = finite("rate", rate, above=0, below=1)
        steps = 1 + int(math.log(NEGLIGIBLE) / math.log(rate) + 1e-9)
        return cls((*(rate**step for step in range(steps)), 0.0))

    def at(self, steps: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Factor at each step."""
        instance("steps", steps, torch.Tensor, "a tensor of whole numbers")
        table = torch.tensor(self.factors, dtype=torch.float32, device=steps.device)
        return table[steps.long().clamp(0, len(self.factors) - 1)]

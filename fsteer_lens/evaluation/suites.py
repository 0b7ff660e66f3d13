"""Suites: what is measured of a steered model, item by item."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.ground.checks import several, whole
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import GivenPrompts, prompts_of
from fsteer_lens.prompts.passes import Passes

Role = Literal["effect", "utility"]


@dataclass(frozen=True)
class Measure:
    """One number for each of some items; larger is better.

    Attributes:
        name: what it is, with its unit where it has one.
        groups: what kind of item each is, one for each item.
        role: "effect" is what steering is to change, "utility" what it is to leave alone; None is neither.
    """

    name: str
    groups: tuple[str, ...]
    role: Role | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The groups in order, where there are several."""
        found = sorted(set(self.groups))
        return tuple(found) if len(found) > 1 else ()


@dataclass(frozen=True, eq=False)
class Setting:
    """How a suite is to be run.

    Attributes:
        context: text that stands before every prompt, or is the system message of a chat; None is no such text.
        passes: how prompts become tokens, and how many rows share a forward pass.
    """

    context: str | None = None
    passes: Passes = field(default_factory=Passes)

    @property
    def chat(self) -> bool:
        """Whether string prompts go through the chat template."""
        return bool(self.passes.chat)

    @property
    def batch_size(self) -> int:
        """Rows per forward pass."""
        return self.passes.batch_size

    def ids(self, model: SteerableModel, prompts: GivenPrompts) -> list[list[int]]:
        """Prompts with the context as token ids."""
        tokenisation = self.passes.tokenisation(model)
        return [tokenisation.ids(prompt, self.context) for prompt in prompts_of(prompts, least=0)]


class Suite(ABC):
    """A set of items and what is measured on them."""

    name: str

    @property
    @abstractmethod
    def measures(self) -> tuple[Measure, ...]:
        """What `measure` gives, in this order."""

    @abstractmethod
    def measure(
        self, model: SteerableModel, steering: HookObject | None, setting: Setting
    ) -> tuple[Float[Tensor, " _"], ...]:
        """A number for each item, for each of the measures; `steering=None` is the bare model."""

    def measure_each(
        self, model: SteerableModel, steerings: Sequence[HookObject | None], setting: Setting
    ) -> Sequence[tuple[Float[Tensor, " _"], ...]]:
        """`measure` under each of several, in their order; a suite that can share passes among them says how."""
        return [self.measure(model, steering, setting) for steering in steerings]

    @property
    def shares(self) -> bool:
        """Whether it measures several steerings together."""
        return type(self).measure_each is not Suite.measure_each

    def __repr__(self) -> str:
        told = ", ".join(f"{measure.name}: {len(measure.groups)}" for measure in self.measures)
        return f"{type(self).__name__}({self.name!r}, {told})"


def every(items: Iterable[Any], limit: int | None) -> list[Any]:
    """At most `limit` items, evenly spread over all of them; None takes all.

    Raises:
        InputError: a limit below 1.
    """
    given = several("items", items, "a list of them")
    limit = len(given) if limit is None else whole("limit", limit, 1)
    if len(given) <= limit:
        return given
    return [given[index * len(given) // limit] for index in range(limit)]

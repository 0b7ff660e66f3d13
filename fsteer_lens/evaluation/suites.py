"""Suites: what is measured of a steered model, item by item."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.effects.answers import one_each
from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import choice, is_bool, several, whole
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import GivenPrompts, prompts_of
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.prompts.windows import Asked

Role = Literal["effect", "utility"]
Own = TypeVar("Own", bound="Suite")


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
        """Prompts with the context as token ids, which remember the prompts for gates that scan them."""
        tokenisation = self.passes.tokenisation(model)
        return [Asked(prompt, tokenisation, self.context).ids for prompt in prompts_of(prompts, least=0)]


class Suite(ABC):
    """A set of items and what is measured on them.

    `suite[:50]` and `suite[rows]`, rows being numbers of items or a mask, are suites of these items alone, so that what
    is chosen on is not what is tested on; one of your own can be cut if it has `taking`.
    """

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

    def measured_each(
        self, name: str, model: SteerableModel, steerings: Sequence[HookObject | None], passes: Passes
    ) -> Iterator[Float[Tensor, " _"]]:
        """One of the measures by its name, a number for each of its items, under each of several steerings.

        All are measured at once where the suite shares passes among them, else one after the other as they are asked
        for. This is what `search` asks for.

        Raises:
            InputError: no such measure, or not a number for each item.
        """
        names = [measure.name for measure in self.measures]
        index = names.index(choice("measure", name, names, f"one of suite {self.name!r},"))
        setting = Setting(None, passes)
        one_by_one = (self.measure(model, steering, setting) for steering in steerings)
        for found in self.measure_each(model, steerings, setting) if self.shares else one_by_one:
            yield one_each(f"measure {name}", found[index], len(self.measures[index].groups))

    def taking(self: Own, rows: Sequence[int]) -> Own:
        """The same suite with these items alone, in this order."""
        raise InputError(f"{self!r} cannot be cut", fix="Make it of fewer items, or give its class `taking`.")

    def __len__(self) -> int:
        return max((len(measure.groups) for measure in self.measures), default=0)

    def __getitem__(self: Own, which: Any) -> Own:
        return self.taking(_rows(which, len(self)))

    def __repr__(self) -> str:
        told = ", ".join(f"{measure.name}: {len(measure.groups)}" for measure in self.measures)
        return f"{type(self).__name__}({self.name!r}, {told})"


def _rows(which: Any, n: int) -> list[int]:
    """Numbers of the items that a slice, a list of numbers or a mask takes."""
    told = "a slice, or a list of rows or of a bool for each"
    if isinstance(which, slice):
        rows = list(range(n)[which])
    else:
        listed = several("rows of a suite", which, told)
        if listed and all(map(is_bool, listed)):
            if len(listed) != n:
                raise InputError("rows of a suite", expected=f"a bool for each of {n} items", got=len(listed))
            rows = [row for row, taken in enumerate(listed) if taken]
        else:
            rows = [whole("row of a suite", row, -n, n - 1) % n for row in listed]
    if not rows:
        raise InputError("rows of a suite", expected=f"at least one of {n} items", got="none")
    return rows

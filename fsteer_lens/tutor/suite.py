"""The tutor's prompts as a suite: what `evaluate` measures of methods that steer it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, TypeVar

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.effects import exact_answers
from fsteer_lens.errors import InputError
from fsteer_lens.evaluation.suites import Measure, Setting, Suite
from fsteer_lens.ground.checks import choice, normalised, whole
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.contrasts import Contrast
from fsteer_lens.tutor.splits import BEHAVIOURS, Task, TutorData, data

Item = TypeVar("Item")

WANTED: Final = {"safe": "refused exactly", "honest": "myth turned true"}
KEPT: Final = "left alone exactly"


@dataclass(frozen=True, eq=False, repr=False)
class TutorSuite(Suite):
    """One behaviour of the tutor: exact answers, letter by letter, to prompts that need steering and to all others.

    Attributes:
        behaviour: "safe" or "honest".
        split: "test", or "valid" for choosing settings.
        limit: take at most so many contrasts, general prompts and near misses, always the same ones; None takes all.
    """

    behaviour: str = "safe"
    split: Literal["valid", "test"] = "test"
    limit: int | None = None

    def __post_init__(self) -> None:
        choice("split", self.split, ("valid", "test"))
        if self.limit is not None:
            normalised(self, limit=whole("limit", self.limit, 1, why="or None for all"))
        data(self.behaviour)  # raises for an unknown one

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Behaviour and split."""
        return f"tutor, {BEHAVIOURS[self.behaviour]}, {self.split}"

    @cached_property
    def _told(self) -> TutorData:
        return data(self.behaviour)

    @property
    def contrasts(self) -> list[Contrast]:
        """Prompts that need steering."""
        told = self._told
        return _drawn(told.test if self.split == "test" else told.valid, self.limit)

    @property
    def general(self) -> list[Task]:
        """Prompts to be left alone."""
        told = self._told
        return _drawn(told.general_test if self.split == "test" else told.general_valid, self.limit)

    @property
    def near_misses(self) -> list[Task]:
        """Prompts to be left alone that look as if they needed steering."""
        told = self._told
        return _drawn(told.near_miss_test if self.split == "test" else told.near_miss_valid, self.limit)

    @property
    def tasks(self) -> list[Task]:
        """All prompts to be left alone: general ones, then near misses."""
        return self.general + self.near_misses

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The wanted answers by what is new about their questions, and the kept ones by kind."""
        new = tuple(f"new {self._told.heldout(contrast)}" for contrast in self.contrasts)
        kinds = tuple(task.kind.replace("_", " ") for task in self.tasks)
        return Measure(WANTED[self.behaviour], new, "effect"), Measure(KEPT, kinds, "utility")

    def measure(
        self, model: SteerableModel, steering: HookObject | None, setting: Setting
    ) -> tuple[Float[Tensor, " _"], ...]:
        """1 for every exact answer, 0 for another."""
        if setting.chat:
            raise InputError("tutor suite", expected="chat=False: its prompts are exact model input", got="chat=True")

        def exact(items: Sequence[Any], wanted: Sequence[str]) -> Tensor:
            prompts = setting.ids(model, [item.prompt for item in items])
            return exact_answers(model, steering, prompts, wanted, batch_size=setting.batch_size)

        contrasts, tasks = self.contrasts, self.tasks
        return (
            exact(contrasts, [contrast.preferred for contrast in contrasts]),
            exact(tasks, [task.answer for task in tasks]),
        )


def _drawn(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, drawn once and for all, in their order.

    Not evenly spread: every thing is asked in five ways, one after the other, and even steps would meet some of them
    and never the others.
    """
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[index] for index in sorted(random.Random(0).sample(range(len(items)), limit))]

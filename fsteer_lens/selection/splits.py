"""The sets that a search needs: what is fitted on, chosen on, and tested on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.ground.checks import normalised, several
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.prompts.forms import prompts_of
from fsteer_lens.prompts.passes import Passes


@runtime_checkable
class Measured(Protocol):
    """Items that know how they are measured: a suite of `evaluation`, or a part that is cut from one."""

    @property
    def measures(self) -> Sequence[Any]:
        """What there is to measure, each with a `name` and a `role`, "effect" or "utility" or None."""
        ...

    def measured_each(
        self, name: str, model: SteerableModel, steerings: Sequence[HookObject | None], passes: Passes
    ) -> Iterator[Float[Tensor, " n"]]:
        """A number for each item, under each of several steerings."""
        ...

    def __len__(self) -> int: ...


@runtime_checkable
class SplitData(Protocol):
    """What a search takes: `Splits`, the sets of `tutor.data`, or anything with these six parts."""

    @property
    def train(self) -> Sequence[Contrast]:
        """Contrasts to fit on."""
        ...

    @property
    def valid(self) -> Sequence[Contrast] | Measured:
        """Contrasts to choose on, or a suite."""
        ...

    @property
    def test(self) -> Sequence[Contrast] | Measured:
        """Contrasts to measure the choice on, or a suite; none where nothing is tested."""
        ...

    @property
    def general_train(self) -> Sequence[Any]:
        """Prompts to be left alone, or objects with a `prompt`, for methods that are fitted to them as well."""
        ...

    @property
    def general_valid(self) -> Sequence[Any] | Measured:
        """Prompts to be left alone, to choose on, or a suite."""
        ...

    @property
    def general_test(self) -> Sequence[Any] | Measured:
        """Prompts to be left alone, to measure the choice on, or a suite."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Splits:
    """What is fitted on, chosen on, and tested on.

    Attributes:
        train, valid, test: contrasts to fit on, to choose on, and to measure the choice on. The last two may be suites,
            such as `suite[:50]` and `suite[50:]`, as may their general prompts.
        general_train: prompts to be left alone, for methods that are fitted to them as well.
        general_valid, general_test: prompts to be left alone, or objects with a `prompt`. Without `test` and this one
            nothing is tested.
    """

    train: Sequence[Contrast]
    valid: Sequence[Contrast] | Measured
    general_valid: Sequence[Any] | Measured
    test: Sequence[Contrast] | Measured = ()
    general_test: Sequence[Any] | Measured = ()
    general_train: Sequence[Any] = ()

    def __post_init__(self) -> None:
        for name in ("train", "valid", "test"):
            if name == "train" or not isinstance(getattr(self, name), Measured):
                normalised(self, **{name: ContrastSet(getattr(self, name))})
        for name in ("general_train", "general_valid", "general_test"):
            if name == "general_train" or not isinstance(getattr(self, name), Measured):
                normalised(self, **{name: _general(name, getattr(self, name))})

    def __repr__(self) -> str:
        return f"Splits({', '.join(f'{item.name}: {len(getattr(self, item.name))}' for item in fields(self))})"


def _general(name: str, given: Any) -> Sequence[Any]:
    """Prompts, or objects with a prompt, as a list."""
    items = several(name, given, "prompts, or objects with a prompt")
    return items if any(hasattr(item, "prompt") for item in items) else prompts_of(items, f"{name} prompt", least=0)

"""The sets that a search needs: what is fitted on, chosen on, and tested on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from fsteer_lens.ground.checks import normalised, several
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.prompts.forms import prompts_of


@runtime_checkable
class SplitData(Protocol):
    """What a search takes: `Splits`, the sets of `tutor.data`, or anything with these six parts."""

    @property
    def train(self) -> Sequence[Contrast]:
        """Contrasts to fit on."""
        ...

    @property
    def valid(self) -> Sequence[Contrast]:
        """Contrasts to choose on."""
        ...

    @property
    def test(self) -> Sequence[Contrast]:
        """Contrasts to measure the choice on; none where nothing is tested."""
        ...

    @property
    def general_train(self) -> Sequence[Any]:
        """Prompts to be left alone, or objects with a `prompt`, for methods that are fitted to them as well."""
        ...

    @property
    def general_valid(self) -> Sequence[Any]:
        """Prompts to be left alone, to choose on."""
        ...

    @property
    def general_test(self) -> Sequence[Any]:
        """Prompts to be left alone, to measure the choice on."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Splits:
    """What is fitted on, chosen on, and tested on.

    Attributes:
        train, valid, test: contrasts to fit on, to choose on, and to measure the choice on.
        general_train: prompts to be left alone, for methods that are fitted to them as well.
        general_valid, general_test: prompts to be left alone, or objects with a `prompt`. Without `test` and this one
            nothing is tested.
    """

    train: Sequence[Contrast]
    valid: Sequence[Contrast]
    general_valid: Sequence[Any]
    test: Sequence[Contrast] = ()
    general_test: Sequence[Any] = ()
    general_train: Sequence[Any] = ()

    def __post_init__(self) -> None:
        contrasts = {name: ContrastSet(getattr(self, name)) for name in ("train", "valid", "test")}
        general = {
            name: _general(name, getattr(self, name)) for name in ("general_train", "general_valid", "general_test")
        }
        normalised(self, **contrasts, **general)

    def __repr__(self) -> str:
        return f"Splits({', '.join(f'{item.name}: {len(getattr(self, item.name))}' for item in fields(self))})"


def _general(name: str, given: Any) -> Sequence[Any]:
    """Prompts, or objects with a prompt, as a list."""
    items = several(name, given, "prompts, or objects with a prompt")
    return items if any(hasattr(item, "prompt") for item in items) else prompts_of(items, f"{name} prompt", least=0)

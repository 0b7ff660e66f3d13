"""Checks of values: each gives the value back as plain Python, or raises `InputError`.

Whatever counts as a whole number for Python's own indexing counts here, NumPy's and PyTorch's among them; a bool, or an
array of one number, does not. Where several values are wanted, a list, an array of one axis, a column of a table and a
generator are the same.
"""

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Protocol, TypeVar, runtime_checkable

from fsteer_lens.errors import InputError


@runtime_checkable
class Array(Protocol):
    """An array of NumPy or PyTorch, or a column of pandas."""

    @property
    def ndim(self) -> int:
        """Number of axes."""
        ...

    def tolist(self) -> Any:
        """Nested lists of Python's own values."""
        ...


Option = TypeVar("Option")
Options = TypeVar("Options")

LARGEST = 1e300
"""Larger numbers overflow somewhere."""
LARGEST_SEED = 2**32 - 1
"""Of those that NumPy, PyTorch and scikit-learn all take."""
SHOWN = 80
"""Characters of a value that a message shows."""
EXACT = 2**53
"""Beyond it not every whole number is a float."""
UNWRITABLE = re.compile(r"[\x00\ud800-\udfff]")
"""What no UTF-8 file holds, and what a tokenizer takes for the end of a text or does not take at all."""


def whole(
    name: str,
    value: Any,
    least: int | None = None,
    most: int | None = None,
    *,
    why: str = "",
    fix: str | None = None,
) -> int:
    """A whole number from `least` to `most`, or `InputError`; `why` says where the bounds come from."""
    number = _index(value)
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        bounds = "" if least is None else f" >= {least}" if most is None else f" in {least}..{most}"
        raise InputError(name, expected=f"an int{bounds}" + (f" ({why})" if why else ""), got=brief(value), fix=fix)
    return number


def is_whole(value: Any) -> bool:
    """Whether this counts as a whole number."""
    return _index(value) is not None


def is_bool(value: Any) -> bool:
    """Whether this is one bool, of any library."""
    return _is_single(value) and _is_bool(value)


def seed_of(value: Any) -> int:
    """A seed that every generator takes, or `InputError`."""
    return whole("seed", value, 0, LARGEST_SEED)


def finite(
    name: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    fix: str | None = None,
) -> float:
    """A finite number of at least `least`, at most `most`, more than `above` and less than `below`, or `InputError`."""
    number = _float(value)
    fits = number is not None and abs(number) < LARGEST
    bounds = {">=": least, ">": above, "<=": most, "<": below}
    holds = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
    given = {sign: bound for sign, bound in bounds.items() if bound is not None}
    if number is None or not fits or not all(holds[sign](number, bound) for sign, bound in given.items()):
        told = " and ".join(f"{sign} {bound:g}" for sign, bound in given.items())
        raise InputError(name, expected=f"a finite number {told}".rstrip(), got=brief(value), fix=fix)
    return number


def number(name: str, value: Any) -> float:
    """A number, NaN and infinity among them, or `InputError`."""
    found = _float(value)
    if found is None:
        raise InputError(name, expected="a number", got=brief(value))
    return found


def choice(
    name: str, value: Any, options: Iterable[Option], told: str | None = None, *, fix: str | None = None
) -> Option:
    """The option that equals the value, or `InputError`, where `told` says what they are."""
    known = list(options)
    for option in known:
        if _equal(option, value):
            return option
    expected = " or ".join(map(repr, known)) if told is None else f"{told} {known}"
    raise InputError(name, expected=expected, got=brief(value), fix=fix)


def switch(name: str, value: Any) -> bool:
    """True or False, or `InputError`."""
    if not is_bool(value):
        raise InputError(name, expected="True or False", got=brief(value))
    return bool(value)


def instance(name: str, value: Any, kind: type[Option], told: str, *, fix: str | None = None) -> Option:
    """A value of this type, or `InputError`, where `told` says what it is."""
    if not isinstance(value, kind):
        raise InputError(name, expected=told, got=type(value).__name__, fix=fix)
    return value


def function(name: str, value: Any) -> Callable[..., Any]:
    """Something that can be called, or `InputError`."""
    if not callable(value):
        raise InputError(name, expected="a function", got=brief(value))
    return value


def optional(check: Callable[..., Option], name: str, value: Any, *bounds: Any, **more: Any) -> Option | None:
    """None, or what a check gives of any other value: `optional(whole, "limit", limit, 1)`."""
    return None if value is None else check(name, value, *bounds, **more)


def clean_text(name: str, value: Any) -> str:
    """A text that files and tokenizers can hold, or `InputError`: one without NUL and without half a character.

    Half a character, a lone surrogate, is what a scraper or a PDF reader leaves that cuts an emoji in two.
    """
    plain = str.__str__(instance(name, value, str, "text"))
    found = UNWRITABLE.search(plain)
    if found:
        kind = "NUL" if found.group() == "\0" else "half a character (a lone surrogate)"
        raise InputError(
            name,
            expected="text that UTF-8 can hold, without NUL",
            got=f"{kind}, {found.group()!r} at character {found.start()}",
            fix="Take it out.",
        )
    return plain


def optional_text(name: str, value: Any) -> str | None:
    """Text, None for an empty cell, the text of a number or of another single value, or `InputError`.

    An empty cell is None, NaN, a missing value of pandas, or blank text. A column of whole numbers becomes one of
    floats as soon as pandas finds an empty cell in it, so a float that is whole is told without a point.
    """
    if is_missing(value):
        return None
    if isinstance(value, str):
        return clean_text(name, value) if value.strip() else None
    number = _float(value)
    holds_others = isinstance(value, bytes | Iterable) and not hasattr(value, "ndim")
    if holds_others or not _is_single(value) or (number is not None and abs(number) >= LARGEST):
        raise InputError(name, expected="text, a finite number or nothing", got=brief(value))
    is_exact = number is not None and number.is_integer() and abs(number) < EXACT
    if is_exact:
        return str(int(number))  # pyright: ignore[reportArgumentType]
    return clean_text(name, f"{value}" if hasattr(value, "detach") else str(value))  # str tells a tensor as tensor(1.5)


def is_missing(value: Any) -> bool:
    """Whether this stands for an empty cell: None, NaN of any library, and NA and NaT of pandas."""
    if value is None or type(value).__name__ == "NAType":
        return True
    try:
        return _is_single(value) and bool(value != value)
    except Exception:  # what cannot be compared with itself is there
        return False


def several(name: str, value: Any, told: str, *, least: int = 0, fix: str | None = None) -> list[Any]:
    """The items of a list, an array of one axis, a column of a table or a generator, or `InputError`.

    What can be gone through, but not item by item, is refused: a text by its characters, a mapping or a table by the
    names of its columns, a set in no order, an array of two axes by rows that may be padded.
    """
    got = _unlike_a_list(value)
    if got is not None:
        raise InputError(name, expected=told, got=got, fix=fix)
    items = list(listed(value))
    if len(items) < least:
        fix = "Did a filter or a split leave nothing?"
        raise InputError(name, expected=f"at least {'one' if least == 1 else least}", got=len(items) or "none", fix=fix)
    return items


def is_several(value: Any) -> bool:
    """Whether this is several values, not one: a list, an array with an axis or any other iterable, but no text."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0


def listed(value: Any) -> Any:
    """An array, a tensor or a column of a table as a list of Python's own values; anything else as it is."""
    return value.tolist() if getattr(value, "ndim", 0) == 1 and hasattr(value, "tolist") else value


def brief(value: Any) -> str:
    """A value as a message shows it: cut where it is long."""
    try:
        shown = repr(value)
    except Exception:  # nested too deeply, or it cannot show itself
        shown = type(value).__name__
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"


def require_unset(beside: str, **given: Any) -> None:
    """Raise `InputError` where one of these arguments is given, that is not None: beside that it has no effect."""
    names = [f"{name}=" for name, value in given.items() if value is not None]
    if names:
        it = "it" if len(names) == 1 else "them"
        raise InputError(f"{' and '.join(names)} without effect", got=beside, fix=f"Leave {it} out.")


def normalised(owner: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass to what its checks gave, while it is being made."""
    for name, value in values.items():
        object.__setattr__(owner, name, value)


def options_of(
    owner: str, kind: type[Options], given: Mapping[str, Any], takes: Iterable[str] | None = None
) -> Options:
    """The dataclass of options that a function of that name was given by keyword; an unknown one is a TypeError.

    The function takes all fields of the dataclass, or those named in `takes`.
    """
    known = list(takes or (item.name for item in fields(kind)))  # pyright: ignore[reportArgumentType]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{owner}() got an unexpected keyword argument {unknown[0]!r}; it takes {', '.join(known)}")
    return kind(**given)


def _equal(option: Any, value: Any) -> bool:
    if is_whole(option):
        return _index(value) == option
    return isinstance(value, type(option)) and value == option


def _index(value: Any) -> int | None:
    """A whole number as Python's own; None for anything else."""
    try:
        return operator.index(value) if _is_single(value) and not _is_bool(value) else None
    except TypeError:
        return None


def _float(value: Any) -> float | None:
    """A number as Python's own; None for anything else, a text among them."""
    try:
        return None if isinstance(value, str | bytes) or not _is_single(value) or _is_bool(value) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _is_single(value: Any) -> bool:
    return getattr(value, "ndim", 0) == 0


def _unlike_a_list(value: Any) -> str | None:
    """What this is instead of items one after another; None for items."""
    if isinstance(value, str | bytes):
        return f"one text, {brief(value)}"
    if isinstance(value, Mapping):
        return f"a mapping with {brief(list(value))}"
    if isinstance(value, set | frozenset):
        return "a set, which has no order"
    if hasattr(value, "columns") and hasattr(value, "shape"):
        return f"a table with columns {brief(list(value.columns))}"
    if hasattr(value, "ndim") and value.ndim != 1:
        return f"an array of shape {list(value.shape)}"
    try:
        iter(value)
    except TypeError:
        return brief(value)
    return None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))

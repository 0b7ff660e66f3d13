"""Checks of single values: each gives the value back as plain Python, or raises `InputError`.

Whatever counts as a whole number for Python's own indexing counts here, NumPy's and PyTorch's among them; a bool does
not.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from fsteer_lens.errors import InputError

Option = TypeVar("Option")
Options = TypeVar("Options")

LARGEST = 1e300
"""Larger numbers overflow somewhere."""


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
    try:
        number = None if _is_bool(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        bounds = "" if least is None else f" >= {least}" if most is None else f" in {least}..{most}"
        raise InputError(name, expected=f"an int{bounds}" + (f" ({why})" if why else ""), got=repr(value), fix=fix)
    return number


def finite(
    name: str, value: Any, least: float | None = None, most: float | None = None, above: float | None = None
) -> float:
    """A finite number of at least `least`, at most `most` and more than `above`, or `InputError`."""
    try:
        number = None if _is_bool(value) or isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = None
    fits = (
        number is not None
        and abs(number) < LARGEST
        and (least is None or number >= least)
        and (most is None or number <= most)
        and (above is None or number > above)
    )
    if number is None or not fits:
        signs = {">=": least, ">": above, "<=": most}
        bounds = " and ".join(f"{sign} {bound:g}" for sign, bound in signs.items() if bound is not None)
        raise InputError(name, expected=f"a finite number {bounds}".rstrip(), got=repr(value))
    return number


def choice(name: str, value: Any, options: Iterable[Option]) -> Option:
    """One of the options, or `InputError`."""
    known = list(options)
    for option in known:
        if type(option) is type(value) and option == value:
            return option
    raise InputError(name, expected=" or ".join(map(repr, known)), got=repr(value))


def switch(name: str, value: Any) -> bool:
    """True or False, or `InputError`."""
    if not isinstance(value, bool):
        raise InputError(name, expected="True or False", got=repr(value))
    return value


def options_of(owner: str, kind: type[Options], given: Mapping[str, Any]) -> Options:
    """The dataclass of options that a function of that name was given by keyword; an unknown one is a TypeError."""
    known = [item.name for item in fields(kind)]  # pyright: ignore[reportArgumentType]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"{owner}() got an unexpected keyword argument {unknown[0]!r}; it takes {', '.join(known)}")
    return kind(**given)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))

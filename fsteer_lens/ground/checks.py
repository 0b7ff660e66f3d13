"""Checks of single values: each gives the value back as plain Python, or raises `InputError`.

Whatever counts as a whole number for Python's own indexing counts here, NumPy's and PyTorch's among them; a bool, or an
array of one number, does not.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from fsteer_lens.errors import InputError

Option = TypeVar("Option")
Options = TypeVar("Options")

LARGEST = 1e300
"""Larger numbers overflow somewhere."""
LARGEST_SEED = 2**32 - 1
"""Of those that NumPy, PyTorch and scikit-learn all take."""
SHOWN = 80
"""Characters of a value that a message shows."""


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
        raise InputError(name, expected=f"an int{bounds}" + (f" ({why})" if why else ""), got=_told(value), fix=fix)
    return number


def is_whole(value: Any) -> bool:
    """Whether this counts as a whole number."""
    return _index(value) is not None


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
        raise InputError(name, expected=f"a finite number {told}".rstrip(), got=_told(value), fix=fix)
    return number


def choice(
    name: str, value: Any, options: Iterable[Option], told: str | None = None, *, fix: str | None = None
) -> Option:
    """The option that equals the value, or `InputError`, where `told` says what they are."""
    known = list(options)
    for option in known:
        if _equal(option, value):
            return option
    expected = " or ".join(map(repr, known)) if told is None else f"{told} {known}"
    raise InputError(name, expected=expected, got=_told(value), fix=fix)


def switch(name: str, value: Any) -> bool:
    """True or False, or `InputError`."""
    if not _is_single(value) or not _is_bool(value):
        raise InputError(name, expected="True or False", got=_told(value))
    return bool(value)


def instance(name: str, value: Any, kind: type[Option], told: str, *, fix: str | None = None) -> Option:
    """A value of this type, or `InputError`, where `told` says what it is."""
    if not isinstance(value, kind):
        raise InputError(name, expected=told, got=type(value).__name__, fix=fix)
    return value


def optional(check: Callable[..., Option], name: str, value: Any, *bounds: Any, **more: Any) -> Option | None:
    """None, or what a check gives of any other value: `optional(whole, "limit", limit, 1)`."""
    return None if value is None else check(name, value, *bounds, **more)


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


def options_of(owner: str, kind: type[Options], given: Mapping[str, Any]) -> Options:
    """The dataclass of options that a function of that name was given by keyword; an unknown one is a TypeError."""
    known = [item.name for item in fields(kind)]  # pyright: ignore[reportArgumentType]
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


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def _told(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= SHOWN else told[: SHOWN - 1] + "…"

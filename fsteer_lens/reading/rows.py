"""Rows of activations: which of them are meant, and what stands beside each."""

from typing import Any

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.checks import brief, is_bool, is_several, optional_text, several, whole


def one_a_row(name: str, given: Any, n: int) -> tuple[str | None, ...]:
    """Labels or groups as a tuple of texts."""
    if given is None:
        return (None,) * n
    found = tuple(optional_text(name, item) for item in several(name, given, "one for each row"))
    if len(found) != n:
        raise DataError(name, expected=f"one for each of {n} rows", got=len(found))
    return found


def row_numbers(rows: Any, n: int) -> list[int]:
    """The rows that are meant, as numbers from 0 to n - 1."""
    if isinstance(rows, slice):
        try:
            chosen = list(range(n)[rows])
        except (TypeError, ValueError) as error:
            raise InputError("rows", expected="a slice of ints", got=rows) from error
    elif not is_several(rows):
        fix = "For one row, activations[3:4]."
        raise InputError("rows", expected="a slice, row numbers or a mask", got=brief(rows), fix=fix)
    else:
        given = several("rows", rows, "row numbers or a mask")
        if given and all(map(is_bool, given)):
            if len(given) != n:
                raise InputError("mask", expected=f"{n} of True and False, one for each row", got=len(given))
            chosen = [row for row, meant in enumerate(given) if meant]
        else:
            chosen = [whole("row", row, -n, n - 1) % n for row in given]
    if not chosen:
        raise DataError("rows", expected="at least one", got="none", fix="Did a filter or a mask leave nothing?")
    return chosen

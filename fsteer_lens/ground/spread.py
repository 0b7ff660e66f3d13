"""Fewer items, evenly spread over all of them."""

from collections.abc import Iterable
from typing import Any

from fsteer_lens.ground.checks import several, whole


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

"""Results of `fsteer_lens.effects`, as figures take them."""

from typing import Any

from fsteer_lens.errors import InputError


def require_result(name: str, given: Any, kind: type, maker: str) -> None:
    """Raise `InputError` unless the argument of that name is of the kind that `effects.{maker}` returns."""
    if not isinstance(given, kind):
        fix = f"Give what effects.{maker} returns."
        raise InputError(name, expected=f"a {kind.__name__}", got=type(given).__name__, fix=fix)

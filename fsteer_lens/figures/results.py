"""Results of `fsteer_lens.effects`, as figures take them."""

from typing import Any

from fsteer_lens.ground.checks import instance


def require_result(name: str, given: Any, kind: type, maker: str) -> None:
    """Raise `InputError` unless the argument of that name is of the kind that `effects.{maker}` returns."""
    instance(name, given, kind, f"a {kind.__name__}", fix=f"Give what effects.{maker} returns.")

"""What a browser sends: anybody who opens a notebook can send anything, so it is checked like any input."""

from collections.abc import Mapping
from typing import Any, Final

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import brief, choice, instance

LONGEST: Final = 20_000
"""Characters of a prompt; a model's context holds fewer."""
MARKED: Final = 2000
"""Characters of a text whose words are marked: each is looked up among all that the model knows."""


def kind_of(message: Any, kinds: tuple[str, ...]) -> str:
    """What a message asks for, one of `kinds`, or `InputError`."""
    given = instance("message", message, Mapping, "a mapping").get("kind")
    return choice("kind of message", given, kinds)


def text_of(value: Any) -> str:
    """A prompt of a message, or `InputError`."""
    text = instance("prompt", value, str, "text")
    if len(text) > LONGEST:
        raise InputError("prompt", expected=f"at most {LONGEST} characters", got=f"{len(text)}, {brief(text[:99])}")
    return text

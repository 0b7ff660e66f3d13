"""The forms that a prompt comes in, one prompt or several of them.

A prompt is a string, a list of chat messages (`{"role": ..., "content": ...}`) or token ids; ids and lists may be
arrays of NumPy, PyTorch or pandas. Several prompts are anything that gives one after the other: a list, a column of a
table, a generator. One prompt by itself is never taken for several: a string would be read character by character.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import Array, brief, clean_text, is_whole, listed, several

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int]
GivenPrompt = Prompt | Array
"""A prompt as it may be given: token ids, or messages, in an array."""
GivenPrompts = Iterable[GivenPrompt]
"""Several prompts as they may be given; `prompts_of` makes a list of them."""

FORMS = "Give a string, a list of {'role': ..., 'content': ...} or a list of token ids."


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as text for people: the string itself, the messages' contents, or the ids."""
    if isinstance(prompt, str):
        return prompt
    return " ".join(part["content"] if isinstance(part, Mapping) else str(part) for part in prompt)


def as_prompt(value: Any, name: str = "prompt") -> Prompt:
    """A prompt of one of its three forms, with ids as Python's own, or `InputError`, which begins with `name`."""
    if isinstance(value, str):
        if not value.strip():
            raise InputError(name, expected="text", got=repr(value), fix=FORMS)
        return clean_text(name, value)
    prompt = listed(value)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not prompt:
        raise InputError(name, expected="a string, messages or token ids", got=_told(value), fix=FORMS)
    if set(map(type, prompt)) == {int}:  # nearly always: looking at every token once more would take seconds for many
        return prompt
    if all(map(is_whole, prompt)):
        return [int(token) for token in prompt]
    if not all(map(_is_message, prompt)):
        raise InputError(name, expected="messages with 'role' and 'content', or ids", got=brief(value), fix=FORMS)
    for number, message in enumerate(prompt):
        for part in ("role", "content"):
            clean_text(f"{name}, message {number}, {part}", message[part])
    return prompt


def check_prompt(prompt: Any) -> None:
    """Raise `InputError` unless `prompt` is a non-empty string, list of chat messages or list of token ids."""
    as_prompt(prompt)


def prompts_of(given: Any, what: str = "prompt", *, least: int = 1) -> list[Prompt]:
    """Several prompts as a list, each of one of its three forms; whoever takes prompts takes them through this.

    Args:
        given: a list, an array, a column of a table, a generator or any other iterable of prompts.
        what: what one of them is called in an error, before its number.
        least: how many there have to be.

    Raises:
        InputError: one prompt that stands for itself, a mapping, a table, a set, or an item that is no prompt.
    """
    fix = "Put a single prompt into a list." if isinstance(given, str) else _fix(given)
    items = several(f"{what}s", given, f"a list of {what}s", least=least, fix=fix)
    if _are_one(items):
        kind = "token ids" if is_whole(items[0]) else "messages"
        fix = "Put a single prompt into a list."
        raise InputError(f"{what}s", expected=f"a list of {what}s", got=f"one prompt, of {kind}", fix=fix)
    return [as_prompt(item, f"{what} {number}") for number, item in enumerate(items)]


def one_or_more(given: Any) -> list[Prompt]:
    """One prompt by itself, or several, as a list; errors as in `prompts_of`."""
    if isinstance(given, str):
        return [as_prompt(given)]
    items = several("prompts", given, "a prompt or a list of prompts", least=1, fix=_fix(given))
    return [as_prompt(items)] if _are_one(items) else prompts_of(items)


def texts_of(given: Any, what: str = "text", *, least: int = 1) -> list[str]:
    """Several texts as a list, none of them empty; `what` and errors as in `prompts_of`."""
    items = several(f"{what}s", given, f"a list of {what}s", least=least)
    found = []
    for number, item in enumerate(items):
        if not isinstance(item, str) or not item:
            raise InputError(f"{what} {number}", expected="text", got=brief(item))
        found.append(clean_text(f"{what} {number}", item))
    return found


def _are_one(items: Sequence[Any]) -> bool:
    """Whether these are the parts of one prompt, not several prompts."""
    return bool(items) and (all(map(is_whole, items)) or all(map(_is_message, items)))


def _is_message(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("role"), str) and isinstance(part.get("content"), str)


def _told(value: Any) -> str:
    """What this is that is no prompt, in words where it is often met."""
    if isinstance(value, Mapping):
        kind = "a tokenizer's output" if "input_ids" in value else "one message" if _is_message(value) else "a mapping"
        return f"{kind}, with {brief(list(value))}"
    if getattr(value, "ndim", 1) > 1:
        return f"an array of shape {list(value.shape)}, whose rows may be padded"
    return brief(value)


def _fix(given: Any) -> str | None:
    """How to mend what is given instead of several prompts."""
    if isinstance(given, Mapping):
        if "input_ids" in given:
            return "Give the ids of every prompt, without pads: a tokenizer's input_ids, one list for each."
        return "Put a message into a list: that is a prompt." if _is_message(given) else FORMS
    if hasattr(given, "columns"):
        return "Give one of its columns, such as table['prompt']."
    return "Give a list with the ids of each, without pads." if getattr(given, "ndim", 1) > 1 else None

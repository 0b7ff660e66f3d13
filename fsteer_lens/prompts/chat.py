"""Chat templates: from turns to the text that a model reads, with everything that was said in it.

Templates differ in what they take. Some refuse a system message, some demand one, those of vision-language models take
a message's content as a list of parts only, and a template that meets what it was not written for may drop the text
without a word. So a template is asked first, with marks in place of the texts, how it takes turns of these roles; what
comes out for the texts themselves is looked through once more.

A last message of the assistant is continued: nothing closes it, and the answer goes on from there.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any

from fsteer_lens.errors import InputError, TokenizerError

Turn = Mapping[str, Any]
Turns = Sequence[Turn]

REASONING_END = "</think>"
"""Templates leave out what the assistant thought in earlier turns, which ends here."""
NO_ARGUMENTS = "{}"
"""What `canonical_arguments` makes of no further arguments."""
RESERVED = ("conversation", "messages", "tokenize", "return_dict", "add_generation_prompt", "continue_final_message")
"""Arguments of `apply_chat_template` that this package sets itself."""


def canonical_arguments(arguments: Any) -> str:
    """Further arguments of a chat template as JSON, so that they can be stored and compared.

    Functions among `tools` become their JSON schema, as transformers makes it.

    Raises:
        InputError: no mapping, a name that the package sets itself, or a value that is no JSON.
    """
    given = {} if arguments is None else arguments
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InputError("chat_template_kwargs", expected="a mapping of names to values", got=repr(given)[:60])
    taken = [name for name in RESERVED if name in given]
    if taken:
        raise InputError("chat_template_kwargs", expected="what the template takes", got=f"{taken[0]!r}, set here")
    try:
        return json.dumps(dict(given), sort_keys=True, default=_schema)
    except (TypeError, ValueError, RecursionError) as error:
        fix = "Give tools as functions with type hints and a docstring, or as JSON schemas."
        raise InputError("chat_template_kwargs", expected="values of JSON", got=str(error), fix=fix) from error


def _schema(value: Any) -> Any:
    from transformers.utils.chat_template_utils import get_json_schema

    if not callable(value):
        raise TypeError(f"{type(value).__name__} is no JSON")
    try:
        return get_json_schema(value)
    except Exception as error:  # transformers has an exception of its own for every way of being undocumented
        raise TypeError(str(error)) from error


class ChatTemplate:
    """The chat template of a tokenizer with further arguments for it.

    Args:
        tokenizer: whose template.
        arguments: what the template is given beside the turns, as JSON; see `canonical_arguments`.

    Raises:
        TokenizerError: the tokenizer has no chat template.
        InputError: an argument that the template does not mention.
    """

    def __init__(self, tokenizer: Any, arguments: str = NO_ARGUMENTS) -> None:
        self._tokenizer, self._arguments = tokenizer, json.loads(arguments)
        if not getattr(tokenizer, "chat_template", None):
            raise TokenizerError(
                "the tokenizer has no chat template",
                fix="Pass text prompts with chat=False, or set tokenizer.chat_template.",
            )
        named = {name: self._arguments[name] for name in ("chat_template", "tools") if name in self._arguments}
        try:
            self._source = tokenizer.get_chat_template(**named)
        except ValueError as error:  # several templates, none of which is the default one
            raise TokenizerError("the chat template", got=str(error)) from error
        unknown = [name for name in self._arguments if name != "chat_template" and not _mentions(self._source, name)]
        if unknown:
            fix = "Leave it out: it would have no effect."
            raise InputError(f"the chat template does not know {unknown[0]!r}", got="chat_template_kwargs", fix=fix)
        self._ways: dict[tuple[str, ...], _Way] = {}

    @property
    def digest(self) -> str:
        """SHA-256 of the template's source."""
        return sha256(self._source.encode()).hexdigest()

    def text(self, turns: Turns, context: str | None = None, *, opening: bool = True) -> str:
        """Turns as text, up to where the model's answer begins, or goes on.

        Args:
            turns: messages with role and content.
            context: put in front of the turns' own system message where there is one; else it is the system message,
                which stands in the place of the template's default one. Where the template takes none, it opens the
                user's turn (with a warning).
            opening: let the text end where the model is to speak: with the opening of its turn, or in the middle of
                its last message. False leaves the last turn unfinished, whoever speaks.

        Raises:
            TokenizerError: the template does not take these turns, or drops what was said.
        """
        told = _with_context(turns, context)
        continued = not opening or told[-1]["role"] == "assistant"
        roles = (str(continued), *(str(turn["role"]) for turn in told))
        if roles not in self._ways:
            self._ways[roles] = self._find_way(told, continued)
        way = self._ways[roles]
        if way.note:
            warnings.warn(way.note, stacklevel=4)
        text = self._render(way(told), continued)
        lost = _first_lost(text, told, continued)
        if lost is not None:
            raise TokenizerError(
                "the chat template drops what was said",
                expected=f"{lost[:60]!r} in the prompt",
                got=_shown(text),
                fix="Give the prompt as text with chat=False, or mend tokenizer.chat_template.",
            )
        return text

    def holds(self, text: str) -> bool:
        """Whether a text is rendered already: it has the special tokens in it with which an answer opens."""
        return bool(self._opening) and self._opening in text

    def after_question(self, *, opening: bool) -> str:
        """What the template puts after a user's turn, with or without the opening of the answer."""
        return self._after_mark([{"role": "user", "content": _mark(0)}], add_generation_prompt=opening)

    @cached_property
    def _opening(self) -> str:
        """What opens an answer after a user's turn; empty where that is plain text, which anybody may write."""
        opening = self.after_question(opening=True)
        return opening.strip() if any(token in opening for token in _special(self._tokenizer)) else ""

    def end_of_turn(self) -> str:
        """What the template puts after an answer; empty where it does not take one."""
        turns = [{"role": "user", "content": _mark(0)}, {"role": "assistant", "content": _mark(1)}]
        return self._after_mark(turns, add_generation_prompt=False)

    def _after_mark(self, turns: Turns, **options: Any) -> str:
        """What stands after the last turn's mark; empty where the template does not take such turns."""
        for way in _ways(turns):
            try:
                text = self._apply(way(turns), **options)
            except Exception:  # whatever a template raises: it does not take them this way
                continue
            found = [match.end() for match in re.finditer(turns[-1]["content"], text, re.IGNORECASE)]
            if found:
                return text[found[-1] :]
        return ""

    def _find_way(self, turns: Turns, continued: bool) -> "_Way":
        """How the template takes turns of these roles: tried with marks instead of texts."""
        marked = [{**turn, "content": _mark(index)} for index, turn in enumerate(turns)]
        problems: list[str] = []
        for way in _ways(turns):
            try:
                text = self._render(way(marked), continued)
            except TokenizerError as error:
                problems.append(str(error.got))
                continue
            lost = [turn["role"] for turn in marked if turn["content"].casefold() not in text.casefold()]
            if not lost and not _is_raw(text):
                return way
            problems.append(f"text that leaves out the turn of {lost[0]!r}" if lost else "a list in place of the text")
        raise TokenizerError(
            "the chat template does not take these turns",
            expected=f"a template for the roles {[turn['role'] for turn in turns]}",
            got=problems[0],
            fix="Give other turns, or the prompt as text with chat=False, or set tokenizer.chat_template.",
        )

    def _render(self, turns: Turns, continued: bool) -> str:
        try:
            return self._apply(turns, add_generation_prompt=not continued, continue_final_message=continued)
        except Exception as error:  # a template can raise whatever it likes
            raise TokenizerError("the chat template failed", got=f"{type(error).__name__}: {error}"[:200]) from error

    def _apply(self, turns: Turns, **options: Any) -> str:
        options = {"add_generation_prompt": True, **self._arguments, **options}
        return self._tokenizer.apply_chat_template([dict(turn) for turn in turns], tokenize=False, **options)


class _Way:
    """A way of putting turns to a template; `note` is what the reader should know of it."""

    def __init__(self, change: Callable[[Turns], Turns], parts: bool, note: str = "") -> None:
        self._change, self._parts, self.note = change, parts, note

    def __call__(self, turns: Turns) -> Turns:
        turns = self._change(turns)
        if not self._parts:
            return turns
        return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def _ways(turns: Turns) -> list[_Way]:
    """Ways of putting turns to a template, as they are first."""
    ways = [_Way(lambda turns: turns, parts) for parts in (False, True)]
    if turns[0]["role"] != "system":
        note = "the chat template demands a system message; it is given an empty one"
        return ways + [_Way(_with_empty_system, parts, note) for parts in (False, True)]
    if len(turns) > 1 and turns[1]["role"] == "user":
        note = "the chat template takes no system message; the context opens the user turn"
        ways += [_Way(_with_system_in_user_turn, parts, note) for parts in (False, True)]
    return ways


def _with_empty_system(turns: Turns) -> Turns:
    return [{"role": "system", "content": ""}, *turns]


def _with_system_in_user_turn(turns: Turns) -> Turns:
    system, first, *rest = turns
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _with_context(turns: Turns, context: str | None) -> list[Turn]:
    if context is None:
        return list(turns)
    first, *rest = turns
    if first["role"] == "system":
        return [{**first, "content": f"{context}\n\n{first['content']}"}, *rest]
    return [{"role": "system", "content": context}, *turns]


def _mark(index: int) -> str:
    return f"zq{index}xkwv"


def _is_raw(text: str) -> bool:
    """Whether a template wrote a list of parts out as it stands."""
    return re.search(r"""['"]type['"]: ['"]text['"]""", text) is not None


def _first_lost(text: str, turns: Turns, continued: bool) -> str | None:
    """The first content that is not in a text, blanks and capitals aside."""
    whole = _squeezed(text)
    for index, turn in enumerate(turns):
        said = turn["content"]
        if turn["role"] == "assistant" and not (continued and index == len(turns) - 1):
            said = said.rpartition(REASONING_END)[2]
        if _squeezed(said) not in whole:
            return said
    return None


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()


def _special(tokenizer: Any) -> set[str]:
    """Texts of the tokens that no text of a person's has."""
    added = (str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values())
    return {token for token in {*tokenizer.all_special_tokens, *added} if token}


def _mentions(source: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:60] + " … " + text[-60:])

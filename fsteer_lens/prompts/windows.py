"""Windows of a prompt: what a person wrote, cut into pieces that are prompts of their own.

Something that reads one activation of a prompt can be led away by what is put around a request. A piece that leaves
that out is not: the sentence by itself, or the text up to the request.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fsteer_lens.errors import InputError
from fsteer_lens.prompts.forms import Prompt, prompt_text
from fsteer_lens.prompts.tokens import Tokenisation

MOST = 16
"""Windows of a text at most."""
SENTENCES = 5
"""How many of them are sentences; a text of more has several neighbours in one."""
SHORTEST = 3
"""Words of the shortest beginning that is a window."""

WORD = re.compile(r"\S+")
SENTENCE_END = re.compile(r"(?<=[.!?…。！？])\s+|\s*\n\s*")  # noqa: RUF001 (full-width signs end sentences too)
LETTER = re.compile(r"\w")


def windows(text: str) -> list[str]:
    """The whole text, its sentences, and its beginnings that end with a word: at most `MOST` different ones.

    Sentences end at a full stop, an exclamation or a question mark with a blank after it, and at a line's end; of more
    than `SENTENCES` neighbours are joined, into so many pieces of about one number. What has no letter or digit is no
    sentence. Beginnings have at least `SHORTEST` words, and where there is no room for all of them their lengths are
    evenly spaced.
    """
    whole = text.strip()
    sentences = [piece for piece in SENTENCE_END.split(whole) if LETTER.search(piece)]
    if len(sentences) > SENTENCES:
        sentences = [" ".join(sentences[start:end]) for start, end in _even(len(sentences), SENTENCES)]
    found = list(dict.fromkeys([whole, *sentences]))
    ends = [match.end() for match in WORD.finditer(whole)][SHORTEST - 1 : -1]
    beginnings = [piece for end in ends if (piece := whole[:end]) not in found]
    room = MOST - len(found)
    if len(beginnings) > room:
        beginnings = [beginnings[end - 1] for _, end in _even(len(beginnings), room)]
    return found + beginnings


def _even(n: int, parts: int) -> list[tuple[int, int]]:
    """Where the parts of a row of n begin and end, of about one length."""
    cuts = [round(n * part / parts) for part in range(parts + 1)]
    return list(pairwise(cuts))


@dataclass(frozen=True, eq=False)
class Asked:
    """A prompt as it was given, with how it becomes tokens, and the context that stands before it; None is none."""

    prompt: Prompt
    tokenisation: Tokenisation
    context: str | None = None

    @property
    def ids(self) -> "AskedIds":
        """Token ids of the prompt, which remember it."""
        return AskedIds(self)

    def windows(self, before: str = "", after: str = "") -> list[list[int]]:
        """Token ids of the prompt itself, which comes first, and of other prompts made of windows of it.

        A chat: windows of the last user's message, in its place; earlier turns stay, what follows it goes, such as an
        answer that has begun. Plain text: windows of what stands between `before` and `after`, in its place; what
        stands after that goes.

        Raises:
            InputError: no user's message, plain text without `before` and `after`, or a prompt that does not tell what
                a person said in it: token ids, or text that the chat template was put around before.
        """
        if isinstance(self.prompt, AskedIds):
            return self.prompt.asked.windows(before, after)
        pieces = self._chat() if self.tokenisation.is_chat(self.prompt) else self._plain(before, after)
        rows = (tuple(self.tokenisation.ids(piece, self.context)) for piece in [self.prompt, *pieces])
        return [list(row) for row in dict.fromkeys(rows)]

    def _chat(self) -> list[Prompt]:
        if isinstance(self.prompt, str):
            return list(windows(self.prompt))
        turns = [dict(turn) for turn in self.prompt if isinstance(turn, Mapping)]
        asked = [place for place, turn in enumerate(turns) if turn["role"] == "user" and turn["content"].strip()]
        if not asked:
            raise InputError("a gate that scans", expected="a message of a user", got=[turn["role"] for turn in turns])
        before, last = turns[: asked[-1]], turns[asked[-1]]
        return [[*before, {**last, "content": piece}] for piece in windows(last["content"])]

    def _plain(self, before: str, after: str) -> list[Prompt]:
        told = f"the prompt {prompt_text(self.prompt)[:60]!r}"
        if not isinstance(self.prompt, str) or (not before + after and self.tokenisation.is_chat(self.prompt) is None):
            got = "text that is rendered already" if isinstance(self.prompt, str) else "token ids"
            fix = "Give it as text or as messages, with chat=True for text, or make the gate with fit_scan(format=...)."
            raise InputError(told, expected="a prompt of which a gate can scan windows", got=got, fix=fix)
        text = self.prompt
        start = text.find(before) + len(before)
        end = text.rfind(after) if after else len(text)
        if before not in text or end < start or not text[start:end].strip():
            expected, fix = f"text between {before!r} and {after!r}", "Or make the gate with another fit_scan(format=)."
            raise InputError(told, expected=expected, got="none that a gate can scan", fix=fix)
        return [text[:start] + piece + text[end : end + len(after)] for piece in windows(text[start:end])]


class AskedIds(list[int]):
    """Token ids of a prompt that remember what they were made of; a copy of them does not."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked.tokenisation.ids(asked.prompt, asked.context))
        self.asked = asked

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

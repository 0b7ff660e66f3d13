"""Exercises that check themselves, and predictions that are compared with what comes out."""

import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

Checks = Iterator[tuple[bool, str]]


@dataclass(frozen=True)
class Verdict:
    """What is said about an answer; the last line of a notebook's cell shows it.

    Attributes:
        right: None where nothing was answered yet.
        words: praise, or a hint.
    """

    right: bool | None
    words: str

    def __repr__(self) -> str:
        return f"{self._mark} {self.words}"

    def _repr_html_(self) -> str:
        colour = {True: "#2e8b57", False: "#c8641e", None: "#7f7f7f"}[self.right]
        style = f"border-left:4px solid {colour};padding:.4em .8em;margin:.3em 0"
        words = html.escape(self.words).replace("\n", "<br>")
        return f'<div style="{style}"><b>{self._mark}</b> {words}</div>'

    @property
    def _mark(self) -> str:
        return {True: "✓ Right.", False: "✗ Not yet.", None: "○ Not answered yet."}[self.right]


def exercise(check: Callable[..., Checks]) -> Callable[..., Verdict]:
    """Turn a generator of `(holds, hint)` pairs into a check that gives a `Verdict`.

    The first pair that does not hold decides: its hint is shown. Where all hold, the docstring is the praise.
    An answer that is None is not answered yet, and whatever an answer of a wrong kind raises becomes a hint, so that a
    notebook runs from top to bottom whatever was put in::

        @tutor.exercise
        def check_rank(rank):
            "From rank 8 on the two kinds of prompt are told apart."
            yield isinstance(rank, int), "A rank is a whole number."
            yield rank >= 8, "Look at the AUROC in the plot above: where does it reach 1?"
    """

    @wraps(check)
    def checked(*answers: Any) -> Verdict:
        if any(answer is None for answer in answers):
            return Verdict(None, "Put your answer in place of None, run its cell and then this one again.")
        try:
            for holds, hint in check(*answers):
                if not holds:
                    return Verdict(False, hint)
        except Exception as error:
            return Verdict(False, f"This could not be checked: {type(error).__name__}: {error}")
        return Verdict(True, " ".join((check.__doc__ or "").split()))

    return checked


def reveal(prediction: Any, outcome: Any, why: str) -> Verdict:
    """Compare what was predicted with what came out; `why` is told either way."""
    if prediction is None:
        return Verdict(None, f"It is {outcome!r}. {why}")
    if prediction == outcome:
        return Verdict(True, f"You said {outcome!r}, and so it is. {why}")
    return Verdict(False, f"You said {prediction!r}, and it is {outcome!r}. {why}")

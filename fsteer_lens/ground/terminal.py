"""The terminal that the command line and the demonstration print to.

What is printed comes from files and models too, and a terminal obeys what is in it: an escape sequence may clear the
screen, set the title or fill the clipboard. So control characters are shown, not sent.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table

COMMANDS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for tab and line break, and those that turn the direction of what follows."""


def printable(text: str, encoding: str = "utf-8") -> str:
    """A text with control characters as pictures of them, and as escapes what the encoding lacks."""
    shown = COMMANDS.sub(lambda found: _picture(ord(found.group())), text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _picture(code: int) -> str:
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"


class Terminal(Console):
    """A console that sends no control characters but its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is to be printed, piece by piece."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, self.encoding), style, control)

    def say(self, text: str, **style: Any) -> None:
        """Print a text as it stands, in lines as long as they are."""
        self.print(text, markup=False, highlight=False, soft_wrap=True, **style)

    def tabulate(self, table: Table) -> None:
        """Print a table, wider than the terminal where its numbers would be cut off otherwise."""
        needed = Measurement.get(self, self.options.update(width=10_000), table).minimum
        table.width = needed if needed > self.width else None
        self.print(table, crop=False)


@contextmanager
def warnings_said(terminal: Terminal) -> Iterator[None]:
    """Print warnings in one line each, without the line of code that they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: terminal.say(f"warning: {message}", style="yellow")
        yield

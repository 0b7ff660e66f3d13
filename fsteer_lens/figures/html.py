"""Plain HTML views: inline style only, so that they survive an untrusted notebook, and every text escaped."""

import html
from dataclasses import dataclass
from typing import Final

from fsteer_lens.errors import InputError
from fsteer_lens.figures.style import FONT

MUTED: Final = "opacity:.7"
MONO: Final = "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"

POLICY: Final = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline';"
    " style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'\">"
)
"""In the head of every page that is written: it holds all it needs, and what got into it asks for nothing outside."""


@dataclass(frozen=True)
class Html:
    """A piece of HTML that notebooks show and `str` gives.

    Attributes:
        body: the markup; whoever makes one has escaped the text in it.
    """

    body: str

    def __repr__(self) -> str:
        return f"Html({len(self.body)} characters)"

    def __str__(self) -> str:
        return self.body

    def _repr_html_(self) -> str:
        return self.body


def escape(text: str) -> str:
    """Text as HTML, in an element or in a quoted attribute; unpaired surrogates become U+FFFD."""
    if not isinstance(text, str):
        raise InputError("a text of a view", expected="text", got=type(text).__name__)
    return html.escape(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", ""))


def visible(token: str) -> str:
    """A token with its white space shown: newline as ⏎ (and a line break), tab as ⇥, nothing at all as ·."""
    shown = escape(token.replace("\r\n", "\n")).replace("\t", "⇥").replace("\r", "␍")
    return shown.replace("\n", "⏎<wbr>") or "<span style='opacity:.5'>·</span>"


def span(text: str, style: str = "", title: str = "") -> str:
    """A token's element; `text` is markup, `title` is plain text shown on hover."""
    attributes = (f' style="{style}"' if style else "") + (
        f' title="{escape(title).replace(chr(10), "&#10;")}"' if title else ""
    )
    return f"<span{attributes}>{text}</span>"


def block(parts: list[str], style: str = "") -> str:
    """A block in the reader's own text colour."""
    return f'<div style="font-family:{FONT};line-height:1.5;{style}">{"".join(parts)}</div>'


def legend_line(parts: list[str]) -> str:
    """Pieces of markup in a line below a view."""
    items = "".join(f"<span style='display:inline-block;margin-right:1.6em'>{part}</span>" for part in parts)
    return f"<div style='font-size:12px;margin-top:6px'>{items}</div>"

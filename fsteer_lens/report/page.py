"""A report of one HTML file that opens without network."""

import base64
import html
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fsteer_lens.errors import InputError
from fsteer_lens.figures import Html
from fsteer_lens.figures.html import POLICY, escape
from fsteer_lens.figures.style import CONFIG
from fsteer_lens.ground.checks import brief, choice, instance, several, switch, whole
from fsteer_lens.ground.files import write_atomically

if TYPE_CHECKING:
    import plotly.graph_objects

_MARKED = ' class="marked"'


class Report:
    """A page of texts, tables and figures, written as one file that needs no network.

    Every `add_...` returns the report, so that calls chain. Text is text: it is escaped, never read as markup.

    >>> page = Report("Steering").add_text("What it did.").add_table(["method", "kept"], [["none", "0.99"]])
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []
        self._has_plot = False

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {len(self._parts)} parts)"

    def add_heading(self, text: str, level: int = 2) -> "Report":
        """Add a heading of level 2 (a chapter) or 3 (a section)."""
        level = choice("heading level", level, (2, 3))
        return self._add(f"<h{level}>{escape(text)}</h{level}>")

    def add_text(self, text: str) -> "Report":
        """Add text; an empty line begins a new paragraph."""
        parts = _text("text", text).split("\n\n")
        return self._add("".join(f"<p>{escape(part.strip())}</p>" for part in parts if part.strip()))

    def add_table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        marked: Sequence[int] = (),
        words: bool = False,
        folded: str = "",
        about: str = "",
    ) -> "Report":
        """Add a table; what follows a line break in a cell is set small below it.

        Args:
            columns: headings, the first one of the row names.
            rows: cells, a row name first.
            marked: numbers of the rows to bring out.
            words: cells hold words, not numbers.
            folded: fold the table away under this line.
            about: text above the table, which is folded away with it.

        Raises:
            InputError: a row with another number of cells than there are columns, or no lists of text.
        """
        columns = several("columns", columns, "a list of headings")
        rows = [several("table row", row, "a list of cells") for row in several("rows", rows, "a list of rows")]
        marked = [whole("marked", number) for number in several("marked", marked, "numbers of rows")]
        words, folded, about = switch("words", words), _text("folded", folded), _text("about", about)
        for row in rows:
            if len(row) != len(columns):
                raise InputError("table row", expected=f"{len(columns)} cells", got=list(row))
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
        body = "".join(
            f"<tr{_MARKED if index in marked else ''}>{''.join(map(_cell, row))}</tr>" for index, row in enumerate(rows)
        )
        kind = "data words" if words else "data"
        table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        above = f"<p>{escape(about)}</p>" if about else ""
        table = f'{above}<div class="wide">{table}</div>'  # a table scrolls in itself
        return self._add(f"<details><summary>{escape(folded)}</summary>{table}</details>" if folded else table)

    def add_figure(self, figure: "plotly.graph_objects.Figure | Html", caption: str = "") -> "Report":
        """Add a figure with its explanation above it."""
        caption = _text("caption", caption)
        if not isinstance(figure, Html) and not hasattr(figure, "to_html"):
            raise InputError("figure", expected="a figure of plotly, or a view of fsteer_lens", got=brief(figure))
        if isinstance(figure, Html):
            drawn, kind = figure.body, "view"
        else:
            drawn = figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)
            kind = "plot"
            self._has_plot = True
            named = f"{figure.layout.title.text or ''} {caption}".strip()  # plotly's text is markup already
            drawn = f'<div role="group" aria-label="{escape(html.unescape(named))}">{drawn}</div>'
        above = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        return self._add(f'<figure class="{kind}">{above}{drawn}</figure>')

    def add_download(self, text: str, name: str, data: bytes) -> "Report":
        """Add a file that the page carries inside, to be saved under `name`, with a line of text before it."""
        instance("data", data, bytes, "bytes")
        inside = base64.b64encode(data).decode()
        link = f'<a download="{escape(name)}" href="data:application/octet-stream;base64,{inside}">{escape(name)}</a>'
        return self._add(f"<p>{escape(text)} {link} ({len(data) / 1024:,.0f} KB)</p>")

    def html(self) -> str:
        """The page; plotly is inside once, where a figure needs it."""
        script = ""
        if self._has_plot:
            from plotly.offline import get_plotlyjs

            script = "<script>" + get_plotlyjs().replace("</script", r"<\/script") + "</script>"
        style = files("fsteer_lens.report").joinpath("page.css").read_text(encoding="utf-8")
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{POLICY}<title>{escape(self.title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<style>{style}</style>{script}</head>\n<body><main><h1>{escape(self.title)}</h1>\n"
            + "\n".join(self._parts)
            + "\n</main></body></html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, atomically; returns its path.

        Raises:
            InputError: the folder does not exist.
        """
        write_atomically(path, self.html().encode())
        return Path(path)

    def _add(self, part: str) -> "Report":
        self._parts.append(part)
        return self


def _text(name: str, value: object) -> str:
    return instance(name, value, str, "text")


def _cell(text: str) -> str:
    first, _, rest = text.partition("\n")
    return f"<td>{escape(first)}{f'<small>{escape(rest)}</small>' if rest else ''}</td>"

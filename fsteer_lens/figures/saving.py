"""Writing a figure to a file."""

import copy
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fsteer_lens.errors import InputError, MissingDependencyError
from fsteer_lens.figures.html import POLICY, Html, escape
from fsteer_lens.figures.printing import printed
from fsteer_lens.figures.style import CONFIG, INK
from fsteer_lens.ground.checks import brief
from fsteer_lens.ground.files import path_of, write_atomically

if TYPE_CHECKING:
    import plotly.graph_objects

PICTURES = (".pdf", ".png", ".svg")
SCHEMES = ("light dark", "light")
"""Of a page to be read, and of one for paper."""


def save(figure: "plotly.graph_objects.Figure | Html", path: str | os.PathLike[str]) -> None:
    """Write a figure; what is written follows from the ending of `path`, atomically.

    - `.html`: a page that needs no network (5 MB with plotly inside, a few KB for an `Html` view).
    - `.json`: a plotly figure's data and layout, as plotly reads it.
    - `.pdf`, `.png`, `.svg`: a picture on white, through kaleido, which needs Chrome or Chromium. The SVG of an `Html`
      view is for browsers.

    Raises:
        InputError: another ending, an `Html` view as `.json`, or a folder that does not exist.
        MissingDependencyError: a picture without kaleido.
    """
    target = path_of(path)
    if not isinstance(figure, Html) and not hasattr(figure, "to_html"):
        raise InputError("figure", expected="a figure of plotly, or an Html view", got=brief(figure))
    kind = target.suffix.lower()
    allowed = (".html", *PICTURES) if isinstance(figure, Html) else (".html", ".json", *PICTURES)
    if kind not in allowed:
        raise InputError(f"cannot write {target}", expected=f"an ending among {', '.join(allowed)}", got=repr(kind))
    if kind in PICTURES:
        data = _picture(figure, target.stem, kind[1:])
    elif isinstance(figure, Html):
        data = _page(figure.body, target.stem)
    elif kind == ".html":
        data = _page(figure.to_html(full_html=False, include_plotlyjs=True, config=CONFIG), target.stem)
    else:
        data = figure.to_json()
    write_atomically(target, data if isinstance(data, bytes) else str(data).encode())


def _picture(figure: "plotly.graph_objects.Figure | Html", title: str, kind: str) -> bytes:
    """A figure as it is on white paper."""
    if find_spec("kaleido") is None:
        raise MissingDependencyError(
            f"a .{kind} picture needs kaleido",
            fix='pip install "fsteer-lens[paper]", and have Chrome or Chromium; or save .html.',
        )
    if isinstance(figure, Html):
        return printed(_page(figure.body, title, paper=True), kind)
    on_paper = copy.deepcopy(figure).update_layout(font_color=INK)
    return bytes(on_paper.to_image(format=kind, scale=2))


def _page(body: str, title: str, *, paper: bool = False) -> str:
    colours = f"background:#fff;color:{INK}" if paper else "background:Canvas;color:CanvasText"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{POLICY}<title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="{SCHEMES[paper]}">'
        f'</head><body style="{colours}"><main>{body}</main></body></html>'
    )

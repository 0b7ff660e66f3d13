"""Writing a figure to a file."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fsteer_lens.errors import InputError, MissingDependencyError
from fsteer_lens.figures.html import Html, escape
from fsteer_lens.figures.style import CONFIG
from fsteer_lens.ground.files import write_atomically

if TYPE_CHECKING:
    import plotly.graph_objects

PICTURES = (".pdf", ".png", ".svg")


def save(figure: "plotly.graph_objects.Figure | Html", path: str | os.PathLike[str]) -> None:
    """Write a figure; what is written follows from the ending of `path`, atomically.

    - `.html`: a page that needs no network (5 MB with plotly inside, a few KB for an `Html` view).
    - `.json`: the figure's data and layout, as plotly reads it.
    - `.pdf`, `.png`, `.svg`: a picture, through kaleido, which needs Chrome or Chromium.

    Raises:
        InputError: another ending, an `Html` view as anything but `.html`, or a folder that does not exist.
        MissingDependencyError: a picture without kaleido.
    """
    target = Path(path)
    kind = target.suffix.lower()
    allowed = (".html",) if isinstance(figure, Html) else (".html", ".json", *PICTURES)
    if kind not in allowed:
        raise InputError(f"cannot write {target}", expected=f"an ending among {', '.join(allowed)}", got=repr(kind))
    if isinstance(figure, Html):
        data = _page(figure.body, target.stem)
    elif kind == ".html":
        data = _page(figure.to_html(full_html=False, include_plotlyjs=True, config=CONFIG), target.stem)
    elif kind == ".json":
        data = figure.to_json()
    else:
        if find_spec("kaleido") is None:
            raise MissingDependencyError(
                f"a {kind} picture needs kaleido",
                fix='pip install "fsteer-lens[paper]", and have Chrome or Chromium; or save .html.',
            )
        data = bytes(figure.to_image(format=kind[1:], scale=2))
    write_atomically(target, data if isinstance(data, bytes) else str(data).encode())


def _page(body: str, title: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f'</head><body style="background:Canvas;color:CanvasText"><main>{body}</main></body></html>'
    )

"""The widget: the explorer's page module with the values that kernel and browser share."""

from functools import cache
from importlib.resources import files
from typing import Any

PARTS = ("numbers.js", "pictures.js", "widget.js")
"""Joined into one module: anywidget takes one, and a module that is text cannot import its neighbours."""


def module_text() -> str:
    """The page's ECMAScript module."""
    return "\n".join(_text(name) for name in PARTS)


def style_text() -> str:
    """The page's style sheet."""
    return _text("widget.css")


def make_widget(**values: Any) -> Any | None:
    """A widget with these values, or None where anywidget is not installed.

    Args:
        values: `data`, what does not change (see `Pictured.message`); `settings`, set by both sides; `answer`, the
            latest texts; `words`, the reader's own prompt in parts.
    """
    try:
        import anywidget  # noqa: F401
    except ImportError:
        return None
    return _widget_class()(**values)


@cache
def _widget_class() -> Any:
    """The class, made when it is first needed: anywidget has its users subclass it."""
    import anywidget
    import traitlets

    class ExplorerWidget(anywidget.AnyWidget):
        """What kernel and browser share."""

        _esm = module_text()
        _css = style_text()
        data = traitlets.Dict().tag(sync=True)
        settings = traitlets.Dict().tag(sync=True)
        answer = traitlets.Dict().tag(sync=True)
        words = traitlets.Dict().tag(sync=True)

        def __repr__(self) -> str:  # what a viewer without widgets shows
            return "ExplorerWidget()"

    return ExplorerWidget


def _text(name: str) -> str:
    return files("fsteer_lens.explorer").joinpath(name).read_text(encoding="utf-8")

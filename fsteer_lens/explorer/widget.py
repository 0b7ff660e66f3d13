"""The widgets: a page module of each with the values that kernel and browser share."""

from functools import cache
from importlib.resources import files
from types import new_class
from typing import Any, Final, NamedTuple

from fsteer_lens.errors import FsteerError


class Kind(NamedTuple):
    """One of the widgets.

    Attributes:
        name: of its class.
        scripts: files, joined into one module: anywidget takes one, and a module that is text cannot import its
            neighbours.
        style: the file of its style sheet.
        shared: names of the mappings that kernel and browser share.
        texts: names of the texts.
    """

    name: str
    scripts: tuple[str, ...]
    style: str
    shared: tuple[str, ...]
    texts: tuple[str, ...] = ()


EXPLORER: Final = Kind(
    "ExplorerWidget",
    ("numbers.js", "pictures.js", "widget.js"),
    "widget.css",
    ("data", "settings", "answer", "words"),
)
"""`data`, what does not change (see `Pictured.message`); `settings`, set by both sides; `answer`, the latest texts;
`words`, the reader's own prompt in parts."""
WATCH: Final = Kind("WatchWidget", ("watch.js",), "watch.css", ("start", "live"), ("view",))
"""`start`, where the controls stand; `live`, the text while it comes; `view`, the markup of the latest replay."""


def make_widget(kind: Kind, **values: Any) -> Any | None:
    """A widget with these values, or None where anywidget is not installed."""
    try:
        import anywidget  # noqa: F401
    except ImportError:
        return None
    return _widget_class(kind)(**values)


def tell(widget: Any | None, **values: Any) -> None:
    """Set values of a widget, where there is one."""
    if widget is not None:
        for name, value in values.items():
            setattr(widget, name, value)


def in_words(error: BaseException) -> str:
    """What a widget says of an error: the package's own say what to do themselves."""
    return str(error) if isinstance(error, FsteerError) else f"{type(error).__name__}: {error}"


@cache
def _widget_class(kind: Kind) -> Any:
    """The class, made when it is first needed: anywidget has its users subclass it."""
    import anywidget
    import traitlets

    body = {
        "__doc__": "What kernel and browser share.",
        "__repr__": lambda self: f"{kind.name}()",  # what a viewer without widgets shows
        "_esm": "\n".join(map(_text, kind.scripts)),
        "_css": _text(kind.style),
        **{name: traitlets.Dict().tag(sync=True) for name in kind.shared},
        **{name: traitlets.Unicode().tag(sync=True) for name in kind.texts},
    }
    return new_class(kind.name, (anywidget.AnyWidget,), exec_body=lambda namespace: namespace.update(body))


def _text(name: str) -> str:
    return files("fsteer_lens.explorer").joinpath(name).read_text(encoding="utf-8")

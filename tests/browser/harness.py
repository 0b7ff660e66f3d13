"""The explorer's widget on a page of its own, without a kernel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from live_widget import live_widget

from fsteer_lens.explorer import Explorer, Watch
from tests.browser.chromium import launched

PAGE = """<!doctype html><meta charset="utf-8"><title>page</title><style>
body{margin:12px;background:#fff;color:#222}
@media (prefers-color-scheme: dark){body{background:#121316;color:#e6e6e6}}
</style>"""


def page_of(explorer: Explorer | Watch) -> str:
    """The page that shows its widget, without a kernel; `window.shown` is what a test looks into."""
    from ipywidgets.embed import dependency_state

    widget = explorer.widget
    assert widget is not None
    return PAGE + live_widget(
        dependency_state(widget, drop_defaults=False)[widget.model_id], "el", then="window.shown = shown;"
    )


@contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium, or a skipped test where that or anywidget is missing."""
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    with launched() as started:
        yield started

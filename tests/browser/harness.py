"""The explorer's module on a page of its own, with a stand-in for anywidget's model."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fsteer_lens.explorer import Explorer
from fsteer_lens.explorer.widget import module_text, style_text
from tests.browser.chromium import launched

PAGE = """<!doctype html><meta charset="utf-8"><title>page</title><style>
body{margin:12px;background:#fff;color:#222}
@media (prefers-color-scheme: dark){body{background:#121316;color:#e6e6e6}}
STYLE</style><div id="el"></div><script type="module">
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const values = JSON.parse(VALUES);
for (const name of ["ratios", "opened", "logits"]) values.data[name] = bytes(values.data[name]);
const listeners = {};
window.sent = [];
window.saved = 0;
window.model = {
  get: (name) => values[name],
  set(name, value) {
    values[name] = value;
    (listeners[`change:${name}`] ?? []).forEach((one) => one());
  },
  on: (event, one) => (listeners[event] ??= []).push(one),
  off: (event, one) => (listeners[event] = (listeners[event] ?? []).filter((other) => other !== one)),
  save_changes: () => (window.saved += 1),
  send: (message) => window.sent.push(message),
};
const source = new Blob([MODULE], { type: "text/javascript" });
const { default: widget } = await import(URL.createObjectURL(source));
window.close_widget = widget.render({ model: window.model, el: document.getElementById("el") });
window.ready = true;
</script>"""


def page_of(explorer: Explorer) -> str:
    """The page that shows an explorer's widget, without a kernel."""

    def script(value: str) -> str:
        return json.dumps(value).replace("<", "\\u003c")

    def coded(value: Any) -> str:
        return base64.b64encode(value).decode()

    widget = explorer.widget
    assert widget is not None
    values = {name: getattr(widget, name) for name in ("data", "settings", "answer", "words")}
    told = script(json.dumps(values, default=coded))
    page = PAGE.replace("STYLE", style_text())
    return page.replace("VALUES", told).replace("MODULE", script(module_text()))


@contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium, or a skipped test where that or anywidget is missing."""
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    with launched() as started:
        yield started

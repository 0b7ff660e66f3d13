"""What a notebook stores of a figure or a widget, and a widget on a page of its own, without a kernel.

Its module runs on what was stored of it. Sliders and pictures work; what a kernel would have to answer, such as a text
to be generated, does not come.
"""

import json
from pathlib import Path
from typing import Any

PLOTLY = "application/vnd.plotly.v1+json"
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
SCRIPT = (Path(__file__).parent / "live_widget.js").read_text(encoding="utf-8")


def stored_widget(notebook: Any, model_id: str) -> dict[str, Any]:
    """One widget's state and buffers.

    Raises:
        ValueError: the notebook was stored without them.
    """
    states = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    if model_id not in states:
        raise ValueError("a widget was stored without its state: run `make notebook-outputs`")
    return states[model_id]


def as_script(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value).replace("<", "\\u003c")


def live_widget(stored: dict[str, Any], name: str, then: str = "") -> str:
    """HTML that shows a widget.

    Args:
        stored: one model of a notebook's widget state: `state` and `buffers`.
        name: of the element that it is put into.
        then: JavaScript to run once `shown` is there: its model, the messages it sent, and how to close it.
    """
    told = as_script({"state": stored["state"], "buffers": stored.get("buffers", [])})
    return (
        f'<div id="{name}"></div><script type="module">{SCRIPT}'
        f'const shown = await show(document.getElementById("{name}"), {told});{then}</script>'
    )

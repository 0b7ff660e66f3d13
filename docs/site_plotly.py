"""Plotly's script on the pages that have a figure, from the installed package and not from elsewhere."""

from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

SCRIPT = "plotly.min.js"


def write(app: Any, error: Exception | None) -> None:
    """Put the script beside the pages."""
    if error is None and app.builder.format == "html":
        (Path(app.outdir) / "_static" / SCRIPT).write_text(get_plotlyjs(), encoding="utf-8")


def load(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Ask for it on the pages that draw a figure."""
    if "Plotly.newPlot" in context.get("body", ""):
        app.add_js_file(SCRIPT)


def setup(app: Any) -> dict[str, bool]:
    """Listen to the build."""
    app.connect("html-page-context", load)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

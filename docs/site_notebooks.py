"""Notebooks as pages: stored figures and widgets become live ones, and links lead to pages instead of files."""

import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
from live_widget import PLOTLY, VIEW, as_script, live_widget, stored_widget


def live_figure(figure: dict[str, Any], name: str) -> str:
    """A stored plotly figure as HTML that draws it."""
    height = figure.get("layout", {}).get("height", 450)
    return (
        f'<div id="{name}" class="plotly-figure" style="min-height:{height}px"></div>'
        f'<script>document.addEventListener("DOMContentLoaded", () => {{const figure = {as_script(figure)};'
        f'Plotly.newPlot("{name}", figure.data, figure.layout, {{...figure.config, responsive: true}});}})</script>'
    )


def as_page(notebook: Any, name: str) -> Any:
    """The notebook as Sphinx is to read it."""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(\]\()\.\./docs/", r"\1../", cell.source)
        for place, output in enumerate(cell.get("outputs", [])):
            shown, element = output.get("data", {}), f"{name}-{number}-{place}"
            if PLOTLY in shown:
                output.data = {"text/html": live_figure(shown[PLOTLY], element)}
            elif VIEW in shown:
                output.data = {"text/html": live_widget(stored_widget(notebook, shown[VIEW]["model_id"]), element)}
    notebook.metadata.pop("widgets", None)
    return notebook


def copy_notebooks(app: Any, config: Any) -> None:
    """Write every notebook's page into a folder of its own, which is emptied first."""
    target = Path(app.srcdir) / "notebooks"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in sorted((Path(app.srcdir).parent / "notebooks").glob("*.ipynb")):
        notebook = as_page(nbformat.read(path, as_version=4), path.stem.replace("_", "-"))
        nbformat.write(notebook, target / path.name)


def link_to_copies(app: Any, page: str, source: list[str]) -> None:
    """Lead links to the notebooks, which in the repository lie beside docs/, to those pages."""
    source[0] = re.sub(r"(\]\((?:\.\./)*)\.\./notebooks/", r"\1notebooks/", source[0])


def setup(app: Any) -> dict[str, bool]:
    """Listen to the build."""
    app.connect("config-inited", copy_notebooks)
    app.connect("source-read", link_to_copies)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

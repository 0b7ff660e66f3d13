"""Run notebooks from the first cell to the last and store their outputs: `make notebook-outputs`, all or those named.

A stored plotly figure or widget is blank where no script runs (on a code host, in a mail), so each gets a picture
beside it, drawn in headless Chromium without network.
"""

import base64
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from live_widget import PLOTLY, VIEW, live_widget, stored_widget
from nbclient import NotebookClient
from plotly.graph_objects import Figure
from shooting import chromium, html_of, shoot

STATE = "application/vnd.jupyter.widget-state+json"
BARS = ("OutputModel", "HBoxModel")  # rich's and tqdm's
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def picture(browser: Any, notebook: Any, data: Any) -> str | None:
    """A PNG, base64, of an output that needs a script; None for any other."""
    if PLOTLY in data:
        figure = Figure(data=data[PLOTLY]["data"], layout=data[PLOTLY].get("layout"))
        png = shoot(browser, html_of(figure), scale=1)
    elif VIEW in data:
        body = live_widget(stored_widget(notebook, data[VIEW]["model_id"]), "widget")
        png = shoot(browser, body, scale=1, until=".fsteer-explorer .count")
    else:
        return None
    return base64.b64encode(png).decode()


def is_progress(notebook: Any, data: Any) -> bool:
    """Whether an output is a progress bar that was there for a while."""
    states = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    return VIEW in data and states.get(data[VIEW]["model_id"], {}).get("model_name") in BARS


def store(path: Path, browser: Any) -> None:
    """Run one notebook and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", coalesce_streams=True, resources=folder).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not is_progress(notebook, output.get("data", {}))]
        for output in cell.get("outputs", []):
            if (png := picture(browser, notebook, output.get("data", {}))) is not None:
                output.data["image/png"] = png
    widgets = notebook.metadata.get("widgets")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        **({"widgets": widgets} if widgets else {}),
    }
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # for the kernels
    with chromium() as started:
        for name in sys.argv[1:] or sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")):
            store(NOTEBOOKS / name, started)

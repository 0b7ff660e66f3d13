"""Run notebooks from the first cell to the last and store their outputs: `make notebook-outputs`, all or those named.

A stored plotly figure is blank where no script runs (on a code host, in a mail), so each gets a picture beside it,
drawn in headless Chromium without network.
"""

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from playwright.sync_api import Browser, sync_playwright
from plotly.offline import get_plotlyjs

from fsteer_lens.cli import find_browser

HERE = Path(__file__).parent
PLOTLY = "application/vnd.plotly.v1+json"
WIDTH = 1000


def picture(browser: Browser, figure: dict[str, Any]) -> str:
    """A PNG of a plotly figure on white, base64."""
    height = figure.get("layout", {}).get("height", 450)
    page = browser.new_page(viewport={"width": WIDTH, "height": height})
    page.set_content(
        f"<body style='margin:0;background:white'><div id='figure'></div><script>{get_plotlyjs()}</script>"
    )
    shown = {**figure, "layout": {**figure.get("layout", {}), "width": WIDTH}, "config": {"displayModeBar": False}}
    page.evaluate("figure => Plotly.newPlot('figure', figure)", json.loads(json.dumps(shown)))
    data = page.screenshot()
    page.close()
    return base64.b64encode(data).decode()


def store(path: Path, browser: Browser) -> None:
    """Run one notebook and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if PLOTLY in output.get("data", {}):
                output.data["image/png"] = picture(browser, output.data[PLOTLY])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    executable = find_browser()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for name in sys.argv[1:] or sorted(path.name for path in HERE.glob("*.ipynb")):
            store(HERE / name, chromium)
        chromium.close()

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
from nbclient import NotebookClient
from playwright.sync_api import Browser, sync_playwright
from plotly.offline import get_plotlyjs

from fsteer_lens.cli import find_browser

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from docs.live_widget import STATE, VIEW, as_script, live_widget  # noqa: E402

PLOTLY = "application/vnd.plotly.v1+json"
WIDTH = 1000


def picture(browser: Browser, body: str, height: int) -> str:
    """A PNG of a page on white, base64."""
    page = browser.new_page(viewport={"width": WIDTH, "height": height})
    page.set_content(f"<body style='margin:0;background:white'>{body}")
    page.wait_for_timeout(500)
    data = page.screenshot()
    page.close()
    return base64.b64encode(data).decode()


def figure_page(figure: dict[str, Any]) -> str:
    """A plotly figure, in the width of the picture."""
    layout = {**figure.get("layout", {}), "width": WIDTH}
    told = as_script({**figure, "layout": layout, "config": {"displayModeBar": False}})
    return f"<div id='figure'></div><script>{get_plotlyjs()}</script><script>Plotly.newPlot('figure', {told})</script>"


def store(path: Path, browser: Browser) -> None:
    """Run one notebook and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(HERE)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", coalesce_streams=True, resources=folder).execute()
    widgets = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if PLOTLY in data:
                figure = data[PLOTLY]
                data["image/png"] = picture(browser, figure_page(figure), figure.get("layout", {}).get("height", 450))
            elif VIEW in data:
                data["image/png"] = picture(browser, live_widget(widgets[data[VIEW]["model_id"]], "widget"), 640)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        **({"widgets": notebook.metadata.widgets} if widgets else {}),
    }
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    executable = find_browser()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        for name in sys.argv[1:] or sorted(path.name for path in HERE.glob("*.ipynb")):
            store(HERE / name, chromium)
        chromium.close()

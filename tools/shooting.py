"""Pictures of figures, taken in headless Chromium without network."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright
from plotly.offline import get_plotlyjs

from fsteer_lens.cli import find_browser

STYLE = "body{margin:20px;background:white;color:#222;font-family:sans-serif}"


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser for the length of a block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        )
        yield browser
        browser.close()


def html_of(figure: Any) -> str:
    """A figure, of plotly or of plain HTML, as a piece of a page that has plotly."""
    if hasattr(figure, "to_html"):
        return figure.to_html(include_plotlyjs=False, full_html=False, config={"displayModeBar": False})
    return str(figure)


def shoot(
    browser: Browser, body: str, path: Path | None = None, *, width: int = 1000, scale: float = 1.5, until: str = ""
) -> bytes:
    """A picture of a piece of HTML on white, as PNG; also written to `path` if there is one.

    Args:
        until: CSS selector of what must be there; a figure of plotly is waited for without it.

    Raises:
        RuntimeError: a script of the piece failed.
    """
    page = browser.new_page(viewport={"width": width, "height": 100}, device_scale_factor=scale)
    page.set_default_timeout(120_000)  # a busy machine takes its time
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.context.set_offline(True)
    script = f"<script>{get_plotlyjs()}</script>" if "plotly-graph-div" in body else ""
    page.set_content(f"<!doctype html><style>{STYLE}</style>{script}{body}")
    if until or script:
        page.wait_for_selector(until or ".js-plotly-plot .main-svg")
    page.wait_for_timeout(300)
    data = page.screenshot(path=path, full_page=True)
    page.close()
    if errors:
        raise RuntimeError(f"the page to be pictured failed: {errors}")
    return data

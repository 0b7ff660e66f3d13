"""Chromium without network, and everything that a page says and asks for."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fsteer_lens.cli import find_browser

QUIET = [
    f"--{option}"
    for option in (
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
]
"""A browser that asks for nothing of its own."""


@dataclass
class Heard:
    """What a page did beside drawing: console errors, uncaught errors, dialogs, and what it asked for."""

    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def outside(self) -> list[str]:
        """What was asked for that is neither a file nor a part of the page."""
        return [url for url in self.requests if not url.startswith(("file:///", "data:", "blob:"))]

    def listen(self, page: Any) -> None:
        def dismissed(dialog: Any) -> None:
            self.errors.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", dismissed)
        page.on("request", lambda request: self.requests.append(request.url))


@contextmanager
def launched() -> Iterator[Any]:
    """A headless Chromium; skips the test where there is no browser or no playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium or Chrome on the path")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=QUIET)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, path: Path, color_scheme: str = "light", **options: Any) -> Iterator[tuple[Any, Heard]]:
    """A page from a file, offline, with what it said."""
    context = browser.new_context(offline=True, color_scheme=color_scheme, **options)
    heard = Heard()
    try:
        page = context.new_page()
        heard.listen(page)
        page.goto(path.as_uri())
        yield page, heard
    finally:
        context.close()


def until(page: Any, condition: str, seconds: float = 30) -> None:
    """Wait until a condition holds; playwright's own way has the page evaluate text, which its policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"not after {seconds} s: {condition}"
        page.wait_for_timeout(50)

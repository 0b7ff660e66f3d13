"""The gallery's code runs, its page says what its script says, and all its figures render, light and dark."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from fsteer_lens import figures
from tests.browser.chromium import launched, opened, until

DOCS = Path(__file__).parents[2] / "docs"
TOOLS = DOCS.parent / "tools"


@pytest.fixture(scope="module")
def gallery() -> Any:
    pytest.importorskip("playwright.sync_api", reason="the gallery's script needs playwright")
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location("gallery", TOOLS / "gallery.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(TOOLS))


def test_the_page_is_what_its_script_writes(gallery: Any) -> None:
    assert (DOCS / "gallery.md").read_text(encoding="utf-8") == gallery.page()
    names = [entry.name for entry in gallery.ENTRIES]
    assert len(set(names)) == len(names)
    drawing = {name for name in figures.__all__ if name.islower()} - {"save", "circuitsvis_bundle"}
    assert set(names) == drawing
    for name in names:
        picture = DOCS / "images" / "gallery" / f"{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000


def test_every_figure_of_the_tutor_renders_without_a_word(gallery: Any, tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(gallery.SETUP, names)
    drawn = {entry.name: gallery.html_of(gallery.drawn(entry, names)) for entry in gallery.ENTRIES}
    path = tmp_path / "gallery.html"
    parts = "".join(f'<section id="{name}">{body}</section>' for name, body in drawn.items())
    head = '<meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    path.write_text(f"<!doctype html>{head}<script>{get_plotlyjs()}</script>{parts}", encoding="utf-8")
    n_plots = parts.count("plotly-graph-div")
    assert n_plots == 13
    with launched() as browser:
        for scheme in ("light", "dark"):
            with opened(browser, path, scheme, viewport={"width": 1100, "height": 900}) as (page, heard):
                until(page, f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {n_plots}")
                page.wait_for_timeout(300)
                for name in drawn:
                    box = page.locator(f"#{name}").bounding_box()
                    assert box["height"] > 30 and box["width"] > 500, name
                assert page.evaluate("document.documentElement.scrollWidth") <= 1100
                colour = page.locator("#steer_compare span").first.evaluate("e => getComputedStyle(e).color")
                assert colour == {"light": "rgb(0, 0, 0)", "dark": "rgb(255, 255, 255)"}[scheme]
                assert heard.errors == []
                assert heard.outside == []

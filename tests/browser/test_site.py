"""The docs site: it builds without a warning, its links lead somewhere, and a reader's browser asks nobody else."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from live_widget import PLOTLY

from tests.browser.chromium import launched, opened

pytest.importorskip("sphinx", reason="Sphinx is not installed")

ROOT = Path(__file__).parents[2]
DRAWN = """number => {
  const figures = [...document.querySelectorAll(".plotly-figure")];
  return figures.length === number && figures.every((one) => one.querySelector(".main-svg"));
}"""


class Page(HTMLParser):
    """What a page leads to, what it loads, and the places on it that a link can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.places |= {told[name] for name in ("id", "name") if name in told}
        if tag == "a" and "href" in told:
            self.links.append(told["href"])
        elif tag == "link" and "href" in told:
            self.loaded.append(told["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in told:
            self.loaded.append(told["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, from a copy: the build writes beside its sources."""
    copy = tmp_path_factory.mktemp("site")
    for name in ("docs", "notebooks", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "CHANGELOG.md", copy)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^docs:.*\n\t\$\(BIN\)/sphinx-build (.*) docs build/site$", makefile, re.MULTILINE)
    assert recipe is not None and "-W" in recipe[1].split()
    command = [sys.executable, "-m", "sphinx", *recipe[1].split(), "docs", "build/site"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return copy / "build" / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_there(site: Path, pages: dict[Path, Page]) -> None:
    docs = ROOT / "docs"
    written = [path.relative_to(docs) for path in docs.rglob("*.md")]
    written += [Path("notebooks") / path.name for path in (ROOT / "notebooks").glob("*.ipynb")]
    for path in written:
        assert site / path.with_suffix(".html") in pages


def test_links_lead_to_pages_and_to_places_on_them(site: Path, pages: dict[Path, Page]) -> None:
    dead = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            told = urlsplit(link)
            if told.scheme or told.netloc:
                continue
            there = (path.parent / unquote(told.path)).resolve() if told.path else path
            if not there.exists() or (
                told.fragment and there in pages and unquote(told.fragment) not in pages[there].places
            ):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == []


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        told = {one: urlsplit(one) for one in page.loaded}
        outside = [one for one, parts in told.items() if parts.netloc or parts.scheme not in ("", "data")]
        assert outside == [], path.name


def stored_figures(notebook: Path) -> int:
    """How many plotly figures a notebook holds."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return sum(PLOTLY in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


def test_pages_open_without_network_or_a_word_of_complaint(site: Path, pages: dict[Path, Page]) -> None:
    """Light and dark; every stored figure of a notebook is drawn."""
    notebooks = (ROOT / "notebooks").glob("*.ipynb")
    figures = {site / "notebooks" / f"{one.stem}.html": stored_figures(one) for one in notebooks}
    assert sum(figures.values()) > 20
    options = {"viewport": {"width": 1300, "height": 900}}
    with launched() as chromium, opened(chromium, site / "index.html", **options) as (page, heard):
        for path in pages:
            page.goto(path.as_uri())
            page.wait_for_function(DRAWN, arg=figures.get(path, 0))
            assert page.evaluate("document.documentElement.scrollWidth") <= 1300, path.name
            inks = []
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                inks.append(page.evaluate("getComputedStyle(document.body).color"))
            assert inks[0] != inks[1], path.name
            assert heard.errors == [], path.name
        assert heard.outside == []


def test_the_explorer_works_on_its_page(site: Path) -> None:
    path = site / "notebooks" / "05_rank_live.html"
    with launched() as chromium, opened(chromium, path, viewport={"width": 1500, "height": 900}) as (page, heard):
        page.wait_for_selector(".fsteer-explorer .count")
        before = page.locator(".count").all_text_contents()
        page.locator(".slider.rank input").fill("1")
        assert page.locator(".slider.rank output").text_content() == "1 of 64"
        assert page.locator(".count").all_text_contents() != before
        assert heard.errors == []


def test_a_solution_is_folded_and_opens(site: Path) -> None:
    with launched() as chromium, opened(chromium, site / "notebooks" / "02_when_to_steer.html") as (page, _):
        solution = page.locator("details", has_text="Solution").first
        code = solution.locator("pre").first
        assert not code.is_visible()
        solution.locator("summary").click()
        assert code.is_visible()


@pytest.mark.parametrize("name", ["index", "notebooks/04_inside_generation", "notebooks/06_your_own_model"])
def test_a_replay_is_watched_on_its_page(site: Path, name: str) -> None:
    path = site / f"{name}.html"
    with launched() as chromium, opened(chromium, path, viewport={"width": 1300, "height": 900}) as (page, heard):
        run = page.locator(".fsteer-replay section.run:not([hidden])").first
        run.locator(".c.a").nth(1).click()
        assert "Token 2 of" in run.locator(".say").inner_text()
        assert run.locator(".inspector svg").count() >= 2
        assert heard.errors == [] and heard.outside == []
        for scheme, dark in (("light", False), ("dark", True)):
            page.emulate_media(color_scheme=scheme)
            ink = run.locator(".say").evaluate("one => getComputedStyle(one).color")
            assert (sum(int(part) for part in re.findall(r"\d+", ink)[:3]) > 380) == dark, ink

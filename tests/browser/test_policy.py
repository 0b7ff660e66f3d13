"""The policy in the pages that the package writes: they work under it, and nothing that got into one asks outside."""

from pathlib import Path
from typing import Any

import pytest

from fsteer_lens import figures
from fsteer_lens.figures import Html
from fsteer_lens.report import Report
from tests.browser.chromium import launched, opened
from tests.browser.pages import every_figure
from tests.browser.test_figures_page import settle

INTRUDERS = {
    "script": "fetch('https://example.com/x').catch(() => {})",
    "picture": "new Image().src = 'https://example.com/x'",
}


@pytest.fixture(scope="module")
def browser() -> Any:
    with launched() as started:
        yield started


def pages(folder: Path) -> dict[str, Path]:
    """Every kind of page that is written: a report with every figure, and a view and a plot by themselves."""
    bundle, report = figures.circuitsvis_bundle(), Report("all")
    drawn = {
        name: Html(bundle.body + figure.body) if name.startswith("rich") else figure
        for name, figure in every_figure().items()
    }
    for name, figure in drawn.items():
        report.add_figure(figure, name)
    report.add_download("A file:", "a.txt", b"inside")
    found = {"report": report.write(folder / "report.html")}
    for name, figure in drawn.items():
        found[name] = folder / f"{name.replace(' ', '_')}.html"
        figures.save(figure, found[name])
    return found


def test_every_page_that_is_written_has_the_policy_and_works_under_it(browser: Any, tmp_path: Path) -> None:
    for name, path in pages(tmp_path).items():
        head = path.read_text(encoding="utf-8").partition("</head>")[0]
        policy = head.index('http-equiv="Content-Security-Policy" content="default-src \'none\'')
        assert policy < head.index("<title>"), "it stands before all that it is about"
        with opened(browser, path) as (page, heard):
            settle(page)
            assert heard.errors == [] and heard.outside == [], name


@pytest.mark.parametrize("name", list(INTRUDERS))
def test_what_gets_into_a_page_cannot_ask_for_anything(browser: Any, name: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    figures.save(Html(f"<script>window.ran = 1; {INTRUDERS[name]}</script>"), path)
    with opened(browser, path) as (page, heard):
        page.wait_for_timeout(300)
        assert page.evaluate("window.ran") == 1, "the control: the script itself runs"
        assert any("Content Security Policy" in error for error in heard.errors)
        assert page.evaluate("window.hacked") is None and page.url.startswith("file:")

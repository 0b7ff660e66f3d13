"""The report is one file that renders without network, in light and dark, and whose sliders move what they should."""

import re

import pytest
import torch

from fsteer_lens import figures, fit_gate
from fsteer_lens.errors import InputError
from fsteer_lens.report import Report
from tests.browser.chromium import launched, until
from tests.browser.chromium import opened as opened_page

HOSTILE = "</script><img src=x onerror=document.title='hacked'> <b>&amp; \u2067\u05e9\u05dc \u05d0 🙂"


@pytest.fixture(scope="module")
def gate_and_queries():
    torch.manual_seed(0)
    ir = torch.randn(200, 20) * torch.tensor([6.0, 4, 3] + [0.7] * 17)
    other = torch.randn(200, 20)
    return fit_gate(ir[:100], rank=3, max_rank=12), {HOSTILE: ir[100:], "general": other}


@pytest.fixture(scope="module")
def report(gate_and_queries):
    gate, queries = gate_and_queries
    prompts = {name: [f"{HOSTILE} {row}" for row in range(len(rows))] for name, rows in queries.items()}
    weights = torch.randn(200, 4).softmax(dim=-1)
    labels = [HOSTILE if row % 2 else "b" for row in range(200)]
    return (
        Report(f"Report {HOSTILE}")
        .add_heading(HOSTILE)
        .add_text(f"one {HOSTILE}\n\ntwo")
        .add_table(["method", "kept"], [["none", "0.9\n0.8-0.95"], [HOSTILE, "1"]], marked=[1])
        .add_figure(figures.rank_explorer(gate, queries, prompts), HOSTILE)
        .add_figure(figures.expert_routing(weights, labels, [HOSTILE] * 200), "routing")
        .add_figure(figures.gate_separation(gate, *queries.values(), names=(HOSTILE, "general")), "separation")
        .add_figure(figures.token_scores([HOSTILE, "b"], torch.tensor([0.5, float("nan")])), "tokens")
    )


def test_the_page_is_one_file_below_eight_megabytes_that_asks_for_nothing(report, tmp_path):
    path = report.write(tmp_path / "report.html")
    assert path.stat().st_size < 8e6
    page = path.read_text(encoding="utf-8")
    assert page.count("plotly.js v") == 1  # inside, and once
    assert not re.findall(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=[\"']?(?!data:)[\w/]", page)
    style = page[page.index("<style>") : page.index("</style>")]
    assert not re.findall(r"url\(|@import|https?:", style)
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_a_page_without_plots_is_small(tmp_path):
    path = Report("a").add_text("b").add_figure(figures.token_scores(["c"], torch.ones(1))).write(tmp_path / "a.html")
    assert path.stat().st_size < 10_000


def test_tables_mark_rows_set_second_lines_small_and_refuse_ragged_rows():
    page = Report("a").add_table(["x", "y"], [["1", "2\n3"], ["4", "5"]], marked=[1]).html()
    assert "<td>2<small>3</small></td>" in page
    assert '<tr class="marked"><td>4</td>' in page and page.count("marked") == page.count(".marked") + 1
    with pytest.raises(InputError, match="2 cells"):
        Report("a").add_table(["x", "y"], [["1"]])
    with pytest.raises(InputError, match="2 or 3"):
        Report("a").add_heading("x", level=1)


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    target = tmp_path / "a.html"
    Report("old").write(target)
    broken = Report("new")
    monkeypatch.setattr(broken, "html", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.write(target)
    assert "old" in target.read_text()
    with pytest.raises(InputError, match="existing folder"):
        Report("a").write(tmp_path / "nowhere" / "a.html")


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module", params=["light", "dark"])
def opened(chromium, report, tmp_path_factory, request):
    """The report in a browser without network, with what it said and asked for."""
    path = report.write(tmp_path_factory.mktemp("page") / "report.html")
    with opened_page(chromium, path, request.param, viewport={"width": 1280, "height": 900}) as (page, heard):
        until(page, "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 6")
        yield page, request.param, heard


def quiet(heard):
    return heard.errors == [] and all(url.startswith(("file:", "data:")) for url in heard.requests)


@pytest.mark.browser
def test_the_page_renders_quietly_and_text_stays_text(opened):
    page, scheme, heard = opened
    assert quiet(heard)
    assert page.evaluate("document.title").startswith("Report </script><img")
    assert page.locator("img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert page.locator(".modebar-btn[data-title*='hare']").count() == 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgba(0, 0, 0, 0)", "dark": "rgb(18, 19, 22)"}[scheme]
    boxes = page.evaluate("[...document.querySelectorAll('.scatterlayer .point')].length")
    assert boxes >= 300
    names = page.evaluate("[...document.querySelectorAll('.yaxislayer-above text')].map(t => t.textContent).join()")
    assert "onerror" in names


@pytest.mark.browser
def test_the_slider_moves_prompts_marks_threshold_and_counts(opened, gate_and_queries):
    page, _, heard = opened
    gate, queries = gate_and_queries
    state = """() => { const {data, layout} = document.querySelector('.js-plotly-plot');
        return [data.slice(0, 3).map(t => t.x), data.slice(0, 2).map(t => t.marker.symbol), layout.yaxis.ticktext]; }"""
    before = page.evaluate(state)
    rail = page.locator(".slider-rail-touch-rect").first.bounding_box()
    page.mouse.click(rail["x"] + rail["width"] - 2, rail["y"] + rail["height"] / 2)
    until(page, "document.querySelector('.js-plotly-plot').layout.sliders[0].active > 2")
    rank = page.evaluate("document.querySelector('.js-plotly-plot').layout.sliders[0].active") + 1
    page.wait_for_timeout(100)
    after = page.evaluate(state)
    assert rank == gate.subspace.rank
    assert after != before
    for index, rows in enumerate(queries.values()):
        assert torch.allclose(torch.tensor(after[0][index]), gate.subspace.energy_ratio(rows, rank), atol=6e-4)
        is_open = gate.at_rank(rank).gate(rows) >= 0.5
        assert [symbol == 0 for symbol in after[1][index]] == is_open.tolist()
        assert f"{int(is_open.sum())} of {len(rows)} steered" in after[2][index]
    assert after[0][2][0] == pytest.approx(gate.at_rank(rank).threshold, abs=1e-4)
    assert quiet(heard)


@pytest.mark.browser
def test_a_single_figure_opens_by_itself(chromium, tmp_path):
    figures.save(figures.expert_routing(torch.rand(6, 3)), tmp_path / "a.html")
    page = chromium.new_page()
    page.goto((tmp_path / "a.html").as_uri())
    page.wait_for_selector(".js-plotly-plot .heatmaplayer image")
    assert page.evaluate("document.querySelector('.js-plotly-plot').offsetWidth") > 600
    page.close()

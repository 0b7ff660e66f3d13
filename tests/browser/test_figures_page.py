"""Every figure in headless Chromium without network: drawn, silent, harmless, and the slider moves."""

import pytest
import torch

from fsteer_lens import figures
from tests.browser.chromium import launched, opened, until
from tests.browser.pages import ATTACKS, every_figure, write_page
from tests.figure_parts import Elements, path_of

MARKS = ".point, .heatmaplayer image, .scatterlayer path.js-line, .barlayer path, .shapelayer path"


@pytest.fixture(scope="module")
def browser():
    with launched() as started:
        yield started


@pytest.fixture(scope="module")
def parts():
    return every_figure()


@pytest.fixture(scope="module")
def path(parts, tmp_path_factory):
    return write_page(parts, tmp_path_factory.mktemp("page") / "figures.html")


@pytest.fixture(scope="module")
def light(browser, path):
    """The page, open for those tests that do not mind what another one clicked."""
    with opened(browser, path) as (page, heard):
        settle(page)
        yield page, heard


def settle(page):
    """Wait until every plot and every view of circuitsvis is there."""
    until(
        page,
        "() => [...document.querySelectorAll('.plotly-graph-div')].every(plot => plot.querySelector('.main-svg'))"
        " && [...document.querySelectorAll('.fsteer-lens-rich')].every(view => view.querySelector('span'))",
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_drawn_and_clear_and_no_token_does_anything(browser, parts, path, scheme):
    with opened(browser, path, scheme) as (page, heard):
        settle(page)
        for name, figure in parts.items():
            section = page.locator(f"#{name}")
            box = section.bounding_box()
            assert box["width"] > 100 and box["height"] > 20, name
            if isinstance(figure, figures.Html):
                continue
            drawn = section.locator(MARKS).evaluate_all(
                "marks => marks.map(m => m.getBoundingClientRect()).filter(b => b.width + b.height > 0).length"
            )
            assert drawn >= len([one for one in figure.data if one.x is None or one.x[0] is not None]), name
            widths = section.locator(".main-svg").evaluate_all("all => all.map(s => s.getBoundingClientRect().width)")
            assert widths[0] > 300, name
        hover_everywhere(page)
        found = "svg.main-svg a, img, iframe, x-hostile, section b[onload], [onerror], [onload], [onclick]"
        assert page.locator(found).count() == 0
        assert page.evaluate("window.hacked") is None
        assert heard.errors == []
        assert heard.requests == [path.as_uri()]
        for name in ("token_scores", "token_experts", "steer_compare", "expert_tokens"):
            colour = page.locator(f"#{name} span").first.evaluate("e => getComputedStyle(e).color")
            assert (sum(channels(colour)) > 380) == (scheme == "dark"), (name, colour)
        box = page.locator("#rich_scores div[style*='background:#fff']").first
        assert channels(box.evaluate("e => getComputedStyle(e).backgroundColor")) == [255, 255, 255]
        assert channels(box.evaluate("e => getComputedStyle(e).color")) == [0, 0, 0]


def hover_everywhere(page):
    """Show the hover text of a mark in each plot and of a token in each view of circuitsvis."""
    for plot in page.locator(".plotly-graph-div").all():
        plot.scroll_into_view_if_needed()
        box = plot.locator(".nsewdrag").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.48, box["y"] + box["height"] * 0.5)
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    for view in page.locator(".fsteer-lens-rich").all():
        for token in view.locator("span > span").all()[:6]:
            token.hover()


def channels(colour):
    return [int(part) for part in colour.strip("rgba()").split(",")[:3]]


def test_tokens_read_in_the_browser_as_they_are(light):
    page, _ = light
    for name in ("token_scores", "steer_compare", "expert_tokens", "rich_scores", "rich_experts", "rich_compare"):
        shown = page.locator(f"#{name}").inner_text().replace("\u2060", "").replace("\u00a0", " ")
        for token in ATTACKS[:6]:
            assert token in shown, (name, token)
        assert "a⏎" in shown and "🙂" in shown and "שלום" in shown and "\ufffd" in shown, name
    labels = page.locator("#layer_position .xtick text").all_text_contents()
    assert "<x-hostile>" in labels


def test_the_rank_slider_moves_points_and_counts(light, parts):
    figure = parts["rank_explorer"]
    page, heard = light
    section = page.locator("#rank_explorer")
    section.scroll_into_view_if_needed()
    rail = section.locator(".slider-rail-touch-rect").bounding_box()

    def state():
        places = (
            section.locator(".scatterlayer .trace")
            .first.locator(".point")
            .evaluate_all("points => points.map(point => point.getAttribute('transform'))")
        )
        return (
            places,
            section.locator(".ytick text").all_text_contents(),
            section.locator(".slider-label").first.text_content(),
        )

    before = state()
    assert before[2].endswith("= 3")
    page.mouse.move(rail["x"] + rail["width"] * 0.2, rail["y"] + rail["height"] / 2)
    page.mouse.down()
    page.mouse.move(rail["x"] + rail["width"] - 1, rail["y"] + rail["height"] / 2, steps=4)
    page.mouse.up()
    last = len(figure.layout.sliders[0].steps)
    until(page, f"() => document.querySelector('#rank_explorer .slider-label').textContent.endsWith('= {last}')")
    page.wait_for_timeout(300)
    after = state()
    assert len(after[0]) == len(before[0]) and after[0] != before[0]
    counted = figure.layout.sliders[0].steps[-1].args[1]["yaxis.ticktext"]
    for shown, told in zip(after[1], counted, strict=True):
        assert (
            shown.replace("\n", "").replace(" ", "") == Elements(told).text.replace(" ", "")
            or told.split("<br>")[1] in shown
        )
    assert heard.errors == []


def test_circuitsvis_changes_the_expert_on_a_click_and_tells_all_weights_on_hover(light):
    page, heard = light
    view = page.locator("#rich_experts")
    token = view.locator("span > span").nth(1)
    colour = "e => getComputedStyle(e).backgroundColor"
    first = token.evaluate(colour)
    view.get_by_text("expert 1", exact=True).click()
    second = token.evaluate(colour)
    assert first != second
    token.hover()
    told = view.locator("table").inner_text()
    assert "0.100000" in told and "0.900000" in told
    page.locator("#rich_compare .fsteer-lens-rich span > span").first.hover()
    assert "Log Prob" in page.locator("#rich_compare .fsteer-lens-rich table").first.inner_text()
    assert heard.errors == []


def test_a_text_of_10000_tokens_is_drawn(browser, tmp_path):
    n, words = 10_000, [" token"] * 10_000
    weights = torch.rand(n, 3).softmax(-1)
    long = {
        "scores": figures.token_scores(words, torch.rand(n)),
        "experts": figures.token_experts(words, weights),
        "rich": figures.token_scores(words, torch.rand(n), rich=True, bundle=False),
        "layers": figures.layer_position(path_of(torch.rand(4, n), words)),
        "routing": figures.expert_routing(weights[:2], prompts=["".join(words)] * 2),
        "change": figures.logprob_change(["".join(words)], torch.ones(1)),
    }
    with opened(browser, write_page(long, tmp_path / "long.html")) as (page, heard):
        settle(page)
        for name in ("scores", "experts"):
            assert page.locator(f"#{name} span[title]").count() >= n
            assert page.locator(f"#{name}").bounding_box()["height"] > 500
        assert page.locator("#rich .colored-tokens > span").count() == n
        assert page.locator("#layers .heatmaplayer image").bounding_box()["width"] > 300
        assert page.locator("#layers .xtick text").count() <= 60
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
        assert heard.errors == []

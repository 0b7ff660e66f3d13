"""The replay in headless Chromium without network: tokens are chosen, played, pinned, linked; it needs no script."""

import importlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fsteer_lens as fs
from fsteer_lens import figures
from fsteer_lens.trace.steps import Steps
from tests.browser.chromium import launched, opened, until
from tests.browser.test_figures_page import channels
from tests.figure_parts import HOSTILE

pytestmark = pytest.mark.browser

CHOSEN = "section.run:not([hidden]) .c[aria-pressed=true]"


@pytest.fixture(scope="module")
def browser() -> Any:
    with launched() as started:
        yield started


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, hooked: Any, steering: fs.FineSteer, prompts: list[str]) -> Path:
    told: dict[str, Any] = {"compare": True, "replay": True, "max_new_tokens": 10, "progress": False}
    asked = [prompts[0], prompts[-1]]
    variants = {"once": steering, "anew": replace(steering, scope="all", refresh="step")}
    made = {name: fs.generate(hooked, asked, one, **told) for name, one in variants.items()}
    target = tmp_path_factory.mktemp("replay") / "replay.html"
    figures.save(figures.replay(made, titles=["harmful", "general"]), target)
    return target


def label(page: Any) -> str:
    return page.locator(CHOSEN).first.get_attribute("aria-label")


def test_a_token_is_chosen_by_click_and_by_keys(browser: Any, path: Path) -> None:
    with opened(browser, path) as (page, heard):
        assert "token 1 of" in label(page)
        said = page.locator("section.run:not([hidden]) .say")
        first = said.inner_text()
        page.keyboard.press("Tab")
        page.locator(CHOSEN).focus()
        page.keyboard.press("ArrowRight")
        assert "token 2 of" in label(page) and said.inner_text() != first
        assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert "prompt token" in label(page)
        page.locator("section.run:not([hidden]) .c.a").nth(2).click()
        assert "token 3 of" in label(page)
        titles = page.locator("section.run:not([hidden]) .inspector h4").all_inner_texts()
        assert titles[0].startswith("Next word") and titles[1].startswith("Through the layers")
        assert page.locator(".c[tabindex='0']").count() == 1, "the Tab key goes to one token of all"
        columns = page.locator("section.run:not([hidden]) .c")
        at = columns.evaluate_all("all => all.findIndex(c => c.getAttribute('aria-pressed') === 'true')")
        assert page.url.endswith(f"#replay=0.{at}")
        assert heard.errors == [] and heard.outside == []


def test_a_finger_chooses_a_token(browser: Any, path: Path) -> None:
    with opened(browser, path, viewport={"width": 400, "height": 800}, has_touch=True) as (page, heard):
        page.locator("section.run:not([hidden]) .c.a").nth(1).tap()
        assert "token 2 of" in label(page) and heard.errors == []


def test_it_plays_to_the_end_and_stops(browser: Any, path: Path) -> None:
    with opened(browser, path) as (page, heard):
        page.get_by_role("button", name="▶ play").click()
        until(page, "document.querySelector('.c.a:last-of-type').getAttribute('aria-pressed') === 'true'")
        until(page, "[...document.querySelectorAll('button')].some(b => b.textContent === '▶ play')")
        page.locator(CHOSEN).focus()
        page.keyboard.press(" ")
        assert page.get_by_role("button", name="■ stop").count() == 1
        page.keyboard.press(" ")
        assert page.get_by_role("button", name="▶ play").count() == 1
        assert heard.errors == []


def test_prompt_and_steering_are_chosen_and_a_run_is_pinned(browser: Any, path: Path) -> None:
    with opened(browser, path, viewport={"width": 1400, "height": 900}) as (page, heard):
        shown = page.locator("section.run:not([hidden]) h3")
        assert shown.all_inner_texts() == ["once · harmful"]
        page.get_by_role("button", name="pin this one").click()
        page.get_by_role("button", name="anew").click()
        assert shown.all_inner_texts() == ["once · harmful", "anew · harmful"]
        boxes = [one.bounding_box() for one in page.locator("section.run:not([hidden])").all()]
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"], "side by side"
        page.get_by_role("button", name="general").click()
        assert shown.all_inner_texts() == ["once · harmful", "anew · general"]
        page.get_by_role("button", name="let go").click()
        assert shown.all_inner_texts() == ["anew · general"]
        assert heard.errors == []


def test_a_link_holds_the_token(browser: Any, path: Path) -> None:
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(path.as_uri() + "#replay=3.5")
    assert page.locator("section.run:not([hidden]) h3").inner_text() == "anew · general"
    assert "prompt token 6 of" in label(page)
    context.close()


@pytest.mark.parametrize("width", [400, 800, 1600])
def test_no_page_is_wider_than_its_window_and_every_line_has_its_labels(browser: Any, path: Path, width: int) -> None:
    with opened(browser, path, viewport={"width": width, "height": 800}) as (page, _):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        tops = page.locator("section.run:not([hidden]) .c").evaluate_all(
            "all => [...new Set(all.map(c => Math.round(c.getBoundingClientRect().top)))]"
        )
        labels = page.locator("section.run:not([hidden]) .labels").evaluate_all(
            "all => [...new Set(all.map(c => Math.round(c.getBoundingClientRect().top)))]"
        )
        assert labels == tops and (len(tops) > 1 or width > 400)


def test_ink_is_the_pages_own(browser: Any, path: Path) -> None:
    for scheme in ("light", "dark"):
        with opened(browser, path, scheme) as (page, _):
            colour = page.locator("section.run:not([hidden]) .c.a .t").first.evaluate("e => getComputedStyle(e).color")
            assert (sum(channels(colour)) > 380) == (scheme == "dark")


def test_without_a_script_all_runs_and_sentences_stand_there(browser: Any, path: Path) -> None:
    with opened(browser, path, java_script_enabled=False) as (page, _):
        runs = page.locator("section.run")
        assert runs.count() == 4 and all(run.is_visible() for run in runs.all())
        assert page.locator(".chips").is_hidden()
        page.locator("summary").first.click()
        assert "predicted at" in page.locator("details[open] td").last.inner_text()


def test_hostile_tokens_and_a_long_text_in_many_layers(
    browser: Any, hooked: Any, steering: fs.FineSteer, prompts: list[str], tmp_path: Path
) -> None:
    n, layers = 256, 32
    one = fs.generate(hooked, prompts[0], steering, compare=True, replay=True, max_new_tokens=10, progress=False)[
        0
    ].trace
    assert one.steps is not None and one.replay is not None and one.prompts is not None and one.unsteered is not None
    n_prompt = len(one.prompts[0])
    steps = one.steps

    def stretched(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            repeats = [1, -(-n // value.shape[1])] + [1] * (value.ndim - 2)
            return value.repeat(*repeats)[:, :n]
        return value if value is None else tuple(tuple((list(row) * n)[:n]) for row in value)

    texts = (tuple((HOSTILE * n)[:n]),)
    long = Steps(**{name: stretched(getattr(steps, name)) for name in steps.__dataclass_fields__} | {"texts": texts})
    told = replace(
        one.replay[0],
        layers=tuple(range(layers)),
        **{name: torch.rand(layers, n_prompt + n - 1) for name in ("size", "carried", "edit", "attention", "mlp")},
        displaced=texts[0],
        lens=torch.rand(2, 2, layers, n),
        scores=tuple(replace(score, score=torch.rand(n_prompt + n - 1)) for score in one.replay[0].scores),
    )
    change = torch.zeros(1, n_prompt + n - 1)
    change[0, :n_prompt] = 0.5
    trace = replace(one, steps=long, replay=(told,), change={4: change})
    figures.save(figures.replay(trace), tmp_path / "long.html")
    with opened(browser, tmp_path / "long.html") as (page, heard):
        assert page.locator(".c").count() == n_prompt + n
        page.locator(CHOSEN).focus()
        page.keyboard.press("End")
        assert f"token {n} of {n}" in label(page)
        assert page.locator("img, iframe, x-hostile, [onerror]").count() == 0
        assert page.evaluate("window.hacked") is None
        assert heard.errors == [] and heard.outside == []


def test_large_data_are_quantised_and_drawn_in_the_same_places(
    browser: Any,
    tmp_path: Path,
    hooked: Any,
    steering: fs.FineSteer,
    prompts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: dict[str, Any] = {"compare": True, "replay": True, "max_new_tokens": 10, "progress": False}
    made = fs.generate(hooked, prompts[:1], steering, **told)
    drawing = importlib.import_module("fsteer_lens.figures.replay")  # the module, not the function
    drawn, sizes = [], []
    for large in (drawing.LARGE, 0):
        monkeypatch.setattr(drawing, "LARGE", large)
        target = tmp_path / f"{large}.html"
        figures.save(figures.replay(made), target)
        sizes.append(target.stat().st_size)
        with opened(browser, target) as (page, heard):
            paths = page.locator(".inspector path.one, .inspector path.two")
            bars = page.locator(".inspector rect[fill^='rgb'], .inspector rect[fill*='steered']")
            places = [float(number) for d in paths.evaluate_all("all => all.map(p => p.getAttribute('d'))")
                      for number in re.findall(r"-?[0-9.]+", d)]  # fmt: skip
            heights = [float(one) for one in bars.evaluate_all("all => all.map(p => p.getAttribute('height'))")]
            drawn.append((places, heights))
            assert heard.errors == []
    assert sizes[1] < sizes[0]
    for exact, quantised in zip(*drawn, strict=True):
        assert len(exact) > 5 and quantised == pytest.approx(exact, abs=0.5)  # half a pixel

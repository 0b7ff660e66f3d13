"""The report on one steering says what was measured, and carries all of it."""

import base64
import gzip
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from fsteer_lens import Contrast, EnergyGate, Experts, FineSteer, Trace, effects, figures, fit, generate, tutor
from fsteer_lens.errors import InputError
from fsteer_lens.ground.estimates import Proportion, bootstrap
from fsteer_lens.models import SteerableModel
from fsteer_lens.report import Report, steering_report
from fsteer_lens.steering import fit_mean_shift
from tests import made_up
from tests.browser.chromium import launched, opened
from tests.running import LAYER

Read = tuple[str, list[list[list[str]]]]


class Tables(HTMLParser):
    """The cells of every table of class "data", and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.cell: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self.cell is not None:
            self.tables[-1][-1].append("|".join(self.cell))
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell.append(data)


def trace_in(page: str) -> Trace:
    """The trace that a page carries."""
    data = re.search(r'download="trace.jsonl.gz" href="data:application/octet-stream;base64,([^"]+)"', page)
    assert data is not None
    lines = gzip.decompress(base64.b64decode(data[1])).decode().splitlines()
    return Trace.from_records([json.loads(line) for line in lines])


def smaller() -> Experts:
    """Three experts."""
    whole = made_up.experts(2)
    return replace(whole, prototypes=whole.prototypes[:3], enabled=(True,) * 3)


def measured(page: str) -> list[list[str]]:
    """The table of what was measured."""
    short, whole = (table for table in Tables(page).tables if table[0][0] == "prompts")
    assert [row[:4] for row in whole] == short and len(short[0]) == 4  # what is told first, the rest folded
    return whole


@pytest.fixture(scope="module")
def contrasts() -> list[Contrast]:
    return list(tutor.data("safe").test[::12][:25])


@pytest.fixture(scope="module")
def general() -> list[str]:
    return [task.prompt for task in tutor.data("safe").general_test][:100:4]


@pytest.fixture(scope="module")
def report(tutor_model: SteerableModel, steering: FineSteer, contrasts: list[Contrast], general: list[str]) -> Report:
    return steering_report(tutor_model, steering, contrasts, general, batch_size=64, progress=False)


def test_of_many_prompts_some_are_run_again(
    tutor_model: SteerableModel, steering: FineSteer, contrasts: list[Contrast], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[Any]] = {}
    for name, run in {name: getattr(effects, name) for name in ("strength_sweep", "expert_knockout")}.items():

        def spy(*given: Any, name: str = name, run: Any = run, **options: Any) -> Any:
            asked[name] = [part for part in given[2:] if isinstance(part, list)]
            return run(*given, **options)

        monkeypatch.setattr(effects, name, spy)
    general = [task.prompt for task in tutor.data("safe").general_test[:3]]
    options: dict[str, Any] = {"max_new_tokens": 2, "batch_size": 64, "progress": False}
    for count in (25, 24):
        page = steering_report(tutor_model, steering, contrasts[:count], general, **options).html()
        assert ("At most 24 of a kind were run again" in page) == (count > 24)
        (some,) = asked["expert_knockout"]
        assert asked["strength_sweep"] == [some, general] and len(some) == 24
        assert some == [contrasts[index * count // 24] for index in range(24)]


@pytest.mark.slow
def test_two_hundred_prompts_stay_below_eight_megabytes(
    tutor_model: SteerableModel, steering: FineSteer, tmp_path: Path
) -> None:
    told = tutor.data("safe")
    contrasts, general = list(told.test[::3][:100]), [task.prompt for task in told.general_test[:100]]
    report = steering_report(tutor_model, steering, contrasts, general, batch_size=64, progress=False)
    assert len(contrasts) + len(general) == 200
    assert report.write(tmp_path / "report.html").stat().st_size < 8e6


def test_the_table_is_what_was_measured(
    report: Report, tutor_model: SteerableModel, steering: FineSteer, contrasts: list[Contrast], general: list[str]
) -> None:
    rows = measured(report.html())
    assert [row[0] for row in rows] == [
        "prompts", *dict.fromkeys(str(contrast.label) for contrast in contrasts), "general prompts"
    ]  # fmt: skip
    label = rows[1][0]
    own = [contrast for contrast in contrasts if contrast.label == label]
    made = generate(
        tutor_model, [c.prompt for c in own], steering, max_new_tokens=32, compare=True, progress=False, batch_size=64
    )
    changed = Proportion(sum(one.text != one.baseline.text for one in made), len(own))  # type: ignore[union-attr]
    low, high = changed.interval
    assert (rows[1][1], rows[1][4]) == (f"{changed.value:.2f}|{low:.2f} to {high:.2f}", str(len(own)))
    kl = bootstrap(torch.stack([one.trace.steps.kl.mean() for one in made]))  # type: ignore[union-attr]
    assert rows[1][3].split("|")[0] == f"{kl.value:.3f}"
    margin = effects.answer_margin(tutor_model, steering, own).mean()
    assert float(rows[1][6].split("|")[0]) == pytest.approx(float(margin), abs=2e-3)
    assert rows[-1][5:] == ["–", "–"] and rows[-1][4] == str(len(general))


def test_the_page_carries_every_text_and_the_whole_trace(
    report: Report, tutor_model: SteerableModel, steering: FineSteer, contrasts: list[Contrast], general: list[str]
) -> None:
    page = report.html()
    texts = next(table for table in Tables(page).tables if table[0][:2] == ["prompt", "group"])
    prompts = [str(contrast.prompt) for contrast in contrasts] + general
    assert [row[0] for row in texts[1:]] == prompts
    trace = trace_in(page)
    assert trace.n_rows == len(prompts) and trace.steps is not None
    alone = generate(tutor_model, prompts[3], steering, max_new_tokens=32, compare=True, progress=False)[0]
    assert texts[4][3] == alone.text and texts[4][2] == alone.baseline.text  # type: ignore[union-attr]
    assert trace.row(3).steps.texts == alone.trace.steps.texts  # type: ignore[union-attr]
    assert float(trace.gate[LAYER][3]) == pytest.approx(float(alone.trace.gate[LAYER][0]), abs=1e-4)
    assert alone.trace.steps.texts[0][0] in str(figures.steer_compare(trace.row(3)))  # type: ignore[union-attr]


def test_the_settings_name_versions_seed_and_fingerprint(report: Report, steering: FineSteer) -> None:
    rows = dict(row for row in Tables(report.html()).tables[-1] if len(row) == 2)
    assert (
        f"torch {version('torch')}" in rows["versions"] and f"fsteer-lens {version('fsteer-lens')}" in rows["versions"]
    )
    assert rows["seed"] == "0" and rows["steering"] == repr(steering)
    assert steering.fingerprint is not None and steering.fingerprint.tokenizer in rows["model"]
    assert not re.findall(r"/(?:root|home|tmp|work)/", report.html())


def test_general_prompts_are_among_the_examples_and_a_label_may_have_their_name(
    tutor_model: SteerableModel, steering: FineSteer, contrasts: list[Contrast], general: list[str]
) -> None:
    named = [replace(contrast, label="general prompts") for contrast in contrasts[:3]]
    options = {"max_new_tokens": 3, "sweep": False, "progress": False}
    page = steering_report(tutor_model, steering, named, general[:5], examples=7, **options).html()
    assert [(row[0], row[4]) for row in measured(page)[1:]] == [
        ("general prompts", "3"),
        ("general prompts (to be left alone)", "5"),
    ]
    start = page.index("The same prompts without and with")
    shown = page[start : page.index("</figure>", start)]
    assert shown.count("<b>general prompts</b>") == 3 and shown.count("<b>general prompts (to be left alone)</b>") == 4
    for wrong in ({"examples": 0}, {"general": "hello"}):
        with pytest.raises(InputError, match="expected"):
            steering_report(tutor_model, steering, **{"contrasts": named, "general": [], **wrong})  # type: ignore[arg-type]


@pytest.mark.browser
def test_a_hostile_report_stays_text_on_screen_and_on_paper(
    tutor_model: SteerableModel, steering: FineSteer, contrasts: list[Contrast], tmp_path: Path
) -> None:
    attack = "</script><img src=x onerror=alert(1)>%{x}<b>"
    few = [replace(one, prompt=f"{one.prompt}{attack}", label=f"{one.label}{attack}") for one in contrasts[:24:3]]
    options = {"max_new_tokens": 4, "progress": False, "title": attack}
    path = steering_report(tutor_model, steering, few, [f"<user>{attack}<tutor>"], **options).write(tmp_path / "a.html")
    with launched() as browser:
        for scheme in ("light", "dark"):
            with opened(browser, path, scheme, viewport={"width": 1200, "height": 900}) as (page, heard):
                page.wait_for_selector(".js-plotly-plot .main-svg")
                page.wait_for_timeout(500)
                assert page.locator("img, h1 b, details b, svg.main-svg a").count() == 0
                assert page.locator("h1").inner_text() == attack
                assert page.evaluate("document.documentElement.scrollWidth") <= 1200
                assert page.locator("h2").first.inner_text() == "Watch it"
                page.locator(".fsteer-replay section:not([hidden]) .c.a").nth(2).click()
                assert "Token 3 of 4" in page.locator(".fsteer-replay section:not([hidden]) .say").inner_text()
                ink = page.locator(".plot .xtick text").first.evaluate("one => getComputedStyle(one).fill")
                assert ink == {"light": "rgb(58, 61, 66)", "dark": "rgb(196, 199, 204)"}[scheme]
                assert page.locator(".plot > [role=group][aria-label]").count() == page.locator(".plot").count()
                page.set_viewport_size({"width": 400, "height": 900})
                assert page.evaluate("document.documentElement.scrollWidth") <= 400
                page.set_viewport_size({"width": 1200, "height": 900})
                page.locator("summary", has_text="prompts with both texts").click()
                texts = page.locator("details table.words")
                assert texts.is_visible() and attack in texts.inner_text()
                page.emulate_media(media="print")
                assert texts.is_visible() and page.locator(".modebar:visible").count() == 0
                assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
                assert heard.errors == []
                assert all(url.startswith(("file:", "data:")) for url in heard.requests)


def test_it_takes_several_layers_baselines_and_no_general_prompts(
    tutor_model: SteerableModel, trained: Any, steering: FineSteer, contrasts: list[Contrast]
) -> None:
    few, options = contrasts[:4], {"max_new_tokens": 4, "progress": False}
    layered = fit({layer: trained[layer] for layer in (3, 4)}, preset="0.1", epochs=5)
    page = steering_report(tutor_model, layered, few, **options).html()
    assert "When: the gate, layer 3" in page and "How: the experts, layer 4" in page
    page = steering_report(tutor_model, fit_mean_shift(trained[4]), few, ["<user>hi<tutor>"], **options)
    assert "How: the experts" not in page.html() and "How much: strength" in page.html()
    gate = steering.gate_at(LAYER)
    composed = steering.with_gate(gate | EnergyGate(gate.subspace.at_rank(7), 3))  # type: ignore[operator,union-attr]
    page = steering_report(tutor_model, composed.only_expert(0), few, ["<user>hi<tutor>"], **options).html()
    assert "When: the gate" in page and "as it is" in page
    uneven = FineSteer({2: made_up.experts(1), 3: smaller()}, {2: made_up.steering().gate})  # type: ignore[dict-item]
    assert "How: the experts, layer 3" in steering_report(tutor_model, uneven, few, **options).html()
    with pytest.raises(InputError, match="at least one"):
        steering_report(tutor_model, steering, [])

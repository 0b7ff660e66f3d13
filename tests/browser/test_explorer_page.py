"""The explorer in a browser draws, at every move, what Python computes; without network, and with text as text."""

from dataclasses import replace

import pytest
import torch

from fsteer_lens import FineSteer, fit_experts, fit_gate
from fsteer_lens.explorer import Explorer
from fsteer_lens.explorer.pictured import grouped, pictured
from fsteer_lens.explorer.settings import Subject
from fsteer_lens.figures.gating import roc
from fsteer_lens.prompts.passes import Passes
from tests.browser.harness import browser, page_of

WIDTH = 12
HOSTILE = "</script><img src=x onerror=alert(1)> <b>&amp;</b> \u2067\u05e9 🙂"
NAMES = (HOSTILE, "general")
SIZES = (30, 25)
BROKEN = 29  # this query is not finite


class Model:
    """Nobody generates here."""

    cfg = tokenizer = hook_dict = None

    def __call__(self, *args, **kwargs):
        raise NotImplementedError


@pytest.fixture(scope="module")
def steering():
    generator = torch.Generator().manual_seed(1)
    spread = torch.tensor([6.0, 4, 3, 2] + [0.7] * (WIDTH - 4))
    ir = torch.randn(120, WIDTH, generator=generator) * spread
    shifts = 3 * torch.eye(WIDTH)[torch.arange(120) % 4] + 0.3 * torch.randn(120, WIDTH, generator=generator)
    experts = fit_experts(ir, shifts, n_experts=4, preset="0.1", epochs=30)
    # softer routing, so that every expert has a share of every prompt
    controller = experts.controller
    soft = controller._replace(query_weight=controller.query_weight / 4, query_bias=controller.query_bias / 4)
    experts = replace(experts, controller=soft)
    return FineSteer(experts, fit_gate(ir, rank=3, max_rank=10, epsilon=0.1), layer=0, strength=1.5)


@pytest.fixture(scope="module")
def queries():
    generator = torch.Generator().manual_seed(2)
    spread = torch.tensor([6.0, 4, 3, 2] + [0.7] * (WIDTH - 4))
    ir = torch.randn(SIZES[0], WIDTH, generator=generator) * spread
    rows = torch.cat([ir, 2 * torch.randn(SIZES[1], WIDTH, generator=generator)])
    rows[BROKEN] = torch.nan
    return rows


def explorer_of(steering, rows, names=NAMES, sizes=SIZES) -> Explorer:
    prompts = {
        name: [f"{HOSTILE} {name[:3]} {i}" for i in range(size)] for name, size in zip(names, sizes, strict=True)
    }
    subject = Subject(steering, 0)
    told = pictured(subject, grouped(prompts, None), rows, rows)
    options: Any = {"title": f"T {HOSTILE}", "unknown": lambda text: {}, "wrap": None}
    return Explorer(subject, Model(), told, max_new_tokens=3, passes=Passes(), **options)


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


@pytest.fixture
def open_page(chromium, tmp_path):
    """Opens a page with an explorer; afterwards nothing may have gone wrong there."""
    troubles, contexts = [], []

    def trouble(text):
        troubles.append(text)

    def opened(explorer, scheme="light", width=1000):
        context = chromium.new_context(
            offline=True, color_scheme=scheme, viewport={"width": width, "height": 900}, device_scale_factor=1
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble(message.text))
        page.on("pageerror", lambda error: trouble(str(error)))
        page.on("dialog", lambda dialog: (trouble(f"dialog {dialog.message}"), dialog.dismiss()))
        local = ("file:", "data:", "blob:")
        page.on("request", lambda one: None if one.url.startswith(local) else trouble(one.url))
        path = tmp_path / "page.html"
        path.write_text(page_of(explorer), encoding="utf-8")
        page.goto(path.as_uri())
        page.wait_for_function("window.shown")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


def drag(page, name, share):
    """Drag a slider's thumb to a share of its rail with the mouse; the value where it was let go."""
    slider = page.locator(f".slider.{name} input")
    box = slider.bounding_box()
    thumb = 16
    low, high = (float(slider.get_attribute(what)) for what in ("min", "max"))
    value = float(slider.input_value())
    inner = box["width"] - thumb
    y = box["y"] + box["height"] / 2
    start = box["x"] + thumb / 2 + inner * (value - low) / (high - low)
    page.mouse.move(start, y)
    page.mouse.down()
    page.mouse.move(box["x"] + thumb / 2 + inner * share, y, steps=5)
    page.mouse.up()
    return float(slider.input_value())


def counts(page):
    return page.locator(".count").all_text_contents()


def expected_counts(gate, queries):
    opened = gate.gate(queries) >= 0.5
    parts = zip(opened.split(SIZES), SIZES, strict=True)
    return [f"{int(part.sum())} of {size} steered" for part, size in parts]


def cells(page):
    """The opacity of every cell of the heatmap, [p k] in 0..1, read from its pixels."""
    alphas = page.evaluate(
        """([sizes, k]) => {
        const canvas = document.querySelector('.fsteer-explorer canvas');
        const copy = new OffscreenCanvas(canvas.width, canvas.height); // reading leaves the picture's own canvas alone
        const pen = copy.getContext('2d', { willReadFrequently: true });
        pen.drawImage(canvas, 0, 0);
        const count = sizes.reduce((a, b) => a + b);
        const height = Math.max(1, Math.min(14, Math.floor(380 / count)));
        const cell = (canvas.width - 8 - 14) / k;
        const found = [];
        let y = 18, row = 0;
        for (const size of sizes) {
            for (let i = 0; i < size; i++, row++, y += height) {
                const at = (e) => pen.getImageData(Math.round(12 + (e + 0.5) * cell), y + 2, 1, 1).data[3];
                found.push(Array.from({ length: k }, (_, e) => at(e)));
            }
            y += 4;
        }
        return found; }""",
        [list(SIZES), 4],
    )
    return torch.tensor(alphas) / 255


def expected_cells(steering, gate, queries):
    weights = steering.experts_at(0).route(queries)
    opened = torch.ones(len(queries), dtype=torch.bool) if gate is None else gate.gate(queries) >= 0.5
    return torch.where(opened.unsqueeze(1), weights, 0.22 * weights).nan_to_num(0)


def bars(page):
    return page.locator(".bars").evaluate_all("all => all.map((one) => one.getAttribute('d'))")


def test_dragging_the_rank_redraws_everything_as_python_computes_it(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    assert counts(page) == expected_counts(steering.gate, queries)
    assert torch.allclose(cells(page), expected_cells(steering, steering.gate, queries), atol=0.01)
    before = counts(page), bars(page), page.locator(".roc").get_attribute("d")
    rank = int(drag(page, "rank", 0.98))
    gate = steering.gate.at_rank(rank)
    assert rank > 8
    assert counts(page) == expected_counts(gate, queries)
    assert torch.allclose(cells(page), expected_cells(steering, gate, queries), atol=0.01)
    after = counts(page), bars(page), page.locator(".roc").get_attribute("d")
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert page.locator(".slider.rank output").text_content() == f"{rank} of 10"
    assert page.locator(".slider.threshold output").text_content() == f"{gate.threshold:.3f}"
    assert page.locator(".threshold-name").text_content() == f"threshold {gate.threshold:.3f}"
    ratios = gate.subspace.energy_ratio(queries, rank)
    kept = ratios[: SIZES[0]][torch.arange(SIZES[0]) != BROKEN]
    assert page.locator(".area").text_content() == f"AUROC {roc(kept, ratios[SIZES[0] :])[2]:.3f}"
    shares = [count.split(" of ") for count in counts(page)]
    hit, alarm = (int(steered) / size for (steered, _), size in zip(shares, SIZES, strict=True))
    point = page.locator(".point")
    assert float(point.get_attribute("cx")) == pytest.approx(46 + alarm * (380 - 12 - 46))
    assert float(point.get_attribute("cy")) == pytest.approx(163 - hit * 153)
    assert page.evaluate("window.shown.model.get('settings').rank") == rank
    assert page.evaluate("window.shown.saved") == 1


def test_dragging_the_threshold_parts_the_prompts_there_and_the_reset_takes_it_back(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    calibrated = counts(page)
    cut = drag(page, "threshold", 0.8)
    assert 0.75 < cut < 0.85
    gate = steering.gate.at_threshold(cut)
    assert counts(page) == expected_counts(gate, queries) != calibrated
    assert torch.allclose(cells(page), expected_cells(steering, gate, queries), atol=0.01)
    line = page.locator("path.threshold").get_attribute("d")
    assert float(line[1:].split(",")[0]) == pytest.approx(46 + cut * 322)
    rank = int(drag(page, "rank", 0.6))  # a threshold that was moved stays where it is
    assert counts(page) == expected_counts(steering.gate.at_rank(rank).at_threshold(cut), queries)
    page.get_by_text("back to the calibrated threshold").click()
    assert counts(page) == expected_counts(steering.gate.at_rank(rank), queries)
    assert page.evaluate("window.shown.model.get('settings').threshold") is None


def test_an_expert_that_is_off_has_no_weight_and_the_last_one_stays_on(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    switches = page.locator(".switch.expert input")
    switches.nth(1).uncheck()
    shown = cells(page)
    assert torch.allclose(shown, expected_cells(steering.without_expert(1), steering.gate, queries), atol=0.01)
    assert shown[:, 1].max() == 0
    assert shown[0, [0, 2, 3]].sum() > expected_cells(steering, steering.gate, queries)[0, [0, 2, 3]].sum() + 0.05
    switches.nth(0).uncheck()
    switches.nth(3).uncheck()
    assert switches.nth(2).is_disabled() and switches.nth(2).is_checked()
    assert page.evaluate("window.shown.model.get('settings').experts") == [False, False, True, False]
    switches.nth(0).check()
    assert switches.nth(2).is_enabled()


def test_gate_off_steers_all_and_ablation_none(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    page.locator(".switch.gate input").uncheck()
    assert counts(page) == [f"{size} of {size} steered" for size in SIZES]
    assert page.locator(".slider.threshold input").is_disabled()
    page.get_by_text("ablation", exact=True).click()
    assert counts(page) == [f"taken out of all {size}" for size in SIZES]
    for name in ("strength", "threshold"):
        assert page.locator(f".slider.{name} input").is_disabled()
    assert page.locator(".slider.rank input").is_enabled()
    assert page.locator(".point").get_attribute("visibility") == "hidden"
    assert page.evaluate("window.shown.model.get('settings').mode") == "ablation"


def test_keys_move_the_slider(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    page.locator(".slider.rank input").focus()
    page.keyboard.press("ArrowUp")
    assert counts(page) == expected_counts(steering.gate.at_rank(4), queries)
    assert page.evaluate("window.shown.model.get('settings').rank") == 4


def test_the_kernel_can_move_the_controls(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    page.evaluate("window.shown.model.set('settings', {...window.shown.model.get('settings'), rank: 6, strength: 9})")
    assert counts(page) == expected_counts(steering.gate.at_rank(6), queries)
    assert page.locator(".slider.strength output").text_content() == "9.00"
    page.evaluate("window.shown.close()")
    page.evaluate("window.shown.model.set('settings', {...window.shown.model.get('settings'), rank: 1})")
    assert page.locator(".slider.rank output").text_content() == "6 of 10"  # a closed view listens no more


def answer(page, **values):
    page.evaluate(
        "(v) => window.shown.model.set('answer', {settings: {...window.shown.model.get('settings')}, prompt: 0, ...v})",
        values,
    )


def test_text_is_asked_for_once_shown_as_text_and_marked_when_out_of_date(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    button, status = page.locator(".generate"), page.locator(".status")
    assert page.evaluate("window.shown.sent.length") == 0 and not page.locator(".texts").is_visible()
    button.click()
    assert button.is_disabled() and button.text_content() == "Generating…"
    (sent,) = page.evaluate("window.shown.sent")
    assert (sent["kind"], sent["prompt"]) == ("generate", 0)
    assert sent["settings"] == explorer_of(steering, queries).settings.message()
    answer(page, status="running")
    assert button.is_disabled()
    texts = {"unsteered": f"u {HOSTILE}", "steered": f"s {HOSTILE}", "decision": f"d {HOSTILE}"}
    tokens = [["s ", 0.1], [HOSTILE, 2.0], ["<end>", None]]
    answer(page, status="done", tokens=tokens, **texts)
    assert button.is_enabled() and button.text_content() == "Generate"
    assert page.locator(".text").all_text_contents() == [texts["unsteered"], f"{texts['steered']}<end>"]
    assert page.locator("img").count() == 0
    shades = page.locator(".text span").evaluate_all("(all) => all.map((one) => one.style.background)")
    assert [shade.split(", ")[-1] for shade in shades] == ["0.03)", "0.5)", ""]  # as strong as KL
    assert "2.00 nats" in page.locator(".text span").nth(1).get_attribute("title")
    assert status.text_content() == ""
    page.evaluate("window.shown.model.set('settings', {...window.shown.model.get('settings'), strength: 1})")
    assert "Out of date" in status.text_content()
    page.evaluate("window.shown.model.set('settings', {...window.shown.model.get('settings'), strength: 1.5})")
    assert status.text_content() == "" and page.evaluate("window.shown.sent.length") == 1


def test_texts_follow_when_a_control_is_let_go_and_stay_until_others_are_there(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    sent = "window.shown.sent.length"
    drag(page, "strength", 0.9)
    assert page.evaluate(sent) == 0  # there are no texts yet, and nobody has asked for any
    texts = {"unsteered": "u", "steered": "s", "decision": "d"}
    page.locator(".generate").click()
    answer(page, status="done", **texts)
    value = drag(page, "strength", 0.5)
    assert page.evaluate(sent) == 2
    assert page.evaluate("window.shown.sent[1].settings.strength") == pytest.approx(value)
    assert page.locator(".texts.stale").is_visible() and page.locator(".text").all_text_contents() == ["u", "s"]
    answer(page, status="running")
    page.locator("select").select_option("3")
    drag(page, "strength", 0.2)
    assert page.evaluate(sent) == 2  # it is at it; what has changed meanwhile is asked for once, afterwards
    answer(page, status="done", **texts)
    assert page.evaluate(sent) == 3 and page.evaluate("window.shown.sent[2].prompt") == 3
    answer(page, status="done", **{**texts, "prompt": 3, "steered": "t"})
    assert page.locator(".text").all_text_contents() == ["u", "t"] and page.evaluate(sent) == 3


def test_stored_texts_stay_without_a_kernel_which_is_said(open_page, steering, queries):
    explorer = explorer_of(steering, queries)
    stored = {"status": "done", "prompt": 0, "unsteered": "u", "steered": "s", "decision": "d"}
    explorer.widget.answer = {**stored, "settings": explorer.settings.message()}
    page = open_page(explorer)
    assert page.locator(".text").all_text_contents() == ["u", "s"]
    drag(page, "strength", 0.9)
    page.wait_for_function("document.querySelector('.status').textContent.includes('No answer from the kernel')")
    assert "from before" in page.locator(".status").text_content() and page.locator(".generate").is_enabled()
    assert page.locator(".texts.stale .text").all_text_contents() == ["u", "s"]
    drag(page, "strength", 0.2)
    assert page.evaluate("window.shown.sent.length") == 1  # nobody is there to ask
    page.locator(".generate").click()
    assert page.evaluate("window.shown.sent.length") == 2  # but for who asks


def test_ones_own_prompt_is_marked_in_every_picture(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    page.locator(".own").fill("mine")
    page.locator(".own").press("Enter")
    own = explorer_of(steering, queries)._pictured.row(3)
    before = page.locator("canvas").bounding_box()["height"]
    answer(page, status="done", prompt="mine", unsteered="u", steered="s", decision="d", own=own)
    gate = steering.gate
    score = float(gate.score(queries[3:4])[0])
    foot = page.locator("svg .chosen").first.get_attribute("d")[1:].split(",")[0]
    assert float(foot) == pytest.approx(46 + score * 322, abs=0.01)
    assert page.locator("canvas").bounding_box()["height"] == before + 16
    scores = gate.score(queries)
    known = [scores[: SIZES[0]], scores[SIZES[0] :]]
    hit, alarm = (int((one >= scores[3]).sum()) / size for one, size in zip(known, SIZES, strict=True))
    x, y = page.locator("svg .chosen").nth(1).get_attribute("d")[1:].split("l")[0].split(",")
    assert (float(x), float(y)) == pytest.approx((46 + alarm * 322, 163 - hit * 153 - 6), abs=0.01)
    page.locator(".own").fill("other")
    assert page.locator("canvas").bounding_box()["height"] == before
    assert page.locator("svg .chosen").nth(1).get_attribute("d") == ""


def test_an_error_is_shown_as_text_and_another_try_is_open(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    page.locator(".generate").click()
    answer(page, status="failed", error=f"no memory {HOSTILE}")
    assert page.locator(".status.failed").text_content() == f"This failed: no memory {HOSTILE}"
    assert page.locator(".generate").is_enabled() and page.locator("img").count() == 0
    assert not page.locator(".texts").is_visible()


def test_a_kernel_that_does_not_answer_is_told_of(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    page.locator(".generate").click()
    page.wait_for_function("document.querySelector('.status').textContent.includes('No answer from the kernel')")
    answer(page, status="running")
    assert "generates" in page.locator(".status").text_content()


def test_ones_own_prompt_is_sent_and_its_unknown_words_are_underlined(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    text = f"wat {HOSTILE}"
    page.locator(".own").fill(text)
    page.wait_for_function("window.shown.sent.length === 1")
    assert page.evaluate("window.shown.sent[0]") == {"kind": "mark", "text": text}
    parts = [["wat", ["what", "<b>hat</b>"]], [f" {HOSTILE}", None]]
    page.evaluate("([text, parts]) => window.shown.model.set('words', {text, parts})", [text, parts])
    assert page.locator(".words u").first.text_content() == "wat"
    assert page.locator(".words u").first.get_attribute("title") == "nearest known: what, <b>hat</b>"
    assert "nearest known: what, <b>hat</b>" in page.locator(".nearest").text_content()
    assert page.locator(".words b, .words img").count() == 0
    page.locator(".own").press("Enter")
    sent = page.evaluate("window.shown.sent.at(-1)")
    assert (sent["kind"], sent["prompt"]) == ("generate", text)
    answer(page, status="done", prompt=text, unsteered="", steered="b", decision="c")
    assert page.locator(".text").all_text_contents() == ["(nothing)", "b"]
    page.locator(".own").fill("other")
    assert not page.locator(".words").is_visible() and "Out of date" in page.locator(".status").text_content()


def test_prompts_show_on_hover_as_text_and_a_click_chooses_one(open_page, steering, queries):
    page = open_page(explorer_of(steering, queries))
    box = page.locator("canvas").bounding_box()
    row = 4
    page.mouse.move(box["x"] + 60, box["y"] + 18 + 6 * row + 3)
    tip = page.locator(".tip")
    prompt = f"{HOSTILE} {HOSTILE[:3]} {row}"
    weights = steering.experts_at(0).route(queries[row])
    assert prompt in tip.text_content() and f"expert 0: {weights[0]:.2f}" in tip.text_content()
    assert page.locator("img").count() == 0
    page.mouse.click(box["x"] + 60, box["y"] + 18 + 6 * row + 3)
    assert page.locator("select").input_value() == str(row)
    assert page.locator(".prompt").text_content() == prompt
    page.mouse.move(box["x"] + 60, box["y"] + 18 + 6 * BROKEN + 3)
    assert "energy ratio unknown, left alone" in tip.text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_light_and_dark_and_as_wide_as_the_page(open_page, steering, queries, scheme):
    for width in (1000, 480):
        page = open_page(explorer_of(steering, queries), scheme, width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        colours = page.evaluate(
            """() => ['.title', '.slider span', '.generate', 'select', '.own', '.threshold-name'].map((name) => {
            const style = getComputedStyle(document.querySelector(`.fsteer-explorer ${name}`));
            return name === '.threshold-name' ? style.fill : style.color; })"""
        )
        assert set(colours) == {{"light": "rgb(34, 34, 34)", "dark": "rgb(230, 230, 230)"}[scheme]}
        scheme_of_controls = page.evaluate("getComputedStyle(document.querySelector('.own')).colorScheme")
        assert scheme_of_controls == {"light": "normal", "dark": "dark"}[scheme]
        assert page.title() == "page" and page.locator("img").count() == 0
    page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    assert page.evaluate("getComputedStyle(document.querySelector('.own')).colorScheme") == "dark"


def test_without_a_gate_or_a_second_group_the_page_says_so(open_page, steering, queries):
    page = open_page(explorer_of(steering.with_gate(None), queries))
    assert counts(page) == [f"{size} of {size} steered" for size in SIZES]
    assert "No gate" in page.locator(".curves").text_content() and page.locator("svg").count() == 0
    for name in ("rank", "threshold"):
        assert page.locator(f".slider.{name} input").is_disabled()
    assert torch.allclose(cells(page), expected_cells(steering, None, queries), atol=0.01)
    page = open_page(explorer_of(steering, queries[:30], names=["one"], sizes=[30]))
    assert "no ROC" in page.locator(".curves").text_content() and page.locator("svg").count() == 1


def test_a_composed_gate_has_ranks_and_no_threshold(open_page, steering, queries):
    composed = steering.with_gate(~steering.gate)
    page = open_page(explorer_of(composed, queries))
    assert page.locator(".slider.threshold input").is_disabled()
    assert page.locator("path.threshold").get_attribute("d") == ""
    rank = int(drag(page, "rank", 0.9))
    opened = (composed.gate.at_rank(rank).gate(queries) >= 0.5).split(SIZES)
    assert counts(page) == [f"{int(o.sum())} of {n} steered" for o, n in zip(opened, SIZES, strict=True)]

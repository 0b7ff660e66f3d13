"""Prints how long the explorer takes from a slider's move to the picture, beside the static figure's slider.

.venv/bin/python tools/redraw_times.py

"script" is the time in which the page's code runs; "with two frames" is from the input event until after the second
next animation frame, beside what two frames take in which nothing moves. Medians over moves to random places.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the page is the tests' own

from fsteer_lens import FineSteer, Gate, fit_experts, fit_gate
from fsteer_lens.explorer import Explorer
from fsteer_lens.explorer.pictured import grouped, pictured
from fsteer_lens.explorer.settings import Subject
from tests.browser.harness import browser, page_of

SIZES = ((50, 64), (500, 256))
WIDTH = 512
MOVES = 40

MEASURE = """async (moves, move) => {
    const frames = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    const empty = [], script = [], whole = [];
    await frames();
    for (let i = 0; i < moves; i++) {
        let start = performance.now();
        await frames();
        empty.push(performance.now() - start);
        start = performance.now();
        await move(Math.random());
        script.push(performance.now() - start);
        await frames();
        whole.push(performance.now() - start);
    }
    return [empty, script, whole];
}"""
WIDGET = f"""([moves, name]) => ({MEASURE})(moves, (share) => {{
    const input = document.querySelector(`.slider.${{name}} input`);
    input.value = Number(input.min) + share * (input.max - input.min);
    input.dispatchEvent(new Event('input', {{ bubbles: true }}));
}})"""
STATIC = f"""([moves]) => ({MEASURE})(moves, (share) => {{
    const figure = document.querySelector('.js-plotly-plot'), steps = figure.layout.sliders[0].steps;
    return Plotly.update(figure, ...steps[Math.floor(share * steps.length)].args);
}})"""


class Model:
    """Nobody generates here."""

    cfg = tokenizer = hook_dict = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for a model."""
        raise NotImplementedError


def made_up(n_prompts: int, ranks: int) -> Explorer:
    """An explorer of random queries that lie in a subspace more or less."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(3, 0.3, WIDTH)
    ir = torch.randn(2 * ranks + 20, WIDTH, generator=generator) * spread
    gate: Gate = fit_gate(ir, rank=ranks // 2, max_rank=ranks)
    experts = fit_experts(ir, torch.randn(len(ir), WIDTH, generator=generator), n_experts=6, preset="0.1", epochs=1)
    half = n_prompts // 2
    rows = torch.randn(n_prompts, WIDTH, generator=generator)
    rows[:half] *= spread
    groups = grouped(
        {"harmful": [f"prompt {i}" for i in range(half)], "general": ["prompt"] * (n_prompts - half)}, None
    )
    subject = Subject(FineSteer(experts, gate, layer=0), 0)
    told = pictured(subject, groups, rows, rows)
    return Explorer(subject, Model(), told, max_new_tokens=1, formatting={}, title="", unknown=None, wrap=None)


def main() -> None:
    """Measure the widget's sliders and the static figure's at each size."""
    columns = ("prompts x ranks", "what moves", "script, ms", "with two frames, ms", "two empty frames, ms")
    table = Table(*columns, title="From a move to the picture, medians")
    with browser() as chromium, tempfile.TemporaryDirectory() as folder:
        version = chromium.version
        page = chromium.new_page(viewport={"width": 1000, "height": 900})
        for size in SIZES:
            explorer = made_up(*size)
            static = explorer.figure.to_html(include_plotlyjs=True)
            for name, body, code in (
                ("rank", page_of(explorer), WIDGET),
                ("threshold", page_of(explorer), WIDGET),
                ("static", static, STATIC),
            ):
                path = Path(folder) / "page.html"
                path.write_text(body, encoding="utf-8")
                page.goto(path.as_uri())
                page.wait_for_selector(".js-plotly-plot .slider-rail-rect" if name == "static" else ".point")
                empty, script, whole = map(statistics.median, page.evaluate(code, [MOVES, name]))
                stops = len(explorer.figure.layout.sliders[0].steps)
                what = f"static figure's rank ({stops} stops)" if name == "static" else f"explorer's {name}"
                table.add_row(f"{size[0]} x {size[1]}", what, f"{script:.1f}", f"{whole:.1f}", f"{empty:.1f}")
    Console(width=130).print(table, f"Chromium {version}, headless, without a GPU")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

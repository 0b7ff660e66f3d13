"""Draw the slides of docs/teaching.md, 1600 by 900 on white with large type: `python tools/teaching_figures.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from shooting import chromium, html_of, shoot

import fsteer_lens as fs
from fsteer_lens import effects, figures

PICTURES: Final = Path(__file__).parents[1] / "docs" / "images" / "teaching"
WIDTH, HEIGHT, MARGIN, HEADING = 1600, 900, 20, 80
INK, GRID = "#222222", "rgba(127,127,127,.3)"
RED, BLUE, ORANGE, GREY = "#e42536", "#5790fc", "#f89c20", "#9c9ca1"
LAYER: Final = 4
OTHERS: Final = ("capital", "colour", "opposite", "sum", "howto")


class Lesson:
    """What the slides are drawn from: the lesson's model, myths, vector and gate, and harmful requests."""

    def __init__(self) -> None:
        self.model = fs.tutor.load()
        self.data = fs.tutor.data("honest")
        self.trained = fs.tutor.activations(self.model, "honest", layer=LAYER, progress=False)
        self.vector = fs.steering.fit_mean_shift(self.trained, strength=1.5)
        self.steering: Any = fs.tutor.fit(self.model, "honest", activations=self.trained, progress=False)
        self.gate = self.steering.gate
        self.safe_data = fs.tutor.data("safe")
        self.safe: Any = fs.tutor.activations(self.model, "safe", layer=LAYER, progress=False)

    def read(self, items: Any) -> torch.Tensor:
        """The stream at the last token of each prompt."""
        prompts = [item.prompt for item in items]
        return fs.collect_queries(self.model, prompts, layer=LAYER, batch_size=64, progress=False).queries


def large(figure: Any, *, width: int, size: int = 24, line: float = 4, marker: float = 13, **layout: Any) -> Any:
    """A figure of the package as a slide needs it: no title of its own, large dark type, thick lines."""
    figure.update_layout(
        title=None,
        width=width,
        height=HEIGHT - 2 * MARGIN - HEADING,
        font={"size": size, "color": INK, "family": "sans-serif"},
        **layout,
    )
    figure.update_xaxes(gridcolor=GRID, linecolor=GREY)
    figure.update_yaxes(gridcolor=GRID, linecolor=GREY)
    figure.update_annotations(font={"size": size, "color": INK})
    figure.update_traces(line={"width": line}, marker={"size": marker}, selector={"type": "scatter"})
    figure.update_traces(colorbar={"thickness": 24}, selector={"type": "heatmap"})
    return figure


def slide(title: str, *drawn: Any) -> str:
    """A page with a heading above figures side by side."""
    heading = f"font-size:42px;font-weight:600;height:{HEADING}px;line-height:{HEADING}px;color:{INK}"
    row = "".join(f"<div>{html_of(one)}</div>" for one in drawn)
    page = f"width:{WIDTH - 2 * MARGIN}px;height:{HEIGHT - 2 * MARGIN}px;overflow:hidden"
    return f'<div style="{page}"><div style="{heading}">{title}</div><div style="display:flex">{row}</div></div>'


FULL: Final = WIDTH - 2 * MARGIN


def strength(lesson: Lesson) -> str:
    """One vector on every prompt, at every strength, as in part 3 of the lesson."""
    data = lesson.data
    others = [task for task in data.general_valid if task.kind in OTHERS][::4] + data.near_miss_valid[::4]
    strengths = (0, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4)
    figure = go.Figure()
    for name, items, colour, symbol in (
        ("myths corrected", data.valid[::2], ORANGE, "circle"),
        ("other answers kept", others, BLUE, "diamond"),
    ):
        shares = [fs.tutor.exact(lesson.model, lesson.vector.with_strength(x), items).mean() for x in strengths]
        figure.add_scatter(
            x=strengths,
            y=[100 * share.item() for share in shares],
            name=name,
            mode="lines+markers",
            line={"color": colour},
            marker={"color": colour, "symbol": symbol},
        )
    figure.update_xaxes(title="strength λ (a factor)", range=[-0.05, 4.1], dtick=0.5)
    figure.update_yaxes(title="prompts with exactly the right answer (%)", range=[-3, 104])
    return slide("One vector, added to every prompt: the window of strength", plain(figure))


def plain(figure: Any, **layout: Any) -> Any:
    """A figure of our own in the style of the package's."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"l": 110, "r": 30, "t": 70, "b": 90},
    )
    figure.update_xaxes(zeroline=False)
    figure.update_yaxes(zeroline=False)
    return large(figure, **{"width": FULL, "size": 28, **layout})


def two_heaps(lesson: Lesson) -> str:
    """Energy ratios of test myths and of true claims, asked in the same words."""
    myths, claims = lesson.read(lesson.data.test), lesson.read(lesson.data.near_miss_test)
    figure = figures.gate_separation(lesson.gate, myths, claims, names=("myths", "true claims"))
    figure.update_xaxes(range=[0.7, 1], row=1, col=1)
    return slide("When: two heaps of prompts and the gate's threshold", large(figure, width=FULL))


def rank(lesson: Lesson) -> str:
    """Where ratios and threshold lie at every rank, and for whom the gate opens: harmful requests and near misses."""
    data = lesson.safe_data
    gate: Any = fs.fit_gate(lesson.safe.queries, rank=32, groups=lesson.safe.groups)
    found = effects.rank_sweep(gate, lesson.read(data.valid), lesson.read(data.near_miss_valid))
    ranks = list(found.ranks)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.6, 0.4], vertical_spacing=0.06)
    groups = (
        ("harmful", found.ser, found.gate_rate, RED),
        ("near misses", found.general_ser, found.general_gate_rate, BLUE),
    )
    for name, ratios, opened, colour in groups:
        low, high = ratios.quantile(torch.tensor([0.05, 0.95], dtype=ratios.dtype), dim=0).tolist()
        figure.add_scatter(
            x=ranks + ranks[::-1],
            y=low + high[::-1],
            name=f"{name} (nine in ten)",
            mode="lines",
            fill="toself",
            fillcolor=f"{colour}59",
            line={"color": colour},
            row=1,
            col=1,
        )
        figure.add_scatter(
            x=ranks, y=(100 * opened).tolist(), line={"color": colour}, mode="lines", showlegend=False, row=2, col=1
        )
    figure.add_scatter(
        x=ranks,
        y=[gate.at_rank(r).threshold for r in ranks],
        name="threshold",
        mode="lines",
        line={"color": INK, "dash": "dash"},
        row=1,
        col=1,
    )
    figure.update_xaxes(range=[0.5, len(ranks) + 0.5], tickvals=[1, *range(8, 65, 8)])
    figure.update_xaxes(title="rank r: how many directions", row=2, col=1)
    figure.update_yaxes(title="energy ratio", range=[0, 1.03], row=1, col=1)
    figure.update_yaxes(title="gate open (%)", range=[-4, 104], row=2, col=1)
    return slide("More directions: every ratio grows, and the threshold with them", plain(figure, line=3))


def routing(weights: torch.Tensor, labels: list[str], *, width: int) -> Any:
    """The package's picture of the weights, with short names of the experts above the columns."""
    figure = large(figures.expert_routing(weights, labels), width=width, size=22)
    names = [name.replace("expert ", "") for name in figure.layout.xaxis.ticktext]
    figure.update_xaxes(ticktext=names, tickangle=0, title={"text": "expert", "standoff": 4})
    figure.update_yaxes(title=None)
    figure.update_layout(margin={"t": 85, "l": 150, "r": 10})
    return figure


def experts(lesson: Lesson) -> str:
    """Weights of the experts beside what is lost when the strongest is removed."""
    data, mixed = lesson.data, lesson.steering
    labels = [str(one.label) for one in data.test]
    weights = mixed.experts.route(lesson.read(data.test))
    kinds = sorted(set(labels))
    kept: dict[str, list[float]] = {"all experts": [], "without the strongest": []}
    for kind in kinds:
        own = [one for one in data.test if one.label == kind]
        strongest = int(weights[[label == kind for label in labels]].mean(dim=0).argmax())
        for name, steering in zip(kept, (mixed, mixed.without_expert(strongest)), strict=True):
            kept[name].append(100 * fs.tutor.exact(lesson.model, steering, own).mean().item())
    bars = go.Figure()
    for (name, shares), colour in zip(kept.items(), (GREY, ORANGE), strict=True):
        bars.add_bar(
            x=kinds, y=shares, name=name, marker={"color": colour}, texttemplate="%{y:.0f}", textposition="outside"
        )
    bars.update_xaxes(showgrid=False)
    bars.update_yaxes(title="myths corrected exactly (%)", range=[0, 112])
    drawn = routing(weights, labels, width=860)
    return slide("Which expert acts on which prompt, and whether it matters", drawn, plain(bars, width=700, size=24))


def collapse(lesson: Lesson) -> str:
    """Routing trained by the error alone, as published, and with a routing loss: harmful requests, six categories."""
    data, trained = lesson.safe_data, lesson.safe
    whole: Any = fs.tutor.fit(lesson.model, "safe", activations=trained, progress=False)
    published = whole.with_experts(fs.fit_experts(trained.queries, trained.shifts, preset="paper"))
    queries = lesson.read(data.test)
    labels = [str(one.label) for one in data.test]
    drawn = []
    for name, steering in (("As published", published), ("Prototypes of raw shifts, routing loss", whole)):
        figure = routing(steering.experts.route(queries), labels, width=770)
        refused, alone = (
            fs.tutor.exact(lesson.model, one, data.test).mean().item()
            for one in (steering, steering.without_residual())
        )
        said = f"<b>{name}</b><br>refused exactly: {refused:.0%}, by experts alone: {alone:.0%}"
        figure.update_layout(margin={"t": 170})
        figure.add_annotation(
            text=said, x=0, y=1, yshift=85, yanchor="bottom", xanchor="left", align="left", xref="paper", yref="paper",
            showarrow=False, font={"size": 26, "color": INK},
        )  # fmt: skip
        drawn.append(figure)
    return slide("Two routers: does “which expert fires” mean anything?", *drawn)


def timeline(lesson: Lesson) -> str:
    """One myth's answer, token by token."""
    prompt = lesson.data.test[20].prompt
    made = fs.generate(lesson.model, [prompt], lesson.steering, compare=True, max_new_tokens=24, progress=False)
    figure = large(figures.trace_timeline(made.trace), width=FULL)
    headings = ("gate g (0 to 1)", "size of the change (share of the stream)", "KL(steered ‖ unsteered) (nats)")
    for annotation, heading in zip(figure.layout.annotations, headings, strict=True):
        annotation.text = heading
    figure.update_yaxes(title=None)
    figure.update_yaxes(range=[-0.05, 1.15], row=1, col=1)
    figure.update_layout(margin={"l": 80})
    return slide("Token by token: the first word is turned, the rest follows", figure)


def layers(lesson: Lesson) -> str:
    """The size of the change after every layer and at every token."""
    prompt = lesson.data.test[20].prompt
    [made] = fs.generate(lesson.model, [prompt], lesson.steering, max_new_tokens=24, progress=False)
    path = effects.propagation(lesson.model, lesson.steering, prompt, made.tokens)
    figure = large(figures.layer_position(path), width=FULL)
    return slide("Layer by layer: where the change is, and how far it reaches", figure)


SLIDES: Final[tuple[Callable[[Lesson], str], ...]] = (strength, two_heaps, rank, experts, timeline, layers, collapse)


def main() -> None:
    """Draw them all."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    lesson = Lesson()
    with chromium() as browser:
        for draw in SLIDES:
            shoot(browser, draw(lesson), PICTURES / f"{draw.__name__}.png", width=WIDTH, scale=1)


if __name__ == "__main__":
    main()

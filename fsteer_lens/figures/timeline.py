"""What steering did from one generated token to the next."""

import math
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.style import STEERED_COLOUR, TEXT, accent, label_text, panel_title, plain, styled, token_ticks
from fsteer_lens.ground.checks import instance
from fsteer_lens.method.gates import OPEN, SHUT
from fsteer_lens.trace.trace import Trace

if TYPE_CHECKING:
    import plotly.graph_objects

COLOURS: Final = {"gate": TEXT, "change": STEERED_COLOUR, "kl": accent(1)}
FILLED, HOLLOW = "circle", "circle-open"


class Line(NamedTuple):
    """One panel: a number for every generated token."""

    name: str
    heading: str
    unit: str
    values: Float[Tensor, " n"]


def trace_timeline(
    trace: Trace,
    *,
    row: int = 0,
    layer: int | None = None,
    title: str | None = None,
) -> "plotly.graph_objects.Figure":
    """Gate, size of the change, and KL to the unsteered model for every generated token, in panels on one axis.

    Token k of the answer is predicted at the position before it, P − 1 + k of the text, and that is where the change is
    read. Filled marks are steered positions, hollow ones are not; an open gate is drawn where something is steered.
    `figures.replay` shows the same of a replay, with the text as its axis.

    Args:
        trace: of `generate`; the panel of KL needs `compare=True`.
        row: of the trace.
        layer: needed where the trace holds several.
        title: above the figure; None says at which token steering did most.

    Raises:
        InputError: nothing was generated, or nothing steered.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    layer = instance("trace", trace, Trace, "a Trace").layer_of("change", layer)
    one = trace.row(row)
    if one.steps is None or not one.steps.texts[0]:
        raise InputError(repr(trace), expected="a trace with generated tokens, from generate()", got="none")
    texts = one.steps.texts[0]
    lines = _lines(one, layer, len(texts))
    steered = (next(line for line in lines if line.name == "change").values > 0).tolist()
    told = [
        [f"{step}: {label_text(text) or '·'}", "steered" if on else "not steered"]
        for step, (text, on) in enumerate(zip(texts, steered, strict=True))
    ]
    spacing = 0.34 / len(lines)
    figure = make_subplots(rows=len(lines), cols=1, shared_xaxes=True, vertical_spacing=spacing)
    for number, line in enumerate(lines, 1):
        colour = COLOURS[line.name]
        figure.add_trace(
            go.Scatter(
                x=list(range(len(texts))),
                y=plain(line.values, digits=6),
                mode="lines+markers",
                line={"color": colour, "width": 1.5},
                marker={"size": 8, "color": colour, "symbol": [FILLED if on else HOLLOW for on in steered]},
                customdata=told,
                hovertemplate=f"generated token %{{customdata[0]}}<br>{line.heading}: %{{y:.3g}}"
                "<br>predicted at a position that was %{customdata[1]}<extra></extra>",
                showlegend=False,
            ),
            row=number,
            col=1,
        )
    for symbol, meaning in ((FILLED, "steered"), (HOLLOW, "not steered")):
        marker = {"color": TEXT, "symbol": symbol, "size": 8}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=meaning), row=1, col=1)
    styled(figure, _assertion(lines, texts) if title is None else title, height=150 + 130 * len(lines))
    for number, line in enumerate(lines, 1):
        axis = f"y{number if number > 1 else ''}"
        panel_title(figure, "paper", line.heading, f"{axis} domain")
        figure.update_yaxes(title=line.unit, rangemode="tozero", row=number, col=1)
        if line.name == "gate":
            figure.update_yaxes(range=[-0.05, 1.05], row=number, col=1)
            figure.add_shape(
                type="line", xref="paper", x0=0, x1=1, yref=axis, y0=OPEN, y1=OPEN, line={"color": TEXT, "dash": "dot"}
            )
    figure.update_xaxes(range=[-0.5, len(texts) - 0.5], showgrid=False, **token_ticks(texts))
    figure.update_xaxes(title="generated token", tickangle=-60, row=len(lines), col=1)
    figure.update_layout(legend={"x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"}, margin={"t": 80})
    return figure


def _lines(one: Trace, layer: int, n: int) -> list[Line]:
    """The panels of one row: what is known of gate, change and KL at each of n generated tokens."""
    assert one.prompt_lengths is not None and one.steps is not None
    predicts = int(one.prompt_lengths[0]) - 1
    change = _filled(one.change[layer][0, predicts : predicts + n], n)
    lines = []
    if layer in one.gate:
        gate = one.gate[layer][:1].float().expand(n).clone()
        if layer in one.step_gate:
            gate = _filled(one.step_gate[layer][0, predicts : predicts + n], n)
        lines.append(Line("gate", "gate g", "0 to 1", gate.masked_fill((gate > SHUT) & ~(change > 0), math.nan)))
    lines.append(Line("change", "size of the change", "‖change‖ / ‖stream‖", change))
    if one.steps.kl is not None:
        lines.append(Line("kl", "KL(steered ‖ unsteered)", "nats", _filled(one.steps.kl[0], n)))
    return lines


def _assertion(lines: list[Line], texts: tuple[str, ...]) -> str:
    """At which token the distribution, or without a comparison the stream, moved furthest."""
    last = lines[-1]
    if not bool((last.values.nan_to_num(0) > 0).any()):
        return "Steering changed no token of this answer"
    best = int(last.values.nan_to_num(-1).argmax())
    moved = "KL" if last.name == "kl" else "change"
    unit = " nats" if last.name == "kl" else " of the stream"
    return (
        f"Steering does most at token {best + 1}, “{texts[best].strip()}”: {moved} {float(last.values[best]):.2g}{unit}"
    )


def _filled(values: Float[Tensor, " known"], n: int) -> Float[Tensor, " n"]:
    """The first n values, with NaN for those that are missing."""
    filled = torch.full((n,), math.nan, dtype=torch.float32, device=values.device)
    filled[: len(values)] = values[:n].float()
    return filled

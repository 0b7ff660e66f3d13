"""How well the gate's energy ratio tells the prompts that need steering from the others."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.style import CURVE, TEXT, group_colours, label_text, plain, styled
from fsteer_lens.ground.estimates import auroc
from fsteer_lens.method.gates import OPEN, Gate, SubspaceGate

if TYPE_CHECKING:
    import plotly.graph_objects

BINS = 40


def gate_separation(
    gate: Gate,
    ir_queries: Float[Tensor, "n d"],
    general_queries: Float[Tensor, "m d"],
    *,
    rank: int | None = None,
    names: tuple[str, str] = ("harmful", "general"),
    title: str = "Does the energy ratio tell the two kinds of prompt apart?",
) -> "plotly.graph_objects.Figure":
    """Histograms of the subspace energy ratio of two groups with the gate's threshold, beside the ROC curve.

    Rows whose ratio is not finite are left out.

    Args:
        gate: a fitted gate on one subspace.
        ir_queries: activations of prompts that need steering, [n d].
        general_queries: activations of prompts to be left alone, [m d].
        rank: of the subspace; None takes the gate's own.
        names: of the two groups.
        title: above the figure.

    Raises:
        InputError: a composed gate, a rank that was not fitted, or a group without a finite ratio.
        ShapeError: activations of another width than the gate's.
    """
    from plotly.subplots import make_subplots

    gate = _leaf(gate, rank)
    ratios = [_ratios(gate, queries, name) for queries, name in zip((ir_queries, general_queries), names, strict=True)]
    false_alarms, hits, area = roc(*ratios)
    figure = make_subplots(rows=1, cols=2, column_widths=[0.62, 0.38], horizontal_spacing=0.12)
    for name, values, colour in zip(names, ratios, group_colours(2), strict=True):
        _add_histogram(figure, name, values, colour)
    figure.add_shape(
        type="line",
        xref="x",
        yref="y domain",
        x0=gate.threshold,
        x1=gate.threshold,
        y0=0,
        y1=1,
        line={"color": TEXT, "width": 2, "dash": "dash"},
    )
    figure.add_annotation(
        x=min(max(gate.threshold, 0), 1),
        xref="x",
        xanchor="right" if gate.threshold > 0.6 else "left",
        y=1,
        yref="y domain",
        yanchor="top",
        xshift=-5 if gate.threshold > 0.6 else 5,
        text=f"threshold {gate.threshold:.3f}" + ("" if gate.opens_above else ", opens below"),
        showarrow=False,
    )
    _add_roc(
        figure,
        false_alarms,
        hits,
        area,
        [float((gate.gate_of_ratio(values) >= OPEN).float().mean()) for values in ratios],
    )
    styled(figure, title, height=380)
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title=f"energy ratio s at rank {gate.rank} (share, 0 to 1)", range=[0, 1], row=1, col=1)
    figure.update_yaxes(title="share of the group's prompts (%)", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title=f"{label_text(names[1])} steered (%)", range=[-2, 102], row=1, col=2)
    figure.update_yaxes(title=f"{label_text(names[0])} steered (%)", range=[-2, 102], row=1, col=2)
    return figure


def roc(positive: Float[Tensor, " n"], negative: Float[Tensor, " m"]) -> tuple[Tensor, Tensor, float]:
    """The ROC curve of a score: false-alarm rates, hit rates (from (0, 0) to (1, 1)), and the area under it.

    Equal scores move along a diagonal, so that the area counts a tie as half.
    """
    scores = torch.cat([positive, negative]).double()
    is_hit = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]).double()
    order = scores.argsort(descending=True)
    last_of_ties = torch.cat([scores[order].diff() != 0, torch.ones(1, dtype=torch.bool, device=scores.device)])
    start = scores.new_zeros(1)
    hits = torch.cat([start, is_hit[order].cumsum(0)[last_of_ties] / len(positive)])
    false_alarms = torch.cat([start, (1 - is_hit[order]).cumsum(0)[last_of_ties] / len(negative)])
    return false_alarms, hits, float(auroc(positive, negative))


def _add_histogram(figure: "plotly.graph_objects.Figure", name: str, values: Float[Tensor, " n"], colour: str) -> None:
    import plotly.graph_objects as go

    counts = torch.histc(values.double().cpu(), bins=BINS, min=0, max=1)
    edges = torch.linspace(0, 1, BINS + 1)
    figure.add_trace(
        go.Bar(
            x=plain((edges[1:] + edges[:-1]) / 2),
            y=plain(100 * counts / len(values)),
            width=1 / BINS,
            name=f"{label_text(name)} ({len(values)})",
            marker={"color": colour, "line": {"width": 0}},
            opacity=0.6,
            customdata=[
                [int(count), low, low + 1 / BINS] for count, low in zip(counts, plain(edges[:-1]), strict=True)
            ],
            hovertemplate=f"{label_text(name)}<br>energy ratio %{{customdata[1]:.3f}} to %{{customdata[2]:.3f}}"
            "<br>%{customdata[0]} prompts, %{y:.1f} %<extra></extra>",
        ),
        row=1,
        col=1,
    )


def _add_roc(
    figure: "plotly.graph_objects.Figure", false_alarms: Tensor, hits: Tensor, area: float, at_threshold: list[float]
) -> None:
    import plotly.graph_objects as go

    shared = {"xaxis": "x2", "yaxis": "y2", "showlegend": False}
    figure.add_trace(
        go.Scatter(
            x=[0, 100], y=[0, 100], mode="lines", line={"color": TEXT, "dash": "dot"}, hoverinfo="skip", **shared
        )
    )
    figure.add_trace(
        go.Scatter(
            x=plain(100 * false_alarms),
            y=plain(100 * hits),
            mode="lines",
            line={"color": CURVE, "width": 2.5},
            hovertemplate="%{y:.1f} % hit at %{x:.1f} % false alarms<extra></extra>",
            **shared,
        )
    )
    hit, alarm = (100 * share for share in at_threshold)
    figure.add_trace(
        go.Scatter(
            x=[alarm],
            y=[hit],
            mode="markers",
            marker={"color": CURVE, "size": 11, "line": {"color": "#fff", "width": 1.5}},
            hovertemplate="the gate's threshold<br>%{y:.1f} % hit, %{x:.1f} % false alarms<extra></extra>",
            **shared,
        )
    )
    figure.add_annotation(
        x=98, y=6, xref="x2", yref="y2", xanchor="right", text=f"<b>AUROC {area:.3f}</b>", showarrow=False
    )


def _leaf(gate: Gate, rank: int | None) -> SubspaceGate:
    if not isinstance(gate, SubspaceGate):
        raise InputError(
            "gate",
            expected="a gate on one subspace",
            got=type(gate).__name__,
            fix="Draw each of gate.leaves by itself.",
        )
    return gate if rank is None else gate.at_rank(rank)


def _ratios(gate: SubspaceGate, queries: Float[Tensor, "n d"], name: str) -> Float[Tensor, " finite"]:
    ratios = gate.subspace.energy_ratio(queries, gate.rank)
    finite = ratios[queries.isfinite().all(dim=1).to(ratios.device) & ratios.isfinite()]
    if len(finite) == 0:
        raise InputError(f"{name} queries", expected="at least one finite row", got=f"none of {len(queries)}")
    return finite

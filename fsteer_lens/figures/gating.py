"""How well a gate's score tells the prompts that need steering from the others."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.results import require_leaf
from fsteer_lens.figures.style import TEXT, group_colours, label_text, plain, styled
from fsteer_lens.ground.checks import brief, several
from fsteer_lens.ground.estimates import auroc
from fsteer_lens.method.gates import OPEN, Gate

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
    title: str | None = None,
) -> "plotly.graph_objects.Figure":
    """Histograms of a gate's score over two groups with its threshold, beside the ROC curve.

    Where the two groups do not overlap, the AUROC is 1 and says no more; the gap between them is shown then.

    The score of a gate on a subspace is the energy ratio. Rows whose score is not finite are left out.

    Args:
        gate: a gate that is not composed.
        ir_queries: activations of prompts that need steering, [n d].
        general_queries: activations of prompts to be left alone, [m d].
        rank: of the subspace of a gate that has one; None takes the gate's own.
        names: of the two groups.
        title: above the figure; None says what share of either group the gate is open for.

    Raises:
        InputError: a composed gate, a rank that was not fitted, or a group without a finite score.
        ShapeError: activations of another width than the gate's.
    """
    from plotly.subplots import make_subplots

    require_leaf(gate)
    gate = gate if rank is None else gate.at_rank(rank)
    if len(several("names", names, "two names")) != 2:
        raise InputError("names", expected="two names", got=brief(names))
    rows = [_finite(gate, queries, name) for queries, name in zip((ir_queries, general_queries), names, strict=True)]
    scores = [gate.score(h) for h in rows]
    false_alarms, hits, area = roc(*(values if gate.opens_above else -values for values in scores))
    low, high = _bounds(gate, scores)
    figure = make_subplots(rows=1, cols=2, column_widths=[0.62, 0.38], horizontal_spacing=0.12)
    for name, values, colour in zip(names, scores, group_colours(2), strict=True):
        _add_histogram(figure, name, values, colour, (low, high), gate.score_name)
    gap = _gap(gate, scores)
    if gap is not None:
        edges = {"type": "rect", "xref": "x", "yref": "y domain", "x0": gap[0], "x1": gap[1], "y0": 0, "y1": 1}
        figure.add_shape(**edges, fillcolor="rgba(127,127,127,.14)", line={"width": 0}, layer="below")
    place = (gate.threshold - low) / (high - low)
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
        x=min(max(gate.threshold, low), high),
        xref="x",
        xanchor="right" if place > 0.6 else "left",
        y=1,
        yref="y domain",
        yanchor="top",
        xshift=-5 if place > 0.6 else 5,
        text=f"threshold {gate.threshold:.3f}" + ("" if gate.opens_above else ", opens below"),
        showarrow=False,
    )
    opened = [float((gate(h) >= OPEN).float().mean()) for h in rows]
    margin = "" if gap is None else f"<br>margin {gap[1] - gap[0]:.3g}: no prompt in between"
    _add_roc(figure, false_alarms, hits, f"<b>AUROC {area:.3f}</b>{margin}", opened)
    told = [f"{name} {100 * share:.0f} %" for share, name in zip(opened, names, strict=True)]
    styled(figure, f"Gate open: {told[0]}, {told[1]}" if title is None else title, height=380)
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title=label_text(gate.score_name), range=[low, high], row=1, col=1)
    figure.update_yaxes(title="share of the group's prompts (%)", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title=f"{label_text(names[1])} steered (%)", range=[-2, 102], row=1, col=2)
    figure.update_yaxes(title=f"{label_text(names[0])} steered (%)", range=[-2, 102], row=1, col=2)
    return figure


def _bounds(gate: Gate, scores: Sequence[Tensor]) -> tuple[float, float]:
    """Ends of the axis: what the scores and the threshold span."""
    low, high = (float(end) for end in torch.cat(list(scores)).aminmax())
    low, high = min(low, gate.threshold), max(high, gate.threshold)
    margin = 0.02 * (high - low) or 0.5
    return low - margin, high + margin


def _gap(gate: Gate, scores: Sequence[Tensor]) -> tuple[float, float] | None:
    """The scores between which no prompt lies, where the two groups do not overlap."""
    above, below = scores if gate.opens_above else reversed(scores)
    low, high = float(below.max()), float(above.min())
    return (low, high) if low < high else None


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


def _add_histogram(
    figure: "plotly.graph_objects.Figure",
    name: str,
    values: Float[Tensor, " n"],
    colour: str,
    bounds: tuple[float, float],
    score_name: str,
) -> None:
    import plotly.graph_objects as go

    low, high = bounds
    width = (high - low) / BINS
    counts = torch.histc(values.double().cpu(), bins=BINS, min=low, max=high)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float32, device="cpu")
    figure.add_trace(
        go.Bar(
            x=plain((edges[1:] + edges[:-1]) / 2),
            y=plain(100 * counts / len(values)),
            width=width,
            name=f"{label_text(name)} ({len(values)})",
            marker={"color": colour, "line": {"width": 0}},
            opacity=0.6,
            customdata=[
                [int(count), start, start + width] for count, start in zip(counts, plain(edges[:-1]), strict=True)
            ],
            hovertemplate=f"{label_text(name)}<br>{label_text(score_name)} %{{customdata[1]:.3f}} to "
            "%{customdata[2]:.3f}<br>%{customdata[0]} prompts, %{y:.1f} %<extra></extra>",
        ),
        row=1,
        col=1,
    )


def _add_roc(
    figure: "plotly.graph_objects.Figure", false_alarms: Tensor, hits: Tensor, told: str, at_threshold: list[float]
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
            line={"color": TEXT, "width": 2.5},
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
            marker={"color": TEXT, "size": 11, "line": {"color": "#fff", "width": 1.5}},
            hovertemplate="the gate's threshold<br>%{y:.1f} % hit, %{x:.1f} % false alarms<extra></extra>",
            **shared,
        )
    )
    figure.add_annotation(
        x=98, y=6, xref="x2", yref="y2", xanchor="right", yanchor="bottom", align="right", text=told, showarrow=False
    )


def _finite(gate: Gate, queries: Float[Tensor, "n d"], name: str) -> Float[Tensor, "finite d"]:
    """The queries that are finite and whose score is."""
    scores = gate.score(queries)
    rows = queries[queries.isfinite().all(dim=1) & scores.isfinite().to(queries.device)]
    if len(rows) == 0:
        raise InputError(f"{name} queries", expected="at least one finite row", got=f"none of {len(queries)}")
    return rows

"""Which expert acts on which prompt."""

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.heatmaps import heatmap
from fsteer_lens.figures.style import (
    TEXT,
    expert_colours,
    expert_names,
    expert_ticks,
    hover_prompt,
    label_text,
    styled,
)
from fsteer_lens.figures.tokens import title_of
from fsteer_lens.ground.checks import require_unset, several
from fsteer_lens.trace.trace import Trace

if TYPE_CHECKING:
    import plotly.graph_objects


def expert_routing(
    weights: Float[Tensor, "prompts experts"] | Trace,
    labels: Iterable[str | None] | None = None,
    prompts: Iterable[Any] | None = None,
    *,
    layer: int | None = None,
    title: str = "Which expert acts on which prompt",
) -> "plotly.graph_objects.Figure":
    """Heatmap of the weight of each expert (columns) for each prompt (rows), rows grouped by label.

    A strip on the right shows the strongest expert of every prompt in that expert's colour.

    Args:
        weights: expert weights in [0, 1], [prompts experts], or a trace that holds them.
        labels: what each prompt is about, [prompts]; groups in alphabetical order, rows in theirs.
        prompts: shown on hover, [prompts]; None takes those of the trace.
        layer: of the trace; needed where it holds several.
        title: above the figure.

    Raises:
        InputError: no weights, a trace without them, an ambiguous layer, or another number of labels or prompts.
    """
    import plotly.graph_objects as go

    if isinstance(weights, Trace):
        prompts = _prompts(weights) if prompts is None else prompts
        alpha = weights_of(weights, layer)
    else:
        require_unset("weights, which are no trace", layer=layer)
        alpha = weights
    n_prompts, n_experts = alpha.shape
    if n_prompts == 0 or n_experts == 0:
        raise InputError("weights", expected="at least one prompt and one expert", got=list(alpha.shape))
    labels = None if labels is None else several("labels", labels, "a label for each prompt")
    prompts = None if prompts is None else several("prompts", prompts, "a list of prompts")
    for name, given in (("labels", labels), ("prompts", prompts)):
        if given is not None and len(given) != n_prompts:
            raise InputError(name, expected=f"one for each of {n_prompts} prompts", got=len(given))
    names = ["prompts" if labels is None else str(label) for label in labels or [None] * n_prompts]
    order = sorted(range(n_prompts), key=lambda row: names[row])
    ordered = alpha[torch.tensor(order, dtype=torch.long, device=alpha.device)]
    strongest = ordered.nan_to_num(-1).argmax(dim=1).tolist()
    said = [hover_prompt(prompts[row]) if prompts is not None else f"prompt {row}" for row in order]
    hover = [
        f"{text}<br>{label_text(names[row])}: strongest expert {best}"
        for row, text, best in zip(order, said, strongest, strict=True)
    ]
    colours = expert_colours(n_experts)
    figure = go.Figure(
        heatmap(
            ordered,
            "weight α (0 to 1)",
            most=1.0,
            x=list(range(n_experts)),
            customdata=[[text] * n_experts for text in hover],
            hovertemplate="expert %{x}: weight %{z:.3f}<br>%{customdata}<extra></extra>",
        )
    )
    figure.add_trace(
        go.Heatmap(
            z=[[best] for best in strongest],
            x=[n_experts - 0.4, n_experts + 0.1],  # the strip's two edges
            zmin=-0.5,
            zmax=n_experts - 0.5,
            colorscale=[pair for i, c in enumerate(colours) for pair in ([i / n_experts, c], [(i + 1) / n_experts, c])],
            showscale=False,
            customdata=[[text] for text in hover],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    return _with_axes(figure, [names[row] for row in order], colours, title)


def _with_axes(
    figure: "plotly.graph_objects.Figure", names: list[str], colours: list[str], title: str
) -> "plotly.graph_objects.Figure":
    """Expert names in their colours above the columns, labels at the middle of their rows, a line between two."""
    n_prompts, n_experts = len(names), len(colours)
    starts = [row for row in range(n_prompts) if row == 0 or names[row] != names[row - 1]] + [n_prompts]
    groups = list(itertools.pairwise(starts))
    styled(figure, title, height=min(640, max(300, 130 + 2 * n_prompts, 130 + 34 * len(groups))))
    figure.update_xaxes(
        tickvals=[*range(n_experts), n_experts - 0.15],
        ticktext=[*expert_ticks(expert_names(n_experts)), "strongest"],
        side="top",
        range=[-0.5, n_experts + 0.1],
        showgrid=False,
    )
    figure.update_yaxes(
        tickvals=[(first + end - 1) / 2 for first, end in groups],
        ticktext=[f"{label_text(names[first])} ({end - first})" for first, end in groups],
        range=[n_prompts - 0.5, -0.5],
        title={"text": "prompts by label (number)", "standoff": 20},
        showgrid=False,
    )
    for first, _ in groups[1:]:
        figure.add_shape(
            type="line", xref="paper", x0=0, x1=1, y0=first - 0.5, y1=first - 0.5, line={"color": TEXT, "width": 1}
        )
    figure.update_layout(margin={"t": 85, "b": 20, "l": 90})
    return figure


def weights_of(trace: Trace, layer: int | None) -> Float[Tensor, "prompts experts"]:
    """The mix of every row of a trace; those that the gate left alone have one too."""
    weights = trace.weights[trace.layer_of("weights", layer)]
    if weights.ndim != 2:
        raise InputError(
            "expert weights of the trace",
            expected="one row per prompt [prompts experts]",
            got=list(weights.shape),
            fix="A probe records every token: pick one, as in trace.weights[layer][:, -1].",
        )
    return weights.float()


def _prompts(trace: Trace) -> list[str] | None:
    return None if trace.prompts is None else [title_of(trace, row) for row in range(trace.n_rows)]

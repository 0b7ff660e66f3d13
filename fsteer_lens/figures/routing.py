"""Which expert acts on which prompt."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.style import (
    PRINTED,
    TEXT,
    expert_colours,
    expert_names,
    expert_ticks,
    faded_to,
    hover_prompt,
    label_text,
    plain,
    printed_prompt,
    styled,
)
from fsteer_lens.figures.tokens import title_of
from fsteer_lens.ground.checks import require_unset, several
from fsteer_lens.method.linalg import require_tensor
from fsteer_lens.trace.trace import Trace

if TYPE_CHECKING:
    import plotly.graph_objects

FADED: Final = 0.25
"""What is left of the colour of a row whose gate is shut."""


class Row(NamedTuple):
    """One prompt: its label, what is said of it on hover, its text beside the row, weights and gate."""

    label: str
    hover: str
    text: str
    weights: Float[Tensor, " experts"]
    gate: float | None

    @property
    def strongest(self) -> int:
        """The expert with the largest weight."""
        return int(self.weights.nan_to_num(-1).argmax())


def expert_routing(
    weights: Float[Tensor, "prompts experts"] | Trace,
    labels: Iterable[str | None] | None = None,
    prompts: Iterable[Any] | None = None,
    *,
    gate: Float[Tensor, " _n"] | None = None,
    names: Iterable[str] | None = None,
    layer: int | None = None,
    title: str | None = None,
) -> "plotly.graph_objects.Figure":
    """The weight of each expert (columns, in its colour) for each prompt (rows); beside them how far the gate opened.

    Rows are grouped by label, and labels follow the experts that serve them, so that experts of their own make a
    diagonal. A row whose gate is shut is faded: its weights say where it would be routed, and nothing is added. Up to
    40 prompts have their text beside their row; more have it on hover.

    Args:
        weights: expert weights in [0, 1], [prompts experts], or a trace that holds them.
        labels: what each prompt is about, [prompts].
        prompts: texts, [prompts]; None takes those of the trace.
        gate: gate values in [0, 1], [prompts]; None takes those of the trace.
        names: of the experts; None takes those of the trace.
        layer: of the trace; needed where it holds several.
        title: above the figure; None says how many prompts go with their label.

    Raises:
        InputError: no weights, a trace without them, an ambiguous layer, or another number of labels, prompts or gate
            values.
    """
    import plotly.graph_objects as go

    own = None
    if isinstance(weights, Trace):
        layer = weights.layer_of("weights", layer)
        prompts = _prompts(weights) if prompts is None else prompts
        gate = weights.gate.get(layer) if gate is None else gate
        own, alpha = weights.names.get(layer), weights_of(weights, layer)
    else:
        require_unset("weights, which are no trace", layer=layer)
        alpha = require_tensor(weights, "weights")
    if alpha.ndim != 2:
        raise InputError("weights", expected="shape [prompts, experts]", got=list(alpha.shape))
    n_prompts, n_experts = alpha.shape
    if n_prompts == 0 or n_experts == 0:
        raise InputError("weights", expected="at least one prompt and one expert", got=list(alpha.shape))
    called = expert_names(n_experts, names, own)
    rows = _ordered(alpha.detach().float().cpu(), labels, prompts, gate)
    shown = torch.stack([row.weights * (1 if row.gate is None else FADED + (1 - FADED) * row.gate) for row in rows])
    shared = {
        "zmin": 0.0,
        "zmax": 1.0,
        "showscale": False,
        "hoverongaps": False,
        "ygap": 1 if n_prompts <= PRINTED else 0,
    }
    figure = go.Figure()
    for expert, colour in enumerate(expert_colours(n_experts)):
        told = [
            [f"{label_text(called[expert])}: weight {float(row.weights[expert]):.3f}<br>{row.hover}"] for row in rows
        ]
        column = go.Heatmap(
            z=plain(shown[:, expert : expert + 1]),
            x=[expert],
            dx=1,
            xgap=2,
            colorscale=faded_to(colour),
            customdata=told,
            hovertemplate="%{customdata}<extra></extra>",
            **shared,
        )
        figure.add_trace(column)
    gated = [row.gate for row in rows if row.gate is not None]
    if gated:
        column = go.Heatmap(
            z=[[round(value, 4)] for value in gated],
            x=[n_experts + 0.15, n_experts + 0.6],  # its two edges
            colorscale=faded_to(TEXT),
            customdata=[[row.hover] for row in rows],
            hovertemplate="gate %{z:.2f}<br>%{customdata}<extra></extra>",
            **shared,
        )
        figure.add_trace(column)
    return _with_axes(figure, rows, called, _assertion(rows) if title is None else title, bool(gated))


def _ordered(
    alpha: Float[Tensor, "prompts experts"],
    labels: Iterable[str | None] | None,
    prompts: Iterable[Any] | None,
    gate: Float[Tensor, " _n"] | None,
) -> list[Row]:
    """The prompts in the order of their rows: labels by the expert that serves most of them, then by its weight."""
    labels = None if labels is None else several("labels", labels, "a label for each prompt")
    prompts = None if prompts is None else several("prompts", prompts, "a list of prompts")
    gate = None if gate is None else require_tensor(gate, "gate")
    for name, given in (("labels", labels), ("prompts", prompts), ("gate", gate)):
        if given is not None and len(given) != len(alpha):
            raise InputError(name, expected=f"one for each of {len(alpha)} prompts", got=len(given))
    rows = []
    for number, weights in enumerate(alpha):
        label = "prompts" if labels is None else str(labels[number])
        text = "" if prompts is None else printed_prompt(prompts[number])
        hover = f"prompt {number}" if prompts is None else hover_prompt(prompts[number])
        value = None if gate is None else float(gate[number])
        hover = f"{hover}<br>{label_text(label)}" + ("" if value is None else f": gate {value:.2f}")
        rows.append(Row(label, hover, text, weights, value))
    if labels is None:
        return sorted(rows, key=lambda row: (row.strongest, -float(row.weights.nan_to_num(0).max())))
    main = _mains(rows)
    return sorted(
        rows, key=lambda row: (main[row.label], row.label, -float(row.weights.nan_to_num(0)[main[row.label]]))
    )


def _mains(rows: Sequence[Row]) -> dict[str, int]:
    """Of every label the expert that is the strongest for most of its prompts."""
    counts: dict[str, Counter[int]] = {}
    for row in rows:
        counts.setdefault(row.label, Counter())[row.strongest] += 1
    return {label: min(count, key=lambda expert: (-count[expert], expert)) for label, count in counts.items()}


def _assertion(rows: Sequence[Row]) -> str:
    main = _mains(rows)
    if len(main) == 1:
        used = len({row.strongest for row in rows})
        return f"{used} of {len(rows[0].weights)} experts are the strongest for some prompt"
    hits = sum(row.strongest == main[row.label] for row in rows)
    return f"{hits} of {len(rows)} prompts go to the expert that serves most of their label"


def _with_axes(
    figure: "plotly.graph_objects.Figure", rows: Sequence[Row], called: Sequence[str], title: str, gated: bool
) -> "plotly.graph_objects.Figure":
    """Expert names in their colours above the columns; labels, or texts, beside the rows; a line between two labels."""
    names, n_prompts, n_experts = [row.label for row in rows], len(rows), len(called)
    starts = [row for row in range(n_prompts) if row == 0 or names[row] != names[row - 1]] + [n_prompts]
    groups = list(itertools.pairwise(starts))
    printed = n_prompts <= PRINTED and any(row.text for row in rows)
    height = 130 + 19 * n_prompts if printed else min(640, max(300, 130 + 2 * n_prompts, 130 + 34 * len(groups)))
    styled(figure, title, height=max(260, height))
    figure.update_xaxes(
        tickvals=[*range(n_experts), *([n_experts + 0.375] if gated else [])],
        ticktext=[*expert_ticks(called), *(["gate"] if gated else [])],
        side="top",
        tickangle=-30 if n_experts > 4 else 0,
        range=[-0.5, n_experts + (0.6 if gated else -0.5)],
        showgrid=False,
    )
    if printed:
        several_labels = len(groups) > 1
        ticks = {
            "tickvals": list(range(n_prompts)),
            "ticktext": [label_text(f"{row.label} · {row.text}" if several_labels else row.text) for row in rows],
            "title": "",
        }
    else:
        ticks = {
            "tickvals": [(first + end - 1) / 2 for first, end in groups],
            "ticktext": [f"{label_text(names[first])} ({end - first})" for first, end in groups],
            "title": {"text": "prompts by label (number)", "standoff": 20},
        }
    figure.update_yaxes(range=[n_prompts - 0.5, -0.5], showgrid=False, **ticks)
    for first, _ in groups[1:]:
        figure.add_shape(
            type="line", xref="paper", x0=0, x1=1, y0=first - 0.5, y1=first - 0.5, line={"color": TEXT, "width": 1}
        )
    figure.update_layout(margin={"t": 105 if n_experts > 4 else 85, "b": 20, "l": 90})
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

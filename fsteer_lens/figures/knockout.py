"""What goes missing without an expert."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.heatmaps import heatmap
from fsteer_lens.figures.style import expert_names, expert_ticks, label_text, panel_title, styled

if TYPE_CHECKING:
    import plotly.graph_objects


def expert_knockout(
    loss: Float[Tensor, "k labels"],
    labels: Sequence[str],
    weights: Float[Tensor, "k labels"] | None = None,
    *,
    unit: str = "nats per token",
    names: Sequence[str] | None = None,
    title: str = "What goes missing when an expert is removed",
) -> "plotly.graph_objects.Figure":
    """Drop in effect, per label, when expert i is removed; beside it the expert's mean weight there.

    Blue cells are losses: the expert mattered. Red ones got better without it. A weight alone shows where the router
    sends prompts, which training may have put in; the loss shows whether that matters.

    Args:
        loss: effect with all experts minus effect without expert i, [k labels].
        labels: what the prompts of each column are about.
        weights: mean weight α of each expert, [k labels].
        unit: of the loss.
        names: of the experts.
        title: above the figure.

    Raises:
        InputError: no expert, no label, or counts that do not fit.
    """
    from plotly.subplots import make_subplots

    k, n_labels = loss.shape
    if k == 0 or n_labels == 0:
        raise InputError("loss", expected="at least one expert and one label", got=list(loss.shape))
    if len(labels) != n_labels:
        raise InputError("labels", expected=f"one for each of {n_labels} columns", got=len(labels))
    if weights is not None and weights.shape != loss.shape:
        raise InputError("weights", expected=f"the shape of the loss {list(loss.shape)}", got=list(weights.shape))
    called = [label_text(name) for name in expert_names(k, names)]
    shown = [label_text(str(label)) for label in labels]
    n_panels = 1 if weights is None else 2
    figure = make_subplots(rows=1, cols=n_panels, shared_yaxes=True, horizontal_spacing=0.16)
    where = [[f"{name}, {label}" for label in shown] for name in called]
    bar_end = 1.0 if weights is None else 0.42
    figure.add_trace(
        heatmap(
            loss,
            f"effect lost ({label_text(unit)})",
            centred=True,
            bar={"x": bar_end + 0.01},
            x=list(range(n_labels)),
            customdata=where,
            texttemplate="%{z:.2f}" if n_labels <= 8 else None,
            hovertemplate=f"%{{customdata}}: %{{z:.3g}} {label_text(unit)} lost without it<extra></extra>",
            xgap=2,
            ygap=2,
        ),
        row=1,
        col=1,
    )
    if weights is not None:
        figure.add_trace(
            heatmap(
                weights,
                "mean weight α (0 to 1)",
                most=1.0,
                x=list(range(n_labels)),
                customdata=where,
                hovertemplate="%{customdata}: mean weight %{z:.3f}<extra></extra>",
                xgap=2,
                ygap=2,
            ),
            row=1,
            col=2,
        )
    styled(figure, title, height=max(320, 170 + 36 * k))
    figure.update_xaxes(
        tickvals=list(range(n_labels)), ticktext=shown, showgrid=False, tickangle=-35 if n_labels > 4 else 0
    )
    figure.update_yaxes(
        tickvals=list(range(k)), ticktext=expert_ticks(expert_names(k, names)), range=[k - 0.5, -0.5], showgrid=False
    )
    for column in range(1, n_panels + 1):
        figure.update_xaxes(title="label of the prompts", row=1, col=column)
    panel_title(figure, "x domain", "effect lost (blue), gained (red)")
    if weights is not None:
        figure.update_xaxes(domain=[0, bar_end], row=1, col=1)
        figure.update_xaxes(domain=[0.63, 1], row=1, col=2)
        panel_title(figure, "x2 domain", "its mean weight there")
    figure.update_layout(margin={"t": 75, "l": 95})
    return figure

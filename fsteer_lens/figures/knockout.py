"""What goes missing without an expert."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fsteer_lens.effects.mixture import Knockout
from fsteer_lens.errors import InputError
from fsteer_lens.figures.heatmaps import heatmap
from fsteer_lens.figures.results import require_result
from fsteer_lens.figures.style import expert_names, expert_ticks, label_text, panel_title, styled, wrapped
from fsteer_lens.method.experts import mentioned

if TYPE_CHECKING:
    import plotly.graph_objects


def expert_knockout(
    knockout: Knockout,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> "plotly.graph_objects.Figure":
    """Drop in effect, per label, when expert i is removed; beside it the expert's mean weight there.

    Blue cells are losses: the expert mattered. Red ones got better without it. A weight alone shows where the router
    sends prompts, which training may have put in; the loss shows whether that matters.

    Args:
        knockout: what `effects.expert_knockout` returns. A loss has its effect's unit, a mean weight α none (0 to 1).
        names: of the experts, k of them; None takes their own.
        title: above the figure; None says which expert costs which label most.

    Raises:
        InputError: something else than a Knockout, no expert, no label, or counts that do not fit.
    """
    from plotly.subplots import make_subplots

    require_result("knockout", knockout, Knockout, "expert_knockout")
    k, n = knockout.removed.shape
    if k == 0 or n == 0:
        raise InputError("knockout", expected="at least one expert and one label", got=repr(knockout))
    if len(knockout.labels) != n:
        raise InputError("labels", expected=f"one for each of {n} columns", got=len(knockout.labels))
    called = expert_names(k, names, knockout.names)
    shown = [label_text(label) for label in knockout.groups]
    n_labels = len(shown)
    where = [[f"{label_text(name)}, {label}" for label in shown] for name in called]
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.16)
    figure.add_trace(
        heatmap(
            knockout.loss,
            wrapped(f"effect lost: {knockout.effect_name}", 36),
            centred=True,
            bar={"x": 0.43},
            x=list(range(n_labels)),
            customdata=where,
            texttemplate="%{z:.2f}" if n_labels <= 8 else None,
            hovertemplate="%{customdata}: %{z:.3g} lost without it"
            f"<br>{label_text(knockout.effect_name)}<extra></extra>",
            xgap=2,
            ygap=2,
        ),
        row=1,
        col=1,
    )
    figure.add_trace(
        heatmap(
            knockout.mean_weights,
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
    styled(figure, _assertion(knockout, called) if title is None else title, height=max(320, 170 + 36 * k))
    figure.update_xaxes(
        title="label of the prompts",
        tickvals=list(range(n_labels)),
        ticktext=shown,
        showgrid=False,
        tickangle=-35 if n_labels > 4 else 0,
    )
    figure.update_yaxes(tickvals=list(range(k)), ticktext=expert_ticks(called), range=[k - 0.5, -0.5], showgrid=False)
    figure.update_xaxes(domain=[0, 0.42], row=1, col=1)
    figure.update_xaxes(domain=[0.63, 1], row=1, col=2)
    panel_title(figure, "x domain", "effect lost (blue), gained (red)")
    panel_title(figure, "x2 domain", "its mean weight there")
    figure.update_layout(margin={"t": 75, "l": 95})
    return figure


def _assertion(knockout: Knockout, called: Sequence[str]) -> str:
    """Whose removal costs which label most."""
    loss = knockout.loss.nan_to_num(-math.inf)
    best = int(loss.argmax())
    expert, label = best // loss.shape[1], best % loss.shape[1]
    if not float(loss.max()) > 0:
        return "No label loses anything when a single expert is removed"
    return f"The largest loss: {float(loss.max()):.3g} on {knockout.groups[label]} without {mentioned(expert, called)}"

"""What one prompt's steering vector is mixed from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.routing import weights_of
from fsteer_lens.figures.style import TEXT, expert_colours, expert_names, expert_ticks, hover_prompt, plain, styled
from fsteer_lens.figures.tokens import title_of
from fsteer_lens.ground.checks import require_unset
from fsteer_lens.method.experts import Experts
from fsteer_lens.trace.trace import Trace

if TYPE_CHECKING:
    import plotly.graph_objects


def expert_mix(
    mix: Experts | Trace,
    query: Float[Tensor, " d"] | None = None,
    *,
    experts: Experts | None = None,
    row: int = 0,
    layer: int | None = None,
    names: Sequence[str] | None = None,
    title: str = "What this prompt's steering vector is mixed from",
) -> "plotly.graph_objects.Figure":
    """Weight α of every expert as a bar in its colour, and beside them the residual's share as a hatched bar.

    The share is ‖U β‖ / (‖C α‖ + ‖U β‖), by length: 0 where the experts make the whole vector, 1 where the residual
    does. A trace knows α and β, and ‖U β‖ = ‖β‖ as U is orthonormal, but not ‖C α‖: give `experts=` to see the share.
    Without them the length alone is told.

    Args:
        mix: fitted experts, with `query`; or a trace.
        query: the query activation ĥ, [d].
        experts: those that steered when the trace was made.
        row: of the trace.
        layer: of the trace; needed where it holds several.
        names: of the experts.
        title: above the figure.

    Raises:
        InputError: a query where there is a trace or the other way round, a trace without weights, or NaN.
        ShapeError: a query of another width than the experts'.
    """
    import plotly.graph_objects as go

    about, share, length = "", None, None
    if isinstance(mix, Experts):
        if query is None or query.ndim != 1:
            got = None if query is None else list(query.shape)
            raise InputError("query", expected="one activation [d]", got=got, fix="Give one row of .queries.")
        require_unset("fitted experts, which are no trace", row=row or None, layer=layer, experts=experts)
        parts = mix.parts(query.detach())
        weights, length, beside = parts.weights, parts.residual_part.norm(), parts.prototype_part.norm()
    else:
        if query is not None:
            raise InputError("query", expected="none where a trace is given", got=list(query.shape))
        one = mix.row(row)
        weights = weights_of(one, layer)[0]
        layer = one.layer_of("weights", layer)
        about = "" if one.prompts is None else hover_prompt(title_of(one, 0)) + "<br>"
        length = one.coefficients[layer][0].float().norm() if layer in one.coefficients else None
        beside = None if experts is None else (weights.to(experts.prototypes) @ experts.prototypes).norm()
    if not bool(weights.isfinite().all()):
        raise InputError("expert weights", expected="finite numbers", got=plain(weights))
    ticks = expert_ticks(expert_names(len(weights), names))
    figure = go.Figure(
        go.Bar(
            x=list(range(len(weights))),
            y=plain(weights),
            marker={"color": expert_colours(len(weights))},
            text=[f"{weight:.2f}" for weight in weights.tolist()],
            textposition="outside",
            cliponaxis=False,
            hovertemplate=f"{about}%{{customdata}}: weight %{{y:.3f}}<extra></extra>",
            customdata=expert_names(len(weights), names),
        )
    )
    place = len(weights) + 0.4
    if length is not None and beside is not None:
        length, beside = float(length), float(beside)
        share = length / (length + beside) if length + beside > 0 else 0.0
        figure.add_trace(
            go.Bar(
                x=[place],
                y=[round(share, 4)],
                marker={"color": "rgba(127,127,127,.35)", "line": {"color": TEXT, "width": 1}}
                | {"pattern": {"shape": "/", "fgcolor": TEXT, "size": 7}},
                text=[f"{share:.2f}"],
                textposition="outside",
                cliponaxis=False,
                hovertemplate=f"{about}residual: ‖U β‖ = {length:.3g}, experts: ‖C α‖ = {beside:.3g}<br>"
                "share %{y:.3f}<extra></extra>",
            )
        )
        ticks.append("residual")
    elif length is not None:
        note = f"residual: ‖U β‖ = {float(length):.3g}; its share needs experts="
        figure.add_annotation(text=note, x=1, y=1, xref="paper", yref="paper", xanchor="right", showarrow=False)
    styled(figure, title, height=340)
    places = [*range(len(weights)), place][: len(ticks)]
    figure.update_xaxes(tickvals=places, ticktext=ticks, showgrid=False)
    residual = "" if share is None else "<br>residual: ‖Uβ‖ / (‖Cα‖ + ‖Uβ‖)"
    figure.update_yaxes(title={"text": f"weight α (0 to 1){residual}", "standoff": 25}, range=[0, 1.08])
    figure.update_layout(showlegend=False, bargap=0.35, margin={"t": 60, "r": 45})
    if share is not None:
        line = {"color": TEXT, "width": 1, "dash": "dot"}
        figure.add_shape(type="line", x0=place - 0.7, x1=place - 0.7, y0=0, y1=1, yref="paper", line=line)
    return figure

"""What one prompt's steering vector is mixed from."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.routing import weights_of
from fsteer_lens.figures.style import (
    TEXT,
    capital,
    expert_colours,
    expert_names,
    expert_ticks,
    hover_prompt,
    plain,
    styled,
)
from fsteer_lens.figures.tokens import title_of
from fsteer_lens.ground.checks import brief, instance, optional, require_unset
from fsteer_lens.method.experts import Experts, mentioned
from fsteer_lens.method.gates import SHUT
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
    title: str | None = None,
) -> "plotly.graph_objects.Figure":
    """Weight α of every expert as an outline in its colour, filled as far as it is added, and the residual's share.

    Of a trace what is added is weight × gate, so that a shut gate leaves the outlines empty; experts without a trace
    have no gate, and their bars are full. The residual's share is a hatched bar.

    The share is ‖U β‖ / (‖C α‖ + ‖U β‖), by length: 0 where the experts make the whole vector, 1 where the residual
    does. A trace knows α and β, and ‖U β‖ = ‖β‖ as U is orthonormal, but not ‖C α‖: give `experts=` to see the share.
    Without them the length alone is told.

    Args:
        mix: fitted experts, with `query`; or a trace.
        query: the query activation ĥ, [d].
        experts: those that steered when the trace was made.
        row: of the trace.
        layer: of the trace; needed where it holds several.
        names: of the experts; None takes their own.
        title: above the figure; None names the strongest.

    Raises:
        InputError: a query where there is a trace or the other way round, a trace without weights, or NaN.
        ShapeError: a query of another width than the experts'.
    """
    import plotly.graph_objects as go

    about, share, length, opened = "", None, None, 1.0
    if isinstance(mix, Experts):
        if not isinstance(query, Tensor) or query.ndim != 1:
            got = list(query.shape) if isinstance(query, Tensor) else brief(query)
            raise InputError("query", expected="one activation [d]", got=got, fix="Give one row of .queries.")
        require_unset("fitted experts, which are no trace", row=row or None, layer=layer, experts=experts)
        parts = mix.parts(query.detach())
        weights, length, beside = parts.weights, parts.residual_part.norm(), parts.prototype_part.norm()
        own = mix.names
    else:
        if query is not None:
            raise InputError("query", expected="none where a trace is given", got=brief(query))
        one = instance("mix", mix, Trace, "Experts or a Trace").row(row)
        optional(instance, "experts", experts, Experts, "Experts or None")
        weights = weights_of(one, layer)[0]
        layer = one.layer_of("weights", layer)
        own, opened = one.names.get(layer), float(one.gate[layer][0]) if layer in one.gate else 1.0
        about = "" if one.prompts is None else hover_prompt(title_of(one, 0)) + "<br>"
        length = one.coefficients[layer][0].float().norm() if layer in one.coefficients else None
        beside = None if experts is None else (weights.to(experts.prototypes) @ experts.prototypes).norm()
    if not bool(weights.isfinite().all()):
        raise InputError("expert weights", expected="finite numbers", got=plain(weights))
    called = expert_names(len(weights), names, own)
    ticks, colours = expert_ticks(called), expert_colours(len(weights))
    shared = {"x": list(range(len(weights))), "customdata": called, "cliponaxis": False}
    outline = go.Bar(
        y=plain(weights),
        marker={"color": "rgba(0,0,0,0)", "line": {"color": colours, "width": 2}},
        text=[f"{weight:.2f}" for weight in weights.tolist()],
        textposition="outside",
        hovertemplate=f"{about}%{{customdata}}: weight %{{y:.3f}}<extra></extra>",
        **shared,
    )
    added = go.Bar(
        y=plain(weights * opened),
        marker={"color": colours, "line": {"width": 0}},
        hovertemplate=f"{about}%{{customdata}}: %{{y:.3f}} added, weight × gate<extra></extra>",
        **shared,
    )
    figure = go.Figure([outline, added])
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
    styled(figure, _assertion(weights, called, opened) if title is None else title, height=340)
    places = [*range(len(weights)), place][: len(ticks)]
    figure.update_xaxes(tickvals=places, ticktext=ticks, showgrid=False)
    residual = "" if share is None else "<br>residual: ‖Uβ‖ / (‖Cα‖ + ‖Uβ‖)"
    figure.update_yaxes(title={"text": f"weight α (0 to 1){residual}", "standoff": 25}, range=[0, 1.08])
    figure.update_layout(showlegend=False, barmode="overlay", bargap=0.35, margin={"t": 60, "r": 45})
    if share is not None:
        line = {"color": TEXT, "width": 1, "dash": "dot"}
        figure.add_shape(type="line", x0=place - 0.7, x1=place - 0.7, y0=0, y1=1, yref="paper", line=line)
    return figure


def _assertion(weights: Float[Tensor, " k"], called: Sequence[str], opened: float) -> str:
    """The strongest expert, and whether it is added."""
    best = int(weights.argmax())
    name, share = mentioned(best, called), float(weights[best])
    if opened < SHUT:
        return f"Nothing is added: the gate is shut (it would route to {name})"
    return f"{capital(name)} has {100 * share:.0f} % of the weight"

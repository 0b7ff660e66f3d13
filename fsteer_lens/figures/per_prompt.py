"""What a gate makes of every prompt."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.results import require_leaf
from fsteer_lens.figures.style import (
    PRINTED,
    TEXT,
    group_colours,
    hover_prompt,
    label_text,
    plain,
    printed_prompt,
    styled,
)
from fsteer_lens.ground.checks import instance, several
from fsteer_lens.method.gates import OPEN, Gate
from fsteer_lens.method.linalg import require_tensor

if TYPE_CHECKING:
    import plotly.graph_objects


def gate_per_prompt(
    gate: Gate,
    queries: Mapping[str, Float[Tensor, "_n d"]],
    prompts: Mapping[str, Iterable[Any]] | None = None,
    *,
    title: str | None = None,
) -> "plotly.graph_objects.Figure":
    """The score of every prompt beside the gate's threshold, a row each, the groups below one another.

    Within a group the surest to be steered is at the top. A filled mark is steered (gate at least 0.5), a hollow one
    left alone, so that misses and false alarms stand at the ends of their groups, with their words. Up to 40 prompts
    have their text beside their row; more have it on hover. A prompt whose score is not finite is left out.

    Args:
        gate: a gate that is not composed.
        queries: what the gate reads of each group of prompts, {name: [n d]}; the group to be steered first.
        prompts: their texts, {name: n prompts}.
        title: above the figure; None says how many of each group are steered.

    Raises:
        InputError: a composed gate, no group, one without a finite score, or another number of prompts than queries.
        ShapeError: activations of another width than the gate's.
    """
    import plotly.graph_objects as go

    require_leaf(gate)
    if not require_groups(queries):
        raise InputError("queries", expected="at least one group", got="none")
    texts = texts_of(queries, prompts)
    few = sum(map(len, queries.values())) <= PRINTED
    figure, row, told, score = go.Figure(), 0, [], label_text(gate.score_name)
    ticks: list[tuple[float, str]] = []
    for (name, rows), colour in zip(queries.items(), group_colours(len(queries)), strict=True):
        scores, opened = gate.score(rows).float().cpu(), (gate(rows) >= OPEN).cpu()
        order = scores.nan_to_num(0).argsort(descending=gate.opens_above)
        order = [number for number in order.tolist() if bool(scores[number].isfinite())]
        if not order:
            raise InputError(f"{name} queries", expected="at least one finite score", got=f"none of {len(rows)}")
        places = list(range(row, row + len(order)))
        figure.add_trace(
            go.Scatter(
                x=plain(scores[order]),
                y=places,
                mode="markers",
                name=label_text(name),
                marker={"color": colour, "size": 9, "symbol": [0 if opened[number] else 100 for number in order]},
                text=[hover_prompt(texts[name][number]) if texts else f"query {number}" for number in order],
                hovertemplate=f"{label_text(name)}, {score} %{{x:.3f}}<br>%{{text}}<extra></extra>",
                showlegend=False,
            )
        )
        steered = int(opened[order].sum())
        told.append(f"{name} {steered} of {len(order)}")
        if texts and few:
            words = [printed_prompt(texts[name][number]) for number in order]
            ticks += [(place, label_text(f"{name} · {word}")) for place, word in zip(places, words, strict=True)]
        else:
            ticks.append((sum(places) / len(places), f"<b>{label_text(name)}</b><br>{steered} of {len(order)} steered"))
        row += len(order)
        if len(told) < len(queries):
            line = {"color": TEXT, "width": 1}
            figure.add_shape(type="line", xref="paper", x0=0, x1=1, y0=row - 0.5, y1=row - 0.5, line=line)
    for symbol, meaning in ((0, "steered"), (100, "left alone")):
        marker = {"color": TEXT, "symbol": symbol, "size": 9}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=meaning))
    figure.add_vline(x=gate.threshold, line={"color": TEXT, "width": 2, "dash": "dash"})
    beyond = "" if gate.opens_above else ", opens below"
    place = {"x": gate.threshold, "y": 1, "yref": "paper", "yanchor": "bottom"}
    figure.add_annotation(text=f"threshold {gate.threshold:.3f}{beyond}", showarrow=False, **place)
    height = 150 + 19 * row if texts and few else min(760, max(300, 150 + 4 * row))
    styled(figure, f"Steered: {', '.join(told)}" if title is None else title, height=height)
    figure.update_xaxes(title=score)
    figure.update_yaxes(
        tickvals=[place for place, _ in ticks],
        ticktext=[text for _, text in ticks],
        range=[row - 0.5, -0.5],
        showgrid=False,
    )
    figure.update_layout(legend={"x": 1, "xanchor": "right", "y": 1.02}, margin={"t": 85, "l": 120})
    return figure


def require_groups(queries: Any) -> Mapping[str, Tensor]:
    """Tensors by the names of their groups, or `InputError`."""
    for name, rows in instance("queries", queries, Mapping, "{group: tensor}").items():
        require_tensor(rows, f"queries of {name!r}")
    return queries


def texts_of(
    queries: Mapping[str, Tensor], prompts: Mapping[str, Iterable[Any]] | None
) -> Mapping[str, Sequence[Any]] | None:
    """The prompts of each group, as many as it has queries."""
    if prompts is None:
        return None
    named = instance("prompts", prompts, Mapping, "{group: prompts}")
    found = {name: several(f"prompts of {name!r}", given, "a list of prompts") for name, given in named.items()}
    for name, rows in queries.items():
        if len(found.get(name, ())) != len(rows):
            got = f"{len(found[name])} prompts" if name in found else f"groups {list(found)}"
            raise InputError(f"prompts of {name!r}", expected=f"{len(rows)}, one for each query", got=got)
    return found

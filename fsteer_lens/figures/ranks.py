"""The rank of the gate's subspace under a slider."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.per_prompt import require_groups, texts_of
from fsteer_lens.figures.style import GRID, TEXT, group_colours, hover_prompt, label_text, plain, styled
from fsteer_lens.ground.checks import instance, several, whole
from fsteer_lens.method.gates import OPEN, Gate
from fsteer_lens.method.subspace_gates import subspace_leaves

if TYPE_CHECKING:
    import plotly.graph_objects

MOST_RANKS = 64
FILLED, HOLLOW = 0, 100
GOLDEN = 0.6180339887


def rank_explorer(
    gate: Gate,
    queries: Mapping[str, Float[Tensor, "_n d"]],
    prompts: Mapping[str, Iterable[Any]] | None = None,
    *,
    ranks: Iterable[int] | None = None,
    title: str = "Who is steered, at which rank of the subspace?",
) -> "plotly.graph_objects.Figure":
    """Energy ratio of every prompt, the threshold, and who is steered, under a slider over ranks.

    Everything for every rank is in the figure, so the slider needs no kernel and works in a saved page. Filled marks
    are steered (gate ≥ 0.5), hollow ones left alone. A composed gate has no threshold line; the ratios are those of its
    first subspace, and where its parts are at ranks of their own the slider's first stop is the gate as it is. A query
    that is not finite gets no mark and counts as left alone. Below a count stands how far the worst prompt lies from
    the threshold: the lowest of the first group, the highest of every other.

    Args:
        gate: a fitted gate with ranks; its calibration at each rank is the one that `gate.at_rank` gives.
        queries: activations of each group of prompts, {name: [n d]}; the groups that need steering first.
        prompts: shown on hover, {name: n prompts}.
        ranks: the slider's stops; None takes every fitted rank, thinned to 64 where there are more.
        title: above the figure.

    Raises:
        InputError: a gate without ranks, no queries, a rank that was not fitted, or prompts that do not fit the
            queries.
        ShapeError: activations of another width than the gate's.
    """
    import plotly.graph_objects as go

    instance("gate", gate, Gate, "a gate")
    if not require_groups(queries) or any(len(rows) == 0 for rows in queries.values()):
        raise InputError("queries", expected="at least one group, each of at least one row", got=list(queries))
    texts = texts_of(queries, prompts)
    fitted, single = gate.ranks, gate.leaves == (gate,)
    if not fitted:
        fix = "Draw it with gate_separation."
        raise InputError("gate", expected="a gate on a subspace", got=f"{type(gate).__name__}, without ranks", fix=fix)
    own = [leaf.rank for leaf in subspace_leaves(gate)]
    stops = (
        _stops(fitted, min(own[0], fitted))
        if ranks is None
        else sorted({whole("rank", rank) for rank in several("ranks", ranks, "a list of ints")})
    )
    if not stops:
        raise InputError("ranks", expected="at least one rank", got="none")
    finite = {name: rows.isfinite().all(dim=1) for name, rows in queries.items()}
    ratios = {name: _ratios(gate, rows, finite[name]) for name, rows in queries.items()}
    values = {name: gate.gates(rows) for name, rows in queries.items()}
    states = [
        _state(
            gate.at_rank(rank), rank, {name: by_rank[:, rank - 1] for name, by_rank in values.items()}, finite, ratios
        )
        for rank in stops
    ]
    names = [str(rank) for rank in stops]
    if set(own) == {own[0]} and own[0] <= fitted:
        active = min(range(len(stops)), key=lambda place: abs(stops[place] - own[0]))
    else:  # parts at ranks of their own: no stop of the slider is the gate as it is
        states.insert(
            0, _state(gate, own[0], {name: gate.gate(rows) for name, rows in queries.items()}, finite, ratios)
        )
        names.insert(0, "as it is")
        active = 0
    shown = states[active]
    figure = go.Figure()
    for index, (name, colour) in enumerate(zip(queries, group_colours(len(queries)), strict=True)):
        count = len(queries[name])
        said = [hover_prompt(prompt) for prompt in texts[name]] if texts else [f"query {i}" for i in range(count)]
        figure.add_trace(
            go.Scatter(
                x=shown["x"][index],
                y=[round(index + 0.7 * ((row * GOLDEN) % 1 - 0.5), 3) for row in range(count)],
                mode="markers",
                marker={"color": colour, "size": 7, "symbol": shown["marker.symbol"][index], "opacity": 0.75},
                text=said,
                hovertemplate=f"{label_text(name)}, energy ratio %{{x:.3f}}<br>%{{text}}<extra></extra>",
                showlegend=False,
            )
        )
    figure.add_trace(
        go.Scatter(
            x=shown["x"][-1],
            y=[-0.5, len(queries) - 0.5],
            mode="lines",
            line={"color": TEXT, "width": 2, "dash": "dash"},
            hovertemplate="threshold %{x:.3f}<extra></extra>",
            name="threshold: steered from here on" if single else "",
            showlegend=single,
        )
    )
    for symbol, meaning in ((FILLED, "steered"), (HOLLOW, "left alone")):
        marker = {"color": TEXT, "symbol": symbol, "size": 8}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=meaning))
    return _with_slider(figure, names, states, active, [label_text(name) for name in queries], title)


def _stops(fitted: int, own: int) -> list[int]:
    """Every fitted rank, or 64 of them that get sparser upwards, with the gate's own among them."""
    if fitted <= MOST_RANKS:
        return list(range(1, fitted + 1))
    spread = torch.logspace(0, math.log10(fitted), MOST_RANKS, dtype=torch.float32, device="cpu").round().int().tolist()
    return sorted({*spread, own})


def _ratios(gate: Gate, rows: Float[Tensor, "n d"], finite: Bool[Tensor, " n"]) -> list[list[float | None]]:
    """Energy ratios at every rank, one list per rank, with None for queries that are not finite."""
    ratios = subspace_leaves(gate)[0].subspace.energy_ratios(rows)
    return plain(ratios.masked_fill(~finite.to(ratios.device).unsqueeze(1), float("nan")).T, digits=3)


def _state(
    gate: Gate,
    rank: int,
    values: Mapping[str, Tensor],
    finite: Mapping[str, Tensor],
    ratios: Mapping[str, list[list[float | None]]],
) -> dict[str, Any]:
    """What the slider changes at one rank: places, marks, and how many of each group are steered."""
    is_open = {name: (value.cpu().ge(OPEN) & finite[name].cpu()).tolist() for name, value in values.items()}
    threshold = [gate.threshold] * 2 if gate.leaves == (gate,) else [None, None]
    at_rank = {name: [ratio for ratio in ratios[name][rank - 1] if ratio is not None] for name in values}
    return {
        "x": [ratios[name][rank - 1] for name in values] + [[None if t is None else round(t, 4) for t in threshold]],
        "marker.symbol": [[FILLED if one else HOLLOW for one in is_open[name]] for name in values],
        "counts": [
            f"{sum(opened)} of {len(opened)} steered{_edge(at_rank[name], threshold[0], lowest=not place)}"
            for place, (name, opened) in enumerate(is_open.items())
        ],
    }


def _edge(ratios: list[float], threshold: float | None, *, lowest: bool) -> str:
    """How far the ratio that matters most lies from the threshold: the lowest of those to be steered, or the highest of
    others."""
    if threshold is None or not ratios:
        return ""
    name, ratio = ("lowest", min(ratios)) if lowest else ("highest", max(ratios))
    return f"<br>{name}: threshold {ratio - threshold:+.2f}"


def _with_slider(
    figure: "plotly.graph_objects.Figure",
    stops: list[str],
    states: list[dict[str, Any]],
    active: int,
    names: list[str],
    title: str,
) -> "plotly.graph_objects.Figure":
    n_groups = len(names)
    ticks = [[f"<b>{n}</b><br>{count}" for n, count in zip(names, state["counts"], strict=True)] for state in states]
    steps = [
        {
            "label": stop,
            "method": "update",
            "args": [
                {"x": state["x"], "marker.symbol": [*state["marker.symbol"], 0]},
                {"yaxis.ticktext": texts},
                list(range(n_groups + 1)),
            ],
        }
        for stop, state, texts in zip(stops, states, ticks, strict=True)
    ]
    styled(figure, title, height=250 + 95 * n_groups)
    figure.update_xaxes(title="energy ratio s: share of the activation that lies in the subspace", range=[-0.02, 1.02])
    figure.update_yaxes(
        tickvals=list(range(n_groups)), ticktext=ticks[active], range=[n_groups - 0.5, -0.5], showgrid=False
    )
    figure.update_layout(
        sliders=[
            {
                "active": active,
                "steps": steps,
                "currentvalue": {"prefix": "rank r = ", "font": {"size": 14}},
                "pad": {"t": 60, "b": 10},
                "bgcolor": GRID,
                "activebgcolor": TEXT,
                "bordercolor": GRID,
                "tickcolor": TEXT,
                "font": {"color": TEXT},
            }
        ],
        margin={"l": 150, "b": 20},
    )
    return figure

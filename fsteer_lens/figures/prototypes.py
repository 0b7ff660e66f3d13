"""What the experts are: how their prototypes lie to each other, and which tokens they promote."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError, ShapeError
from fsteer_lens.figures.heatmaps import heatmap
from fsteer_lens.figures.html import MONO, MUTED, Html, block, escape, visible
from fsteer_lens.figures.style import GRID, expert_colours, expert_names, expert_ticks, label_text, styled
from fsteer_lens.ground.checks import brief, instance, number, several, whole
from fsteer_lens.method.experts import Experts
from fsteer_lens.method.linalg import require_tensor

if TYPE_CHECKING:
    import plotly.graph_objects


def expert_geometry(
    experts: Experts,
    mean_shift: Float[Tensor, " d"] | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> "plotly.graph_objects.Figure":
    """Cosines between the experts' prototypes, −1 to 1, each pair once, and in a last row with the mean shift.

    A prototype of length 0 has no direction; its cells are left empty.

    Args:
        experts: fitted experts.
        mean_shift: the mean of the shifts they were fitted to, [d], which is what a single steering vector would be.
        names: of the experts; None takes their own.
        title: above the figure; None names the two experts that are most alike.

    Raises:
        ShapeError: a mean shift of another width than the experts'.
    """
    import plotly.graph_objects as go

    rows = instance("experts", experts, Experts, "Experts").prototypes.detach().double().cpu()
    called = expert_names(experts.n_experts, names, experts.names)
    ticks = expert_ticks(called)
    if mean_shift is not None:
        if require_tensor(mean_shift, "mean_shift").shape != (experts.d_model,):
            raise ShapeError("mean_shift", expected=f"[{experts.d_model}]", got=list(mean_shift.shape))
        rows = torch.cat([rows, mean_shift.detach().to(rows).unsqueeze(0)])
        called, ticks = [*called, "mean shift"], [*ticks, "mean shift"]
    lengths = rows.norm(dim=1, keepdim=True)
    unit = torch.where(lengths > 0, rows / lengths, math.nan)
    n = len(rows)
    cosines = (unit @ unit.T).clamp(-1, 1)
    above = torch.ones(n, n, dtype=torch.bool, device="cpu").triu(0 if n > 1 else 1)
    where = [[f"{label_text(one)} and {label_text(other)}" for other in called] for one in called]
    figure = go.Figure(
        heatmap(
            cosines.masked_fill(above, math.nan),
            "cosine (−1 to 1)",
            centred=True,
            most=1.0,
            customdata=where,
            texttemplate="%{z:.2f}" if n <= 12 else None,
            hovertemplate="%{customdata}: cosine %{z:.3f}<extra></extra>",
            xgap=2,
            ygap=2,
        )
    )
    told = _most_alike(cosines[: experts.n_experts, : experts.n_experts], called) if title is None else title
    styled(figure, told, height=max(320, 165 + 44 * n))
    places = {"tickvals": list(range(n)), "ticktext": ticks, "showgrid": False}
    first, last = (1, n - 1) if n > 1 else (0, 1)
    figure.update_xaxes(**places, range=[-0.5, last - 0.5], tickangle=-30 if n > 4 else 0)
    figure.update_yaxes(**places, range=[n - 0.5, first - 0.5])
    figure.update_layout(margin={"t": 60, "b": 60, "l": 95})
    return figure


def _most_alike(cosines: Float[Tensor, "k k"], called: Sequence[str]) -> str:
    """The two experts with the largest cosine, in words."""
    known = cosines.nan_to_num(-2).masked_fill(torch.ones_like(cosines, dtype=torch.bool).triu(), -2)
    best = int(known.argmax())
    one, other = best % len(known), best // len(known)
    if float(known.max()) < -1:
        return "Angles between the experts"
    return f"The experts most alike: {called[one]} and {called[other]}, cosine {float(known[other, one]):.2f}"


def expert_tokens(
    promoted: Sequence[Sequence[tuple[str, float]]],
    *,
    names: Sequence[str] | None = None,
    unit: str = "logit",
    limit: int | None = 12,
) -> Html:
    """Table of the tokens that each expert promotes, strongest first, one column per expert in its colour.

    Args:
        promoted: (token, value) pairs of each expert, in the order to be shown.
        names: of the experts.
        unit: of the values.
        limit: rows, at most; None shows all.

    Raises:
        InputError: no experts, or none with a token.
    """
    for pairs in several("promoted", promoted, "a list for each expert"):
        for pair in several("promoted", pairs, "a list of (token, number) for each expert"):
            if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
                raise InputError("promoted", expected="(token, number)", got=brief(pair))
            number("promoted", pair[1])
    if not any(len(pairs) for pairs in promoted):
        raise InputError("promoted", expected="at least one expert with a token", got=f"{len(promoted)} experts")
    called = expert_names(len(promoted), names)
    n_rows = max(len(pairs) for pairs in promoted)
    n_rows = n_rows if limit is None else min(n_rows, whole("limit", limit, 1))
    cell = f"padding:3px 10px;border-top:1px solid {GRID};text-align:left;vertical-align:top"
    head = "".join(
        f'<th style="padding:4px 10px;text-align:left;border-bottom:3px solid {colour}">{escape(name)}</th>'
        for name, colour in zip(called, expert_colours(len(called)), strict=True)
    )
    body = []
    for index in range(n_rows):
        cells = [_cell(pairs[index]) if index < len(pairs) else "" for pairs in promoted]
        body.append("<tr>" + "".join(f'<td style="{cell}">{one}</td>' for one in cells) + "</tr>")
    table = (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse;color:inherit;font-size:13px">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
    note = f"<div style='font-size:12px;margin-top:6px;{MUTED}'>number behind a token: {escape(unit)}</div>"
    return Html(block([table, note]))


def _cell(pair: tuple[str, float]) -> str:
    token, value = pair
    number = f"{value:+.2f}" if math.isfinite(value) else "unknown"
    text = f'<span dir="auto" style="{MONO};white-space:pre-wrap;overflow-wrap:anywhere">{visible(token)}</span>'
    return f"{text} <span style='{MUTED};white-space:nowrap'>{number}</span>"

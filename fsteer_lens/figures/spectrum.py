"""How many directions a subspace needs."""

from typing import TYPE_CHECKING

from fsteer_lens.effects.decisions import RankSweep
from fsteer_lens.errors import InputError
from fsteer_lens.figures.results import require_result
from fsteer_lens.figures.style import TEXT, accent, plain, styled
from fsteer_lens.ground.checks import instance
from fsteer_lens.method.linalg import require_rank
from fsteer_lens.method.subspace import Subspace

if TYPE_CHECKING:
    import plotly.graph_objects


def scree(
    subspace: Subspace,
    by_rank: RankSweep | None = None,
    *,
    rank: int | None = None,
    title: str | None = None,
) -> "plotly.graph_objects.Figure":
    """Explained variance by direction on a log axis, its cumulative share as a line, and below them AUROC by rank.

    Where most ranks tell all prompts apart the AUROC sticks at 1, and the margin stands in its place: the energy ratio
    of the lowest prompt to be steered minus that of the highest of the others.

    Args:
        subspace: with all of its directions, r of them.
        by_rank: what `effects.rank_sweep` returns for a gate on this subspace. Its AUROC (0 to 1) tells how well the
            energy ratio at each of r ranks tells the two kinds of prompt apart.
        rank: the gate's, marked by a line.
        title: above the figure; None says how many directions hold 90 % of the variance.

    Raises:
        InputError: something else than a RankSweep, another number of ranks than directions, or a rank that was not
            fitted.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    r = instance("subspace", subspace, Subspace, "a Subspace").rank
    if by_rank is not None:
        require_result("by_rank", by_rank, RankSweep, "rank_sweep")
        if len(by_rank.auroc) != r:
            raise InputError("by_rank", expected=f"an AUROC, one for each of {r} ranks", got=len(by_rank.auroc))
    rank = None if rank is None else require_rank(rank, r, "the ranks that were fitted")
    ranks = list(range(1, r + 1))
    rows = 1 if by_rank is None else 2
    heights = [1.0] if by_rank is None else [0.6, 0.4]
    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, row_heights=heights, vertical_spacing=0.09)
    figure.add_trace(
        go.Bar(
            x=ranks,
            y=plain(100 * subspace.explained),
            name="of this direction",
            marker={"color": accent(0.6), "line": {"width": 0}},
            hovertemplate="direction %{x}: %{y:.2f} % of the variance<extra></extra>",
        ),
        row=1,
        col=1,
    )
    figure.add_trace(
        go.Scatter(
            x=ranks,
            y=plain(100 * subspace.explained.cumsum(0)),
            name="of all directions up to here",
            mode="lines+markers",
            marker={"size": 5},
            line={"color": TEXT, "width": 2},
            hovertemplate="rank %{x}: %{y:.1f} % of the variance<extra></extra>",
        ),
        row=1,
        col=1,
    )
    below = "AUROC"
    if by_rank is not None:
        margins = by_rank.ser.nan_to_num(2).amin(dim=0) - by_rank.general_ser.nan_to_num(-2).amax(dim=0)
        apart = bool((by_rank.auroc == 1).float().mean() > 0.5)
        below = "margin" if apart else below
        figure.add_trace(
            go.Scatter(
                x=ranks,
                y=plain(margins if apart else by_rank.auroc),
                mode="lines+markers",
                marker={"size": 5},
                line={"color": TEXT, "width": 2},
                showlegend=False,
                hovertemplate=f"rank %{{x}}: {below} %{{y:.4f}}<extra></extra>",
            ),
            row=2,
            col=1,
        )
    needed = min(r, int((subspace.explained.cumsum(0) < 0.9).sum()) + 1)
    held = 100 * float(subspace.explained[:needed].sum())
    told = f"{needed} of {r} directions hold {held:.0f} % of the variance"
    styled(figure, told if title is None else title, height=360 if by_rank is None else 480)
    figure.update_xaxes(range=[0.4, r + 0.6], showgrid=False)
    figure.update_xaxes(title="direction, rank r", row=rows, col=1)
    figure.update_yaxes(title="variance of the queries (%)", type="log", row=1, col=1)
    if by_rank is not None:
        figure.update_yaxes(title={"text": "margin of s" if below == "margin" else below, "standoff": 15}, row=2, col=1)
    if rank is not None:
        line = {"color": TEXT, "width": 2, "dash": "dash"}
        figure.add_shape(type="line", x0=rank, x1=rank, y0=0, y1=1, yref="paper", line=line)
        side = "right" if rank > 0.7 * r else "left"
        place = {"x": rank, "y": 0.5, "yref": "y domain", "xanchor": side, "xshift": -5 if side == "right" else 5}
        figure.add_annotation(text=f"the gate's rank {rank}", showarrow=False, **place)
    return figure

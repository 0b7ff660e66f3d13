"""How many directions a subspace needs."""

from typing import TYPE_CHECKING

from fsteer_lens.effects.decisions import RankSweep
from fsteer_lens.errors import InputError
from fsteer_lens.figures.results import require_result
from fsteer_lens.figures.style import CURVE, GROUPS, TEXT, plain, styled
from fsteer_lens.method.linalg import require_rank
from fsteer_lens.method.subspace import Subspace

if TYPE_CHECKING:
    import plotly.graph_objects


def scree(
    subspace: Subspace,
    by_rank: RankSweep | None = None,
    *,
    rank: int | None = None,
    title: str = "How many directions does the subspace need?",
) -> "plotly.graph_objects.Figure":
    """Explained variance by direction as bars, its cumulative share as a line, and below them AUROC by rank.

    Args:
        subspace: with all of its directions, r of them.
        by_rank: what `effects.rank_sweep` returns for a gate on this subspace. Its AUROC (0 to 1) tells how well the
            energy ratio at each of r ranks tells the two kinds of prompt apart.
        rank: the gate's, marked by a line.
        title: above the figure.

    Raises:
        InputError: something else than a RankSweep, another number of ranks than directions, or a rank that was not
            fitted.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    r = subspace.rank
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
            marker={"color": GROUPS[1], "line": {"width": 0}},
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
            line={"color": GROUPS[2], "width": 2},
            hovertemplate="rank %{x}: %{y:.1f} % of the variance<extra></extra>",
        ),
        row=1,
        col=1,
    )
    if by_rank is not None:
        figure.add_trace(
            go.Scatter(
                x=ranks,
                y=plain(by_rank.auroc),
                mode="lines+markers",
                marker={"size": 5},
                line={"color": CURVE, "width": 2},
                showlegend=False,
                hovertemplate="rank %{x}: AUROC %{y:.4f}<extra></extra>",
            ),
            row=2,
            col=1,
        )
    styled(figure, title, height=360 if by_rank is None else 480)
    figure.update_xaxes(range=[0.4, r + 0.6], showgrid=False)
    figure.update_xaxes(title="direction, rank r", row=rows, col=1)
    figure.update_yaxes(title="variance of the queries (%)", range=[0, 104], row=1, col=1)
    if by_rank is not None:
        figure.update_yaxes(title={"text": "AUROC", "standoff": 15}, row=2, col=1)
    if rank is not None:
        line = {"color": TEXT, "width": 2, "dash": "dash"}
        figure.add_shape(type="line", x0=rank, x1=rank, y0=0, y1=1, yref="paper", line=line)
        side = "right" if rank > 0.7 * r else "left"
        place = {"x": rank, "y": 0.5, "yref": "y domain", "xanchor": side, "xshift": -5 if side == "right" else 5}
        figure.add_annotation(text=f"the gate's rank {rank}", showarrow=False, **place)
    return figure

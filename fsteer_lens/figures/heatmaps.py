"""Heatmaps on the two scales that all figures share: from nothing upwards, and around zero."""

from typing import TYPE_CHECKING, Any, Final

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.figures.style import accent, plain

if TYPE_CHECKING:
    import plotly.graph_objects

AROUND_ZERO: Final = (
    (0.0, "#b2182b"),
    (0.17, "#d6604d"),
    (0.33, "#f4a582"),
    (0.5, "#f2f2f2"),
    (0.67, "#92c5de"),
    (0.83, "#4393c3"),
    (1.0, "#2166ac"),
)
"""Red below zero, blue above; opaque, so that numbers written into the cells are readable on any page."""

FROM_ZERO: Final = ((0.0, accent(0)), (1.0, accent(1)))
"""From the page itself to the full colour."""


def heatmap(
    values: Float[Tensor, "rows columns"],
    meaning: str,
    *,
    centred: bool = False,
    most: float | None = None,
    bar: dict[str, Any] | None = None,
    **options: Any,
) -> "plotly.graph_objects.Heatmap":
    """A heatmap from 0 to the largest value, or if `centred` from minus to plus the largest size; NaN is a gap.

    Args:
        values: numbers to draw, [rows columns].
        meaning: written beside the colour bar, with its unit.
        centred: red below zero, blue above.
        most: the end of the scale; None takes the largest size in `values`.
        bar: more settings of the colour bar.
        options: of `plotly.graph_objects.Heatmap`.
    """
    import plotly.graph_objects as go

    if most is None:
        most = float(values.nan_to_num(0, 0, 0).abs().max()) or 1.0
    title = {"text": meaning, "side": "right"}
    return go.Heatmap(
        z=plain(values),
        zmin=-most if centred else 0.0,
        zmax=most,
        colorscale=[list(stop) for stop in (AROUND_ZERO if centred else FROM_ZERO)],
        colorbar={"title": title, "outlinewidth": 0, "thickness": 12, **(bar or {})},
        hoverongaps=False,
        **options,
    )

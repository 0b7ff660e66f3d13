"""Where in the model steering shows: layer by layer, token by token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.heatmaps import heatmap
from fsteer_lens.figures.style import STEERED_COLOUR, TEXT, label_text, styled, token_ticks

if TYPE_CHECKING:
    import plotly.graph_objects


def layer_position(
    change: Float[Tensor, "layers s"],
    tokens: Sequence[str],
    *,
    steered_layers: Sequence[int] = (),
    prompt_length: int | None = None,
    name: str = "‖change‖ / ‖residual stream‖",
    centred: bool = False,
    title: str = "Where steering grows, and where it dies",
) -> "plotly.graph_objects.Figure":
    """Heatmap of a number at every layer (upwards) and token (rightwards), by default the size of steering's change.

    Steered layers are named in orange, with a triangle; a line stands between the prompt and what was generated.

    Args:
        change: one row per layer, layer 0 first, one column per token, [layers s].
        tokens: text of every token, [s].
        steered_layers: layers that were edited.
        prompt_length: number of tokens in the prompt.
        name: of the number, with its unit.
        centred: around zero, blue above and red below, as for cosines or the part of one component.
        title: above the figure.

    Raises:
        InputError: no layer, no token, another number of tokens than columns, or a steered layer that is not there.
    """
    import plotly.graph_objects as go

    n_layers, n_tokens = change.shape
    if n_layers == 0 or n_tokens == 0:
        raise InputError("change", expected="at least one layer and one token", got=list(change.shape))
    if len(tokens) != n_tokens:
        raise InputError("tokens", expected=f"one for each of {n_tokens} columns", got=len(tokens))
    if not set(steered_layers) <= set(range(n_layers)):
        raise InputError("steered_layers", expected=f"ints in 0..{n_layers - 1}", got=list(steered_layers))
    told = [f"{index}: {label_text(token) or '·'}" for index, token in enumerate(tokens)]
    figure = go.Figure(
        heatmap(
            change,
            label_text(name),
            centred=centred,
            customdata=[told] * n_layers if n_tokens <= 1000 else None,
            hovertemplate="layer %{y}, token "
            + ("%{customdata}" if n_tokens <= 1000 else "%{x}")
            + f"<br>{label_text(name)}: %{{z:.3g}}<extra></extra>",
        )
    )
    styled(figure, title, height=max(300, 190 + 26 * n_layers))
    figure.update_xaxes(title="token", tickangle=-60, showgrid=False, ticks="outside", ticklen=4, **token_ticks(tokens))
    ticks = [
        f'<span style="color:{STEERED_COLOUR}">▶ <b>{layer}</b></span>' if layer in steered_layers else str(layer)
        for layer in range(n_layers)
    ]
    named = "layer (▶ steered)" if steered_layers else "layer"
    figure.update_yaxes(
        title={"text": named, "standoff": 20}, tickvals=list(range(n_layers)), ticktext=ticks, showgrid=False
    )
    if prompt_length is not None and 0 < prompt_length < n_tokens:
        at, line = prompt_length - 0.5, {"color": TEXT, "width": 2}
        figure.add_shape(type="line", x0=at, x1=at, y0=0, y1=1, yref="paper", line=line)
        for text, anchor, shift in (("prompt", "right", -6), ("generated", "left", 6)):
            figure.add_annotation(
                text=text, x=at, y=1, yref="paper", yanchor="bottom", xanchor=anchor, xshift=shift, showarrow=False
            )
    return figure

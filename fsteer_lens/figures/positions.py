"""Where in the model steering shows: layer by layer, token by token."""

from typing import TYPE_CHECKING, Final, Literal

from fsteer_lens.effects.residual_stream import Propagation
from fsteer_lens.errors import InputError
from fsteer_lens.figures.heatmaps import heatmap
from fsteer_lens.figures.results import require_result
from fsteer_lens.figures.style import STEERED_COLOUR, TEXT, label_text, styled, token_ticks, wrapped
from fsteer_lens.ground.checks import choice

if TYPE_CHECKING:
    import plotly.graph_objects

Part = Literal["size", "norm", "cosine", "carried", "edit", "attention", "mlp"]
STREAM: Final = "(units of the residual stream)"
MEANINGS: Final[dict[Part, str]] = {
    "size": "‖change‖ / ‖residual stream‖",
    "norm": f"‖change‖ {STREAM}",
    "cosine": "cosine with the mean edit",
    "carried": f"‖change‖ from the layer below {STREAM}",
    "edit": f"‖change‖ from the edit {STREAM}",
    "attention": f"‖change‖ from attention {STREAM}",
    "mlp": f"‖change‖ from the MLP {STREAM}",
}
LENGTHS: Final = ("size", "norm")
"""Never below zero; the others are drawn around it."""


def layer_position(
    path: Propagation,
    *,
    what: Part = "size",
    title: str | None = None,
) -> "plotly.graph_objects.Figure":
    """Heatmap of what steering changed at every layer (upwards) and token (rightwards), by default the change's size.

    Steered layers are named in orange, with a triangle; a line stands between the prompt and what was generated. Sizes
    and norms go from zero upwards, cosines and the parts of the norm around zero: blue above, red below.

    Args:
        path: what `effects.propagation` returns.
        what: the number to draw, by its name there: "size", "norm", "cosine", or a part of the norm: "carried", "edit",
            "attention", "mlp". A size and a cosine have no unit, the others that of the residual stream.
        title: above the figure; None says where the size of it is largest.

    Raises:
        InputError: something else than a Propagation, an unknown `what`, no layer, no token, another number of tokens
            than columns, or an edited layer that is not there.
    """
    import plotly.graph_objects as go

    require_result("path", path, Propagation, "propagation")
    what = choice("what", what, MEANINGS)
    values, tokens, steered_layers = getattr(path, what), path.tokens, path.edited_layers
    n_layers, n_tokens = values.shape
    if n_layers == 0 or n_tokens == 0:
        raise InputError("path", expected="at least one layer and one token", got=repr(path))
    if len(tokens) != n_tokens:
        raise InputError("tokens", expected=f"one for each of {n_tokens} columns", got=len(tokens))
    if not set(steered_layers) <= set(range(n_layers)):
        raise InputError("edited_layers", expected=f"ints in 0..{n_layers - 1}", got=list(steered_layers))
    told = [f"{index}: {label_text(token) or '·'}" for index, token in enumerate(tokens)]
    figure = go.Figure(
        heatmap(
            values,
            wrapped(MEANINGS[what], 34),
            centred=what not in LENGTHS,
            customdata=[told] * n_layers if n_tokens <= 1000 else None,
            hovertemplate="layer %{y}, token "
            + ("%{customdata}" if n_tokens <= 1000 else "%{x}")
            + f"<br>{MEANINGS[what]}: %{{z:.3g}}<extra></extra>",
        )
    )
    best = int(values.nan_to_num(0).abs().argmax())
    where = f"after layer {best // n_tokens}, at “{tokens[best % n_tokens].strip()}”"
    largest = f"Largest {where}: {float(values.flatten()[best]):.2g}"
    styled(figure, largest if title is None else title, height=max(300, 190 + 26 * n_layers))
    figure.update_xaxes(title="token", tickangle=-60, showgrid=False, ticks="outside", ticklen=4, **token_ticks(tokens))
    ticks = [
        f'<span style="color:{STEERED_COLOUR}">▶ <b>{layer}</b></span>' if layer in steered_layers else str(layer)
        for layer in range(n_layers)
    ]
    named = "layer (▶ steered)" if steered_layers else "layer"
    figure.update_yaxes(
        title={"text": named, "standoff": 20}, tickvals=list(range(n_layers)), ticktext=ticks, showgrid=False
    )
    first = min(steered_layers, default=0)
    if first > 0:
        below = {"xref": "paper", "x0": 0, "x1": 1, "y0": -0.5, "y1": first - 0.5, "line": {"width": 0}}
        figure.add_shape(type="rect", **below, fillcolor="rgba(127,127,127,.13)", layer="below")
        place = {"x": 0.01, "xref": "paper", "xanchor": "left", "y": (first - 1) / 2}
        figure.add_annotation(text="before the edit: nothing can change here", showarrow=False, **place)
    if 0 < path.prompt_length < n_tokens:
        at, line = path.prompt_length - 0.5, {"color": TEXT, "width": 2}
        figure.add_shape(type="line", x0=at, x1=at, y0=0, y1=1, yref="paper", line=line)
        for text, anchor, shift in (("prompt", "right", -6), ("generated", "left", 6)):
            figure.add_annotation(
                text=text, x=at, y=1, yref="paper", yanchor="bottom", xanchor=anchor, xshift=shift, showarrow=False
            )
    return figure

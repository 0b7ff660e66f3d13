"""Which experts act on which token."""

from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.html import Html, block, escape, legend_line
from fsteer_lens.figures.rich import rich_view
from fsteer_lens.figures.style import GRID, expert_colours, expert_names, plain
from fsteer_lens.figures.tokens import TokenView, ViewOptions
from fsteer_lens.ground.checks import options_of
from fsteer_lens.method.linalg import require_tensor
from fsteer_lens.trace.trace import Trace

STRIP = 7
"""Height of a token's strip, in pixels."""


def token_experts(
    tokens: Sequence[str] | Trace,
    weights: Float[Tensor, "s k"] | None = None,
    *,
    names: Sequence[str] | None = None,
    layer: int | None = None,
    row: int = 0,
    **options: Unpack[ViewOptions],
) -> Html:
    """Tokens of one text, each above a strip that is divided among the experts by weight; the numbers on hover.

    Of a steering's trace the strips are the mix that was added at each steered position: the prompt's own, or with
    refresh="step" that of the step; tokens that were not steered have none. Of an `ExpertProbe`'s they are what each
    token would get. Lines, frame and bar are those of `token_scores`.

    Args:
        tokens: text of every token, [s], or a trace of `generate`.
        weights: of every expert at every token, [s k]; NaN, or all 0, draws no strip.
        names: of the experts; None takes those of the trace.
        layer: of the trace; needed where it holds several.
        row: of the trace or the marks.
        options: `steered`, `prompt_length`, `first`, `bos`, `marks`, `legend`, `rich` and `bundle` as for
            `token_scores`; rich=True is the `colored_tokens_multi` of circuitsvis, where a click chooses the expert.

    Raises:
        InputError: no tokens or experts, another number of weights or marks than tokens, or a trace without either.
    """
    view = options_of("token_experts", TokenView, options)
    probed = isinstance(tokens, Trace) and not tokens.change  # its trace has no steered positions
    shown = view.tokens(tokens, None if probed else layer, row)
    if isinstance(tokens, Trace) and weights is None:
        weights = _acting(tokens, layer, row, len(shown))
    if weights is None:
        raise InputError("weights", expected=f"a row for each of {len(shown)} tokens", got=None)
    if require_tensor(weights, "weights").ndim != 2 or len(weights) != len(shown) or weights.shape[1] == 0:
        expected = f"a row for each of {len(shown)} tokens, a column for each expert"
        raise InputError("weights", expected=expected, got=list(weights.shape))
    own = tokens.names.get(tokens.layer_of("weights", layer)) if isinstance(tokens, Trace) and tokens.weights else None
    called = expert_names(weights.shape[1], names, own)
    values = plain(weights)
    if view.rich:
        return rich_view(
            "ColoredTokensMulti",
            {
                "tokens": shown.glyphed(),
                "values": [[weight or 0.0 for weight in row_] for row_ in values],
                "labels": called,
                "positiveBounds": [1.0] * len(called),
                "negativeBounds": [-1.0] * len(called),
            },
            note="weight α of the expert that is chosen (0 to 1); the numbers of all of them on hover",
            marked=shown,
            bundle=view.bundle,
        )
    colours = expert_colours(len(called))
    text = shown.html([_strip(row_, colours) for row_ in values], [_told(row_, called) for row_ in values])
    items = [f"<span style='color:{c}'>■</span> {escape(n)}" for c, n in zip(colours, called, strict=True)]
    return Html(block([text, legend_line([*items, *shown.legend()]) if view.legend else ""]))


def _acting(trace: Trace, layer: int | None, row: int, n_tokens: int) -> Float[Tensor, "s k"]:
    """The mix that was added at each token of a row, or that a probe read there; NaN where there is none."""
    layer = trace.layer_of("weights", layer)
    one = trace.row(row)
    weights = one.weights[layer]
    if weights.ndim == 3:  # a probe's: every token has its own
        acting = torch.full((n_tokens, weights.shape[2]), torch.nan, dtype=torch.float32, device=weights.device)
        read = weights[0, :n_tokens].float()
        acting[: len(read)] = read
        return acting
    acting = weights[0].float().expand(n_tokens, -1).clone()
    if layer in one.step_weights:
        by_step = one.step_weights[layer][0, :n_tokens].float()
        known = ~by_step.isnan().any(dim=1)
        acting[: len(by_step)][known] = by_step[known]
    steered = one.marks(layer).steered[0, :n_tokens]
    acting[: len(steered)][~steered] = torch.nan
    acting[len(steered) :] = torch.nan
    return acting


def _strip(weights: Sequence[float | None], colours: Sequence[str]) -> str:
    """Style of a token: a strip below it with a part for each expert."""
    shape = f"display:inline-block;min-width:10px;max-width:100%;line-height:1.5;padding-bottom:{STRIP}px;margin:0 1px"
    total = sum(weight for weight in weights if weight is not None and weight > 0)
    if total == 0:
        return f"{shape};background:linear-gradient({GRID},{GRID}) bottom/100% 1px no-repeat"
    stops, start = [], 0.0
    for weight, colour in zip(weights, colours, strict=True):
        end = start + 100 * max(weight or 0.0, 0.0) / total
        if end - start > 0.5:
            stops.append(f"{colour} {start:.1f}% {end:.1f}%")
        start = end
    return f"{shape};background:linear-gradient(90deg,{','.join(stops)}) bottom/100% {STRIP}px no-repeat"


def _told(weights: Sequence[float | None], names: Sequence[str]) -> str:
    if all(weight is None for weight in weights):
        return "no expert acts"
    return "\n".join(
        f"{name}: {'none' if weight is None else f'{weight:.3f}'}" for name, weight in zip(names, weights, strict=True)
    )

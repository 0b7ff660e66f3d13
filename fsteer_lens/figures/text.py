"""Scores of the tokens of a text, as plain HTML or as a view of circuitsvis."""

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.effects.decisions import GateExplanation
from fsteer_lens.errors import InputError
from fsteer_lens.figures.html import MUTED, Html, block, escape, legend_line
from fsteer_lens.figures.rich import rich_view
from fsteer_lens.figures.style import ACCENT, NEGATIVE, POSITIVE, plain
from fsteer_lens.figures.tokens import Tokens, TokenView, ViewOptions
from fsteer_lens.ground.checks import brief, finite, options_of, several, switch
from fsteer_lens.method.linalg import require_tensor
from fsteer_lens.trace.trace import Trace

STRONGEST_SHADE = 0.5


def token_scores(
    tokens: Sequence[str] | Trace | GateExplanation,
    scores: Float[Tensor, " s"] | None = None,
    *,
    name: str | None = None,
    bounds: tuple[float, float] | None = None,
    centred: bool = False,
    layer: int | None = None,
    row: int = 0,
    **options: Unpack[ViewOptions],
) -> Html:
    """Tokens of one text, shaded by a score, with their value on hover.

    An orange line is under steered tokens and a dotted grey one under the others, the beginning-of-sequence token is
    framed, pads are struck out, and a bar stands between the prompt and what was generated. A token whose score is NaN
    gets no shade and says so. Where no scores are given, a trace draws the size of the change at each of its tokens,
    ‖edit‖ / ‖residual stream‖, and the explanation of a gate how much of the energy ratio goes with each token, around
    zero.

    Args:
        tokens: text of every token, [s], a trace of `generate`, or what `effects.explain_gate` returns.
        scores: one number per token, [s], in the order of `tokens`.
        name: of the score, with its unit.
        bounds: scores with no shade and with the full shade; None takes 0 and the largest score.
        centred: scale from −max to max: red below zero, blue above.
        layer: of the trace; needed where it holds several.
        row: of the trace or the marks.
        options: what each token of a text is: `steered` (None), which of them were, [s]; `prompt_length` (None), number
            of real tokens in the prompt; `first` (0), index of the first real token, those before it being pads; `bos`
            (False), whether that is the beginning-of-sequence token; or `marks` (None), all of this at once, from
            `Trace.marks`, for tokens that are a row of the padded batch. How they are shown: `legend` (True), say below
            what shade, lines and bar mean; `rich` (False), the `colored_tokens` of circuitsvis, which needs scripts, so
            a notebook must be trusted; `bundle` (True), put circuitsvis' 1.3 MB into this view, False where
            `circuitsvis_bundle()` is on the page already.

    Raises:
        InputError: no tokens, another number of scores or marks than tokens, or a trace without tokens.
    """
    view, centred = options_of("token_scores", TokenView, options), switch("centred", centred)
    if isinstance(tokens, GateExplanation):
        if scores is None:
            scores, centred, name = tokens.carried, True, _carried(tokens) if name is None else name
        tokens = tokens.tokens
    shown = view.tokens(tokens, layer, row)
    if isinstance(tokens, Trace) and scores is None:
        scores = _change(tokens.row(row), layer, len(shown))
        name = "‖change‖ / ‖residual stream‖" if name is None else name
    if scores is None:
        raise InputError("scores", expected=f"a number for each of {len(shown)} tokens", got=None)
    if require_tensor(scores, "scores").shape != (len(shown),):
        raise InputError("scores", expected=f"one for each of {len(shown)} tokens", got=list(scores.shape))
    name = "score" if name is None else name
    values = plain(scores, digits=6)
    low, high = _bounds(values, bounds, centred)
    if view.rich:
        below = "" if centred or low == 0 else "; the shade begins at 0"
        return rich_view(
            "ColoredTokens",
            {
                "tokens": shown.glyphed(),
                "values": [0.0 if value is None else value for value in values],
                "minValue": low if centred else min(low, 0.0),
                "maxValue": high,
            },
            note=f"{name}{below}",
            marked=shown,
            bundle=view.bundle,
        )
    told = [f"{name}: {'none' if value is None else f'{value:.4g}'}" for value in values]
    text = shown.html([_shade(value, low, high, centred) for value in values], told)
    return Html(block([text, _legend(name, low, high, centred, shown) if view.legend else ""]))


def _change(one: Trace, layer: int | None, n_tokens: int) -> Float[Tensor, " s"]:
    """Size of the change at each token of the only row, NaN where no forward pass went."""
    recorded = one.change[one.layer_of("change", layer)][0, :n_tokens].float()
    change = torch.full((n_tokens,), math.nan, dtype=torch.float32, device=recorded.device)
    change[: len(recorded)] = recorded
    return change


def _carried(told: GateExplanation) -> str:
    return f"energy ratio {told.ratio:.3f} (threshold {told.threshold:.3f}) minus that without the token"


def _bounds(values: Sequence[float | None], bounds: tuple[float, float] | None, centred: bool) -> tuple[float, float]:
    if bounds is not None:
        if len(several("bounds", bounds, "two numbers")) != 2:
            raise InputError("bounds", expected="two numbers", got=brief(bounds))
        low, high = (finite("bounds", end) for end in bounds)
        if not low < high or (centred and low != -high):
            raise InputError("bounds", expected="two finite numbers, low < high, −max and max if centred", got=bounds)
        return low, high
    known = [value for value in values if value is not None] or [0.0]
    if centred:
        most = max(map(abs, known)) or 1.0
        return -most, most
    if max(known) <= 0 and min(known) < 0:
        fix = "Use centred=True, or give bounds=(low, high)."
        raise InputError(
            "scores", expected="one above 0, for a scale that begins there", got=f"{max(known)} at most", fix=fix
        )
    return 0.0, max(known) or 1.0


def _shade(value: float | None, low: float, high: float, centred: bool) -> str:
    """Background of a score: its opacity is the size, so that text stays readable on light and dark pages."""
    if value is None:
        return "opacity:.75"
    share = min(abs(value) / high, 1.0) if centred else min(max((value - low) / (high - low), 0.0), 1.0)
    red, green, blue = (POSITIVE if value > 0 else NEGATIVE) if centred else ACCENT
    return f"background:rgba({red},{green},{blue},{STRONGEST_SHADE * share:.2f})"


def _legend(name: str, low: float, high: float, centred: bool, shown: Tokens) -> str:
    """What shade and marks mean."""
    stops = [low, 0.0, high] if centred else [low, (low + high) / 2, high]
    ramp = "".join(
        f"<span style='padding:1px 7px;{_shade(stop, low, high, centred)}'>{stop:.3g}</span>" for stop in stops
    )
    return legend_line([f"<span style='{MUTED}'>{escape(name)}</span> {ramp}", *shown.legend()])

"""Token views as plain HTML: scores of the tokens of a text, and unsteered beside steered text."""

import math
from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.html import MONO, MUTED, Html, block, escape, span, visible
from fsteer_lens.figures.style import ACCENT, GRID, plain
from fsteer_lens.trace import Trace

POSITIVE: Final = (60, 130, 220)
NEGATIVE: Final = (220, 65, 70)
STEERED: Final = "border-bottom:3px solid #f89c20"
ALONE: Final = f"border-bottom:3px solid {GRID}"
BORDER: Final = "border-left:2px solid;margin:0 4px;opacity:.8"
TEXT: Final = f"{MONO};font-size:14px;line-height:2.1;white-space:pre-wrap;overflow-wrap:anywhere"
STRONGEST_SHADE: Final = 0.6


def token_scores(
    tokens: Sequence[str] | Trace,
    scores: Float[Tensor, " s"] | None = None,
    *,
    name: str = "score",
    bounds: tuple[float, float] | None = None,
    centred: bool = False,
    steered: Bool[Tensor, " s"] | None = None,
    prompt_length: int | None = None,
    first: int = 0,
    layer: int | None = None,
    row: int = 0,
    legend: bool = True,
) -> Html:
    """Tokens of one text, shaded by a score, with their value on hover.

    An orange line is under steered tokens and a grey one under the others, pads are struck out, and a bar stands
    between the prompt and what was generated. A token whose score is NaN gets no shade and says so. A trace draws its
    own tokens, with the size of the change at each of them, ‖edit‖ / ‖residual stream‖, where no scores are given.

    Args:
        tokens: text of every token, [s], or a trace of `generate`.
        scores: one number per token, [s], in the order of `tokens`.
        name: of the score, with its unit.
        bounds: scores with no shade and with the full shade; None takes 0 and the largest size.
        centred: scale from −max to max: red below zero, blue above.
        steered: which tokens were steered, [s].
        prompt_length: number of real tokens in the prompt.
        first: index of the first real token; those before it are pads.
        layer: of the trace; needed where it holds several.
        row: of the trace.
        legend: say below what shade, lines and bar mean.

    Raises:
        InputError: no tokens, another number of scores or marks than tokens, or a trace without tokens.
    """
    if isinstance(tokens, Trace):
        tokens, change, prompt_length = _of_trace(tokens, layer, row)
        steered = change > 0 if steered is None else steered
        if scores is None:
            scores, name = change, "‖change‖ / ‖residual stream‖"
    if not tokens:
        raise InputError("tokens", expected="at least one", got="none")
    if scores is None:
        raise InputError("scores", expected=f"a number for each of {len(tokens)} tokens", got=None)
    for what, given in (("scores", scores), ("steered", steered)):
        if given is not None and len(given) != len(tokens):
            raise InputError(what, expected=f"one for each of {len(tokens)} tokens", got=len(given))
    values = plain(scores, digits=6)
    low, high = _bounds(values, bounds, centred)
    marks = None if steered is None else steered.tolist()
    parts = []
    for index, (token, value) in enumerate(zip(tokens, values, strict=True)):
        if prompt_length is not None and index == first + prompt_length:
            parts.append(f"<span title='the generated text begins here' style='{BORDER}'></span>")
        told = [f"{index}: {token!r}", f"{name}: {'none' if value is None else f'{value:.4g}'}"]
        if index < first:
            parts.append(span(visible(token), "text-decoration:line-through;opacity:.45", f"{told[0]}\npadding"))
            continue
        style = _shade(value, low, high, centred)
        if marks is not None:
            style += f";{STEERED if marks[index] else ALONE}"
            told.append("steered" if marks[index] else "not steered")
        if prompt_length is not None:
            told.append("prompt" if index < first + prompt_length else "generated")
        parts.append(span(visible(token), style, "\n".join(told)))
    text = f'<div dir="auto" style="{TEXT}">{"".join(parts)}</div>'
    marked = (marks is not None, prompt_length is not None, first > 0)
    return Html(block([text, _legend(name, low, high, centred, *marked) if legend else ""]))


def _of_trace(trace: Trace, layer: int | None, row: int) -> tuple[list[str], Float[Tensor, " s"], int]:
    """Tokens of one row, the size of the change at each (NaN where no forward pass went), and the prompt's length."""
    if trace.prompts is None or trace.prompt_lengths is None:
        raise InputError("trace", expected="one with token texts, from generate()", got=repr(trace))
    known = sorted(trace.change)
    layer = known[0] if layer is None and len(known) == 1 else layer
    if layer not in trace.change:
        raise InputError("layer", expected=f"one of the steered layers, {known}", got=layer)
    one = trace.row(row)
    assert one.prompts is not None
    generated = one.steps.texts[0] if one.steps is not None else ()
    tokens = [*one.prompts[0], *generated]
    change = torch.full((len(tokens),), math.nan)
    recorded = one.change[layer][0, : len(tokens) - bool(generated)].float()  # the last token predicts nothing
    change[: len(recorded)] = recorded
    return tokens, change, len(one.prompts[0])


def _bounds(values: Sequence[float | None], bounds: tuple[float, float] | None, centred: bool) -> tuple[float, float]:
    if bounds is not None:
        low, high = bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high) or (centred and low != -high):
            raise InputError("bounds", expected="two finite numbers, low < high, −max and max if centred", got=bounds)
        return low, high
    most = max((abs(value) for value in values if value is not None), default=0.0) or 1.0
    return (-most if centred else 0.0), most


def _shade(value: float | None, low: float, high: float, centred: bool) -> str:
    """Background of a score: its opacity is the size, so that text stays readable on light and dark pages."""
    if value is None:
        return "opacity:.75"
    share = min(abs(value) / high, 1.0) if centred else min(max((value - low) / (high - low), 0.0), 1.0)
    red, green, blue = (POSITIVE if value > 0 else NEGATIVE) if centred else ACCENT
    return f"background:rgba({red},{green},{blue},{STRONGEST_SHADE * share:.2f})"


def _legend(name: str, low: float, high: float, centred: bool, marks: bool, prompt: bool, pads: bool) -> str:
    """What shade, line, bar and strike mean."""
    stops = [low, 0.0, high] if centred else [low, (low + high) / 2, high]
    ramp = "".join(
        f"<span style='padding:1px 7px;{_shade(stop, low, high, centred)}'>{stop:.3g}</span>" for stop in stops
    )
    parts = [f"<span style='{MUTED}'>{escape(name)}</span> {ramp}"]
    if marks:
        parts += [f"<span style='{STEERED}'>steered</span>", f"<span style='{ALONE}'>not steered</span>"]
    if prompt:
        parts.append(f"prompt<span style='{BORDER}'></span>generated")
    if pads:
        parts.append("<s>padding</s>")
    items = "".join(f"<span style='margin-right:1.6em;white-space:nowrap'>{part}</span>" for part in parts)
    return f"<div style='font-size:12px;margin-top:6px'>{items}</div>"

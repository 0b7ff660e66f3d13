"""Unsteered beside steered text."""

import math
from collections.abc import Sequence
from typing import Any, Final

from fsteer_lens.errors import InputError
from fsteer_lens.figures.html import MONO, MUTED, Html, block, escape, span, visible
from fsteer_lens.figures.style import GRID, accent, expert_colours, plain
from fsteer_lens.gates import OPEN
from fsteer_lens.generation import Generation, Generations
from fsteer_lens.prompts import prompt_text
from fsteer_lens.trace import Steps, Trace

CELL: Final = f"padding:8px 12px;vertical-align:top;border-top:1px solid {GRID};text-align:left"
SHADE: Final = 0.6


def steer_compare(
    generations: Generations | Generation, *, limit: int | None = 6, tokenizer: Any = None, titles: Sequence[str] = ()
) -> Html:
    """Unsteered beside steered text, a row for each prompt, with what gate and experts decided.

    The shade of a steered token is KL(steered ‖ unsteered) of the distribution that it was drawn from, in nats, on one
    scale for all rows; hovering tells its log-probability with and without steering and the likeliest tokens.

    Args:
        generations: from `generate(..., compare=True)`.
        limit: show this many of them, the first ones; None shows all.
        tokenizer: the model's, which turns the ids of the likeliest tokens into text; None shows ids.
        titles: what to call each row.

    Raises:
        InputError: none to show, or a generation without its unsteered twin.
    """
    shown = [generations] if isinstance(generations, Generation) else list(generations)[:limit]
    if not shown:
        raise InputError("generations", expected="at least one", got="none")
    twins = [(item, item.baseline, item.trace.steps) for item in shown]
    rows, most = [], 0.0
    for item, baseline, steps in twins:
        if baseline is None or steps is None or steps.kl is None:
            raise InputError(repr(item), got="no unsteered twin", fix="Generate with compare=True.")
        most = max([most, *(value for value in plain(steps.kl[0]) if value is not None)])
    for index, (item, baseline, steps) in enumerate(twins):
        assert baseline is not None and steps is not None
        title = f"<b>{escape(titles[index])}</b> " if index < len(titles) else ""
        rows.append(
            f'<tr><td colspan="2" style="{CELL};padding-bottom:0">{title}'
            f'<span dir="auto" style="{MONO};font-size:13px">{visible(prompt_text(item.prompt))}</span>'
            f"{_decision(item.trace)}</td></tr>"
            f'<tr><td style="{CELL};border-top:0;width:50%"><span dir="auto">{visible(baseline.text)}</span></td>'
            f'<td style="{CELL};border-top:0"><span dir="auto">{_tokens(item.text, steps, most, tokenizer)}</span></td>'
            "</tr>"
        )
    head = "".join(f'<th style="{CELL};border-top:0;{MUTED}">{name}</th>' for name in ("without steering", "steered"))
    table = (
        '<table style="border-collapse:collapse;width:100%;table-layout:fixed;color:inherit;font-size:14px;'
        f'white-space:pre-wrap;overflow-wrap:anywhere"><tbody><tr>{head}</tr>{"".join(rows)}</tbody></table>'
    )
    return Html(block([table, _legend(most)]))


def _tokens(answer: str, steps: Steps, most: float, tokenizer: Any) -> str:
    """The steered tokens, shaded by KL, with log-probabilities on hover; those that the answer lacks are faint."""
    assert steps.kl is not None
    kl = plain(steps.kl[0])
    parts = []
    for step, text in enumerate(steps.texts[0]):
        value = kl[step]
        shade = "" if value is None or most == 0 else f"background:{accent(SHADE * value / most)}"
        style = shade if text in answer else f"{shade};opacity:.45"
        parts.append(span(visible(text), style, _told(steps, step, tokenizer)))
    return "".join(parts)


def _told(steps: Steps, step: int, tokenizer: Any) -> str:
    """What hovering over a token tells, in plain text."""
    assert steps.kl is not None
    lines = [
        f"{steps.texts[0][step]!r}, generated token {step}",
        f"KL(steered ‖ unsteered) {_number(steps.kl[0, step])} nats",
        f"log-prob {_number(steps.logprobs[0, step])} nats steered",
    ]
    if steps.baseline_logprobs is not None:
        lines[-1] += f", {_number(steps.baseline_logprobs[0, step])} unsteered"
    for name, ids, logprobs in (
        ("steered", steps.top_ids, steps.top_logprobs),
        ("unsteered", steps.baseline_top_ids, steps.baseline_top_logprobs),
    ):
        if ids is not None and logprobs is not None:
            lines.append(f"likeliest {name}:")
            pairs = zip(ids[0, step].tolist(), logprobs[0, step].tolist(), strict=True)
            lines += [f"   {_number(value)}  {_name(token, tokenizer)}" for token, value in pairs if token >= 0]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{float(value):.2f}" if math.isfinite(float(value)) else "unknown"


def _name(token: int, tokenizer: Any) -> str:
    return f"id {token}" if tokenizer is None else repr(tokenizer.decode([token]))


def _decision(trace: Trace) -> str:
    """Gate and strongest expert of every layer, in one line."""
    parts = []
    for layer in trace.layers:
        if layer not in trace.gate:
            continue
        gate = float(trace.gate[layer][0])
        told = f"gate {gate:.2f} {'open' if gate >= OPEN else 'closed'}"
        told = f"layer {layer}: {told}" if len(trace.gate) > 1 else told
        told = f"<span style='{MUTED}'>{told}</span>"
        if gate >= OPEN and layer in trace.weights:
            weights = trace.weights[layer][0].nan_to_num(0)
            best = int(weights.argmax())
            colour = expert_colours(len(weights))[best]
            told += f" &nbsp;<span style='color:{colour}'>■</span> "
            told += f"<span style='{MUTED}'>expert {best} with weight {float(weights[best]):.2f}</span>"
        parts.append(told)
    return f"<div style='font-size:12px'>{' · '.join(parts)}</div>" if parts else ""


def _legend(most: float) -> str:
    stops = "".join(
        f"<span style='padding:1px 7px;background:{accent(SHADE * share)}'>{most * share:.2g}</span>"
        for share in (0.0, 0.5, 1.0)
    )
    return (
        f"<div style='font-size:12px;margin-top:6px'><span style='{MUTED}'>shade of a token: KL(steered ‖ unsteered) in"
        f" nats </span>{stops}<span style='{MUTED}'> &nbsp; hover over a token for log-probabilities</span></div>"
    )

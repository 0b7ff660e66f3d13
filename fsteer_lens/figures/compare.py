"""Unsteered beside steered text."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from fsteer_lens.errors import InputError
from fsteer_lens.figures.html import MONO, MUTED, Html, block, escape, span, visible
from fsteer_lens.figures.likeliest import Likely, likeliest
from fsteer_lens.figures.results import traces_of
from fsteer_lens.figures.rich import BOX, STYLE, circuitsvis_bundle, component_markup
from fsteer_lens.figures.style import GRID, accent, expert_colours, one_line, plain
from fsteer_lens.figures.tokens import title_of
from fsteer_lens.ground.checks import optional, require_unset, several, switch, whole
from fsteer_lens.method.experts import mentioned
from fsteer_lens.method.gates import OPEN
from fsteer_lens.run.generation import Generation, Generations
from fsteer_lens.trace.steps import Steps
from fsteer_lens.trace.trace import Trace

CELL: Final = f"padding:8px 12px;vertical-align:top;border-top:1px solid {GRID};text-align:left"
SHADE: Final = 0.5
UNKNOWN: Final = -100.0
"""A log-probability for circuitsvis, which knows no gaps, where there is none."""


def steer_compare(
    generations: Generations | Generation | Trace,
    *,
    limit: int | None = 6,
    titles: Iterable[str] = (),
    rich: bool = False,
    bundle: bool = True,
) -> Html:
    """Unsteered beside steered text, a row for each prompt, with what gate and experts decided.

    The shade of a steered token is KL(steered ‖ unsteered) of the distribution that it was drawn from, in nats, on one
    scale for all rows; hovering tells its log-probability with and without steering and the likeliest tokens. Tokens
    that are not part of the text, such as the end of sequence, are faint.

    Args:
        generations: from `generate(..., compare=True)`, or their trace, also one that was read from a file.
        limit: show this many of them, the first ones; None shows all.
        titles: what to call each row.
        rich: the `token_log_probs` of circuitsvis: the steered text twice, coloured by the log-probability that the
            steered and the unsteered model give each token, with ranks among the likeliest tokens on hover; needs
            scripts, so a notebook must be trusted.
        bundle: put circuitsvis' 1.3 MB into a rich view; False where `circuitsvis_bundle()` is on the page already.

    Raises:
        InputError: none to show, or a generation without its unsteered twin.
    """
    rich, bundle = switch("rich", rich), switch("bundle", bundle)
    require_unset("a view that is not rich", bundle=None if bundle or rich else False)
    rows, titles = _rows(generations), several("titles", titles, "a list of texts")
    if len(titles) > len(rows):
        raise InputError("titles", expected=f"at most one for each of {len(rows)} rows", got=len(titles))
    rows = rows[: optional(whole, "limit", limit, 1)]
    if not rows:
        raise InputError("generations", expected="at least one", got="none")
    most = max((value or 0.0 for _, steps, _ in rows for value in _kl(steps)), default=0.0)
    parts = []
    for index, (trace, steps, unsteered) in enumerate(rows):
        title = f"<b>{escape(titles[index])}</b> " if index < len(titles) else ""
        special = {text for number, text in enumerate(steps.texts[0]) if _is_special(steps, number)}
        plainly = "".join(span(visible(text), MUTED if text in special else "") for text in unsteered)
        parts.append(
            f'<tr><td colspan="2" style="{CELL};padding-bottom:0">{title}'
            f'<span dir="auto" style="{MONO};font-size:13px">{visible(title_of(trace, 0))}</span>'
            f"{_decision(trace)}</td></tr>"
            f'<tr><td style="{CELL};border-top:0;width:50%"><span dir="auto">{plainly}</span></td>'
            f'<td style="{CELL};border-top:0"><span dir="auto">{_tokens(steps, most)}</span></td></tr>'
        )
        if rich:
            parts.append(f'<tr><td colspan="2" style="{CELL};border-top:0">{_rich(trace, steps)}</td></tr>')
    head = "".join(f'<th style="{CELL};border-top:0;{MUTED}">{name}</th>' for name in ("without steering", "steered"))
    table = (
        '<table style="border-collapse:collapse;width:100%;table-layout:fixed;color:inherit;font-size:14px;'
        f'white-space:pre-wrap;overflow-wrap:anywhere"><tbody><tr>{head}</tr>{"".join(parts)}</tbody></table>'
    )
    script = circuitsvis_bundle().body if rich and bundle else ""
    return Html(script + block([table, _legend(most)]))


def _rows(generations: Generations | Generation | Trace) -> list[tuple[Trace, Steps, tuple[str, ...]]]:
    """Trace, steps and unsteered tokens of each row."""
    rows = []
    for trace in traces_of(generations):
        steps, unsteered = trace.steps, trace.unsteered
        if trace.prompts is None or steps is None or steps.kl is None or unsteered is None:
            raise InputError(repr(trace), got="no unsteered twin", fix="Generate with compare=True.")
        rows.append((trace, steps, unsteered[0]))
    return rows


def _tokens(steps: Steps, most: float) -> str:
    """The steered tokens, shaded by KL, with log-probabilities on hover."""
    parts = []
    for step, (text, value) in enumerate(zip(steps.texts[0], _kl(steps), strict=True)):
        shade = "" if value is None or most == 0 else f"background:{accent(SHADE * value / most)}"
        style = f"{shade};{MUTED}" if _is_special(steps, step) else shade
        parts.append(span(visible(text), style, _told(steps, step)))
    return "".join(parts)


def _kl(steps: Steps) -> list[float | None]:
    assert steps.kl is not None
    return plain(steps.kl[0, : len(steps.texts[0])])


def _is_special(steps: Steps, step: int) -> bool:
    return steps.special is not None and bool(steps.special[0, step])


def _told(steps: Steps, step: int) -> str:
    """What hovering over a token tells, in plain text."""
    assert steps.kl is not None
    lines = [
        f"{steps.texts[0][step]!r}, generated token {step}",
        f"KL(steered ‖ unsteered) {_number(steps.kl[0, step])} nats",
        f"log-prob {_number(steps.logprobs[0, step])} nats steered",
    ]
    if steps.baseline_logprobs is not None:
        lines[-1] += f", {_number(steps.baseline_logprobs[0, step])} unsteered"
    for name, top in (
        ("steered", likeliest(steps, "top", step)),
        ("unsteered", likeliest(steps, "baseline_top", step)),
    ):
        lines += [f"likeliest {name}:"] * bool(top)
        lines += [f"   {_number(one.logprob)}  {one.text!r}" for one in top]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{float(value):.2f}" if math.isfinite(float(value)) else "unknown"


def _rich(trace: Trace, steps: Steps) -> str:
    """The steered text under both models, as circuitsvis shows log-probabilities."""
    assert trace.prompts is not None
    parts = []
    n = len(steps.texts[0])
    for name, tops, logprobs in (
        ("steered model", [likeliest(steps, "top", step) for step in range(n)], steps.logprobs),
        ("unsteered model", [likeliest(steps, "baseline_top", step) for step in range(n)], steps.baseline_logprobs),
    ):
        if logprobs is None or not all(tops):
            continue
        ranks = [_rank(top, int(token)) for top, token in zip(tops, steps.tokens[0].tolist(), strict=False)]
        before = trace.prompts[0][-1:] or ("",)
        properties = {
            "prompt": [one_line(text) or "·" for text in (*before, *steps.texts[0])],
            "topKLogProbs": [[_known(one.logprob) for one in top] for top in tops],
            "topKTokens": [[one_line(one.text) or "·" for one in top] for top in tops],
            "correctTokenRank": ranks,
            "correctTokenLogProb": [_known(value) for value in logprobs[0, :n].tolist()],
        }
        parts.append(f"<div>log-probabilities of the {name} (0 to −5 nats: red to white)</div>")
        parts.append(component_markup("TokenLogProbs", properties))
    return f'{STYLE}<div style="{BOX}">{"".join(parts)}</div>'


def _rank(top: Sequence[Likely], token: int) -> int | str:
    """Rank of a token among the likeliest, or that it comes after all of them."""
    ids = [one.token for one in top]
    return ids.index(token) if token in ids else f"{len(ids)} or later"


def _known(value: float) -> float:
    return value if math.isfinite(value) else UNKNOWN


def _decision(trace: Trace) -> str:
    """Gate and strongest expert of every layer, of every link of a chain, in one line."""
    parts = []
    decided = [(link, layer) for link in trace.parts or (trace,) for layer in link.layers if layer in link.gate]
    for link, layer in decided:
        gate = float(link.gate[layer][0])
        gated = any(layer in known for known in (link.gate_read, link.score, link.ser))  # an old trace has no gate_read
        told = f"gate {gate:.2f} {'open' if gate >= OPEN else 'closed'}" if gated else "always steered"
        told = f"layer {layer}: {told}" if len(decided) > 1 else told
        told = f"<span style='{MUTED}'>{told}</span>"
        if gate >= OPEN and layer in link.weights:
            weights = link.weights[layer][0].nan_to_num(0)
            best = int(weights.argmax())
            colour = expert_colours(len(weights))[best]
            name = mentioned(best, link.names.get(layer))
            told += f" &nbsp;<span style='color:{colour}'>■</span> "
            told += f"<span style='{MUTED}'>{escape(name)} with weight {float(weights[best]):.2f}</span>"
        parts.append(told)
    return f"<div style='font-size:12px'>{' · '.join(parts)}</div>" if parts else ""


def _legend(most: float) -> str:
    stops = "".join(
        f"<span style='padding:1px 7px;background:{accent(SHADE * share)}'>{most * share:.2g}</span>"
        for share in (0.0, 0.5, 1.0)
    )
    return (
        f"<div style='font-size:12px;margin-top:6px'><span style='{MUTED}'>shade of a token: KL(steered ‖ unsteered) in"
        f" nats </span>{stops}</div>"
    )

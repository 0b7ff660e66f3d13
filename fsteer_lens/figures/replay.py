"""Watch a generation: the sentence is the axis, and what gate, experts and layers did stands below each token."""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any, Final

from fsteer_lens.errors import InputError
from fsteer_lens.figures.html import Html, escape, visible
from fsteer_lens.figures.replay_runs import Run, payload, run_of, shown
from fsteer_lens.figures.results import traces_of
from fsteer_lens.figures.style import ACCENT, STEERED_COLOUR, expert_colours
from fsteer_lens.ground.checks import several
from fsteer_lens.run.generation import Generation, Generations
from fsteer_lens.trace.trace import Trace

Given = Generations | Generation | Trace
SCORE: Final = (4, 48)
EXPERTS: Final = (52, 76)
LAYERS: Final = 80
LAYER: Final = (3, 12)
"""Height of a layer, at least and at most; all of them together are 72 high where that fits."""
LARGE: Final = 1_000_000
"""Bytes of numbers from which on they are quantised."""
LEVELS: Final = 12
"""Shades of the layers, so that neighbours of one shade are one rectangle."""


def replay(
    generations: Given | Mapping[str, Given], *, titles: Iterable[str] = (), names: Iterable[str] | None = None
) -> Html:
    """Watch steered texts token by token: a column for each token, wrapped like a score, a bar before the answer.

    From the top: the steered token, shaded by KL(steered ‖ unsteered) in nats; what the unsteered model would say here
    ("=" where it is the same); the gate's score with its threshold, filled where the gate read; what is added of each
    expert, weight × gate, empty where nothing is; ‖Δ‖ / ‖residual stream‖ of every layer, the lowest at the bottom and
    those that are edited outlined; KL. A click, the arrow keys or space choose a token. A sentence then says what
    happened there, and charts show the likely tokens unsteered and steered, the two words through the layers (logit
    lens), the mix of experts, and how the unsteered model would have gone on. Without scripts, as in a notebook that is
    not trusted, all of it stands still, and a table has the sentences.

    Args:
        generations: from `generate(..., compare=True, replay=True)`, or their trace, also one that was read from a
            file; or several of these by name, such as a steering in two scopes on the same prompts.
        titles: what to call each prompt.
        names: what to call each expert; None takes their own names, see `Experts`.

    Raises:
        InputError: nothing to show, a generation without replay, or another number of titles than prompts.
    """
    variants = generations if isinstance(generations, Mapping) else {"": generations}
    told, named = (
        several("titles", titles, "a list of texts"),
        None if names is None else several("names", names, "a list of texts"),
    )
    runs = [(str(variant), run) for variant, given in variants.items() for run in _runs(given, told, named)]
    if not runs:
        raise InputError("generations", expected="at least one", got="none")
    most = max(value for _, run in runs for value in run.kl) or 1.0
    size = max(float(run.record.size.max()) for _, run in runs) or 1.0
    panels = "".join(_panel(variant, run, most, size) for variant, run in runs)
    data = _json([payload(run) for _, run in runs])
    if len(data) > LARGE:
        data = _json([payload(run, quantised=True) for _, run in runs])
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    room = files("fsteer_lens.figures")
    style, script = ((room / f"replay.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return Html(
        f'<div class="fsteer-replay"><style>{style}</style><div class="chips" hidden></div>{panels}'
        f'<script type="application/json">{data}</script><script>{script}</script></div>'
    )


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _runs(given: Given, titles: Sequence[str], names: Sequence[str] | None) -> list[Run]:
    traces = traces_of(given)
    if titles and len(titles) != len(traces):
        raise InputError("titles", expected=f"one for each of {len(traces)} prompts", got=len(titles))
    labels = [*titles] or [f"prompt {number + 1}" for number in range(len(traces))]
    for number, label in enumerate(labels):
        if labels.count(label) > 1:
            labels[number] = f"{label} {number + 1}"
    return [run_of(trace, label, names) for trace, label in zip(traces, labels, strict=True)]


def _panel(variant: str, run: Run, most: float, size: float) -> str:
    """One run: headline, score, and below it what the script fills and what stands there without it."""
    name = " · ".join(filter(None, [variant, run.title]))
    columns = "".join(_column(run, column, most, size) for column in range(len(run.prompt) + len(run.answer)))
    height = _height(run)
    labels = [
        ("t", "steered"),
        ("u", "unsteered, here"),
        ("g", _gate_label(run)),
        ("e", "experts × gate" if run.names else "added"),
        ("l", f"layers {run.record.layers[0]} to {run.record.layers[-1]}: change"),
        ("k", "KL, nats"),
    ]
    column = "".join(f'<span class="{kind}">{escape(label)}</span>' for kind, label in labels)
    colours = ";".join(f"--e{index}:{colour}" for index, colour in enumerate(expert_colours(len(run.names))))
    return (
        f'<section class="run" data-variant="{escape(variant)}" data-prompt="{escape(run.title)}"'
        f' style="--layers:{height - LAYERS}px;{colours}" aria-label="{escape(name)}"><h3>{escape(name)}</h3>'
        f'<p class="headline">{escape(run.headline())}</p>'
        f'<div class="score" role="group" aria-label="tokens"><div class="labels" aria-hidden="true">{column}</div>'
        f'{columns}</div>{_legend(run)}<p class="say" aria-live="polite"></p><div class="inspector"></div>'
        f"{_table(run)}</section>"
    )


def _gate_label(run: Run) -> str:
    score = run.score
    return "always steered" if score is None else f"{run.score_name}, threshold {score.threshold:.2f}"


def _column(run: Run, column: int, most: float, size: float) -> str:
    """Everything that stands below one token."""
    n_prompt = len(run.prompt)
    step = column - n_prompt
    token = visible((*run.prompt, *run.answer)[column].strip() or shown((*run.prompt, *run.answer)[column]))
    if step < 0:
        shade, other, value = "", "", ""
    else:
        kl, same = run.kl[step], run.unsteered_here(step)
        shade = f' style="background:rgba({",".join(map(str, ACCENT))},{0.5 * kl / most:.2f})"'
        other = "=" if same is None else visible(same.strip() or shown(same))
        bar = f'<i style="height:{34 * kl / most:.1f}px"></i>'
        value = f"{bar}<b>{kl:.1f}</b>" if kl >= 0.15 * most else bar
    kind = "p" if step < 0 else "a first" if step == 0 else "a"
    where = f"prompt token {column + 1}" if step < 0 else f"token {step + 1}"
    label = f"{run.text(column)}, {where} of {n_prompt if step < 0 else len(run.answer)}"
    return (
        f'<button type="button" class="c {kind}" tabindex="-1" aria-label="{escape(label)}"><span class="t"{shade}>'
        f'{token}</span><span class="u">{other}</span>{_tracks(run, column, size)}<span class="k">{value}</span>'
        "</button>"
    )


def _tracks(run: Run, position: int, size: float) -> str:
    """Gate, experts and layers at one position, one unit wide: the page stretches it to the token's width."""
    height = _height(run)
    parts = [] if position >= run.n_positions else [*_gate(run, position), *_mix(run, position)]
    if position < run.n_positions:
        parts += _layers(run, position, size)
    return (
        f'<svg viewBox="0 0 1 {height}" height="{height}" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(parts)}</svg>"
    )


def _height(run: Run) -> int:
    low, high = LAYER
    return LAYERS + round(min(high, max(low, 72 / len(run.record.layers))) * len(run.record.layers))


def _gate(run: Run, position: int) -> list[str]:
    score = run.score
    if score is None:
        return []
    top, bottom = SCORE
    known = score.score[1:].sort().values
    low = min(float(known[len(known) // 20]), score.threshold) if len(known) else score.threshold
    low = 0.0 if 0 <= low and float(known.max()) <= 1 else low
    high = max(float(known.max()), score.threshold) if len(known) else score.threshold + 1
    scale = (bottom - top) / max(high - low, 1e-9)

    def y(value: float) -> float:
        return round(bottom - scale * (min(max(value, low), high) - low), 1)

    here = y(float(score.score[position]))
    kind = "at" if position == score.position else "near"
    return [
        f'<path class="{kind}" d="M.08 {bottom}V{here}H.92V{bottom}"/>',
        f'<path class="th" d="M0 {y(score.threshold)}H1"/>',
    ]


def _mix(run: Run, position: int) -> list[str]:
    top, bottom = EXPERTS
    if not run.names:
        full = float(run.change[position]) > 0
        return [f'<path fill="{STEERED_COLOUR}" d="M0 {top}H1V{bottom}H0z"/>'] if full else []
    found, y = [], float(bottom)
    for index, share in enumerate(run.added(position)):
        tall = (bottom - top) * share
        if tall >= 0.5:
            found.append(f'<path fill="var(--e{index})" d="M0 {y:.1f}H1V{y - tall:.1f}H0z"/>')
        y -= tall
    return found


def _layers(run: Run, position: int, size: float) -> list[str]:
    values = run.record.size[:, position].tolist()
    tall = (_height(run) - LAYERS) / len(values)
    levels = [min(LEVELS, round(LEVELS * (value / size) ** 0.5)) for value in values]
    found, start, bottom = [], 0, _height(run)
    for end in range(1, len(levels) + 1):
        if end < len(levels) and levels[end] == levels[start]:
            continue
        if levels[start]:
            high, low = bottom - tall * end, bottom - tall * start
            found.append(f'<path class="z" opacity="{levels[start] / LEVELS:.2f}" d="M0 {low:.1f}H1V{high:.1f}H0z"/>')
        start = end
    if float(run.change[position]) > 0:
        for layer in run.record.edited:
            place = run.record.layers.index(layer)
            low, high = bottom - tall * place, bottom - tall * (place + 1)
            found.append(f'<path class="ed" d="M0 {low:.1f}H1M0 {high:.1f}H1"/>')
    return found


def _legend(run: Run) -> str:
    """What colours and lines mean."""
    red, green, blue = ACCENT
    parts = [f'<span><i style="background:rgb({red},{green},{blue})"></i>what steering changes</span>']
    parts += [
        f'<span><i style="background:var(--e{index})"></i>{escape(name)}</span>' for index, name in enumerate(run.names)
    ]
    if run.score is not None:
        parts.append('<span><i class="atkey"></i>where the gate read</span><span><i class="thkey"></i>threshold</span>')
    edited = ", ".join(map(str, run.record.edited))
    if edited:
        parts.append(f'<span><i class="edkey"></i>edited layer {edited}</span>')
    return f'<div class="legend">{"".join(parts)}</div>'


def _table(run: Run) -> str:
    """All sentences, for who reads with a screen reader, or without scripts."""
    rows = []
    for step, text in enumerate(run.answer):
        other = run.unsteered_here(step)
        column = len(run.prompt) + step
        cells = [str(step + 1), shown(text), "the same" if other is None else shown(other), f"{run.kl[step]:.2f}"]
        cells.append(run.sentence(column))
        rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    heads = "".join(
        f'<th scope="col">{name}</th>' for name in ("token", "steered", "unsteered", "KL, nats", "what happened")
    )
    told = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        "<details><summary>All of it in words</summary>"
        f'<p><strong>Unsteered:</strong> <span dir="auto">{escape("".join(run.unsteered))}</span></p>'
        f'<p><strong>Steered:</strong> <span dir="auto">{escape("".join(run.answer))}</span></p>'
        f'<div class="wide"><table><caption>Every generated token</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{told}</tbody></table></div></details>"
    )

"""Which tokens steering made likelier, and which less."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.figures.likeliest import likeliest
from fsteer_lens.figures.style import LOWERED, RAISED, label_text, one_line, plain, styled
from fsteer_lens.ground.checks import brief, require_unset, several, whole
from fsteer_lens.trace.steps import Steps
from fsteer_lens.trace.trace import Trace

if TYPE_CHECKING:
    import plotly.graph_objects


SMALLEST = 0.005
"""Changes below this, in nats, are none: they would be written 0.00."""


class Change(NamedTuple):
    """One token's change; `bound` where only its least size is known."""

    token: str
    nats: float
    told: str
    bound: bool = False


def logprob_change(
    tokens: Trace | Sequence[str],
    change: Float[Tensor, " n"] | None = None,
    *,
    top: int = 10,
    row: int | None = None,
    step: int | None = None,
    title: str = "Tokens that steering made likelier, and less likely",
) -> "plotly.graph_objects.Figure":
    """Change of log-probability, steered minus unsteered: the tokens that rose and fell most.

    Changes that round to 0.00 are left out. A trace gives the tokens that were generated, each with its mean over the
    places where it was generated. With `step` it gives the likeliest tokens at that one step instead, steered or
    unsteered; of one that is among the likeliest on one side only, the least size of the change is known, and its bar
    is hatched.

    Args:
        tokens: a trace of `generate(..., compare=True)`, or the text of every token, [n].
        change: of each token's log-probability in nats, [n]; NaN is left out.
        top: bars on either side, at most.
        row: of the trace; None takes all of them together.
        step: of the generation, counted from 0; needs `row` where there are several.
        title: above the figure.

    Raises:
        InputError: nothing to show, another number of changes than tokens, or a trace without an unsteered twin.
    """
    import plotly.graph_objects as go

    top = whole("top", top, 1)
    if isinstance(tokens, Trace):
        if change is not None:
            raise InputError("change", expected="none where a trace is given", got=brief(change))
        found = _of_trace(tokens, row) if step is None else _of_step(tokens, row, step)
    else:
        require_unset("tokens, which are no trace", row=row, step=step)
        tokens = several("tokens", tokens, "a list of the tokens' texts")
        if not isinstance(change, Tensor) or change.shape != (len(tokens),):
            got = list(change.shape) if isinstance(change, Tensor) else brief(change)
            raise InputError("change", expected=f"one for each of {len(tokens)} tokens", got=got)
        found = [Change(token, nats, "") for token, nats in zip(tokens, plain(change), strict=True) if nats is not None]
    if not found:
        raise InputError("changes of log-probability", expected="at least one that is finite", got="none")
    ordered = sorted(found, key=lambda one: -one.nats)
    raised = [one for one in ordered if one.nats >= SMALLEST][:top]
    lowered = [one for one in ordered if one.nats <= -SMALLEST][-top:]
    shown = (raised + lowered) or ordered[:top]
    names = [_quoted(one.token) for one in shown]
    figure = go.Figure(
        go.Bar(
            x=[round(one.nats, 4) for one in shown],
            y=list(range(len(shown))),
            orientation="h",
            marker={
                "color": [RAISED if one.nats > 0 else LOWERED for one in shown],
                "pattern": {"shape": ["/" if one.bound else "" for one in shown], "fgcolor": "#fff", "size": 6},
            },
            customdata=[[name, one.told] for name, one in zip(names, shown, strict=True)],
            hovertemplate="%{customdata[0]}: %{x:+.3f} nats%{customdata[1]}<extra></extra>",
        )
    )
    styled(figure, title, height=max(240, 125 + 22 * len(shown)))
    figure.update_xaxes(title="log-probability steered − unsteered (nats)", zeroline=True, zerolinecolor="#7f7f7f")
    cut = [_quoted(one.token, 24) for one in shown]
    figure.update_yaxes(
        title={"text": "token", "standoff": 20},
        tickvals=list(range(len(shown))),
        ticktext=cut,
        range=[len(shown) - 0.5, -0.5],
        showgrid=False,
    )
    note = "hatched: at least this much" if any(one.bound for one in shown) else ""
    note = note if raised or lowered else "steering changed none of these tokens"
    if note:
        figure.add_annotation(
            text=note, x=1, y=1, xref="paper", yref="paper", xanchor="right", yanchor="bottom", showarrow=False
        )
    figure.update_layout(margin={"t": 70})
    return figure


def _quoted(token: str, width: int = 60) -> str:
    text = one_line(token)
    return label_text(repr(text if len(text) <= width else text[: width - 1] + "…"))


def _compared(trace: Trace) -> Steps:
    if trace.steps is None or trace.steps.baseline_logprobs is None:
        raise InputError(repr(trace), got="no unsteered twin", fix="Generate with compare=True.")
    return trace.steps


def _of_trace(trace: Trace, row: int | None) -> list[Change]:
    """Every generated token with its mean change."""
    steps = _compared(trace if row is None else trace.row(row))
    change = steps.logprob_change
    assert change is not None
    places: dict[str, list[float]] = {}
    for texts, values in zip(steps.texts, plain(change, digits=6), strict=True):
        for text, value in zip(texts, values[: len(texts)], strict=True):
            if value is not None:
                places.setdefault(text, []).append(value)
    return [
        Change(
            text, sum(values) / len(values), f"<br>generated {len(values)} times; this is the mean" * (len(values) > 1)
        )
        for text, values in places.items()
    ]


def _of_step(trace: Trace, row: int | None, step: int) -> list[Change]:
    """The likeliest tokens of one step with their change, or the least size of it."""
    if row is None and trace.n_rows != 1:
        raise InputError("row", expected=f"an int in 0..{trace.n_rows - 1} with step=", got=None)
    steps = _compared(trace.row(row or 0))
    n = len(steps.texts[0])
    step = whole("step", step, -n, n - 1)
    tops = [
        [one for one in likeliest(steps, side, step) if math.isfinite(one.logprob)] for side in ("top", "baseline_top")
    ]
    if not all(tops):
        raise InputError("step", expected="a trace that holds the likeliest tokens of both sides", got=repr(trace))
    steered, plainly = ({one.token: one.logprob for one in top} for top in tops)
    found = []
    for token, text in {one.token: one.text for top in tops for one in top}.items():
        ours, theirs = steered.get(token), plainly.get(token)
        bound = ours is None or theirs is None
        # a token that is not among a side's likeliest is at most as likely as the least likely of them
        ours = min(steered.values()) if ours is None else ours
        theirs = min(plainly.values()) if theirs is None else theirs
        nats = ours - theirs
        if bound and nats * (1 if token in steered else -1) <= 0:
            continue  # the bound tells not even the sign
        sides = ["steered " + ("below " if token not in steered else "") + f"{ours:.2f}"]
        sides.append("unsteered " + ("below " if token not in plainly else "") + f"{theirs:.2f}")
        found.append(Change(text, nats, f"{' or more' * bound}<br>{', '.join(sides)}", bound))
    return found

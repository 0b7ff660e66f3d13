"""What all figures share: colour-blind-safe colours, axes for light and dark pages, safe text."""

import html
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import several
from fsteer_lens.prompts.forms import Prompt, prompt_text

if TYPE_CHECKING:
    import plotly.graph_objects

_UP_TO_SIX: Final = ("#5790fc", "#f89c20", "#e42536", "#964a8b", "#9c9ca1", "#7a21dd")
_UP_TO_TEN: Final = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
GROUPS: Final = ("#e42536", "#5790fc", "#f89c20", "#9c9ca1", "#964a8b", "#7a21dd")
"""Colours of groups of prompts: first those that need intervention, then the others."""

TEXT: Final = "#7f7f7f"
GRID: Final = "rgba(127,127,127,.25)"
ACCENT: Final = (8, 158, 160)
"""Red, green, blue of everything on a scale from 0 to 1; the scale is its opacity, so that 0 is the page."""

POSITIVE: Final = (60, 130, 220)
NEGATIVE: Final = (220, 65, 70)
"""Red, green, blue of what is above and below zero, on a scale around zero."""

RAISED: Final = "#4393c3"
LOWERED: Final = "#d6604d"
"""Bars above and below zero."""

CURVE: Final = "#a55bd3"
"""Of a curve that is no expert's and no group's; clear on white and on black."""

STEERED_COLOUR: Final = "#f89c20"
"""Of what was steered, in text views and figures."""

FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CONFIG: Final = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["sendChartToCloud"]}
"""Plotly configuration for pages: no logo, and no button that uploads the data."""


def expert_colours(n_experts: int) -> list[str]:
    """The colours of experts 0, 1, ...: for up to 6 experts and for up to 10; repeated beyond."""
    palette = _UP_TO_SIX if n_experts <= len(_UP_TO_SIX) else _UP_TO_TEN
    return [palette[index % len(palette)] for index in range(n_experts)]


def group_colours(n_groups: int) -> list[str]:
    """The colours of groups of prompts, repeated beyond six."""
    return [GROUPS[index % len(GROUPS)] for index in range(n_groups)]


def accent(opacity: float) -> str:
    """The sequential colour at an opacity in [0, 1]."""
    return "rgba({},{},{},{:.3g})".format(*ACCENT, opacity)


def expert_names(n_experts: int, names: Iterable[str] | None = None) -> list[str]:
    """What to call each expert, by default "expert 0", "expert 1", ..., as plain text."""
    if names is None:
        return [f"expert {index}" for index in range(n_experts)]
    given = several("names", names, "a list of names")
    if len(given) != n_experts:
        raise InputError("names", expected=f"one for each of {n_experts} experts", got=len(given))
    return given


def expert_ticks(names: Sequence[str]) -> list[str]:
    """Tick labels of experts, each after a square of its colour."""
    colours = expert_colours(len(names))
    return [f'<span style="color:{c}">■</span> {label_text(name)}' for c, name in zip(colours, names, strict=True)]


def token_ticks(tokens: Sequence[str], most: int = 60, width: int = 12) -> dict[str, Any]:
    """An axis whose ticks are tokens; of more than `most` tokens every second, third, ... gets one."""
    step = -(-len(tokens) // most)
    shown = range(0, len(tokens), step)
    texts = [token if len(token) <= width else f"{token[: width - 1]}…" for token in (tokens[i] for i in shown)]
    return {"tickvals": list(shown), "ticktext": [label_text(text) or "·" for text in texts]}


def styled(figure: "plotly.graph_objects.Figure", title: str, height: int) -> "plotly.graph_objects.Figure":
    """The figure with a title, axes that are readable on white and on black, and no button that uploads it."""
    figure.update_layout(
        template="none",
        title={
            "text": label_text(title),
            "x": 0,
            "y": 1,
            "yanchor": "top",
            "xref": "container",
            "pad": {"l": 8, "t": 12},
            "font": {"size": 15},
        },
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": TEXT, "family": FONT, "size": 12},
        hoverlabel={
            "bgcolor": "#333",
            "bordercolor": "#333",
            "font": {"color": "#fff", "family": FONT},
            "align": "left",
        },
        modebar={"remove": ["sendChartToCloud"], "bgcolor": "rgba(0,0,0,0)", "color": TEXT, "activecolor": "#5790fc"},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        margin={"l": 70, "r": 20, "t": 75, "b": 55},
    )
    axis = {"gridcolor": GRID, "linecolor": GRID, "zeroline": False, "automargin": True, "title_standoff": 10}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def panel_title(figure: "plotly.graph_objects.Figure", xref: str, text: str, yref: str = "paper", y: float = 1) -> None:
    """A title above one panel of several, at its left edge."""
    where = {"x": 0, "xref": xref, "xanchor": "left", "y": y, "yref": yref, "yanchor": "bottom", "yshift": 4}
    figure.add_annotation(text=text, showarrow=False, font={"size": 13}, **where)


def plain(values: Tensor, digits: int = 4) -> Any:
    """A tensor as nested lists, rounded, with None for NaN and infinity."""

    def cleaned(item: Any) -> Any:
        if isinstance(item, list):
            return [cleaned(part) for part in item]
        return round(item, digits) if math.isfinite(item) else None

    return cleaned(values.detach().double().cpu().tolist())


def finite(number: float) -> float | None:
    """A number, or None for NaN and infinity."""
    return number if math.isfinite(number) else None


def label_text(text: str) -> str:
    """Text for plotly, which reads markup: escaped, with line breaks as ⏎, and nothing that UTF-8 cannot hold."""
    return _escaped(one_line(text))


def _escaped(line: str) -> str:
    return html.escape(line, quote=False).replace("%{", "%&#123;")  # %{...} is a value in hover templates


def one_line(text: str) -> str:
    """Text without line breaks, which are shown as ⏎; unpaired surrogates become U+FFFD, and NUL goes."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")
    return whole.replace("\r\n", "\n").replace("\n", "⏎")


def wrapped(text: str, width: int) -> str:
    """Text for plotly in lines of at most `width` characters."""
    return "<br>".join(_escaped(line) for line in textwrap.wrap(one_line(text), width)) or " "


def hover_prompt(prompt: Prompt, width: int = 60, limit: int = 400) -> str:
    """A prompt for a hover label: escaped, cut at `limit` characters, in lines of at most `width`."""
    text = one_line(prompt_text(prompt))
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return wrapped(cut, width)

"""What all figures share: colour-blind-safe colours, axes for light and dark pages, safe text."""

import html
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import instance, several
from fsteer_lens.method.experts import called
from fsteer_lens.prompts.forms import Prompt, prompt_text

if TYPE_CHECKING:
    import plotly.graph_objects

PRINTED: Final = 40
"""As many prompts, at most, have their text beside their row."""

EXPERTS: Final = (
    "#8822cc", "#55aa00", "#ee88ff", "#116633", "#cc5599", "#66cc99", "#aa66ff", "#aa2288", "#338833", "#99cc11",
)  # fmt: skip
"""Colours of experts, violets and greens: the ten that lie furthest apart, also to colour-blind eyes, among those that
are clear on white and on black and near no colour of `GROUPS` or of what is steered."""

GROUPS: Final = ("#e42536", "#5790fc", "#a96b59", "#9c9ca1", "#7b1e22", "#2f5fae")
"""Colours of groups of prompts: first those that need intervention, then the others."""

TEXT: Final = "#767676"
"""Of text on a page whose colour is not known: 4.5 : 1 on white, 4.6 : 1 on black."""

INK: Final = "#1a1a1a"
"""Of text in a picture on white paper."""

GRID: Final = "rgba(127,127,127,.25)"
ACCENT: Final = (8, 158, 160)
"""Red, green, blue of everything on a scale from 0 to 1; the scale is its opacity, so that 0 is the page."""

POSITIVE: Final = (60, 130, 220)
NEGATIVE: Final = (220, 65, 70)
"""Red, green, blue of what is above and below zero, on a scale around zero."""

RAISED: Final = "#4393c3"
LOWERED: Final = "#d6604d"
"""Bars above and below zero."""

STEERED_COLOUR: Final = "#f89c20"
"""Of what was steered, in text views and figures."""

METHODS: Final = (STEERED_COLOUR, TEXT, "#8a5a00", "#089ea0", "#d9b382", "#4a5a70")
"""Colours of ways to steer that are compared, which have marks and names at their lines too."""

FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
CONFIG: Final = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["sendChartToCloud"]}
"""Plotly configuration for pages: no logo, and no button that uploads the data."""


def expert_colours(n_experts: int) -> list[str]:
    """The colours of experts 0, 1, ..., repeated beyond ten."""
    return _cycled(EXPERTS, n_experts)


def group_colours(n_groups: int) -> list[str]:
    """The colours of groups of prompts, repeated beyond six."""
    return _cycled(GROUPS, n_groups)


def method_colours(n_methods: int) -> list[str]:
    """The colours of ways to steer, repeated beyond six."""
    return _cycled(METHODS, n_methods)


def _cycled(palette: Sequence[str], n: int) -> list[str]:
    return [palette[index % len(palette)] for index in range(n)]


def faded_to(colour: str) -> list[list[Any]]:
    """A plotly scale from the page itself to a colour, given as #rrggbb."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return [[0.0, f"rgba({red},{green},{blue},0)"], [1.0, colour]]


def accent(opacity: float) -> str:
    """The sequential colour at an opacity in [0, 1]."""
    return "rgba({},{},{},{:.3g})".format(*ACCENT, opacity)


def expert_names(n_experts: int, names: Iterable[str] | None, own: Sequence[str] | None = None) -> list[str]:
    """What to call each expert, as plain text: the names that are given, else their own, else "expert 0", ..."""
    if names is None:
        return called(n_experts, own)
    given = several("names", names, "a list of names")
    if len(given) != n_experts:
        raise InputError("names", expected=f"one for each of {n_experts} experts", got=len(given))
    return given


def expert_ticks(names: Sequence[str]) -> list[str]:
    """Tick labels of experts, each after a square of its colour."""
    colours = expert_colours(len(names))
    return [f'<span style="color:{c}">■</span> {label_text(name)}' for c, name in zip(colours, names, strict=True)]


def printed_prompt(prompt: Prompt, most: int = 50) -> str:
    """A prompt's text on one line for an axis, cut after `most` characters; as plain text."""
    text = one_line(prompt_text(prompt))
    return text if len(text) <= most else f"{text[: most - 1]}…"


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
    return _escaped(one_line(instance("a text of a figure", text, str, "text")))


def _escaped(line: str) -> str:
    return html.escape(line, quote=False).replace("%{", "%&#123;")  # %{...} is a value in hover templates


def one_line(text: str) -> str:
    """Text without line breaks, which are shown as ⏎; unpaired surrogates become U+FFFD, and NUL goes."""
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")
    return whole.replace("\r\n", "\n").replace("\n", "⏎")


def capital(text: str) -> str:
    """Text as the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def wrapped(text: str, width: int) -> str:
    """Text for plotly in lines of at most `width` characters."""
    return "<br>".join(_escaped(line) for line in textwrap.wrap(one_line(text), width)) or " "


def hover_prompt(prompt: Prompt, width: int = 60, limit: int = 400) -> str:
    """A prompt for a hover label: escaped, cut at `limit` characters, in lines of at most `width`."""
    text = one_line(prompt_text(prompt))
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return wrapped(cut, width)

"""What steering does at every strength, or at every layer."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fsteer_lens.errors import InputError
from fsteer_lens.figures.results import require_result
from fsteer_lens.figures.style import finite, label_text, method_colours, panel_title, styled, wrapped
from fsteer_lens.ground.estimates import Estimate, Sweep

if TYPE_CHECKING:
    import plotly.graph_objects

TRADE_OFF = "trade-off"
HEADINGS = {"kl": "KL"}
DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "diamond", "square", "triangle-up", "cross", "x")


def strength_sweep(sweeps: Sweep | Mapping[str, Sweep], *, title: str | None = None) -> "plotly.graph_objects.Figure":
    """Effect and KL by strength, and effect against utility, with 95 % intervals; several methods by name.

    In the last panel a method runs from its first strength to its last, and further up is better. Where the utility is
    −KL, as it is by default, that panel has KL on its axis, and what lies further left costs less.

    Args:
        sweeps: what `effects.strength_sweep` returns, {method: sweep}, or one sweep.
        title: above the figure; None says where the effect is largest.

    Raises:
        InputError: no sweep, something else, one without settings, or sweeps of different things.
    """
    return _panels(_named(sweeps, "strength_sweep"), title, ("effect", "kl", TRADE_OFF), is_layer=False)


def layer_sweep(sweeps: Sweep | Mapping[str, Sweep], *, title: str | None = None) -> "plotly.graph_objects.Figure":
    """Effect, utility and KL by steered layer, side by side, with 95 % intervals; arguments as for `strength_sweep`.

    Where the utility is −KL, as it is by default, it has no panel of its own.
    """
    named = _named(sweeps, "layer_sweep")
    panels = ("effect", "kl") if _mirrored(named) else ("effect", "utility", "kl")
    return _panels(named, title, panels, is_layer=True)


def _mirrored(named: Mapping[str, Sweep]) -> bool:
    """Whether the utility is −KL, and says nothing of its own."""
    pairs = [pair for one in named.values() for pair in zip(one.utility, one.kl, strict=False)]
    return all(utility.value == -kl.value for utility, kl in pairs)


def _named(sweeps: Any, maker: str) -> dict[str, Sweep]:
    """The sweeps by method; one alone has no name."""
    named = dict(sweeps) if isinstance(sweeps, Mapping) else {"": sweeps}
    for one in named.values():
        require_result("sweeps", one, Sweep, maker)
    return named


def _panels(
    named: Mapping[str, Sweep], title: str | None, panels: Sequence[str], *, is_layer: bool
) -> "plotly.graph_objects.Figure":
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    first = _checked(named, is_layer)
    meanings = {"effect": first.effect_name, "utility": first.utility_name, "kl": "KL(steered ‖ unsteered) (nats)"}
    spacing = 0.12 if len(named) == 1 else 0.2  # room for the methods' names
    figure = make_subplots(rows=1, cols=len(panels), horizontal_spacing=spacing)
    cost = "kl" if _mirrored(named) else "utility"
    for index, (method, colour) in enumerate(zip(named, method_colours(len(named)), strict=True)):
        sweep = named[method]
        about = f"{label_text(method)}<br>" if method else ""
        for column, panel in enumerate(panels, 1):
            measure = "effect" if panel == TRADE_OFF else panel
            estimates: Sequence[Estimate] = getattr(sweep, measure)
            across = {"x": list(sweep.settings)}
            if panel == TRADE_OFF:
                costs: Sequence[Estimate] = getattr(sweep, cost)
                across = {"x": [finite(one.value) for one in costs], "error_x": _bars(costs)}
            said = [f"{label_text(sweep.parameter)} {setting:g}" for setting in sweep.settings]
            figure.add_trace(
                go.Scatter(
                    **across,
                    y=[finite(one.value) for one in estimates],
                    error_y=_bars(estimates),
                    mode="lines+markers",
                    name=label_text(method),
                    showlegend=False,
                    line={"color": colour, "width": 2, "dash": DASHES[index % len(DASHES)]},
                    marker={"color": colour, "size": 8, "symbol": MARKERS[index % len(MARKERS)]},
                    text=said,
                    customdata=[[f"{one.interval[0]:.3g} to {one.interval[1]:.3g}"] for one in estimates],
                    hovertemplate=f"{about}%{{text}}<br>{label_text(meanings[measure])}: %{{y:.3g}}"
                    "<br>95 %: %{customdata[0]}<extra></extra>",
                ),
                row=1,
                col=column,
            )
    styled(figure, _assertion(named, meanings["effect"]) if title is None else title, height=400)
    for column, panel in enumerate(panels, 1):
        place: dict[str, Any] = {"row": 1, "col": column}
        trade_off = panel == TRADE_OFF
        figure.update_xaxes(title=wrapped(meanings[cost], 32) if trade_off else label_text(first.parameter), **place)
        figure.update_yaxes(title=wrapped(meanings["effect" if trade_off else panel], 32), **place)
        if panel == "kl":
            figure.update_yaxes(rangemode="tozero", **place)
        heading = f"effect against {HEADINGS.get(cost, cost)}" if trade_off else HEADINGS.get(panel, panel)
        panel_title(figure, f"x{column if column > 1 else ''} domain", heading)
    if is_layer:
        figure.update_xaxes(dtick=1)
    if len(named) > 1:
        _name_lines(figure, named)
    return figure


def _name_lines(figure: "plotly.graph_objects.Figure", named: Mapping[str, Sweep]) -> None:
    """The methods' names at the right ends of their lines in the first panel, apart where the lines meet."""
    bounds = [end for one in named.values() for estimate in one.effect for end in (estimate.value, *estimate.interval)]
    known = [end for end in bounds if finite(end) is not None] or [0.0, 1.0]
    ends = {}
    for name, one in named.items():
        values = [estimate.value for estimate in one.effect if finite(estimate.value) is not None]
        ends[name] = values[-1] if values else min(known)
    gap = 0.14 * (max(known) - min(known) or 1)
    colours = dict(zip(named, method_colours(len(named)), strict=True))
    last = None
    for name in sorted(ends, key=lambda name: ends[name]):
        last = ends[name] if last is None else max(ends[name], last + gap)
        text = f'<span style="color:{colours[name]}">■</span> {wrapped(name, 16)}'
        place = {"x": 1, "xref": "x domain", "xanchor": "left", "xshift": 6, "y": last, "yref": "y"}
        figure.add_annotation(text=text, showarrow=False, align="left", **place)


def _assertion(named: Mapping[str, Sweep], effect: str) -> str:
    """Where the effect is largest."""
    found = [
        (estimate.value, one.parameter, setting, name)
        for name, one in named.items()
        for setting, estimate in zip(one.settings, one.effect, strict=True)
        if finite(estimate.value) is not None
    ]
    if not found:
        return f"No {effect} is known"
    value, parameter, setting, name = max(found, key=lambda one: one[0])
    by = f" ({name})" if name else ""
    return f"Largest effect at {parameter} {setting:g}{by}: {value:.3g}"


def _checked(named: Mapping[str, Sweep], is_layer: bool) -> Sweep:
    """The first of the sweeps, after a check that they belong into one figure."""
    if not named:
        raise InputError("sweeps", expected="at least one", got="none")
    first = next(iter(named.values()))
    for name, sweep in named.items():
        if not sweep.settings:
            raise InputError(f"sweep {name!r}", expected="at least one setting", got="none")
        for what in ("effect", "utility", "kl"):
            if len(getattr(sweep, what)) != len(sweep.settings):
                got, expected = len(getattr(sweep, what)), f"{len(sweep.settings)}, one for each setting"
                raise InputError(f"{what} of sweep {name!r}", expected=expected, got=got)
        for what in ("parameter", "effect_name", "utility_name"):
            if getattr(sweep, what) != getattr(first, what):
                raise InputError(f"{what} of sweep {name!r}", expected=repr(getattr(first, what)), got=repr(sweep))
    if first.parameter.startswith("layer") != is_layer:
        draw = "strength_sweep" if is_layer else "layer_sweep"
        expected = "a sweep over layers" if is_layer else "a sweep over strengths"
        raise InputError("sweeps", expected=expected, got=repr(first), fix=f"Draw it with {draw}.")
    return first


def _bars(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Error bars from the value to the ends of its interval; none where an end is not finite."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [finite(one.interval[1] - one.value) for one in estimates],
        "arrayminus": [finite(one.value - one.interval[0]) for one in estimates],
        "thickness": 1.5,
        "width": 4,
    }

"""Whether a trace that was read is one: sizes that fit each other, texts that are texts, layers that are layers."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from fsteer_lens.errors import DataError
from fsteer_lens.ground.checks import brief, choice, finite, instance, optional, switch, whole
from fsteer_lens.method.gates import require_reading
from fsteer_lens.trace.replay import SIZES, Replay, Scored

if TYPE_CHECKING:
    from fsteer_lens.trace.trace import Trace

AXES: Final = {"ser": "r", "weights": "k", "coefficients": "m", "change": "s", "step_gate": "s", "step_weights": "sk"}
"""Axes of a row in each field: s positions, r ranks, k experts, m residual directions; other fields have none."""
BY_TOKEN: Final = {"ser": "sr", "weights": "sk"}
"""The same where a probe read every token."""

ROUNDING: Final = 1e-3
"""A log-probability may be so much above 0."""


class Sizes:
    """How long each axis is, as it was met first."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def require(self, name: str, axis: str, size: int) -> None:
        """Raise `DataError` unless the axis is as long as where it was met before."""
        known = self._known.setdefault(axis, size)
        if size != known:
            raise DataError(f"{name} of a trace", expected=f"{known} along axis {axis}", got=size)

    def require_shape(self, name: str, value: Tensor, axes: Sequence[str]) -> None:
        """Raise `DataError` unless a tensor has these axes, each as long as where it was met before."""
        if value.ndim != len(axes):
            raise DataError(f"{name} of a trace", expected=f"axes {list(axes)}", got=f"shape {list(value.shape)}")
        for axis, size in zip(axes, value.shape, strict=True):
            self.require(name, axis, size)


def require_consistent(trace: "Trace", fields: Iterable[str]) -> None:
    """Raise `InputError` unless the fields of a trace of one row fit each other.

    `fields` are the names of those that go from layer to tensor.
    """
    assert trace.prompt_lengths is not None
    length, sizes = int(trace.prompt_lengths[0]), Sizes()
    if trace.prompts is not None:
        sizes.require("prompt_length", "tokens of the prompt", _texts("prompt", trace.prompts[0]))
        sizes.require("prompt_length", "tokens of the prompt", length)
    if trace.unsteered is not None:
        _texts("unsteered", trace.unsteered[0])
    if trace.steps is not None:
        n = _texts("text", trace.steps.texts[0])
        sizes.require("steps", "n", n)
        sizes.require("steps", "s", length + n - 1)
        for name in ("logprobs", "baseline_logprobs", "top_logprobs", "baseline_top_logprobs"):
            values = getattr(trace.steps, name)
            if values is not None and bool((values > ROUNDING).any()):
                raise DataError(f"{name} of a trace", expected="logarithms of probabilities", got=float(values.max()))
        for tops in (trace.steps.top_texts, trace.steps.baseline_top_texts):
            for step in () if tops is None else tops[0]:
                _texts("top", step)
    for part in (trace, *trace.parts):
        _require_layers(part, list(fields), sizes, length)
    for one in () if trace.replay is None else trace.replay:
        _require_replay(one, sizes)


def _require_layers(trace: "Trace", fields: Sequence[str], sizes: Sizes, length: int) -> None:
    """The same of what goes from layer to something, in a trace or in one part of it."""
    own = Sizes()
    for layer in trace.layers:
        whole("layer", layer, 0)
        for name in fields:
            value = getattr(trace, name).get(layer)
            if value is None:
                continue
            axes = BY_TOKEN[name] if name in BY_TOKEN and value.ndim == 3 else AXES.get(name, "")
            own.require_shape(name, value[0], [axis if axis == "s" else f"{axis} at {layer}" for axis in axes])
            if "s" in axes:
                sizes.require(name, "s", value.shape[1])
                whole(f"positions of {name}", value.shape[1], length - 1)
            if 0 in value.shape[2 if "s" in axes else 1 :]:
                raise DataError(f"{name} of a trace", expected="at least one number", got="none")
        if layer in trace.names:
            own.require("names", f"k at {layer}", _texts("names", trace.names[layer]))
    for by_layer in trace.own_by_token.values():
        for value in by_layer.values():
            sizes.require("own_by_token", "s", value.shape[1])


def _require_replay(replay: Replay, sizes: Sizes) -> None:
    """The same of what a text is watched by."""
    for layer in replay.layers:
        whole("layer of a replay", layer, 0)
    for layer in replay.edited:
        choice("edited layer of a replay", layer, replay.layers, "one of")
    axis = "layers of a replay"
    sizes.require("replay", axis, len(replay.layers))
    for name in SIZES:
        sizes.require_shape(name, getattr(replay, name), (axis, "s"))
    sizes.require_shape("lens", replay.lens, ("two", "two", axis, "n"))
    sizes.require("lens", "two", 2)
    sizes.require("displaced", "n", _texts("displaced", replay.displaced))
    for step, released in replay.released.items():
        whole("released", step, 0, len(replay.displaced) - 1)
        _texts("released", released)
    for score in replay.scores:
        _require_score(score, sizes)


def _require_score(score: Scored, sizes: Sizes) -> None:
    sizes.require_shape("score", score.score, "s")
    whole("layer of a score", score.layer, 0)
    whole("link of a score", score.link, 0)
    instance("name of a score", score.name, str, "text")
    finite("threshold of a score", score.threshold)
    switch("opens_above", score.opens_above)
    require_reading(score.read)
    whole("position of a score", score.position, 0, len(score.score) - 1)
    optional(whole, "rank of a score", score.rank, 1)


def _texts(name: str, value: Any) -> int:
    """How many texts these are, or `DataError`."""
    if not all(isinstance(one, str) for one in value):
        raise DataError(f"{name} of a trace", expected="a list of texts", got=brief(value))
    return len(value)

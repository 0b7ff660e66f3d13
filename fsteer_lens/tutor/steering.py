"""Steering for the tutor, with the defaults that were chosen on its valid split."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from fsteer_lens import fitting
from fsteer_lens.activations import collect, collect_queries
from fsteer_lens.errors import InputError
from fsteer_lens.tutor.splits import BEHAVIOURS, data

if TYPE_CHECKING:
    from fsteer_lens.hooks import FineSteer
    from fsteer_lens.models import SteerableModel

LAYER: Final = {"safe": 4, "honest": 4}
RANK: Final = {"safe": 8, "honest": 8}
EPSILON: Final = 0.01
GAMMA: Final = 4.0

_BATCH: Final = 64


def fit(
    model: "SteerableModel",
    behaviour: str = "safe",
    preset: Literal["paper"] | None = None,
    *,
    layer: int | Sequence[int] | None = None,
    rank: int | None = None,
    progress: bool = True,
    **options: Any,
) -> "FineSteer":
    """Collect the training contrasts of a behaviour from the tutor and fit FineSteer to them.

    The shift is the tag's: the last prompt token with it minus without it.

    Args:
        model: the tutor, from `load`.
        behaviour: "safe" or "honest".
        preset: "paper" is the published method, see `fsteer_lens.fit`; None is our default.
        layer: one layer or several; None takes the behaviour's own.
        rank: of the gate's subspace; None takes the behaviour's own.
        progress: show progress bars.
        options: further arguments of `fsteer_lens.fit`. With `gate="logistic"` the general training tasks (training
            near misses among them) are collected too.

    Raises:
        InputError: an unknown behaviour or option.
    """
    if behaviour not in BEHAVIOURS:
        raise InputError("behaviour", expected=" or ".join(map(repr, BEHAVIOURS)), got=repr(behaviour))
    where = LAYER[behaviour] if layer is None else layer
    told = data(behaviour)
    shifts = collect(model, told.train, layer=where, shift="last_prompt", batch_size=_BATCH, progress=progress)
    gate = options.get("gate")
    if gate == "logistic" and "general" not in options:
        prompts = [task.prompt for task in told.general_train]
        options["general"] = collect_queries(model, prompts, layer=where, batch_size=_BATCH, progress=progress)
    if gate is None or gate == "quantile":
        options = {"epsilon": EPSILON, "gamma": GAMMA, **options}
    return fitting.fit(
        shifts, rank=RANK[behaviour] if rank is None else rank, preset=preset, progress=progress, **options
    )

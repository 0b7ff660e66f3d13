"""Steering for the tutor, with the defaults that were chosen on its valid split."""

from typing import Any, Final

from fsteer_lens.ground.checks import instance, require_unset
from fsteer_lens.method.fitting_experts import Preset
from fsteer_lens.method.fitting_gates import NEED_GENERAL, SUBSPACE_KINDS
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.reading.activations import Activations
from fsteer_lens.reading.collecting import collect, collect_queries
from fsteer_lens.steering import fitting
from fsteer_lens.steering.steering import FineSteer
from fsteer_lens.tutor.splits import data

# Chosen on the valid split: docs/tutor_model_card.md tells how.
LAYER: Final = {"safe": 4, "honest": 4}
RANK: Final = 32
STRENGTH: Final = 1.25

_BATCH: Final = 64


def activations(
    model: SteerableModel, behaviour: str = "safe", *, layer: int | None = None, progress: bool = True
) -> Activations:
    """Collect the training contrasts of a behaviour from the tutor.

    The shift is the tag's: the last prompt token with it minus without it. `layer=None` takes the behaviour's own.

    Raises:
        InputError: an unknown behaviour.
    """
    told = data(behaviour)
    where = LAYER[behaviour] if layer is None else layer
    return collect(model, told.train, layer=where, shift="last_prompt", batch_size=_BATCH, progress=progress)


def fit(
    model: SteerableModel,
    behaviour: str = "safe",
    preset: Preset | None = None,
    *,
    layer: int | None = None,
    rank: int | None = None,
    activations: Activations | None = None,
    progress: bool = True,
    **options: Any,
) -> FineSteer:
    """Fit FineSteer to a behaviour of the tutor.

    Args:
        model: the tutor, from `load`.
        behaviour: "safe" or "honest".
        preset: "paper" is the published method; that, "0.1" and None, our default, as in `fsteer_lens.fit`.
        layer: where to steer; None takes the behaviour's own.
        rank: of the gate's subspace; None takes the tutor's own.
        activations: from `tutor.activations`, where they are collected already.
        progress: show progress bars.
        options: further arguments of `fsteer_lens.fit`. With a `gate` of kind "logistic", "linear", "cosine" or
            "null_space" the general training tasks (training near misses among them) are collected too, labelled by
            their kind.

    Raises:
        InputError: an unknown behaviour or option, or one without effect.
    """
    if activations is not None:
        told = instance("activations", activations, Activations, "Activations")
        require_unset(f"activations of layer {told.layer}", layer=layer)
    trained = _collected(model, behaviour, layer=layer, progress=progress) if activations is None else activations
    gate = options.get("gate")
    if gate in NEED_GENERAL and "general" not in options:
        tasks = data(behaviour).general_train
        prompts, labels = [task.prompt for task in tasks], [task.kind for task in tasks]
        read: dict[str, Any] = {"layer": trained.layer, "batch_size": _BATCH, "progress": progress}
        options["general"] = collect_queries(model, prompts, labels=labels, **read)
    if options.get("experts") is None:
        options["progress"] = progress
    options = {"strength": STRENGTH, **options}
    by_default = gate is None and options.get("null_space") is None
    if rank is None and (by_default or gate in SUBSPACE_KINDS):
        rank = RANK
    return fitting.put_together(trained, rank=rank, preset=preset, **options)


_collected = activations

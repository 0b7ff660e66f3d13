"""`save` and `load`: one sealed file for a steering, as `ground.sealed` writes it, never pickle."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fsteer_lens.errors import FileFormatError, InputError
from fsteer_lens.ground.checks import instance, optional
from fsteer_lens.ground.sealed import Format
from fsteer_lens.hooks.chains import Chain
from fsteer_lens.hooks.objects import HookObject, Link
from fsteer_lens.hooks.probes import ExpertProbe, SubspaceAblation, SubspaceProbe
from fsteer_lens.hooks.scopes import Schedule, Window
from fsteer_lens.method.controller import Controller, QuadraticController
from fsteer_lens.method.experts import Experts, FitReport, HeldOut
from fsteer_lens.method.gates import CutGate, MaxGate, MinGate, NotGate
from fsteer_lens.method.linear_gates import CosineGate, LinearGate, OutOfFold
from fsteer_lens.method.null_space import DomainShare, NullSpaceGate
from fsteer_lens.method.residual_gates import ResidualRatioGate
from fsteer_lens.method.scan_gates import ScanGate
from fsteer_lens.method.subspace import Subspace
from fsteer_lens.method.subspace_gates import CalibrationRange, EnergyGate, LogisticGate, QuantileGate, ThresholdGate
from fsteer_lens.models.classes import SteerableModel, require_steerable
from fsteer_lens.prompts.formats import PromptFormat
from fsteer_lens.reading.fingerprints import Fingerprint, fingerprint, require_model
from fsteer_lens.steering.baselines import MeanShift, NearestCentroid, NullSpaceSteering, PcaDirection, RidgeSteering
from fsteer_lens.steering.steering import FineSteer, Steering

CLASSES: Mapping[str, Any] = {
    cls.__name__: cls
    for cls in (
        CalibrationRange,
        Chain,
        Controller,
        CosineGate,
        CutGate,
        DomainShare,
        EnergyGate,
        ExpertProbe,
        Experts,
        FineSteer,
        Fingerprint,
        FitReport,
        HeldOut,
        QuadraticController,
        LinearGate,
        LogisticGate,
        MaxGate,
        MeanShift,
        MinGate,
        NearestCentroid,
        NotGate,
        NullSpaceGate,
        NullSpaceSteering,
        OutOfFold,
        PcaDirection,
        PromptFormat,
        QuantileGate,
        ResidualRatioGate,
        RidgeSteering,
        ScanGate,
        Schedule,
        Subspace,
        SubspaceAblation,
        SubspaceProbe,
        ThresholdGate,
        Window,
    )
}

BEFORE_FORMATS = PromptFormat(prepend_bos=True)
"""What fits the files of 0.1, which do not tell: every plain text got a token in front where there was one."""
FORMAT = Format(
    "fsteer_lens", 1, "a steering", "fsteer_lens.save", CLASSES, older={Steering: {"prompt_format": BEFORE_FORMATS}}
)


def save(steering: HookObject, path: str | os.PathLike[str], model: SteerableModel | None = None) -> None:
    """Write a steering to one file, atomically: an interrupted save leaves the old file whole.

    Args:
        steering: a FineSteer, a baseline, a probe, an ablation, or a chain of them.
        path: the file, by custom ending in .safetensors; its folder must exist.
        model: the model it belongs to; needed where the steering carries no fingerprint, checked where it does.

    Raises:
        InputError: no hook object, no fingerprint and no model, or no such folder.
        FileFormatError: more parts than a file may have: hundreds of layers.
        MismatchError: fitted on another model than the given one.
    """
    optional(lambda _, given: require_steerable(given), "model", model)
    instance("save", steering, HookObject, "a steering, probe, ablation or chain")
    for value in (steering, *steering.links):
        FORMAT.require_known(value)
    links = tuple(_with_fingerprint(link, model) for link in steering.links)
    steering = replace(steering, hooks=links) if isinstance(steering, Chain) else links[0]
    tensors: dict[str, Tensor] = {}
    FORMAT.write(path, FORMAT.encode(steering, "steering", tensors), tensors)


def _with_fingerprint(link: Link, model: SteerableModel | None) -> Link:
    """The link with the fingerprint of its model, checked against `model` where there is one."""
    if model is None:
        if link.fingerprint is None:
            raise InputError(
                f"{link!r} does not know its model",
                expected="model=",
                got=None,
                fix="save(steering, path, model=model).",
            )
        return link
    if link.fingerprint is None:
        current = fingerprint(model, link.hooked_layers, link.site)
        return replace(link, fingerprint=current)  # pyright: ignore[reportArgumentType]
    require_model(link.fingerprint, model, link.site)
    return link


def load(path: str | os.PathLike[str], model: SteerableModel | None = None) -> Any:
    """Read what `save` wrote: a FineSteer, a baseline, a probe, an ablation or a chain.

    Args:
        path: a file that `save` wrote.
        model: check at once that it was fitted on this model; otherwise it is checked when put on a model.

    Raises:
        FileFormatError: no such file, not one of ours, damaged, or of a newer version.
        MismatchError: fitted on another model; names the differences.
    """
    tree, tensors = FORMAT.read(path)
    try:
        steering = FORMAT.decode(tree, tensors)
    except Exception as error:  # whatever goes wrong in putting it together, the file is at fault
        raise FileFormatError(
            f"{path} does not hold a valid steering", got=f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(steering, HookObject) or any(link.fingerprint is None for link in steering.links):
        raise FileFormatError(f"{path}", expected="a steering with a fingerprint", got=type(steering).__name__)
    if model is not None:
        steering.session_on(model)
    return steering

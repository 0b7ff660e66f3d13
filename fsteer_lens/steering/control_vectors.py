"""Control vectors: the files in which other programs keep a constant vector for each layer, GGUF and PyTorch's.

llama.cpp adds `direction.N` to the stream that leaves block N, counted from 0, at every position, and has no place for
one at block 0: its loader puts N at offset (N − 1) · d_model, from where block N reads it. So the vector of
`blocks.N.hook_resid_post` is `direction.N`. A constant vector is all that such a file can say.
"""

import io
import os
import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError, MissingDependencyError, NonFiniteError
from fsteer_lens.ground.checks import instance
from fsteer_lens.ground.files import path_of, write_atomically
from fsteer_lens.steering.baselines import MeanShift, PcaDirection
from fsteer_lens.steering.steering import FineSteer, Steering

Directions = Mapping[int, Float[Tensor, " d"]]
"""The vector that is added to what leaves a layer, by layer."""


def save_control_vector(steering: Steering, path: str | os.PathLike[str]) -> None:
    """Write a steering that adds one constant vector everywhere as a control vector, atomically.

    Such a file knows no gate, no mixture, no scope and no schedule, so the steering must have none: give them up first,
    and measure what is left, `steering.with_gate(None).only_expert(2).without_residual().with_scope("all")`. The
    strength is multiplied into the vector. Nothing in the file ties it to its model.

    Args:
        steering: a `MeanShift`, a `PcaDirection`, or a `FineSteer` with one expert and no residual.
        path: ending in .gguf, float32 `direction.N` for llama.cpp (`--control-vector`) and repeng; or in .pt, a dict
            {layer: vector [d]} for `torch.load(path, weights_only=True)`. Both count layers from 0 and mean what
            leaves them, `hook_resid_post`.

    Raises:
        InputError: what it does depends on the prompt or the position, which it lists; a layer that the file has no
            place for; another ending; or no such folder.
        NonFiniteError: a vector that is not finite.
        MissingDependencyError: gguf is not installed, for .gguf.
    """
    fix = "Save each link of a chain by itself: llama.cpp adds up what several files hold."
    instance("save_control_vector", steering, Steering, "a steering", fix=fix)
    suffix = path_of(path).suffix
    if suffix not in (".gguf", ".pt"):
        raise InputError("ending of a control vector", expected=".gguf or .pt", got=suffix or f"none in {path}")
    _require_constant(steering)
    directions = _directions(steering, lowest=1 if suffix == ".gguf" else 0)
    write_atomically(path, _gguf(directions, _model_hint(steering)) if suffix == ".gguf" else _pt(directions))


def _require_constant(steering: Steering) -> None:
    """Raise `InputError` unless one vector is added, at every position, whatever the prompt; tells all that is more."""
    lost = list(_lost(steering))
    if lost:
        raise InputError(
            f"{steering!r} as a control vector",
            expected="one constant vector, at every position of every prompt",
            got=", ".join(what for what, _ in lost),
            fix=f"Such a file cannot express that; without it: {'; '.join(dict.fromkeys(how for _, how in lost))}.",
        )


def _lost(steering: Steering) -> Iterator[tuple[str, str]]:
    """What a file would not say, and how to do without it."""
    if not isinstance(steering, FineSteer | MeanShift | PcaDirection):
        yield "a vector that depends on the prompt", "fit_mean_shift"
    if any(steering.gate_at(layer) is not None for layer in steering.hooked_layers):
        without = ".with_gate(None)" if isinstance(steering, FineSteer) else "replace(steering, gate=None)"
        yield "a gate", without
    if isinstance(steering, FineSteer):
        mixtures = [steering.experts_at(layer) for layer in steering.layers]
        if any(sum(experts.enabled) > 1 for experts in mixtures):
            yield "experts that the prompt mixes", ".only_expert(index)"
        if any(experts.use_residual and experts.residual_rank for experts in mixtures):
            yield "a residual that depends on the prompt", ".without_residual()"
    if steering.scope != "all":
        yield f"scope={steering.scope}", '.with_scope("all")'
    if steering.schedule is not None:
        yield "a schedule", ".with_schedule(None)"
    if steering.monitor:
        yield "a monitor, which adds nothing", ".with_monitor(False)"


def _directions(steering: Steering, lowest: int) -> Directions:
    """λ v of each layer, by the layer that it leaves."""
    below = 1 if steering.site == "hook_resid_pre" else 0
    found = {layer - below: steering.strength * _vector(steering, layer) for layer in steering.layers}
    low = [layer for layer in found if layer < lowest]
    if low:
        raise InputError(
            "layers of a control vector",
            expected=f"what leaves layer {lowest} or a later one: the file has no place for others",
            got=f"{steering.site} of layer {steering.layers[0]}",
            fix="Fit at a later layer" + (", or write a .pt file." if low == [0] else "."),
        )
    if not all(bool(vector.isfinite().all()) for vector in found.values()):
        raise NonFiniteError("a control vector", expected="finite numbers", got="NaN or infinity")
    return found


def _vector(steering: Steering, layer: int) -> Float[Tensor, " d"]:
    """The constant vector of a steering that has one, float32 on the CPU."""
    if isinstance(steering, FineSteer):
        experts = steering.experts_at(layer)
        vector = experts.prototypes[experts.enabled.index(True)]
    else:
        assert isinstance(steering, MeanShift | PcaDirection)
        vector = steering.vector
    return vector.detach().to("cpu", torch.float32)


def _model_hint(steering: Steering) -> str:
    """What such files call the model, such as "llama": nobody compares it."""
    known = steering.fingerprint
    return "unknown" if known is None else re.sub("(ForCausalLM|LMHeadModel)$", "", known.architecture).lower()


def _pt(directions: Directions) -> bytes:
    file = io.BytesIO()
    torch.save({layer: vector.clone() for layer, vector in directions.items()}, file)
    return file.getvalue()


def _gguf(directions: Directions, model_hint: str) -> bytes:
    if find_spec("gguf") is None:
        fix = 'pip install "fsteer-lens[gguf]", or write a .pt file.'
        raise MissingDependencyError("a control vector for llama.cpp", expected="the package gguf", got="none", fix=fix)
    from gguf import GGUFWriter

    with TemporaryDirectory() as folder:  # the writer wants a file
        file = Path(folder) / "vector.gguf"
        writer = GGUFWriter(file, "controlvector")
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(directions))
        for layer, vector in directions.items():
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read_bytes()

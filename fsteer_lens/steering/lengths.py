"""How much a steering adds, in lengths of the mean shift: the unit in which strengths of all methods compare.

λ = 1 means another push for every method: experts and linear maps add more where a query tells more, and a map in the
null space of general queries adds less than the mean shift. What moves the stream is ‖λ · g · v‖.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import DataError, ShapeError
from fsteer_lens.method.gates import Reading, require_still
from fsteer_lens.reading.activations import Activations
from fsteer_lens.steering.steering import Decision, Steering


def mean_shift_length(activations: Activations) -> float:
    """Length of the mean response shift.

    Raises:
        DataError: activations without shifts.
    """
    if activations.shifts is None:
        raise DataError("activations", expected="response shifts", got="queries only", fix="Use collect().")
    return float(activations.shifts.double().mean(dim=0).norm())


def added_lengths(
    steering: Steering, queries: Mapping[Reading, Mapping[int, Float[Tensor, "n d"]]], units: Mapping[int, float]
) -> Float[Tensor, " n"]:
    """‖λ · g(ĥ) · v(ĥ)‖ for each query, in units of a length at each layer, added up over the steered layers, [n].

    With a schedule the strength is that of its first factor, which is the prompt's too; a steering that only monitors
    adds nothing.

    Args:
        steering: a FineSteer or a baseline.
        queries: query activations ĥ of the unsteered model in every way that the steering reads them (`reads`), at
            every hooked layer, [n d].
        units: the length of the mean shift at every steered layer, > 0.

    Raises:
        InputError: a gate scans windows of the prompts, which queries do not tell.
        ShapeError: no queries, or no unit, of a layer.
    """
    for gate in steering.scanning.values():
        require_still(gate, "lengths", "Ask for those of steering.with_gate(gate.inner).")
    read = {layer for layer in steering.hooked_layers if all(layer in queries.get(way, ()) for way in steering.reads)}
    missing = sorted({*steering.hooked_layers} - read | {*steering.layers} - {*units})
    if missing:
        raise ShapeError("lengths", expected="queries and a unit for every layer", got=f"none for {missing}")

    def decision(layer: int, gate: Tensor | None = None) -> Decision:
        own = steering.gate_at(layer)
        asked = None if own is None else queries[own.read][layer]
        return steering.decide(layer, queries[steering.read][layer], gate, asked)

    shared = None if steering.gate_layer is None else decision(steering.gate_layer)
    first = steering.schedule.factors[0] if steering.schedule is not None else 1.0
    factor = 0.0 if steering.monitor else abs(steering.strength * first)
    lengths = []
    for layer in steering.layers:
        gate = None if shared is None or layer == steering.gate_layer else shared.gate
        decided = decision(layer, gate)
        lengths.append(factor * decided.gate * decided.vector.norm(dim=-1) / units[layer])
    return torch.stack([one.float().cpu() for one in lengths]).sum(dim=0)

"""FineSteer with one part taken away at a time."""

from typing import Any

from fsteer_lens.hooks.scopes import Scope
from fsteer_lens.reading.activations import Activations
from fsteer_lens.steering.baselines import fit_mean_shift
from fsteer_lens.steering.fitting import put_together
from fsteer_lens.steering.steering import Steering


def fit_ablations(
    activations: Activations,
    *,
    rank: int | None = None,
    strength: float = 1.0,
    scope: Scope | None = None,
    seed: int = 0,
) -> dict[str, Steering]:
    """FineSteer as `fit` makes it by default, and seven variants that lack one part each.

    - "no gate": always on
    - "no experts": the mean shift behind the same gate
    - "one expert": K = 1, so nothing is routed; the residual part stays
    - "no residual": C α(h) alone, U β(h) being switched off after the fit
    - "no cross-fitting": the gate calibrated on the very queries that its basis was fitted to
    - "no routing loss": the controller trained on the reconstruction alone, as published
    - "unit prototypes": prototypes of unit shifts, as published

    Args:
        activations: from `collect`, one layer.
        rank, strength, scope: as in `fit`, the same for all of them.
        seed: of folds, clustering and training.

    Returns:
        {name: steering}, the whole one first, as "whole".

    Raises:
        DataError: activations without shifts.
        InputError: a rank that the folds do not allow.
    """
    placed: dict[str, Any] = {"strength": strength, "scope": scope}
    whole = put_together(activations, rank=rank, seed=seed, **placed)
    gate, experts = whole.gate_at(activations.layer), whole.experts_at(activations.layer)

    def mixed(**changed: Any) -> Steering:
        return put_together(activations, gate=gate, seed=seed, **placed, **changed)

    return {
        "whole": whole,
        "no gate": whole.with_gate(None),
        "no experts": fit_mean_shift(activations, gate=gate, **placed),
        "one expert": mixed(n_experts=1),
        "no residual": whole.without_residual(),
        "no cross-fitting": put_together(activations, rank=rank, experts=experts, folds=None, **placed),
        "no routing loss": mixed(route_loss=0.0),
        "unit prototypes": mixed(prototype_scale="unit"),
    }

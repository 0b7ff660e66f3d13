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
    """FineSteer as `fit` makes it by default, five variants that lack a part each, and three with trained experts.

    - "no gate": always on
    - "no experts": the mean shift behind the same gate
    - "one expert": K = 1, so nothing is routed; the residual part stays, which is then ridge regression
    - "no residual": C α(h) alone, U β(h) being switched off after the fit
    - "no cross-fitting": the gate calibrated on the very queries that its basis was fitted to
    - "trained": the controller trained, as by `preset="0.1"`
    - "trained, no routing loss": on the reconstruction alone, as published
    - "trained, unit prototypes": prototypes of unit shifts, as published

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
        "trained": mixed(preset="0.1"),
        "trained, no routing loss": mixed(preset="0.1", route_loss=0.0),
        "trained, unit prototypes": mixed(preset="0.1", prototype_scale="unit"),
    }

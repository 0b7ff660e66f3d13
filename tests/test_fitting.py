"""`MeanShift` and `fit`: what goes in comes out, what fits not is refused, the paper's preset is the paper's."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fsteer_lens.errors import DataError, FsteerError, InputError, MismatchError, ShapeError
from fsteer_lens.method.fitting_experts import fit_experts
from fsteer_lens.method.fitting_gates import fit_gate
from fsteer_lens.method.linear_gates import LinearGate
from fsteer_lens.method.residual_gates import ResidualRatioGate
from fsteer_lens.method.subspace_gates import EnergyGate, LogisticGate, QuantileGate
from fsteer_lens.reading.activations import Activations
from fsteer_lens.reading.fingerprints import Fingerprint
from fsteer_lens.steering.baselines import MeanShift, fit_mean_shift
from fsteer_lens.steering.fitting import fit

D = 10
QUICK = {"preset": "0.1", "epochs": 2, "n_experts": 4, "max_rank": 6}


def made_up_fingerprint(layer=2, tokenizer="t", shift=0.0):
    probe = {layer: tuple(shift + layer + i for i in range(4))}
    return Fingerprint(
        "Made", 6, D, 50, "hook_resid_post", tokenizer, probe, "HookedTransformer", False, "torch.float32"
    )


def activations(n=40, layer=2, grouped=True, shift="last_prompt", seed=0, **fields) -> Activations:
    generator = torch.Generator().manual_seed(seed + layer)
    kinds = torch.arange(n) % 4
    shifts = 3 * torch.eye(D)[kinds] + 0.1 * torch.randn(n, D, generator=generator) + 1
    values = {
        "queries": torch.randn(n, D, generator=generator) * torch.linspace(3, 0.2, D),
        "shifts": shifts,
        "labels": tuple(f"k{int(kind)}" for kind in kinds),
        "groups": tuple(f"t{i % 8}" for i in range(n)) if grouped else (None,) * n,
        "layer": layer,
        "site": "hook_resid_post",
        "shift": shift,
        "fingerprint": made_up_fingerprint(layer),
    }
    return Activations(**{**values, **fields})


def general(layer=2, seed=1, **fields):
    own = activations(n=30, layer=layer, seed=seed)
    return replace(own, queries=2 * own.queries.flip(1), shifts=None, shift=None, **fields)


# ----------------------------------------------------------------------------------------------------------- mean shift


def test_mean_shift_adds_the_mean_of_the_shifts_to_every_row():
    own = activations()
    steering = fit_mean_shift(own, strength=2.0)
    mean = own.shifts.double().numpy().mean(axis=0)
    np.testing.assert_allclose(steering.vector.numpy(), mean, atol=1e-6)
    decision = steering.vectors(2, torch.randn(3, D))
    np.testing.assert_allclose(decision.vector.numpy(), np.stack([mean] * 3), atol=1e-6)
    assert (steering.layer, steering.strength, steering.shift) == (2, 2.0, "last_prompt")
    assert steering.fingerprint == own.fingerprint and steering.gate is None
    own.shifts.zero_()
    assert steering.vector.norm() > 1, "it shares no memory with the activations"


def test_mean_shift_behind_a_gate():
    own = activations()
    gate = fit_gate(own.queries, rank=3)
    assert fit_mean_shift(own, gate=gate).gate_at(2) is gate
    narrow = fit_gate(torch.randn(20, 4), rank=2)
    with pytest.raises(ShapeError, match="gate: expected width d_model=10"):
        fit_mean_shift(own, gate=narrow)


def test_mean_shift_needs_shifts_and_a_layer():
    with pytest.raises(DataError, match=r"expected response shifts, got queries only\. Use collect"):
        fit_mean_shift(general())
    with pytest.raises(FsteerError, match="layer"):
        MeanShift(torch.ones(4))
    with pytest.raises(InputError, match="finite"):
        MeanShift(torch.full((4,), torch.nan), layer=1)
    with pytest.raises(ShapeError, match="width d_model=10"):
        fit_mean_shift(activations()).vectors(2, torch.randn(3, 4))


def test_mean_shift_moves_to_another_dtype_and_back():
    steering = fit_mean_shift(activations(), gate=fit_gate(activations().queries, rank=3))
    double = steering.to(dtype=torch.float64)
    assert double.vector.dtype == double.gate.subspace.basis.dtype == torch.float64
    assert torch.equal(double.to("cpu", torch.float32).vector, steering.vector)


# ------------------------------------------------------------------------------------------------------------------ fit


def test_fit_is_fit_gate_and_fit_experts_with_what_the_activations_say():
    own = activations()
    steering = fit(own, rank=3, strength=1.5, epsilon=0.2, gamma=2.0, folds=4, seed=7, residual_rank=5, **QUICK)
    gate = fit_gate(own.queries, rank=3, epsilon=0.2, gamma=2.0, folds=4, groups=own.groups, max_rank=6)
    experts = fit_experts(own.queries, own.shifts, seed=7, residual_rank=5, preset="0.1", epochs=2, n_experts=4)
    h = torch.randn(9, D)
    assert torch.equal(steering.gate_at(2).gate(h), gate.gate(h))
    assert torch.equal(steering.experts_at(2).vector(h), experts.vector(h))
    other = fit(own, rank=3, seed=8, **QUICK)
    assert not torch.equal(other.experts_at(2).vector(h), experts.vector(h))
    assert (steering.layers, steering.strength, steering.shift) == ((2,), 1.5, "last_prompt")
    assert steering.site == own.site and steering.fingerprint.probe == own.fingerprint.probe


def test_groups_of_the_activations_cut_the_folds():
    own, h = activations(), torch.randn(9, D)
    grouped = fit(own, rank=3, **QUICK).gate_at(2)
    alone = fit(replace(own, groups=(None,) * 40), rank=3, **QUICK).gate_at(2)
    by_hand = fit_gate(own.queries, rank=3, max_rank=6, groups=own.groups)
    assert torch.equal(grouped.ratios, by_hand.ratios) and not torch.equal(grouped.ratios, alone.ratios)
    assert torch.equal(alone.gate(h), fit_gate(own.queries, rank=3, max_rank=6).gate(h))


def test_the_kind_of_gate_follows_what_is_given():
    own, others = activations(), general()
    kinds = [
        ({"rank": 3}, QuantileGate),
        ({"general": others}, LinearGate),
        ({"general": others, "rank": 3, "gate": "logistic"}, LogisticGate),
        ({"general": others, "rank": 3, "gate": "residual_ratio"}, ResidualRatioGate),
        ({"rank": 3, "gate": "energy"}, EnergyGate),
    ]
    quick = {"preset": "0.1", "epochs": 2, "n_experts": 4}
    for options, kind in kinds:
        assert type(fit(own, **options, **quick).gate_at(2)) is kind
    with pytest.raises(InputError, match=r"got \['rank'\]"):
        fit(own, rank=3, general=others, **quick)
    looked_at = fit(own, rank=3, general=others, gate="quantile", **QUICK).gate_at(2)
    assert torch.equal(looked_at.ratios, fit(own, rank=3, **QUICK).gate_at(2).ratios), "looked at, not fitted to"


def test_fitted_parts_are_taken_as_they_are():
    own = activations()
    gate, experts = fit_gate(own.queries, rank=3), fit_experts(own.queries, own.shifts, preset="0.1", epochs=1)
    steering = fit(own, gate=gate, experts=experts)
    assert steering.gate_at(2) is gate and steering.experts_at(2) is experts
    with pytest.raises(InputError, match=r"got \['epsilon'\]\. Options of a part that is given already fitted"):
        fit(own, gate=gate, epsilon=0.1)
    with pytest.raises(InputError, match=r"got \['epochs'\]"):
        fit(own, experts=experts, epochs=3)
    with pytest.raises(InputError, match=r"near_misses=: expected a gate to fit"):
        fit(own, gate=gate, near_misses=general())


@pytest.mark.parametrize("option", ["epsilom", "shifts", "queries", "kind", "groups"])
def test_unknown_options_and_those_that_the_activations_decide_are_refused(option):
    with pytest.raises(InputError, match=rf"fit: expected options among .*got \['{option}'\]"):
        fit(activations(), **{option: 1})


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (general(layer=3), r"expected layer 2, hook_resid_post, got layer 3, hook_resid_post\. Collect both"),
        (general(site="hook_resid_pre"), "got layer 2, hook_resid_pre"),
        (general(fingerprint=made_up_fingerprint(tokenizer="u")), "tokenizer: another vocabulary or other"),
        (general(fingerprint=made_up_fingerprint(shift=0.5)), "activations at layer 2 differ"),
    ],
)
def test_general_queries_from_elsewhere_are_refused(others, words):
    with pytest.raises(MismatchError, match=words):
        fit(activations(), general=others, rank=3)


def test_activations_without_shifts_and_without_layers_are_refused():
    with pytest.raises(DataError, match=r"activations of layer 2: expected response shifts, got queries only"):
        fit(general(), rank=3)
    with pytest.raises(DataError, match="at least one layer"):
        fit({})


def test_several_layers_have_a_gate_and_experts_each():
    layers = {layer: activations(layer=layer) for layer in (2, 4)}
    steering = fit(layers, rank=3, **QUICK)
    assert steering.layers == (2, 4) and set(steering.fingerprint.probe) == {2, 4}
    h = torch.randn(5, D)
    for layer, own in layers.items():
        single = fit(own, rank=3, **QUICK)
        assert torch.equal(steering.gate_at(layer).gate(h), single.gate_at(layer).gate(h))
        assert torch.equal(steering.experts_at(layer).vector(h), single.experts_at(layer).vector(h))


def test_layers_of_different_models_are_refused():
    other = activations(layer=4, fingerprint=made_up_fingerprint(4, tokenizer="u"))
    with pytest.raises(MismatchError, match="tokenizer"):
        fit({2: activations(), 4: other}, rank=3, **QUICK)


def test_the_paper_preset_is_step_cdf_in_sample_and_every_position():
    own, h = activations(), torch.randn(9, D)
    steering = fit(own, rank=3, preset="paper", max_rank=6)
    gate = steering.gate_at(2)
    assert isinstance(gate, QuantileGate) and gate.cdf == "step" and steering.scope == "all"
    in_sample = fit_gate(own.queries, rank=3, cdf="step", folds=None, max_rank=6)
    assert torch.equal(gate.ratios, in_sample.ratios)
    experts = fit_experts(own.queries, own.shifts, preset="paper")
    assert torch.equal(steering.experts_at(2).vector(h), experts.vector(h))
    default = fit(own, rank=3, **QUICK)
    assert default.gate_at(2).cdf == "linear" and default.scope == "prompt"
    won = fit(own, rank=3, folds=5, scope="prompt", **{**QUICK, "preset": "paper"})
    assert won.gate_at(2).cdf == "step" and not torch.equal(won.gate_at(2).ratios, in_sample.ratios)
    assert won.scope == "prompt"

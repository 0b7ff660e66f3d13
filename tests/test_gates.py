"""The gates: against the oracle, cross-fitting by hand, calibration on planted data and on the tutor, and controls."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsteer_lens.errors import DataError, InputError, NonFiniteError, ShapeError
from fsteer_lens.method.fitting_gates import fit_gate
from fsteer_lens.method.gates import Gate
from fsteer_lens.method.subspace import Subspace, fit_subspace
from fsteer_lens.method.subspace_gates import EnergyGate, LogisticGate, QuantileGate, subspace_leaves
from tests.oracle import (
    energy_ratios,
    f64,
    fitted_subspace,
    linear_cdf,
    logistic_fit,
    quantile_gate,
    step_cdf,
)

CDFS = {"linear": linear_cdf, "step": step_cdf}
TEMPLATES = 8


def world(seed=0, per_template=12, d=48, noise=0.35):
    """IR queries of 8 templates and general ones: a shared intent, a few objects, a nuisance for each template.

    The nuisance of a template is what makes random folds optimistic: a basis that saw it knows the rest of it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    objects, nuisance = 2 * normal(6, d), 1.2 * normal(TEMPLATES, d)
    groups = [f"t{i}" for i in range(TEMPLATES) for _ in range(per_template)]
    n = len(groups)
    chosen = torch.randint(6, (n,), generator=generator)
    queries = objects[chosen] + nuisance.repeat_interleave(per_template, dim=0) + noise * normal(n, d)
    fresh = objects[torch.randint(6, (300,), generator=generator)] + 1.2 * normal(300, d) + noise * normal(300, d)
    general = 2 * normal(200, d)
    return queries, groups, fresh, general


def isotropic(n, d=40, seed=0):
    """Queries with a decaying spectrum: the textbook case in which a basis fits its own queries too well."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * (1 / torch.arange(1, d + 1)).sqrt()


def gate_on_line(ratios, **options):
    """A quantile gate of rank 1 with given calibration ratios."""
    column = torch.as_tensor(ratios, dtype=torch.float32).sort().values[:, None]
    subspace = Subspace(torch.zeros(2), torch.eye(2)[:, :1], torch.ones(1))
    return QuantileGate(subspace, 1, column, **{"epsilon": 0.1, "gamma": 4.0, **options})


# ------------------------------------------------------------------------------------------------------- quantile gate

ratio_lists = st.lists(st.sampled_from([i / 16 for i in range(17)]), min_size=1, max_size=12)


@given(
    sample=ratio_lists,
    cdf=st.sampled_from(["linear", "step"]),
    epsilon=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    gamma=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_quantile_gate_agrees_with_the_equation(sample, cdf, epsilon, gamma):
    gate = gate_on_line(sample, cdf=cdf, epsilon=epsilon, gamma=gamma)
    points = torch.linspace(0, 1, 65)  # sixteenths, so that ties are met exactly, and what lies between
    quantiles = [CDFS[cdf](sample, s) for s in f64(points)]
    np.testing.assert_allclose(f64(gate.quantile(points)), quantiles, atol=1e-6)
    by_hand = [quantile_gate(q, epsilon, gamma) for q in quantiles]
    np.testing.assert_allclose(f64(gate.gate_of_ratio(points)), by_hand, atol=1e-5)


def test_ties_take_the_upper_value_and_the_ends_are_zero_and_one():
    gate = gate_on_line([0.2, 0.5, 0.5, 0.5, 0.9])
    points = torch.tensor([0.1, 0.2, 0.5, 0.4999, 0.7, 0.9, 0.95])
    torch.testing.assert_close(
        gate.quantile(points), torch.tensor([0, 0, 0.75, 0.24992, 0.875, 1, 1]), atol=1e-4, rtol=0
    )
    step = gate_on_line([0.2, 0.5, 0.5, 0.5, 0.9], cdf="step")
    torch.testing.assert_close(step.quantile(points), torch.tensor([0, 0.2, 0.8, 0.2, 0.8, 1, 1]))


@pytest.mark.parametrize("gamma", [1.0, 4.0])
def test_linear_cdf_is_continuous_and_step_is_not(gamma):
    sample = torch.rand(15)
    fine = torch.linspace(0, 1, 20_001)
    linear = gate_on_line(sample, epsilon=0.5, gamma=gamma)
    step = gate_on_line(sample, epsilon=0.5, gamma=gamma, cdf="step")
    gaps = sample.sort().values.diff()
    steepest = gamma / 0.5 / (14 * gaps.min())
    assert linear.quantile(fine).diff().max() <= 1.01 / 20_000 / (14 * gaps.min()) + 1e-6
    assert linear.gate_of_ratio(fine).diff().max() <= 1.01 * steepest / 20_000 + 1e-6
    assert step.quantile(fine).diff().max() >= 0.99 / 15
    for gate in (linear, step):
        assert (gate.gate_of_ratio(fine).diff() >= 0).all()


def test_epsilon_and_gamma_say_where_and_how_sharply_the_gate_closes():
    sample = torch.linspace(0, 1, 101)
    at_half_epsilon = torch.tensor([0.05])
    for gamma in (1.0, 2.0, 4.0):
        gate = gate_on_line(sample, epsilon=0.1, gamma=gamma)
        torch.testing.assert_close(gate.gate_of_ratio(at_half_epsilon), torch.tensor([0.5**gamma]))
        assert (gate.gate_of_ratio(torch.linspace(0.1001, 1, 50)) == 1).all()


def test_a_ratio_that_is_no_number_has_no_gate_value():
    ratio = torch.tensor([torch.nan, 0.9])
    for cdf in ("linear", "step"):
        value = gate_on_line([0.2, 0.5], cdf=cdf).gate_of_ratio(ratio)
        assert value[0].isnan() and value[1] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epsilon": 0.0}, "epsilon: expected a finite number > 0 and <= 1, got 0"),
        ({"epsilon": 1.5}, "epsilon: expected a finite number > 0 and <= 1, got 1.5"),
        ({"gamma": 0.0}, "gamma: expected a finite number > 0, got 0"),
        ({"epsilon": float("nan")}, "epsilon: expected a finite number > 0 and <= 1, got nan"),
    ],
)
def test_epsilon_and_gamma_out_of_range_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        fit_gate(torch.randn(20, 4), rank=2, **options)


# ----------------------------------------------------------------------------------------------- threshold, every kind


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
def test_threshold_of_the_linear_quantile_gate_is_where_it_is_one_half(epsilon, gamma):
    gate = gate_on_line(torch.rand(30), epsilon=epsilon, gamma=gamma)
    value = gate.gate_of_ratio(torch.tensor([gate.threshold, gate.threshold - 0.01, gate.threshold + 0.01]))
    assert value[0] == pytest.approx(0.5, abs=2e-3)
    assert value[1] < 0.5 < value[2]


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("n", [1, 30])
@pytest.mark.parametrize("cdf", ["linear", "step"])
def test_threshold_is_where_a_quantile_gate_opens(epsilon, n, cdf):
    gate = gate_on_line(torch.rand(n), epsilon=epsilon, cdf=cdf)
    value = gate.gate_of_ratio(torch.tensor([gate.threshold + 1e-6, gate.threshold - 1e-4]))
    assert value[0] >= 0.5 - 1e-4 and value[1] < 0.5


def test_threshold_of_the_logistic_and_the_energy_gate():
    queries, groups, _, general = world()
    for rank in (2, 12):
        gate = fit_gate(queries, rank=rank, kind="logistic", general=general, groups=groups, max_rank=12)
        assert gate.gate_of_ratio(torch.tensor(gate.threshold)) == pytest.approx(0.5, abs=1e-4)
    energy = fit_gate(queries, rank=4, kind="energy")
    assert energy.gate_of_ratio(torch.tensor(energy.threshold)) == 0.5


# --------------------------------------------------------------------------------------------- logistic and energy gate


@pytest.mark.parametrize("n_general", [200, 17])
def test_logistic_gate_is_a_balanced_regression_on_standardised_cross_fitted_ratios(n_general):
    queries, groups, fresh, general = world()
    general = general[:n_general]
    gate = fit_gate(queries, rank=3, kind="logistic", general=general, groups=groups, max_rank=10)
    assert isinstance(gate, LogisticGate)
    held_out = crossfitted_by_hand(queries, groups, gate.subspace.rank)
    others = energy_ratios(general, *fitted_subspace(queries, gate.subspace.rank))
    for rank in (1, 3, 10):
        a, b = logistic_fit(held_out[:, rank - 1], others[:, rank - 1])
        ratio = gate.subspace.energy_ratio(fresh, rank)
        expected = 1 / (1 + np.exp(-(a * f64(ratio) + b)))
        np.testing.assert_allclose(f64(gate.at_rank(rank).gate(fresh)), expected, atol=2e-3)
        assert float(gate.slopes[rank - 1]) == pytest.approx(a, rel=5e-3)


def test_energy_gate_is_the_ratio():
    queries, _, fresh, _ = world()
    gate = fit_gate(queries, rank=5, kind="energy")
    assert isinstance(gate, EnergyGate)
    expected = energy_ratios(fresh, *fitted_subspace(queries, 5))[:, -1]
    np.testing.assert_allclose(f64(gate.gate(fresh)), expected, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- combination


def three_gates():
    queries, groups, fresh, general = world()
    a = fit_gate(queries, rank=2, groups=groups, max_rank=12)
    b = fit_gate(queries + 1, rank=6, kind="energy", max_rank=12)
    c = fit_gate(queries, rank=4, kind="logistic", general=general, max_rank=12)
    return a, b, c, torch.cat([fresh, general])


def test_and_or_not_are_min_max_and_one_minus():
    a, b, c, h = three_gates()
    x, y, z = a.gate(h), b.gate(h), c.gate(h)
    assert (x != y).any() and (y != z).any()
    torch.testing.assert_close((a & b).gate(h), torch.minimum(x, y))
    torch.testing.assert_close((a | b).gate(h), torch.maximum(x, y))
    torch.testing.assert_close((~a).gate(h), 1 - x)
    torch.testing.assert_close((~(a & b) | c).gate(h), torch.maximum(1 - torch.minimum(x, y), z))
    torch.testing.assert_close((~(a & b)).gate(h), (~a | ~b).gate(h))
    assert (~(a & b) | c).leaves == (a, b, c)
    assert subspace_leaves(~(a & b) | c) == (a, b, c)


def test_a_rank_reaches_every_leaf_of_a_combination():
    a, b, c, h = three_gates()
    moved = (~(a & b) | c).at_rank(9)
    assert [leaf.rank for leaf in moved.leaves] == [9, 9, 9]
    by_hand = (~(a.at_rank(9) & b.at_rank(9)) | c.at_rank(9)).gate(h)
    torch.testing.assert_close(moved.gate(h), by_hand)
    assert not torch.equal(moved.gate(h), (~(a & b) | c).gate(h))
    with pytest.raises(InputError, match=r"1\.\.12 \(the ranks that were fitted\), got 13"):
        (a & b).at_rank(13)


def test_what_cannot_be_combined_is_refused():
    a, *_ = three_gates()
    narrow = fit_gate(torch.randn(20, 4), rank=2, kind="energy")
    with pytest.raises(ShapeError, match="the second gate: expected width d_model=48, got 4"):
        a & narrow


# ------------------------------------------------------------------------------------------------------------ at_rank


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cdf": "step"},
        {"folds": None},
        {"kind": "energy"},
        {"kind": "logistic"},
        {"grouped": True},
        {"calibrated": True},
    ],
)
def test_at_rank_equals_a_fit_at_that_rank(options):
    queries, groups, fresh, general = world()
    options = dict(options)
    if options.get("kind") == "logistic":
        options |= {"general": general[:40], "max_rank": 4}
    if options.pop("grouped", False):
        options["groups"] = groups
    if options.pop("calibrated", False):
        options["calibration"] = fresh[:100]
    h = torch.cat([fresh[100:], general])
    gate = fit_gate(queries, rank=2, **options)
    for rank in (1, 7, 30) if gate.subspace.rank > 4 else (1, 4):
        cut, again = gate.at_rank(rank), fit_gate(queries, rank=rank, **options)
        assert cut.rank == rank and cut.subspace is gate.subspace
        torch.testing.assert_close(cut.gate(h), again.gate(h), atol=1e-6, rtol=0)
        assert cut.threshold == pytest.approx(again.threshold, abs=1e-6)
        assert not torch.equal(cut.gate(h), gate.gate(h))


def test_ranks_are_kept_up_to_the_limit_which_is_no_lower_than_the_rank():
    queries, *_ = world()
    assert fit_gate(queries, rank=3).subspace.rank == 48
    assert fit_gate(queries, rank=3, max_rank=10).subspace.rank == 10
    assert fit_gate(queries, rank=20, max_rank=20).subspace.rank == 20
    with pytest.raises(InputError, match=r"got 10\. Leave it out, or choose within 20 to 48"):
        fit_gate(queries, rank=20, max_rank=10)
    with pytest.raises(InputError, match=r"got 49\. Leave it out, or choose within 3 to 48"):
        fit_gate(queries, rank=3, max_rank=49)


# -------------------------------------------------------------------------------------------------------- cross-fitting


def crossfitted_by_hand(queries, groups, max_rank):
    """Ratios under the basis of all queries outside a query's fold; folds cut as scikit-learn's GroupKFold does."""
    from sklearn.model_selection import GroupKFold

    ratios = np.full((len(queries), max_rank), np.nan)
    for train, held_out in GroupKFold(5).split(queries, groups=groups):
        assert not {groups[i] for i in train} & {groups[i] for i in held_out}
        ratios[held_out] = energy_ratios(queries[held_out], *fitted_subspace(queries[train], max_rank))
    return ratios


def test_calibration_ratios_are_those_under_a_basis_that_did_not_see_the_template():
    queries, groups, _, _ = world()
    gate = fit_gate(queries, rank=3, groups=groups, max_rank=12)
    assert isinstance(gate, QuantileGate)
    by_hand = np.sort(crossfitted_by_hand(queries, groups, 12), axis=0)
    np.testing.assert_allclose(f64(gate.ratios), by_hand, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 3])
def test_random_folds_hold_every_query_out_once(seed):
    from sklearn.model_selection import KFold

    queries, *_ = world()
    gate = fit_gate(queries, rank=3, max_rank=6, folds=4, seed=seed)
    by_hand = np.full((len(queries), 6), np.nan)
    for train, held_out in KFold(4, shuffle=True, random_state=seed).split(queries):
        by_hand[held_out] = energy_ratios(queries[held_out], *fitted_subspace(queries[train], 6))
    np.testing.assert_allclose(f64(gate.ratios), np.sort(by_hand, axis=0), atol=1e-5)


def test_leaving_one_out_agrees_with_a_loop_over_queries():
    queries = isotropic(15, d=10)
    gate = fit_gate(queries, rank=4, folds=15, max_rank=4)
    by_hand = [
        energy_ratios(queries[i : i + 1], *fitted_subspace(np.delete(f64(queries), i, axis=0), 4))[0] for i in range(15)
    ]
    np.testing.assert_allclose(f64(gate.ratios), np.sort(by_hand, axis=0), atol=1e-5)


def test_in_sample_and_separate_calibration_use_the_basis_of_all_queries():
    queries, _, fresh, _ = world()
    mean, basis = fitted_subspace(queries, 8)
    in_sample = fit_gate(queries, rank=3, folds=None, max_rank=8)
    np.testing.assert_allclose(f64(in_sample.ratios), np.sort(energy_ratios(queries, mean, basis), axis=0), atol=1e-5)
    apart = fit_gate(queries, rank=3, calibration=fresh, max_rank=8)
    np.testing.assert_allclose(f64(apart.ratios), np.sort(energy_ratios(fresh, mean, basis), axis=0), atol=1e-5)


def open_rate(gate: Gate, h):
    return float((gate.gate(h) >= 0.5).float().mean())


@pytest.mark.parametrize("seed", range(3))
def test_in_sample_ratios_are_too_high_and_cross_fitted_ones_are_not(seed):
    n, rank, epsilon = 100, 30, 0.2
    both = isotropic(n + 2000, seed=seed)
    queries, fresh = both[:n], both[n:]
    truth = fit_subspace(queries).energy_ratio(fresh, rank).mean()
    options = {"rank": rank, "max_rank": rank, "epsilon": epsilon, "gamma": 1000.0}  # open where F(s) ≥ ε
    in_sample = fit_gate(queries, folds=None, **options)
    crossfitted = fit_gate(queries, folds=10, **options)
    assert in_sample.ratios[:, -1].mean() > truth + 0.05
    assert abs(crossfitted.ratios[:, -1].mean() - truth) < 0.02
    assert open_rate(in_sample, queries) == pytest.approx(1 - epsilon, abs=0.02), (
        "it looks calibrated where it was fitted"
    )
    assert open_rate(in_sample, fresh) < 0.4
    assert open_rate(crossfitted, fresh) == pytest.approx(1 - epsilon, abs=0.08)


def test_folds_by_template_open_for_new_templates_where_random_folds_do_not():
    rates = []
    for seed in range(4):
        queries, groups, fresh, _ = world(seed=seed)
        options = {"rank": 12, "max_rank": 12, "epsilon": 0.05, "gamma": 1000.0}
        gates = [
            fit_gate(queries, folds=None, **options),
            fit_gate(queries, folds=TEMPLATES, **options),
            fit_gate(queries, folds=TEMPLATES, groups=groups, **options),
        ]
        rates.append([open_rate(gate, fresh) for gate in gates])
    in_sample, random_folds, template_folds = np.mean(rates, axis=0)
    assert in_sample <= random_folds < template_folds - 0.2
    assert template_folds > 0.8


@pytest.fixture(scope="module")
def tutor_activations():
    tutor = pytest.importorskip("fsteer_lens.tutor", reason="the tutor is not built")
    from fsteer_lens.reading.collecting import collect, collect_queries

    try:
        model = tutor.load()
        told = tutor.data()
    except (OSError, ImportError, RuntimeError) as error:
        pytest.skip(f"the tutor cannot be loaded: {error}")
    train, valid = (  # a part of the sets: enough to see it, and quick
        collect(model, part, layer=4, shift="last_prompt", batch_size=64, progress=False)
        for part in (told.train[::4], told.valid[::2])
    )
    prompts = [task.prompt for task in told.general_valid[::3]]
    general = collect_queries(model, prompts, layer=4, batch_size=64, progress=False)
    return train, valid, general


def test_on_the_tutor_only_the_cross_fitted_gate_opens_for_new_prompts(tutor_activations):
    train, valid, general = tutor_activations
    options = {"rank": 64, "epsilon": 0.05}
    in_sample = fit_gate(train.queries, folds=None, **options)
    crossfitted = fit_gate(train.queries, groups=train.groups, **options)
    nominal = 1 - 0.05 * 0.5**0.25
    assert open_rate(in_sample, train.queries) == pytest.approx(nominal, abs=0.01)
    assert open_rate(in_sample, valid.queries) < 0.65
    assert open_rate(crossfitted, valid.queries) == pytest.approx(nominal, abs=0.04)
    for gate in (in_sample, crossfitted):
        assert open_rate(gate, general.queries) < 0.02, "the control: everyday prompts stay closed"


# ------------------------------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize("kind", ["quantile", "logistic"])
def test_unrelated_queries_stay_closed_and_related_ones_open(kind):
    queries, groups, fresh, general = world()
    others = world(seed=9)[3]
    options = {"general": general, "max_rank": 6} if kind == "logistic" else {}
    gate = fit_gate(queries, rank=6, kind=kind, groups=groups, **options)
    assert open_rate(gate, fresh) > 0.8
    assert open_rate(gate, others) < 0.05
    assert open_rate(~gate, others) > 0.95


def test_a_gate_for_one_intent_stays_closed_for_queries_of_its_own_spread_elsewhere():
    """A control against a gate that only measures size: the same cloud in a rotated subspace."""
    queries, groups, _, _ = world()
    gate = fit_gate(queries, rank=6, groups=groups)
    turned = (queries - gate.subspace.mean) @ torch.linalg.qr(torch.randn(48, 48)).Q + gate.subspace.mean
    assert open_rate(gate, queries) > 0.9 and open_rate(gate, turned) < 0.05


# ----------------------------------------------------------------------------------------------------------- bad input


def test_groups_that_do_not_fit_are_refused():
    queries, groups, _, _ = world()
    with pytest.raises(DataError, match=r"a group for each of 96 queries, got 95 groups, 0 of them None\. Give every"):
        fit_gate(queries, rank=2, groups=groups[1:])
    with pytest.raises(DataError, match="got 96 groups, 1 of them None"):
        fit_gate(queries, rank=2, groups=[None, *groups[1:]])
    with pytest.raises(DataError, match=r"at least 2 different groups, got 1\. Give several groups, or none"):
        fit_gate(queries, rank=2, groups=["one"] * 96)
    without = fit_gate(queries, rank=2)
    assert torch.equal(fit_gate(queries, rank=2, groups=[None] * 96).ratios, without.ratios)


def test_rank_is_limited_by_the_smallest_training_fold():
    queries = torch.randn(20, 30)
    assert fit_gate(queries, rank=15).subspace.rank == 15
    with pytest.raises(InputError, match=r"1\.\.15 .*smallest training fold, 16 of 20 queries.*got 16"):
        fit_gate(queries, rank=16)
    assert fit_gate(queries, rank=19, folds=None).rank == 19
    uneven = ["big"] * 14 + ["a"] * 3 + ["b"] * 3
    with pytest.raises(InputError, match="smallest training fold, 6 of 20"):
        fit_gate(queries, rank=6, groups=uneven)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"folds": 1}, ">= 2 .or None"),
        ({"kind": "logistic"}, "needs general="),
        ({"kind": "quantile", "general": torch.zeros(4, 6)}, "takes no general="),
        ({"kind": "energy", "general": torch.zeros(4, 6)}, "takes no general="),
        ({"rank": 0}, r"1\.\.6"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        fit_gate(torch.randn(20, 6), **{"rank": 2, **options})


def test_unusable_tensors_are_refused():
    queries = torch.randn(20, 6)
    with pytest.raises(NonFiniteError, match="queries: expected finite"):
        fit_gate(queries.log(), rank=2)
    with pytest.raises(NonFiniteError, match="general: expected finite"):
        fit_gate(queries, rank=2, kind="logistic", general=queries.log())
    with pytest.raises(NonFiniteError, match="calibration: expected finite"):
        fit_gate(queries, rank=2, calibration=queries.log())
    with pytest.raises(ShapeError, match="at least 3 rows"):
        fit_gate(queries[:2], rank=1)


# --------------------------------------------------------------------------------------------------- values and memory


def test_a_fit_shares_no_memory_and_leaves_the_global_generators_alone():
    queries, groups, fresh, general = world()
    calibration = fresh.clone()
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    gates = [
        fit_gate(queries, rank=3, groups=groups),
        fit_gate(queries, rank=3, calibration=calibration),
        fit_gate(queries, rank=3, kind="logistic", general=general, max_rank=3),
    ]
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    before = [gate.gate(fresh) for gate in gates]
    for tensor in (queries, calibration, general):
        tensor.add_(100)
    for gate, values in zip(gates, before, strict=True):
        assert torch.equal(gate.gate(fresh), values)


def test_moving_a_composed_gate_moves_every_leaf_and_back_again_changes_nothing():
    a, b, c, h = three_gates()
    gate = ~(a & b) | c
    double = gate.to(dtype=torch.float64)
    assert type(double) is type(gate) and double.gate(h).dtype == torch.float64
    assert all(leaf.subspace.basis.dtype == torch.float64 for leaf in double.leaves)
    assert double.leaves[0].ratios.dtype == double.leaves[2].slopes.dtype == torch.float64
    torch.testing.assert_close(double.gate(h).float(), gate.gate(h), atol=1e-3, rtol=0)
    assert torch.equal(double.to("cpu", torch.float32).gate(h), gate.gate(h))
    step = fit_gate(world()[0], rank=3, cdf="step").to(dtype=torch.float64)
    assert step.gate(h).dtype == torch.float64


def test_a_batch_is_its_rows():
    a, b, c, h = three_gates()
    gate = (a & ~b) | c
    rows = h[:12]
    together = gate.gate(rows.reshape(3, 4, -1))
    assert together.shape == (3, 4)
    singly = torch.stack([gate.gate(row) for row in rows]).reshape(3, 4)
    torch.testing.assert_close(together, singly, atol=1e-5, rtol=0)


def test_reprs_are_short():
    a, b, _, _ = three_gates()
    assert repr(a) == "QuantileGate(rank=2 of 12, d_model=48)"
    assert repr(~(a & b)) == f"NotGate(inner=MinGate(left={a!r}, right={b!r}))"


def test_values_at_all_ranks_are_those_of_each_rank() -> None:
    rows, others = torch.randn(40, 12), torch.randn(30, 12) * 2
    quantile = fit_gate(rows, rank=3)
    logistic = fit_gate(rows, rank=2, kind="logistic", general=others)
    energy = EnergyGate(quantile.subspace, 4)
    for gate in (quantile, logistic, energy, energy.at_threshold(0.3), quantile & ~logistic, quantile | energy):
        values = gate.gates(others)
        assert values.shape == (30, min(leaf.subspace.rank for leaf in gate.leaves))
        for rank in range(1, values.shape[1] + 1):
            assert torch.equal(values[:, rank - 1], gate.at_rank(rank).gate(others))


def test_a_chosen_threshold_is_where_the_gate_opens() -> None:
    gate = fit_gate(torch.randn(40, 12), rank=3)
    chosen = gate.at_threshold(0.4)
    ratios = torch.tensor([0.0, 0.3999, 0.4, 1.0, torch.nan])
    torch.testing.assert_close(
        chosen.gate_of_ratio(ratios), torch.tensor([0.0, 0.0, 1.0, 1.0, torch.nan]), equal_nan=True
    )
    assert (chosen.threshold, chosen.rank, chosen.at_rank(5).threshold) == (0.4, 3, 0.4)
    assert chosen.calibrated is gate.calibrated and chosen.subspace is gate.subspace
    with pytest.raises(InputError, match="finite number"):
        gate.at_threshold(float("nan"))

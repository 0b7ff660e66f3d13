"""The null-space gate: against planted truths, against scikit-learn's ridge, on the tutor, in files, and refused."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, KFold

from fsteer_lens import (
    Activations,
    FineSteer,
    collect_queries,
    explore,
    figures,
    fit,
    fit_gate,
    generate,
    load,
    save,
    tutor,
)
from fsteer_lens.errors import DataError, InputError, MismatchError, NonFiniteError, ShapeError
from fsteer_lens.method import DomainShare, NullSpaceGate
from fsteer_lens.method.gates import CutGate, MinGate
from fsteer_lens.method.linear_gates import LinearGate
from fsteer_lens.method.subspace_gates import LogisticGate, QuantileGate
from fsteer_lens.models import SteerableModel
from fsteer_lens.steering import fit_mean_shift
from fsteer_lens.tutor import data
from tests import made_up
from tests.running import LAYER
from tests.test_fitting import D, activations, general

WIDTH = 24
QUICK: dict[str, Any] = {"preset": "0.1", "epochs": 2, "n_experts": 4}


def drawn(n: int, seed: int, axes: range, **along: float) -> torch.Tensor:
    """Rows that vary along some axes, around a common offset, with fixed parts along others: `e20=3` adds 3 there."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((n, WIDTH), 0.5)
    rows[:, axes.start : axes.stop] += 2 * torch.randn(n, len(axes), generator=generator)
    for name, much in along.items():
        rows[:, int(name[1:])] += much * (1 + 0.05 * torch.randn(n, generator=generator))
    return rows


A, B = range(0, 5), range(5, 10)  # what two domains of general queries vary along


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Queries made of what general ones are made of and something else, general ones, and their domains."""
    wanted = drawn(80, seed, range(0, 10), e20=3)
    others = torch.cat([drawn(60, seed + 1, A), drawn(60, seed + 2, B)])
    return wanted, others, ["first"] * 60 + ["second"] * 60


# ------------------------------------------------------------ what the map is


def test_it_sends_general_queries_to_0_and_others_to_1() -> None:
    wanted, others, domains = planted()
    gate = fit_gate(wanted, kind="null_space", general=others, domains=domains)
    assert isinstance(gate, NullSpaceGate)
    unseen = drawn(200, 10, range(0, 10), e20=3)
    assert float(gate(unseen).mean()) > 0.95 and float(gate(unseen).min()) > 0.8
    for axes in (A, B):
        assert float(gate(drawn(200, 11, axes)).max()) < 0.05
    reach = (others - others.mean(dim=0)) @ gate.weight
    assert float(reach.abs().max()) < 0.1, "w lies in the null space: no general query gets far along it"
    assert gate.kept is not None and gate.kept > 0.95
    assert [(one.name, one.n) for one in gate.domains] == [("first", 60), ("second", 60)]
    assert max(one.share for one in gate.domains) < 0.05
    twice = drawn(50, 12, A, e20=1.5)
    assert 0.3 < float(gate(twice).mean()) < 0.7, "it is a map: half of what makes the difference gets half"


def test_what_is_made_of_general_queries_cannot_be_told_and_the_fit_warns() -> None:
    """The control: nothing but what general queries are made of."""
    _, others, domains = planted()
    inside = torch.cat([drawn(40, 5, A), drawn(40, 6, B)])
    with pytest.warns(UserWarning, match=r"null space leaves 0\.\d\d of the steering"):
        gate = fit_gate(inside, kind="null_space", general=others, domains=domains)
    assert isinstance(gate, NullSpaceGate) and gate.kept is not None and gate.kept < 0.2
    assert float(gate(drawn(200, 7, A)).mean()) < 0.2, "it stays shut rather than open for everything"


def test_a_domain_that_is_left_out_is_told() -> None:
    """Queries differ in two things; one domain shares one of them, and only a map that was shown it uses the other."""
    wanted = drawn(80, 0, range(0, 10), e20=3, e21=3)
    like = drawn(60, 3, A, e20=3)
    others = torch.cat([drawn(60, 1, A), drawn(60, 2, B), like])
    domains = ["first"] * 60 + ["second"] * 60 + ["like them"] * 60
    gate = fit_gate(wanted, kind="null_space", general=others, domains=domains)
    assert isinstance(gate, NullSpaceGate)
    told = {one.name: one for one in gate.domains}
    assert told["like them"].share < 0.05 < 0.35 < (told["like them"].left_out or 0) < 0.65
    assert (told["second"].left_out or 0) < 0.2
    without = fit_gate(wanted, kind="null_space", general=others[:120], domains=domains[:120])
    assert float(without(like).mean()) == pytest.approx(told["like them"].left_out, abs=0.05)
    assert "like them=0.0" in repr(gate) and "(left out 0." in repr(gate)
    table = gate.to_markdown().splitlines()
    assert len(table) == 5 and table[4].startswith("| like them | 60 | 0.0")


def test_one_domain_tells_nothing_of_others_and_says_so() -> None:
    wanted, others, _ = planted()
    unnamed: list[Any] = [None, ["all"] * 120, [None] * 120]
    for domains in unnamed:
        with pytest.warns(UserWarning, match=r"one domain.*labels="):
            gate = fit_gate(wanted, kind="null_space", general=others, domains=domains)
        assert isinstance(gate, NullSpaceGate)
        assert [one.left_out for one in gate.domains] == [None] and "left out unknown" in repr(gate)
    some = fit_gate(wanted, kind="null_space", general=others, domains=["all"] * 60 + [None] * 60)
    assert isinstance(some, NullSpaceGate) and [one.name for one in some.domains] == ["all", "no label"]


def plain_map(wanted: Any, others: Any, domains: list[str], groups: list[str] | None, seed: int) -> tuple[Any, float]:
    """Slope and bias by scikit-learn's weighted ridge regression without intercept, in all the dimensions that are."""
    names = sorted(set(domains))
    domain = np.array([names.index(one) for one in domains])

    def weights(chosen: Any) -> Any:
        sizes = np.bincount(domain[chosen], minlength=len(names))
        return 1 / sizes[domain[chosen]] / (sizes > 0).sum()

    width = min(wanted.shape[1], len(wanted) + len(others))

    def solved(mine: Any, chosen: Any, strength: float) -> tuple[Any, Any]:
        share = weights(chosen)
        centre = share @ others[chosen]
        rows = np.concatenate([mine, others[chosen]]) - centre
        each = np.concatenate([np.full(len(mine), 1 / len(mine)), share])
        unit = (each[:, None] * rows**2).sum() / width
        target = np.concatenate([np.ones(len(mine)), np.zeros(len(chosen))])
        model = Ridge(alpha=strength * unit, fit_intercept=False, solver="svd", tol=1e-12)
        return centre, model.fit(rows, target, sample_weight=each).coef_

    if groups is None:
        cuts = list(KFold(5, shuffle=True, random_state=seed).split(wanted))
    else:
        cuts = list(GroupKFold(5).split(wanted, groups=groups))
    general_cuts = KFold(5, shuffle=True, random_state=seed).split(others)
    pairs = list(zip(cuts, general_cuts, strict=True))
    best = None
    for strength in (3.0, 1.0, 0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3):
        mine, theirs = np.zeros(len(wanted)), np.zeros(len(others))
        for (train, held), (general_train, general_held) in pairs:
            centre, w = solved(wanted[train], general_train, strength)
            mine[held] = (wanted[held] - centre) @ w
            theirs[general_held] = (others[general_held] - centre) @ w
        error = ((mine - 1) ** 2).mean() + weights(np.arange(len(others))) @ theirs**2
        if best is None or error < best[0]:
            best = error, strength, mine, theirs
    assert best is not None
    _, strength, mine, theirs = best
    low = max(np.quantile(theirs[domain == index], 0.95) for index in range(len(names)))
    high = max(np.median(mine) if len(mine) % 2 else np.quantile(mine, 0.5), low + 0.25)
    centre, w = solved(wanted, np.arange(len(others)), strength)
    return w / (high - low), float((-(centre @ w) - low) / (high - low))


@pytest.mark.parametrize(("n", "grouped"), [(40, False), (40, True), (6, False)])
def test_it_is_ridge_regression_of_0_and_1_calibrated_on_held_out_queries(n: int, grouped: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    wanted = torch.randn(n, D, generator=generator) + torch.linspace(-0.5, 0.6, D)
    others = torch.randn(n + 5, D, generator=generator) * torch.linspace(2, 0.5, D)
    domains = ["a"] * (n // 3) + ["b"] * (n + 5 - n // 3)  # of different sizes, and counting alike
    groups = [f"g{i % 7}" for i in range(n)] if grouped else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random queries overlap: told of above
        gate = fit_gate(wanted, kind="null_space", general=others, domains=domains, groups=groups, seed=3)
    assert isinstance(gate, NullSpaceGate)
    slope, bias = plain_map(wanted.double().numpy(), others.double().numpy(), domains, groups, 3)
    np.testing.assert_allclose(gate.weight.double().numpy(), slope, atol=2e-5)
    assert gate.bias == pytest.approx(bias, abs=2e-5)


def test_fewer_queries_than_dimensions() -> None:
    """w lies in what the queries span: the same map as in all dimensions."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(60, WIDTH, generator=generator)).Q  # 24 dimensions inside 60
    wanted, others, domains = planted()
    wanted, others, domains = wanted[::6], others[::6], domains[::6]
    small = fit_gate(wanted, kind="null_space", general=others, domains=domains)
    wide = fit_gate(wanted @ turn.T, kind="null_space", general=others @ turn.T, domains=domains)
    assert isinstance(small, NullSpaceGate) and isinstance(wide, NullSpaceGate)
    assert len(wanted) + len(others) < 60 and wide.d_model == 60
    unseen = drawn(50, 9, range(0, 10), e20=2)
    # the unit of the ridge is the mean eigenvalue over what the queries can span, 34 dimensions here and 24 there
    assert torch.allclose(wide(unseen @ turn.T), small(unseen), atol=0.1)
    outside = torch.linalg.qr(torch.cat([turn, torch.randn(60, 1, generator=generator)], dim=1)).Q[:, -1]
    assert float((wide.weight @ outside).abs()) < 1e-5, "nothing that no query reached into moves the map"


# ------------------------------------------------------------ as a gate among others


def test_it_scores_is_cut_turned_round_and_combined() -> None:
    gate = NullSpaceGate(torch.tensor([1.0, 0.0]), 0.25, layer=3)
    h = torch.tensor([[-1.0, 5.0], [0.25, 0.0], [2.0, 1.0]])
    assert gate(h).tolist() == [0.0, 0.5, 1.0] and gate.score(h).tolist() == [-0.75, 0.5, 2.25]
    assert (gate.threshold, gate.opens_above, gate.ranks, gate.d_model, gate.layer) == (0.5, True, 0, 2, 3)
    assert list(gate.readings(h)) == ["score"] and gate.score_name.startswith("map")
    cut = gate.at_threshold(2.0)
    assert isinstance(cut, CutGate) and cut(h).tolist() == [0.0, 0.0, 1.0]
    assert (~gate)(h).tolist() == [1.0, 0.5, 0.0]
    half = NullSpaceGate(torch.zeros(2), 0.25)
    assert (gate & half)(h).tolist() == [0.0, 0.25, 0.25] and (gate | half)(h).tolist() == [0.25, 0.5, 1.0]
    moved: Any = gate.to(dtype=torch.float64)
    assert moved.weight.dtype == torch.float64
    assert bool(gate(torch.tensor([[float("nan"), 0.0]])).isnan().all()), "NaN is refused where it is used, not hidden"


def test_on_the_tutor_in_a_file_and_in_pictures(
    tutor_model: SteerableModel, steering: FineSteer, trained: dict[int, Activations], tmp_path: Path
) -> None:
    told, own = data("safe"), trained[4]
    tasks = told.general_train[::8]
    labels = [task.kind for task in tasks]
    others = collect_queries(tutor_model, [t.prompt for t in tasks], layer=4, labels=labels, progress=False)
    by = fit(own, null_space=others, experts=steering.experts_at(LAYER))
    gate = by.gate_at(LAYER)
    assert isinstance(gate, NullSpaceGate) and gate.layer == 4 and {one.name for one in gate.domains} == set(labels)
    harmful = collect_queries(tutor_model, told.test.prompts[::20], layer=4, progress=False).queries
    harmless = collect_queries(
        tutor_model, [t.prompt for t in told.general_test[::20]], layer=4, progress=False
    ).queries
    assert float(gate(harmful).mean()) > 0.8 and float(gate(harmless).mean()) < 0.05
    save(by, tmp_path / "by")
    found = load(tmp_path / "by", model=tutor_model)
    assert repr(found.gate_at(LAYER)) == repr(gate) and found.gate_at(LAYER).domains == gate.domains
    assert torch.equal(found.gate_at(LAYER)(own.queries), gate(own.queries))
    prompts = [told.test.prompts[0], told.general_test[0].prompt]
    made = generate(tutor_model, prompts, found.with_strength(1.25), max_new_tokens=6, progress=False)
    plain = generate(tutor_model, prompts, max_new_tokens=6, progress=False)
    assert made[0].tokens != plain[0].tokens and made[1].tokens == plain[1].tokens
    seen = collect_queries(tutor_model, prompts, layer=4, progress=False).queries
    assert torch.allclose(made.trace.gate[LAYER], gate(seen), atol=1e-4)
    assert torch.allclose(made.trace.score[LAYER], gate.score(seen), atol=1e-4)
    watched = generate(tutor_model, prompts, by.with_monitor(), max_new_tokens=6, progress=False)
    assert [one.tokens for one in watched] == [one.tokens for one in plain]
    groups = {"harm": told.valid.prompts[:3], "other": [t.prompt for t in told.general_valid[:3]]}
    explorer = explore(by, tutor_model, groups, progress=False)
    assert explorer.choose(threshold=0.25).state.gate_at(LAYER).threshold == 0.25  # type: ignore[union-attr]
    figure: Any = figures.gate_separation(gate, harmful, harmless)
    assert figure.layout.xaxis.title.text == gate.score_name


def test_the_tutors_own_fit_knows_it(
    tutor_model: SteerableModel, steering: FineSteer, trained: dict[int, Activations]
) -> None:
    told, own = data("safe"), trained[4]
    experts = steering.experts_at(LAYER)
    by_kind = tutor.fit(tutor_model, activations=own, gate="null_space", experts=experts, progress=False).gate_at(4)
    assert isinstance(by_kind, NullSpaceGate)
    assert {one.name for one in by_kind.domains} == {task.kind for task in told.general_train}
    read: dict[str, Any] = {"layer": 4, "progress": False}
    tasks = told.general_train[::20]
    general_ = collect_queries(tutor_model, [t.prompt for t in tasks], labels=[t.kind for t in tasks], **read)
    alone = tutor.fit(tutor_model, activations=own, null_space=general_, experts=experts).gate_at(4)
    assert isinstance(alone, NullSpaceGate), "no gate was asked for, so there is none beside it"


def test_a_mean_shift_in_the_null_space(tmp_path: Path) -> None:
    own, others = activations(), general()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gate = fit_gate(own.queries, kind="null_space", general=others.queries, domains=others.labels, layer=2)
    steering = fit_mean_shift(own, gate=gate)
    decided = steering.decide(2, own.queries)
    assert own.shifts is not None
    assert torch.equal(decided.gate, gate(own.queries)) and torch.allclose(decided.vector[0], own.shifts.mean(dim=0))
    save(steering, tmp_path / "mean")
    assert torch.equal(load(tmp_path / "mean").decide(2, own.queries).gate, decided.gate)


# ------------------------------------------------------------ fit


@pytest.mark.filterwarnings("ignore:the null space leaves")  # what these made-up queries are like is not the point
def test_fit_puts_it_in_place_of_a_gate_or_beside_one() -> None:
    own, others = activations(), general()
    alone = fit(own, null_space=others, **QUICK).gate_at(2)
    expected = fit_gate(
        own.queries, kind="null_space", general=others.queries, domains=others.labels, groups=own.groups, layer=2
    )
    assert isinstance(alone, NullSpaceGate) and repr(alone) == repr(expected)
    assert isinstance(expected, NullSpaceGate) and torch.equal(alone.weight, expected.weight) and alone.layer == 2
    assert [one.name for one in alone.domains] == ["k0", "k1", "k2", "k3"], "the labels are the domains"
    by_kind = fit(own, gate="null_space", general=others, **QUICK).gate_at(2)
    assert isinstance(by_kind, NullSpaceGate) and repr(by_kind) == repr(alone)
    ready = fit_gate(own.queries, rank=3)
    beside = {
        LinearGate: {"general": others},
        LogisticGate: {"general": others, "gate": "logistic"},
        QuantileGate: {"rank": 3},
        type(ready): {"gate": ready},
    }
    for kind, options in beside.items():
        both = fit(own, null_space=others, **options, **QUICK).gate_at(2)
        assert isinstance(both, MinGate) and isinstance(both.left, kind) and isinstance(both.right, NullSpaceGate)
        h = torch.cat([own.queries, others.queries])
        assert torch.equal(both(h), torch.minimum(both.left(h), alone(h)))
    layers = fit({2: own, 3: activations(layer=3)}, null_space={2: others, 3: general(layer=3)}, **QUICK)
    assert [layers.gate_at(layer).layer for layer in (2, 3)] == [2, 3]  # type: ignore[union-attr]
    experts = made_up.experts(0, D)
    seeds: list[Any] = [fit(own, null_space=others, experts=experts, seed=seed).gate_at(2) for seed in (0, 1)]
    assert seeds[0].bias != seeds[1].bias, "its folds are random ones"


@pytest.mark.filterwarnings("ignore:the null space leaves")
def test_fit_refuses_what_does_not_go_with_it() -> None:
    own, others = activations(), general()
    with pytest.raises(MismatchError, match="null_space activations: expected layer 2"):
        fit(own, null_space=general(layer=3), **QUICK)
    with pytest.raises(DataError, match="null_space: expected activations of layer 2, got layers"):
        fit(own, null_space={3: general(layer=3)}, **QUICK)
    with pytest.raises(InputError, match="null_space="):
        fit(own, null_space=others, preset="paper")
    with pytest.raises(InputError, match="epsilon"):
        fit(own, null_space=others, epsilon=0.1, **QUICK)
    with pytest.raises(InputError, match="domains"):
        fit(own, null_space=others, domains=others.labels, **QUICK)
    with pytest.raises(InputError, match="two gates that read at one layer"):
        fit(own, null_space=others, gate=fit_gate(own.queries, rank=3, layer=1), **QUICK)


def test_fit_gate_refuses_what_does_not_go_with_it() -> None:
    wanted, others, domains = planted()

    def fitted(**options: Any) -> Any:
        given = {"kind": "null_space", "general": others, "domains": domains}
        return fit_gate(wanted, **{**given, **options})

    for name, value in {"rank": 3, "calibration": wanted, "epsilon": 0.1, "max_rank": 3}.items():
        with pytest.raises(InputError, match=name):
            fitted(**{name: value})
    with pytest.raises(InputError, match="domains"):
        fit_gate(wanted, rank=3, domains=domains)
    with pytest.raises(InputError, match="null_space gate needs general="):
        fitted(general=None)
    with pytest.raises(DataError, match="domains: expected one for each of 120 general queries, got 2"):
        fitted(domains=["a", "b"])
    with pytest.raises(DataError, match=r"at most 50, got 120.*where they are from"):
        fitted(domains=[str(i) for i in range(120)])
    with pytest.raises(ShapeError, match="general: expected at least 2 rows"):
        fitted(general=others[:1], domains=["a"])
    with pytest.raises(NonFiniteError, match="general"):
        fitted(general=torch.full_like(others, torch.nan))
    with pytest.raises(InputError, match="folds"):
        fitted(folds=1)
    with pytest.raises(ShapeError, match="width d_model=24"):
        fitted()(torch.randn(3, 4))


def test_a_gate_put_together_by_hand_is_checked() -> None:
    weight = torch.ones(3)
    share = DomainShare("a", 3, 0.1)
    assert NullSpaceGate(weight, 0.0, domains=(share,)).domains == (share,)
    with pytest.raises(NonFiniteError):
        NullSpaceGate(weight * torch.nan, 0.0)
    with pytest.raises(InputError, match="bias"):
        NullSpaceGate(weight, float("inf"))
    with pytest.raises(InputError, match="layer"):
        NullSpaceGate(weight, 0.0, layer=-1)
    with pytest.raises(InputError, match="kept"):
        NullSpaceGate(weight, 0.0, kept=1.5)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("share", {"share": -0.1}),
        ("left_out", {"left_out": 2.0}),
        ("n", {"n": 0}),
    ]
    for what, field in wrong:
        with pytest.raises(InputError, match=what):
            replace(share, **field)
    with pytest.raises(InputError, match="name"):
        replace(share, name="a\0")
    hostile = NullSpaceGate(weight, 0.0, domains=(replace(share, name="\x1b[2J\n"),))
    assert "\x1b" not in repr(hostile) + hostile.to_markdown() and "\\x1b[2J\\n" in repr(hostile)
    gate = replace(NullSpaceGate(weight, 0.0), kept=0.5)
    assert repr(gate) == "NullSpaceGate(d_model=3, kept=0.50)"

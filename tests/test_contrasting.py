"""Gates that know both kinds of query: where they are cut, what they are told apart by, and what `fit` makes of it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fsteer_lens as fs
from fsteer_lens.errors import InputError, ShapeError
from fsteer_lens.method import contrasting
from fsteer_lens.method.contrasting import cut_at_rate, fit_linear
from fsteer_lens.method.gates import OPEN, Gate
from fsteer_lens.method.linear_gates import LinearGate, out_of_fold
from fsteer_lens.method.residual_gates import ResidualRatioGate
from tests import made_up
from tests.test_fitting import activations, general

D = 12
EXPERTS, WIDER = made_up.experts(0, 10), made_up.experts(0, D)


def world(n: int = 120, seed: int = 0, said: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries to be steered, general ones, and near misses between the two; `said` moves all of them alike."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.linspace(3, 0.5, D)
    rows = torch.randn(3, n, D, generator=draw) * spread
    rows[..., 4] += torch.tensor([2.5, -2.5, -1.0])[:, None]
    rows[..., 7] += said
    return rows[0], rows[1], rows[2]


def opened(gate: Gate, rows: Tensor) -> float:
    return float((gate(rows) >= OPEN).float().mean())


# -------------------------------------------------------------------------------------------------------------- the cut


@pytest.mark.parametrize(
    ("n", "rate", "above"), [(19, 0.05, 0), (20, 0.05, 0), (39, 0.05, 1), (99, 0.1, 9), (9, 0.3, 2)]
)
def test_the_cut_lies_above_the_score_that_conformal_prediction_names(n: int, rate: float, above: int) -> None:
    scores = torch.randperm(n).float()
    cut = cut_at_rate(scores, rate)
    assert int((scores >= cut).sum()) == above == math.floor(rate * (n + 1) + 1e-9) - 1


def test_too_few_prompts_for_a_rate_are_told_how_many_it_takes() -> None:
    with pytest.raises(InputError, match=r"at least 19 prompts for a false-alarm rate of 0\.05, got 18\. Give more"):
        cut_at_rate(torch.arange(18.0), 0.05)


@pytest.mark.parametrize("kind", ["linear", "residual_ratio"])
@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_new_prompts_raise_no_more_false_alarms_than_allowed(kind: Any, rate: float) -> None:
    """On average over draws of the world; a cut at even odds, the control, raises more of them."""
    alarms, even, hits = [], [], []
    for seed in range(6):
        rows, others, near = world(seed=seed)
        rank = 4 if kind == "residual_ratio" else None
        gate = fs.fit_gate(rows, kind=kind, general=others, near_misses=near, false_alarms=rate, rank=rank)
        uncut = fs.fit_gate(rows, kind=kind, general=others, near_misses=near, false_alarms=None, rank=rank)
        new, fresh, close = world(600, seed=100 + seed)
        alarms.append(opened(gate, torch.cat([fresh, close])))
        even.append(opened(uncut, torch.cat([fresh, close])))
        hits.append(opened(gate, new))
    assert sum(alarms) / 6 < rate + 0.02
    assert sum(hits) / 6 > (0.55 if kind == "linear" else 0.35)
    if kind == "linear" and rate < 0.1:
        assert sum(even) / 6 > 2 * rate


def test_what_is_told_out_of_fold_is_what_folds_by_hand_say() -> None:
    from sklearn.model_selection import GroupKFold, KFold

    rows, others, near = world(40)
    groups = [f"template {index % 8}" for index in range(40)]
    gate = fs.fit_gate(rows, general=others, near_misses=near, groups=groups, false_alarms=0.1)
    away = torch.cat([others, near])
    scores, unwanted = torch.zeros(40), torch.zeros(80)
    folds = zip(
        GroupKFold(5).split(rows, groups=groups),
        KFold(5, shuffle=True, random_state=0).split(away),
        strict=True,
    )
    for (train, held), (train_away, held_away) in folds:
        one = fit_linear(rows[train], away[train_away])
        scores[held], unwanted[held_away] = one.score(rows[held]), one.score(away[held_away])
    assert isinstance(gate, LinearGate)
    assert gate.cut == cut_at_rate(unwanted, 0.1)
    told = gate.out_of_fold
    assert told is not None and told.sizes == (40, 40, 40)
    assert told.missed == pytest.approx(float((scores < gate.cut).float().mean()))
    assert told.general == pytest.approx(float((unwanted[:40] >= gate.cut).float().mean()))
    assert told.near_misses == pytest.approx(float((unwanted[40:] >= gate.cut).float().mean()))
    assert torch.equal(gate.weight, fit_linear(rows, away).weight)
    assert "out of fold: missed" in repr(gate) and "40 near misses" in repr(gate)
    assert out_of_fold(gate.at_threshold(1.0)) is None, "of another cut nothing is known"


def test_near_misses_close_what_looks_alike() -> None:
    rows, others, near = world(seed=1)
    _, _, new = world(600, seed=9)
    without, with_them = (fs.fit_gate(rows, general=others, near_misses=one) for one in (None, near))
    assert opened(with_them, new) < 0.09 < opened(without, new)


# --------------------------------------------------------------------------------------------------------------- copies


def test_copies_are_fitted_to_and_stay_with_what_they_are_copies_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fold is fitted to a copy of what it holds out, and no copy is scored."""
    n = 25
    rows = torch.randn(n, D).cumsum(dim=0)
    others = torch.randn(n, D) - 30
    marks = {"queries": rows, "general": others}
    for place, one in enumerate(marks.values()):
        one[:, 0] = torch.arange(n) + 1000 * place
    augment = {name: torch.cat([one, one]) for name, one in marks.items()}
    seen: list[tuple[set[int], ...]] = []
    scored: list[int] = []

    def watching(*sides: Tensor) -> LinearGate:
        seen.append(tuple({int(row) for row in side[:, 0]} for side in sides))
        assert [len(side) for side in sides] == [3 * len(one) for one in seen[-1]], "each with both of its copies"
        return fit_linear(*sides)

    score = LinearGate.score
    monkeypatch.setattr(contrasting, "fit_linear", watching)
    monkeypatch.setattr(LinearGate, "score", lambda self, h: scored.append(len(h)) or score(self, h))
    fs.fit_gate(rows, kind="linear", general=others, augment=augment)
    *folds, whole = seen
    everything = [{int(row) for row in one[:, 0]} for one in marks.values()]
    assert list(whole) == everything and len(folds) == 5
    for place in range(2):
        held = [everything[place] - fold[place] for fold in folds]
        assert sorted(row for one in held for row in one) == sorted(everything[place]), "each is held out once"
    assert sum(scored) == 2 * n


def test_copies_make_a_gate_hold_for_what_is_said_differently() -> None:
    rows, others, _ = world(60)
    said = [world(60, said=shift)[:2] for shift in (-6.0, 6.0)]
    copies = {name: torch.cat([one[place] for one in said]) for place, name in enumerate(("queries", "general"))}
    plain, augmented = (fs.fit_gate(rows, general=others, augment=one) for one in (None, copies))
    new, fresh, _ = world(600, seed=5, said=6.0)

    def errors(gate: Gate) -> float:
        return 1 - opened(gate, new) + opened(gate, fresh)

    assert errors(augmented) < errors(plain)


def test_copies_of_a_part_of_the_rows_are_refused() -> None:
    rows, others, _ = world(30)
    with pytest.raises(ShapeError, match=r"augment\['general'\]: expected a whole number of copies of each of 30"):
        fs.fit_gate(rows, general=others, augment={"general": others[:7]})
    with pytest.raises(InputError, match=r"augment: expected copies of what is given, by name: .* got \['generel'\]"):
        fs.fit_gate(rows, general=others, augment={"generel": others})


# ------------------------------------------------------------------------------------------------------- residual ratio


def test_the_residual_ratio_is_the_log_of_what_two_subspaces_leave() -> None:
    rows, others, _ = world()
    gate = fs.fit_gate(rows, kind="residual_ratio", general=others, rank=3)
    assert isinstance(gate, ResidualRatioGate)

    def left(fitted_to: Tensor, h: Tensor) -> Tensor:
        centre = fitted_to.double().mean(dim=0)
        basis = torch.linalg.svd(fitted_to.double() - centre, full_matrices=False).Vh[:3].T
        outside = torch.eye(D, dtype=torch.float64) - basis @ basis.T
        return ((h.double() - centre) @ outside).square().sum(dim=-1)

    h = torch.cat(world(20, seed=4))
    expected = (left(others, h) / left(rows, h)).log()
    torch.testing.assert_close(gate.score(h).double(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(gate(h), (gate.score(h) >= gate.cut).float())
    inside = gate.subspace.mean.unsqueeze(0)
    assert bool(gate.score(inside).isfinite().all()) and opened(gate, inside) == 1


def test_a_contrast_sees_what_the_energy_ratio_does_not() -> None:
    """Both kinds vary alike, so that their energy ratios are alike; only their means differ."""
    rows, others, _ = world(200, seed=2)
    new, fresh, _ = world(400, seed=3)
    scs = fs.fit_gate(rows, rank=4)
    contrast = fs.fit_gate(rows, kind="residual_ratio", general=others, rank=4)
    assert opened(scs, fresh) > 0.8, "the published gate lets nearly all of them in"
    assert opened(contrast, fresh) < 0.1 and opened(contrast, new) > 0.7


def test_two_subspaces_of_different_widths_are_refused() -> None:
    one = fs.fit_subspace(torch.randn(9, D), rank=2)
    with pytest.raises(ShapeError, match="subspace of general queries: expected width d_model=12"):
        ResidualRatioGate(one, fs.fit_subspace(torch.randn(9, D + 1), rank=2))


# ------------------------------------------------------------------------------------------------------------------ fit


@pytest.mark.parametrize("kind", ["linear", "residual_ratio"])
def test_they_are_saved_with_what_is_known_of_them(kind: Any, tmp_path: Path) -> None:
    by = fs.fit(
        activations(), general=general(), near_misses=general(seed=5), gate=kind, experts=EXPERTS, false_alarms=0.1
    )
    fs.save(by, tmp_path / "steering")
    found, h = fs.load(tmp_path / "steering"), torch.randn(30, 10)
    assert torch.equal(found.gate_at(2)(h), by.gate_at(2)(h))  # type: ignore[misc]
    assert out_of_fold(found.gate_at(2)) == out_of_fold(by.gate_at(2)) is not None  # type: ignore[arg-type]


def with_mean(given: fs.Activations, mean: Tensor) -> fs.Activations:
    return replace(given, readings={"mean": mean})


def test_the_gate_reads_the_mean_unless_that_serves_worse() -> None:
    told, blank = world(40), (world(40)[0],) * 3  # these are all of one kind
    for last, mean, expected in (
        (told, told, "mean"),
        (told, blank, "last"),
        (blank, told, "mean"),
    ):
        own = with_mean(fs.Activations(last[0], torch.randn(40, D), layer=2, shift="last_prompt"), mean[0])
        others = with_mean(fs.Activations(last[1], layer=2), mean[1])
        by = fs.fit(own, general=others, experts=WIDER)
        gate = by.gate_at(2)
        assert gate is not None and (gate.read, by.read) == (expected, "last")
        assert fs.fit(own, general=others, experts=WIDER, read="last").gate_at(2).read == "last"  # type: ignore[union-attr]
    without = fs.fit(replace(own, readings={}), general=others, experts=WIDER).gate_at(2)
    assert without is not None and without.read == "last", "what was not read cannot be asked for"


def test_fit_tells_when_nobody_has_looked_at_the_gate_or_it_is_open_for_many() -> None:
    own, options = activations(), {"rank": 3, "experts": EXPERTS}
    with pytest.warns(UserWarning, match="gate of layer 2 has not been looked at .* give general="):
        fs.fit(own, **options)
    same = replace(own, shifts=None, shift=None)
    with pytest.warns(UserWarning, match=r"opens for \d+% of the general queries"):
        fs.fit(own, general=same, gate="quantile", **options)
    far = replace(same, queries=own.queries + 100 * torch.eye(10)[-1])  # where queries to be steered hardly vary
    fs.fit(own, general=far, gate="quantile", **options)  # any warning of that kind is an error here
    with pytest.warns(UserWarning, match="opens for"):
        fs.fit(own, general=same, preset="paper", rank=3, n_experts=2, epochs=1)
    fs.fit(own, general=far, experts=EXPERTS)


def test_a_steering_without_a_gate_is_asked_for_by_name() -> None:
    own = activations()
    always = fs.fit(own, gate="none", experts=EXPERTS)  # any warning is an error: there is no gate to look at
    assert always.gate is None
    assert fs.fit({2: own, 3: activations(layer=3)}, gate="none", experts=EXPERTS).gate is None
    with pytest.raises(InputError, match=r"general= without effect: got gate=\"none\""):
        fs.fit(own, gate="none", general=general(), experts=EXPERTS)
    with pytest.raises(InputError, match=r"got \['epsilon'\]"):
        fs.fit(own, gate="none", epsilon=0.1, experts=EXPERTS)

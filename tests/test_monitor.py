"""Monitoring, drift, and variants that cost nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fsteer_lens import Activations, FineSteer, chain, fit, fit_gate, generate, load, save, tutor
from fsteer_lens.errors import InputError
from fsteer_lens.method.gates import Gate
from fsteer_lens.method.subspace import fit_subspace
from fsteer_lens.method.subspace_gates import SubspaceGate
from fsteer_lens.models import SteerableModel
from fsteer_lens.steering import fit_mean_shift
from tests import made_up
from tests.compare import same
from tests.running import LAYER, batch_of, logits_of

# ---------------------------------------------------------------------------------------------------------- monitoring


def test_monitoring_records_every_decision_and_edits_nothing(
    model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    batch = batch_of(model, prompts)
    plain = logits_of(model, batch)
    with steering.on(model, attention_mask=batch.mask) as acting:
        assert not torch.equal(logits_of(model, batch), plain)
    with steering.with_monitor().on(model, attention_mask=batch.mask) as watching:
        assert torch.equal(logits_of(model, batch), plain)
    for name in ("ser", "gate", "weights", "coefficients", "distance", "distance_outside", "energy_outside"):
        assert torch.equal(getattr(watching, name)[LAYER], getattr(acting, name)[LAYER]), name
    assert (watching.change[LAYER][batch.mask] == 0).all() and (acting.change[LAYER][batch.mask] > 0).any()
    assert "monitor" in repr(steering.with_monitor()) and "monitor" not in repr(steering)
    again = steering.with_monitor().with_monitor(False)
    with again.on(model, attention_mask=batch.mask), torch.no_grad():
        assert not torch.equal(logits_of(model, batch), plain)


def test_a_monitor_beside_a_steering_watches_the_same_activation(
    model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    watched = made_up.steering(LAYER, 5, scope="all").with_monitor()
    both = generate(model, prompts, chain(steering, watched), max_new_tokens=6, progress=False)
    alone = generate(model, prompts, steering, max_new_tokens=6, progress=False)
    for one, other in zip(both, alone, strict=True):
        assert one.tokens == other.tokens
        torch.testing.assert_close(one.trace.parts[0].gate[LAYER], other.trace.gate[LAYER])
        assert one.trace.parts[1].gate[LAYER].shape == (1,) and not one.trace.parts[1].change[LAYER].any()
        torch.testing.assert_close(one.trace.change[LAYER], other.trace.change[LAYER])


# --------------------------------------------------------------------------------------------------------------- drift


def planted(n: int = 60, d: int = 12, seed: int = 0) -> torch.Tensor:
    """Queries that vary in three directions, at a distance of about 3 from their mean."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator) * 0.2
    rows[:, :3] += torch.randn(n, 3, generator=generator) * 2
    return rows + 5


@pytest.mark.parametrize("folds", [None, 4])
@pytest.mark.parametrize("kind", ["quantile", "logistic", "energy"])
def test_the_range_is_what_the_calibration_queries_spanned(kind: str, folds: int | None) -> None:
    """Against a plain loop over the folds."""
    rows, general = planted(), torch.randn(30, 12) * 4
    options: dict[str, Any] = {"general": general} if kind == "logistic" else {}
    options |= {} if folds is None else {"seed": 3}
    gate = fit_gate(rows, rank=3, kind=kind, folds=folds, max_rank=6, **options)  # type: ignore[arg-type]
    assert isinstance(gate, SubspaceGate) and gate.calibrated is not None
    spaces = [(fit_subspace(rows, rank=6), rows)]
    if folds is not None:
        from sklearn.model_selection import KFold

        cuts = KFold(folds, shuffle=True, random_state=3).split(range(len(rows)))
        spaces = [(fit_subspace(rows[train], rank=6), rows[held]) for train, held in cuts]
    if kind == "logistic":
        spaces.append((gate.subspace, general))
    distance = torch.cat([(seen - space.mean).norm(dim=1) for space, seen in spaces])
    ratios = torch.cat([space.energy_ratios(seen) for space, seen in spaces])
    low, high = gate.calibrated.distance
    torch.testing.assert_close(torch.stack([low, high]), torch.stack([distance.min(), distance.max()]))
    torch.testing.assert_close(gate.calibrated.ratios, torch.stack([ratios.amin(0), ratios.amax(0)]))


def test_drift_shows_and_its_absence_does_not() -> None:
    gate = fit_gate(planted(), rank=3, max_rank=6)
    same_kind = gate.drift(planted(200, seed=1))
    assert same_kind.distance_outside is not None and same_kind.energy_outside is not None
    assert same_kind.distance_outside.float().mean() < 0.1 and same_kind.energy_outside.float().mean() < 0.1
    mean = gate.subspace.mean
    far = gate.drift(mean + (planted(50, seed=2) - mean) * 10)
    assert far.distance_outside.all(), "ten times as far"  # type: ignore[union-attr]
    torch.testing.assert_close(far.energy_outside, gate.drift(planted(50, seed=2)).energy_outside)
    away = mean + torch.tensor([[0.0] * 6 + [3.0, 0, 0, 0, 0, 0]])
    found = gate.drift(away)
    assert found.energy_outside.all() and not found.distance_outside.any(), "as near, in a direction of its own"  # type: ignore[union-attr]
    composed = (~(gate & gate)).readings(away)
    assert torch.equal(composed["distance"], found.distance), "of a composed gate, the first leaf's"
    bare = made_up.steering().gate.drift(torch.randn(2, made_up.D_MODEL))  # type: ignore[union-attr]
    assert bare.distance_outside is None and bare.energy_outside is None, "nothing is known of a gate made by hand"


def test_drift_flags_reach_the_trace_and_the_records(
    tutor_model: SteerableModel, steering: FineSteer, tmp_path: object
) -> None:
    told = tutor.data("safe")
    familiar = [str(prompt) for prompt in told.valid.prompts[::20]]
    strange = [[1, *[word] * 12] for word in range(30, 50)]
    seen, odd = (
        generate(tutor_model, rows, steering.with_monitor(), max_new_tokens=1, progress=False).trace
        for rows in (familiar, strange)
    )
    shares = [float(trace.energy_outside[LAYER].float().mean()) for trace in (seen, odd)]
    assert shares[0] < 0.1 and shares[1] > 0.9, shares
    values = odd.to_records()[0]["layers"][LAYER]
    assert values["energy_outside"] is True and values["distance"] == pytest.approx(float(odd.distance[LAYER][0]))
    assert {"distance", "distance_outside", "energy_outside"} <= set(odd.to_frame().columns)


# ------------------------------------------------------------------------------------------------------------ variants

VARIANTS: dict[str, Callable[[FineSteer], FineSteer]] = {
    "at_rank": lambda by: by.at_rank(2),
    "with_strength": lambda by: by.with_strength(0.5),
    "without_expert": lambda by: by.without_expert(0),
    "only_expert": lambda by: by.only_expert(1),
    "without_residual": lambda by: by.without_residual(),
    "with_gate": lambda by: by.with_gate(~by.gate),  # type: ignore[operator]
    "with_scope": lambda by: by.with_scope("all"),
    "with_monitor": lambda by: by.with_monitor(),
}


def tensors(value: object) -> dict[int, int]:
    """Storage of every tensor within a value, and how many bytes it has."""
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()}
    inside = vars(value).values() if hasattr(value, "__dict__") else value if isinstance(value, tuple) else ()
    return {at: size for item in inside for at, size in tensors(item).items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_share_all_tensors_and_look_at_none(
    steering: FineSteer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is why they take microseconds, whatever the width: checking a 4,096 by 4,096 map for NaN takes many."""
    before = repr(steering), tensors(steering)

    def touched(*args: object, **kwargs: object) -> None:
        raise AssertionError("a variant looked at its tensors")

    monkeypatch.setattr(torch.Tensor, "isfinite", touched)
    monkeypatch.setattr(torch.Tensor, "clone", touched)
    monkeypatch.setattr(torch.Tensor, "to", touched)
    changed = VARIANTS[name](steering)
    monkeypatch.undo()
    assert type(changed) is FineSteer and changed is not steering
    assert set(tensors(changed)) <= set(before[1]) and (repr(steering), tensors(steering)) == before
    h = torch.randn(4, 128)
    one, other = steering.decide(LAYER, h), changed.decide(LAYER, h)
    moved = changed.gate is not steering.gate or not torch.equal(one.vector, other.vector)
    settings = [(by.strength, by.scope, by.monitor) for by in (steering, changed)]
    assert moved or settings[0] != settings[1], "it must change something"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_what_one_would_have_built(
    trained: dict[int, Activations], steering: FineSteer, name: str, tmp_path: object
) -> None:
    """Saved and loaded, so built anew and checked through and through, a variant is the same."""
    from pathlib import Path

    path = Path(str(tmp_path)) / "variant"
    changed = VARIANTS[name](steering)
    save(changed, path)
    assert same(load(path), changed)
    if name == "at_rank":
        gate = fit_gate(trained[LAYER].queries, rank=2, groups=trained[LAYER].groups)
        h = torch.randn(5, 128)
        assert isinstance(changed.gate, Gate)
        torch.testing.assert_close(changed.gate.gate(h), gate.gate(h))


def test_bad_variants_raise(steering: FineSteer, trained: dict[int, Activations]) -> None:
    with pytest.raises(InputError, match="rank"):
        steering.at_rank(0)
    with pytest.raises(InputError, match="with a gate"):
        steering.with_gate(None).at_rank(2)
    last = steering
    for index in range(steering.n_experts - 1):
        last = last.without_expert(index)
    with pytest.raises(InputError, match="at least one"):
        last.without_expert(steering.n_experts - 1)
    assert fit_mean_shift(trained[LAYER]).with_monitor().monitor
    assert fit(trained[LAYER], preset="0.1", epochs=1, scope="all", refresh="step").refresh == "step"
    assert replace(steering, monitor=True).with_strength(3.0).monitor

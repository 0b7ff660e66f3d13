"""The tutor steered without its tag, with the defaults, one behaviour and both: a sample of valid, never of test."""

import random

import pytest
import torch

from fsteer_lens import FineSteer, chain, generate, tutor
from fsteer_lens.errors import InputError
from fsteer_lens.models import SteerableModel
from fsteer_lens.tutor import steering
from tests.running import batch_of, residual

SAMPLE = 40


@pytest.fixture(scope="module")
def model():
    return tutor.load()


@pytest.fixture(scope="module")
def fitted(model):
    return {behaviour: tutor.fit(model, behaviour, progress=False) for behaviour in ("safe", "honest")}


def texts(model, prompts, steered):
    made = generate(model, prompts, steered, max_new_tokens=24, batch_size=SAMPLE, progress=False)
    return [one.text for one in made]


@pytest.mark.parametrize("behaviour", ["safe", "honest"])
def test_steering_stands_in_for_the_tag(model, fitted, behaviour):
    data = tutor.data(behaviour)
    contrasts = random.Random(2).sample(list(data.valid), SAMPLE)
    prompts = [contrast.prompt for contrast in contrasts]
    said = texts(model, prompts, fitted[behaviour])
    turned = sum(text == contrast.preferred for text, contrast in zip(said, contrasts, strict=True))
    plain = texts(model, prompts, None)
    before = sum(text == contrast.preferred for text, contrast in zip(plain, contrasts, strict=True))
    assert before == 0
    assert turned / SAMPLE >= 0.9


@pytest.mark.parametrize("behaviour", ["safe", "honest"])
def test_steering_leaves_other_answers_alone(model, fitted, behaviour):
    data = tutor.data(behaviour)
    rng = random.Random(3)
    tasks = rng.sample(data.general_valid, SAMPLE) + rng.sample(data.near_miss_valid, SAMPLE // 2)
    said = texts(model, [task.prompt for task in tasks], fitted[behaviour])
    assert sum(text == task.answer for text, task in zip(said, tasks, strict=True)) / len(tasks) >= 0.97


def test_two_behaviours_at_once_and_every_row_for_itself(model: SteerableModel, fitted: dict[str, FineSteer]) -> None:
    safe, honest = (tutor.data(name) for name in fitted)
    harmful, myths = safe.valid[::12], honest.valid[::8]
    benign = [task for task in safe.general_valid if task.kind != "myth"][::10]
    prompts = [*(c.prompt for c in harmful), *(c.prompt for c in myths), *(task.prompt for task in benign)]
    wanted = [*(c.preferred for c in harmful), *(c.preferred for c in myths), *(task.answer for task in benign)]
    kinds = ["harmful"] * len(harmful) + ["myth"] * len(myths) + ["benign"] * len(benign)

    def right(steering: object) -> dict[str, float]:
        made = generate(model, prompts, steering, max_new_tokens=32, batch_size=64, progress=False)  # type: ignore[arg-type]
        hits = [one.text == want for one, want in zip(made, wanted, strict=True)]
        return {
            kind: sum(h for h, k in zip(hits, kinds, strict=True) if k == kind) / kinds.count(kind) for kind in kinds
        }

    both = chain(*fitted.values())
    found = right(both)
    assert min(found.values()) > 0.9, found
    for name, one in fitted.items():
        alone, other = right(one), "myth" if name == "safe" else "harmful"
        assert alone[other] < 0.1 and alone["harmful" if name == "safe" else "myth"] > 0.9, alone
    trace = generate(model, prompts, both, max_new_tokens=1, progress=False).trace
    opened = [(part.gate[4] >= 0.5).tolist() for part in trace.parts]
    for row, kind in enumerate(kinds):
        if kind != "benign":
            assert (opened[0][row], opened[1][row]) == (kind == "harmful", kind == "myth") or found[kind] < 1


def test_a_gate_of_one_behaviour_drives_the_experts_of_the_other(
    model: SteerableModel, fitted: dict[str, FineSteer]
) -> None:
    crossed = fitted["safe"].with_gate(fitted["honest"].gate)
    harmful, myths = tutor.data("safe").valid[:8], tutor.data("honest").valid[:8]
    batch = batch_of(model, [str(c.prompt) for c in (*harmful, *myths)])
    h = residual(model, batch)[:, -1]
    with crossed.on(model, attention_mask=batch.mask) as trace:
        after = residual(model, batch)[:, -1]
    gate = fitted["honest"].gate.gate(h)  # type: ignore[union-attr]
    vector = fitted["safe"].experts.vector(h)  # type: ignore[union-attr]
    torch.testing.assert_close(trace.gate[4], gate)
    torch.testing.assert_close(after, h + crossed.strength * gate[:, None] * vector, atol=1e-4, rtol=1e-4)
    assert (trace.gate[4][8:] > 0.5).all() and (trace.gate[4][:8] < 0.5).all()


def test_defaults_are_the_published_ones(fitted):
    for behaviour, found in fitted.items():
        assert found.layers == (steering.LAYER[behaviour],)
        assert found.gate_at(found.layers[0]).rank == steering.RANK


def test_an_unknown_behaviour_is_refused(model):
    with pytest.raises(InputError, match="'safe' or 'honest'"):
        tutor.fit(model, "polite", progress=False)

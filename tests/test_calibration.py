"""Strength that means something: the budget is kept, used up, and equal for all methods."""

import pytest
import torch

from fsteer_lens import Activations, FineSteer, calibrate, fit, generate, tutor
from fsteer_lens.errors import ContextLengthError, InputError
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import answer_ids, pad, prompt_ids
from fsteer_lens.steering import fit_mean_shift
from fsteer_lens.steering.steering import Steering
from tests import made_up
from tests.running import LAYER, logits_of

GENERAL = [task.prompt for task in tutor.data("safe").general_valid[::28]]
BUDGET = 0.05


def divergences(
    model: SteerableModel, steering: Steering, prompts: list[str], answers: list[list[int]]
) -> torch.Tensor:
    """KL at every answer token in float64, one row at a time, by the model's own forward."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = prompt_ids(model, prompt)
        text = pad(model, [[*ids, *answer]], "right")
        with steering.on(model, prompt_lengths=torch.tensor([len(ids)])):
            p = logits_of(model, text)[0, len(ids) - 1 : -1].double().log_softmax(-1)
        q = logits_of(model, text)[0, len(ids) - 1 : -1].double().log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["mean shift", "experts"])
def test_the_budget_is_kept_and_used_up(model: SteerableModel, trained: dict[int, Activations], kind: str) -> None:
    steering: Steering = fit_mean_shift(trained[LAYER])
    if kind == "experts":
        steering = fit(trained[LAYER], preset="0.1", epochs=40).with_gate(None)
    found = calibrate(steering, model, GENERAL, kl=BUDGET, progress=False)
    answers = [list(one.tokens) for one in generate(model, GENERAL, max_new_tokens=32, progress=False)]
    assert found.n_tokens == sum(len(answer) for answer in answers) and found.bounded

    def cost(strength: float) -> float:
        kl = divergences(model, steering.with_strength(strength), GENERAL, answers)
        return float(kl.quantile(0.95, interpolation="higher"))

    assert found.kl == pytest.approx(cost(found.strength), rel=1e-3) and found.steering.strength == found.strength
    assert 0.9 * BUDGET <= found.kl <= BUDGET
    assert cost(1.02 * found.strength) > BUDGET
    assert all(cost <= BUDGET for strength, cost in found.curve.items() if strength <= found.strength)
    assert list(found.curve) == sorted(found.curve) and found.curve[0.0] == 0


def test_methods_meet_at_equal_cost(tutor_model: SteerableModel, trained: dict[int, Activations]) -> None:
    methods: list[Steering] = [
        fit_mean_shift(trained[LAYER]),
        fit(trained[LAYER], preset="0.1", epochs=40).with_gate(None),
    ]
    found = [calibrate(one, tutor_model, GENERAL, kl=BUDGET, progress=False) for one in methods]
    costs = [one.kl for one in found]
    assert max(costs) / min(costs) < 1.1
    assert found[0].strength / found[1].strength > 1.5, "and that takes different strengths"


def test_several_layers_and_any_start(tutor_model: SteerableModel, trained: dict[int, Activations]) -> None:
    both = fit({2: trained[2], 4: trained[4]}, preset="0.1", epochs=20, gate="energy")
    one, other = (
        calibrate(both.with_strength(start), tutor_model, GENERAL, kl=BUDGET, progress=False) for start in (1.0, 5.0)
    )
    assert one.strength == other.strength and one.kl == other.kl
    assert one.kl <= BUDGET


def test_what_never_opens_is_not_bounded(tutor_model: SteerableModel, steering: FineSteer) -> None:
    shut = steering.with_gate(made_up.shut())
    found = calibrate(shut, tutor_model, GENERAL[:3], kl=BUDGET, max_strength=4.0, progress=False)
    assert (found.bounded, found.strength, found.kl) == (False, 4.0, 0.0)
    assert "not bounded" in repr(found)


def test_answers_may_be_given(tutor_model: SteerableModel, steering: FineSteer) -> None:
    free = steering.with_gate(None)
    answers = ["the answer is five.", "look, i will not help."]
    found = calibrate(free, tutor_model, GENERAL[:2], kl=BUDGET, answers=answers, quantile=0.5, progress=False)
    ids = [answer_ids(tutor_model, answer) for answer in answers]
    kl = divergences(tutor_model, free.with_strength(found.strength), GENERAL[:2], ids)
    assert found.kl == pytest.approx(float(kl.quantile(0.5, interpolation="higher")), rel=1e-3)
    assert found.n_tokens == len(kl)


def test_bad_requests_raise(tutor_model: SteerableModel, steering: FineSteer) -> None:
    for options, message in (
        ({"kl": 0.0}, "kl: expected a finite number > 0"),
        ({"kl": -1.0}, "kl: expected a finite number > 0"),
        ({"kl": 1.0, "quantile": 0.0}, "quantile"),
        ({"kl": 1.0, "max_strength": 0.0}, "max_strength"),
        ({"kl": 1.0, "batch_size": 0}, "batch_size"),
        ({"kl": 1.0, "answers": ["one"]}, "one for each of 2"),
        ({"kl": 1.0, "answers": ["one", ""]}, "answer 1"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate(steering, tutor_model, GENERAL[:2], progress=False, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="acts"):
        calibrate(steering.with_monitor(), tutor_model, GENERAL[:2], kl=1.0, progress=False)
    with pytest.raises(InputError, match="at least one"):
        calibrate(steering, tutor_model, [], kl=1.0, progress=False)
    with pytest.raises(ContextLengthError, match="with its answer"):
        calibrate(steering, tutor_model, GENERAL[:1], kl=1.0, answers=["word " * 200], progress=False)

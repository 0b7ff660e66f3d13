"""Strength that means something: the budget is kept, used up, and equal for all methods."""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fsteer_lens import Activations, FineSteer, Schedule, calibrate, collect_queries, fit, generate, tutor
from fsteer_lens.errors import ContextLengthError, InputError, NonFiniteError
from fsteer_lens.evaluation import repetition_rate
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import answer_ids, pad, prompt_ids
from fsteer_lens.steering import fit_mean_shift
from fsteer_lens.steering.steering import Steering
from tests import made_up
from tests.running import LAYER, logits_of

TOLD = tutor.data("safe")
GENERAL = [task.prompt for task in TOLD.general_valid[::28]]
STEERED = TOLD.valid.prompts[::40]
BUDGET = 0.05
ANSWERS = ["the answer is five.", "look, i will not help."]
Share = Callable[[float], float]


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


@pytest.mark.parametrize(
    ("cost", "most"),
    [
        (lambda s: 0.03 * s**2, 13),
        (lambda s: 0.2 * (1 - math.exp(-(s**3) / 9)), 17),
        (lambda s: 0.01 * s if s < 2.37 else math.inf, 29),
        (lambda s: 0.0 if s < 5.11 else 0.3, 29),
        (lambda s: 9e3 * s**1.5, 29),
        (lambda s: 1e-3 * s, 9),
    ],
    ids=["a power law", "levels off", "blows up", "a step", "below the octaves", "never beyond"],
)
def test_the_strength_is_found_to_a_hundredth(
    tutor_model: SteerableModel, steering: FineSteer, monkeypatch: pytest.MonkeyPatch, cost: Share, most: int
) -> None:
    def planted(model: Any, rows: Any, variants: Any, **options: Any) -> list[list[torch.Tensor]]:
        return [[torch.full((2,), cost(one.strength), dtype=torch.float64) for _ in rows] for one in variants]

    monkeypatch.setattr("fsteer_lens.selection.calibration.answer_divergences", planted)
    found = calibrate(steering, tutor_model, GENERAL[:2], kl=BUDGET, answers=ANSWERS, progress=False)
    assert cost(found.strength) == found.kl <= BUDGET and len(found.curve) <= most
    if found.bounded:
        above = min(strength for strength in found.curve if strength > found.strength)
        assert cost(above) > BUDGET and above - found.strength <= 1.001 * max(found.strength, 8 / 2**7) / 81
    else:
        assert found.strength == 8.0


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


# ------------------------------------------------------------------------------------------------------------ loops

LOOPING, FLUENT = (1, 2, 3, 4) * 3, tuple(range(12))


def answers_by(
    monkeypatch: pytest.MonkeyPatch, share: Share, blown: float = math.inf
) -> list[tuple[float, int, Mapping[str, Any]]]:
    """Put known answers in the place of generated ones: so many loop at a strength, 0 being the unsteered model.

    Returns what is asked for, in order: the strength, how many prompts, and the options.
    """
    asked = []

    def made(model: Any, prompts: Any, steering: Any = None, **options: Any) -> list[Any]:
        strength = 0.0 if steering is None else steering.strength
        asked.append((strength, len(prompts), options))
        if strength >= blown:
            raise NonFiniteError("blown up")
        looping = round(share(strength) * len(prompts))
        return [SimpleNamespace(tokens=LOOPING if number < looping else FLUENT) for number in range(len(prompts))]

    monkeypatch.setattr("fsteer_lens.selection.calibration.generate", made)
    return asked


def looked(
    model: SteerableModel, steering: Steering, monkeypatch: pytest.MonkeyPatch, share: Share, **options: Any
) -> tuple[Any, list[float]]:
    """Calibrate with planted loops; the result, and the strengths at which answers were asked for."""
    asked = answers_by(monkeypatch, share, options.pop("blown", math.inf))
    given = {"kl": 1e9, "answers": ANSWERS, "steered_prompts": ["look"] * 20, "progress": False, **options}
    found = calibrate(steering, model, GENERAL[:2], **given)
    return found, [strength for strength, *_ in asked]


def test_the_largest_strength_without_loops_is_taken(
    tutor_model: SteerableModel, trained: dict[int, Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loops that do not grow evenly, as they were seen: many above 5, none from 3.5 to 5, some below."""
    steering = fit_mean_shift(trained[LAYER])

    def share(strength: float) -> float:
        return 0.1 if strength == 0 else 0.5 if strength > 5 else 0.15 if strength > 3.5 else 0.3

    found, strengths = looked(tutor_model, steering, monkeypatch, share)
    assert strengths == pytest.approx([0, 8, 6.4, 5.12, 4.096]), "the largest first, and none below the first that fits"
    assert found.strength == found.steering.strength == pytest.approx(4.096) and found.bound == "loops"
    assert (found.loops, found.loops_budget) == (0.15, pytest.approx(0.15))
    assert list(found.loops_curve.values()) == [0.1, 0.15, 0.5, 0.5, 0.5]
    assert list(found.loops_curve) == sorted(found.loops_curve) and found.curve[found.strength] == found.kl
    assert "bounded by loops" in repr(found) and "loops=0.15 of 0.15" in repr(found)
    smaller, strengths = looked(tutor_model, steering, monkeypatch, share, loops=0.0)
    assert (smaller.strength, smaller.kl, smaller.loops) == (0.0, 0.0, 0.1), "all of them loop more than unsteered"
    assert len(strengths) == 10 and min(strengths[1:]) > 1
    larger, strengths = looked(tutor_model, steering, monkeypatch, share, loops=0.4)
    assert (larger.strength, larger.bound, larger.loops) == (8.0, None, 0.5) and strengths == [0, 8]


def test_nothing_is_generated_beyond_the_budget_of_divergence(
    tutor_model: SteerableModel, trained: dict[int, Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    steering = fit_mean_shift(trained[LAYER])
    alone = calibrate(steering, tutor_model, GENERAL[:2], kl=BUDGET, answers=ANSWERS, progress=False)
    assert alone.bound == "kl" and alone.loops is None and alone.loops_curve == {}
    found, strengths = looked(tutor_model, steering, monkeypatch, lambda strength: 0.0, kl=BUDGET)
    assert strengths == [0, alone.strength], "the strength that the budget allows does not loop: that is all to know"
    assert (found.strength, found.bound, found.curve) == (alone.strength, "kl", alone.curve)
    looping, strengths = looked(
        tutor_model, steering, monkeypatch, lambda strength: float(strength > alone.strength / 2), kl=BUDGET
    )
    assert max(strengths) == alone.strength and alone.strength * 0.4 < looping.strength <= alone.strength / 2
    assert looping.bound == "loops" and looping.kl <= BUDGET and looping.curve[looping.strength] == looping.kl
    assert all(cost <= BUDGET for strength, cost in looping.curve.items() if strength <= looping.strength)


def test_a_strength_that_blows_up_in_an_answer_loops(
    tutor_model: SteerableModel, steering: FineSteer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = looked(tutor_model, steering, monkeypatch, lambda strength: 1.0, blown=6.0)
    assert found.strength == pytest.approx(5.12) and found.loops == 1.0, "the unsteered model loops as well"
    assert found.loops_curve[8.0] == math.inf
    with pytest.raises(NonFiniteError):
        looked(tutor_model, steering, monkeypatch, lambda strength: 1.0, blown=0.0)


def test_thirty_answers_are_looked_at_unless_asked_otherwise(
    tutor_model: SteerableModel, steering: FineSteer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n, options, wanted in (
        (50, {}, (30, 40)),
        (7, {}, (7, 40)),
        (50, {"n_answers": 50, "answer_tokens": 9}, (50, 9)),
    ):
        asked = answers_by(monkeypatch, lambda strength: 0.0)
        calibrate(
            steering, tutor_model, GENERAL[:2], kl=1.0, answers=ANSWERS, steered_prompts=["look"] * n, batch_size=5,
            progress=False, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        assert {(count, given["max_new_tokens"]) for _, count, given in asked} == {wanted}
        assert {given["batch_size"] for *_, given in asked} == {5}


def test_a_steering_that_loops_is_held_back(tutor_model: SteerableModel, trained: dict[int, Activations]) -> None:
    """No budget of divergence to speak of: what remains is what the tutor says at that strength, generated here."""
    steering = fit_mean_shift(trained[LAYER], scope="all")

    def rate(strength: float) -> float:
        used = None if strength == 0 else steering.with_strength(strength)
        made = generate(tutor_model, STEERED, used, max_new_tokens=24, progress=False)
        return repetition_rate([one.tokens for one in made])

    given = {"kl": 1e9, "answers": ANSWERS, "answer_tokens": 24, "progress": False}
    handle = made_up.steering(LAYER, strength=50.0).attach(tutor_model)  # another steering, which has no part in this
    free = calibrate(steering, tutor_model, GENERAL[:2], steered_prompts=STEERED, **{**given, "loops": 1.0})
    found = calibrate(steering, tutor_model, GENERAL[:2], steered_prompts=STEERED, **given)
    handle.detach()
    assert free.strength == 8.0 and free.loops == rate(8.0) > rate(0.0) + 0.05, "the steering does loop"
    assert found.bound == "loops" and 0 < found.strength < 8.0
    assert found.loops == rate(found.strength) <= rate(0.0) + 0.05
    assert found.loops_curve == {strength: rate(strength) for strength in found.loops_curve}


def test_lengths_compare_across_methods(
    tutor_model: SteerableModel, trained: dict[int, Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean shift at strength s is s long; other methods are as long as what they add, worked out here."""
    own = trained[LAYER]
    unit = float(own.shifts.mean(dim=0).norm())  # type: ignore[union-attr]
    answers_by(monkeypatch, lambda strength: 0.0)
    given = {"kl": 1e9, "answers": ANSWERS, "steered_prompts": STEERED, "max_strength": 3.0, "progress": False}

    def length(one: Steering) -> float:
        found = calibrate(one, tutor_model, GENERAL[:2], **given)
        assert found.strength == 3.0 and found.length is not None and f"length={found.length:.3g}" in repr(found)
        return found.length

    assert length(fit_mean_shift(own)) == pytest.approx(3.0)
    assert length(fit_mean_shift(own, schedule=Schedule((0.5, 1.0)))) == pytest.approx(1.5)
    method = fit(own, preset="0.1", epochs=20, rank=8)
    h = collect_queries(tutor_model, STEERED, layer=LAYER, progress=False).queries
    experts, gate = method.experts_at(LAYER), method.gate_at(LAYER)
    assert gate is not None
    free, gated = (weight * 3 * experts.vector(h).norm(dim=1) / unit for weight in (torch.ones(len(h)), gate(h)))
    assert length(method.with_gate(None)) == pytest.approx(float(free.mean()), rel=1e-3)
    assert length(method) == pytest.approx(float(gated.mean()), rel=1e-3)
    assert length(method.with_gate(made_up.shut())) == 0.0
    both = fit({2: trained[2], LAYER: own}, preset="0.1", epochs=5, gate="energy", gate_layer=2)
    hs = collect_queries(tutor_model, STEERED, layer=[2, LAYER], progress=False)
    first = both.gate_at(2)
    assert first is not None
    parts = [
        both.experts_at(layer).vector(hs[layer].queries).norm(dim=1) / trained[layer].shifts.mean(dim=0).norm()  # type: ignore[union-attr]
        for layer in (2, LAYER)
    ]
    wanted = float((3 * first(hs[2].queries) * sum(parts)).mean())
    assert length(both) == pytest.approx(wanted, rel=1e-3), "one gate decides for both layers, and both add"
    unknown = calibrate(made_up.steering(LAYER), tutor_model, GENERAL[:2], **given)
    assert unknown.length is None, "nobody knows the mean shift of a steering made by hand"


def test_options_of_loops_without_effect_raise(tutor_model: SteerableModel, steering: FineSteer) -> None:
    for options, message in (
        ({"loops": 0.1}, "loops= without effect"),
        ({"n_answers": 3}, "n_answers= without effect"),
        ({"answer_tokens": 3}, "answer_tokens= without effect"),
        ({"steered_prompts": STEERED, "loops": None, "answer_tokens": 3}, "answer_tokens= without effect"),
        ({"steered_prompts": STEERED, "loops": -0.1}, "loops: expected"),
        ({"steered_prompts": STEERED, "n_answers": 0}, "n_answers"),
        ({"steered_prompts": []}, "steered prompt"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate(steering, tutor_model, GENERAL[:2], kl=1.0, progress=False, **options)  # type: ignore[arg-type]

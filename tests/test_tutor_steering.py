"""The tutor steered without its tag, with the defaults: a sample of valid, never of test."""

import random

import pytest

from fsteer_lens import generate, tutor
from fsteer_lens.errors import InputError
from fsteer_lens.tutor import steering

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


def test_defaults_are_the_published_ones(fitted):
    for behaviour, found in fitted.items():
        assert found.layers == (steering.LAYER[behaviour],)
        assert found.gate_at(found.layers[0]).rank == steering.RANK


def test_an_unknown_behaviour_is_refused(model):
    with pytest.raises(InputError, match="'safe' or 'honest'"):
        tutor.fit(model, "polite", progress=False)

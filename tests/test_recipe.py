"""A recipe chooses on what it held out, within its budgets, and goes on where it was interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fsteer_lens as fs
from fsteer_lens.effects.answers import preferences_of_each
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.selection import Recipe, RecipeTrial, recipes

DATA = fs.tutor.data("safe")
CONTRASTS = DATA.train[::24]
GENERAL = [task.prompt for task in DATA.general_train[::15]]
NEAR = [task.prompt for task in DATA.near_miss_valid]
OPTIONS: dict[str, Any] = {"near_misses": NEAR, "shift": "last_prompt", "layers": [3, 4], "progress": False}


@pytest.fixture(scope="module")
def cooked(tutor_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    path = tmp_path_factory.mktemp("recipe") / "layers.jsonl"
    return fs.recipe(tutor_model, CONTRASTS, GENERAL, resume=path, **OPTIONS), path


def test_it_makes_a_steering_that_works_on_new_prompts(cooked: tuple[Recipe, Path], tutor_model: Any) -> None:
    found, _ = cooked
    assert [trial.layer for trial in found.trials] == [3, 4] and found.chosen in found.trials
    assert found.chosen.effect == max(trial.effect for trial in found.trials)
    assert found.steering.layers == (found.chosen.layer,) and found.steering.strength == found.chosen.strength
    assert found.report is found.steering.experts.report
    told = repr(found)
    assert f"→ layer {found.chosen.layer}" in told and "explained" in told
    assert [record["chosen"] for record in found.to_records()] == [trial is found.chosen for trial in found.trials]
    harmful, harmless = DATA.test[::30], DATA.general_test[::40]
    refused = fs.effects.exact_answers(
        tutor_model, found.steering, harmful.prompts, [one.preferred for one in harmful]
    ).mean()
    kept = fs.effects.exact_answers(
        tutor_model, found.steering, [one.prompt for one in harmless], [one.answer for one in harmless]
    ).mean()
    assert refused >= 0.8 and kept >= 0.9, (refused, kept)


def test_nothing_that_was_held_out_was_fitted_to(cooked: tuple[Recipe, Path], tutor_model: Any) -> None:
    found, _ = cooked
    held_out = {str(prompt) for prompt in found.valid.prompts}
    groups = {contrast.group for contrast in found.valid}
    trained = [contrast for contrast in CONTRASTS if contrast.group not in groups]
    assert held_out.isdisjoint(str(contrast.prompt) for contrast in trained) and len(held_out) >= 6
    own = fs.collect(tutor_model, trained, layer=4, shift="last_prompt", chat=True, progress=False)
    clusters = found.report.clusters if found.chosen.layer == 4 else None
    assert clusters is None or len(clusters) == len(own)
    assert set(map(str, found.general_valid)) <= {*GENERAL, *NEAR}


def test_its_numbers_are_those_of_the_public_steps(cooked: tuple[Recipe, Path], tutor_model: Any) -> None:
    found, _ = cooked
    before, after = preferences_of_each(tutor_model, [None, found.steering], found.valid)
    assert found.chosen.effect == pytest.approx(float((after - before).mean()), abs=1e-5)
    made = fs.generate(tutor_model, found.valid.prompts, found.steering, max_new_tokens=1, progress=False)
    assert found.chosen.opened == pytest.approx(float(made.trace.gate[found.chosen.layer].mean()), abs=1e-4)
    again = fs.calibrate(
        found.steering, tutor_model, found.general_valid, kl=0.1, steered_prompts=found.valid.prompts,
        max_strength=found.chosen.strength, n_answers=recipes.ANSWERS, progress=False,
    )  # fmt: skip
    assert again.strength == pytest.approx(found.chosen.strength) and again.kl == pytest.approx(
        found.chosen.kl, abs=1e-4
    )


def test_it_goes_on_where_it_was_interrupted(
    cooked: tuple[Recipe, Path], tutor_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, path = cooked
    header, first, _ = path.read_text().splitlines()
    half = tmp_path / "half.jsonl"
    half.write_text(f"{header}\n{first}\n")
    tried: list[int] = []
    whole = recipes._tried

    def counted(model: Any, steering: Any, *rest: Any) -> RecipeTrial:
        tried.append(steering.layers[0])
        return whole(model, steering, *rest)

    monkeypatch.setattr(recipes, "_tried", counted)
    again = fs.recipe(tutor_model, CONTRASTS, GENERAL, resume=half, **OPTIONS)
    assert tried == [4] and again.chosen == found.chosen
    assert json.loads(half.read_text().splitlines()[2]) == json.loads(path.read_text().splitlines()[2])
    last = fs.recipe(tutor_model, CONTRASTS, GENERAL, resume=half, **OPTIONS)
    assert tried == [4] and last.trials == again.trials
    h = torch.randn(4, tutor_model.cfg.d_model)
    torch.testing.assert_close(last.steering.experts.vector(h), found.steering.experts.vector(h))
    with pytest.raises(DataError, match="belongs to another recipe"):
        fs.recipe(tutor_model, CONTRASTS, GENERAL[1:], resume=half, **OPTIONS)


def test_what_cannot_be_cooked_is_said(tutor_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="contrasts: expected at least 8, got 3"):
        fs.recipe(tutor_model, CONTRASTS[:3], GENERAL, **OPTIONS)
    with pytest.raises(DataError, match="general: expected at least 26, got 2"):
        fs.recipe(tutor_model, CONTRASTS, GENERAL[:2], **OPTIONS)
    with pytest.raises(DataError, match="near_misses: expected at least 8, got 1"):
        fs.recipe(tutor_model, CONTRASTS, GENERAL, **{**OPTIONS, "near_misses": NEAR[:1]})
    with pytest.raises(InputError, match="kl"):
        fs.recipe(tutor_model, CONTRASTS, GENERAL, kl=0, **OPTIONS)
    with pytest.raises(InputError, match="layer: expected"):
        fs.recipe(tutor_model, CONTRASTS, GENERAL, **{**OPTIONS, "layers": []})
    none = RecipeTrial(3, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5)
    monkeypatch.setattr(recipes, "_tried", lambda *_: none)
    with pytest.raises(InputError, match=r"some strength is within kl=0\.1 and loops=0\.05"):
        fs.recipe(tutor_model, CONTRASTS, GENERAL, **{**OPTIONS, "layers": [3]})


def test_three_depths_are_tried_where_none_are_named(tutor_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(model: Any, steering: Any, *_: Any) -> RecipeTrial:
        (layer,) = steering.layers
        return RecipeTrial(layer, 1.0, 0.0, 0.0, layer / 10, 0.0, 1.0, 1.0, 1.0, 0.5)

    monkeypatch.setattr(recipes, "_tried", tried)
    few = {**OPTIONS, "layers": None, "near_misses": None}
    found = fs.recipe(tutor_model, CONTRASTS, GENERAL, **few)
    n = tutor_model.cfg.n_layers
    assert [trial.layer for trial in found.trials] == [round(n * depth) for depth in recipes.DEPTHS]
    assert found.chosen is found.trials[-1] and len(found.general_valid) <= recipes.MOST_COSTED

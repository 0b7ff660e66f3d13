"""`search`: the grid is tried whole, the choice is the best within the budget, test is read once, work is not lost."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fsteer_lens import Activations, generate, search, tutor
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.hooks import HookObject
from fsteer_lens.models import SteerableModel
from fsteer_lens.selection import SplitData, Splits
from fsteer_lens.steering import fit_mean_shift, fit_pca_direction
from fsteer_lens.steering.steering import Steering
from tests import made_up

TOLD = tutor.data("safe")
SPLITS = Splits(TOLD.train[::12], TOLD.valid[::30], TOLD.general_valid[::60], TOLD.test[::30], TOLD.general_test[::60])
GRID = {"layers": [3, 4], "strengths": [0.5, 1.0, 4.0]}


def mean_shift(own: Activations, general: Activations | None) -> Steering:
    return fit_mean_shift(own)


def other_method(own: Activations, general: Activations | None) -> Steering:
    return fit_pca_direction(own)


class Planted:
    """Effect and utility that are known for every setting; remembers which items it was asked about."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, float, int]] = []

    def _note(self, what: str, steering: HookObject | None, items: object) -> None:
        assert steering is None or isinstance(steering, Steering)
        where = (0, 0.0) if steering is None else (steering.layers[0], steering.strength)
        self.asked.append((what, *where, id(items)))

    def effect(self, model: SteerableModel, steering: HookObject | None, items: object) -> Tensor:
        self._note("effect", steering, items)
        assert isinstance(steering, Steering)
        return torch.full((len(items),), steering.layers[0] + min(steering.strength, 2.0))  # type: ignore[arg-type]

    def utility(self, model: SteerableModel, steering: HookObject | None, items: object) -> Tensor:
        self._note("utility", steering, items)
        lost = 0.0 if not isinstance(steering, Steering) else steering.strength / 10 * (steering.layers[0] == 4)
        return torch.full((len(items),), 0.75 - lost)  # type: ignore[arg-type]


def test_the_best_setting_within_the_budget_is_chosen_and_tested_once(tutor_model: SteerableModel) -> None:
    found = {}
    for budget, wanted in ((0.0, (3, 4.0)), (0.06, (3, 4.0)), (0.1, (4, 1.0)), (0.5, (4, 4.0))):
        planted = Planted()
        one = search(
            tutor_model, SPLITS, budget=budget, method=mean_shift, effect=planted.effect, utility=planted.utility,
            shift="last_prompt", progress=False, **GRID,
        )  # fmt: skip
        assert (one.chosen.layer, one.chosen.strength) == wanted
        assert (one.steering.layers[0], one.steering.strength) == wanted
        assert one.floor == pytest.approx(0.75 - budget)
        assert len(one.trials) == 6 and sum(record["chosen"] for record in one.to_records()) == 1
        assert [ask[1:3] for ask in planted.asked if ask[3] == id(SPLITS.test)] == [wanted]
        assert [ask[1:3] for ask in planted.asked if ask[3] == id(SPLITS.general_test)] == [wanted]
        assert one.test_effect is not None and one.test_effect.value == pytest.approx(one.chosen.effect)
        assert f"layer={wanted[0]}" in repr(one)
        found[budget] = one
    assert found[0.0].trials == found[0.5].trials


def test_any_object_with_the_six_parts_is_searched_alike(tutor_model: SteerableModel) -> None:
    found = []
    for data in (SPLITS, SimpleNamespace(**vars(SPLITS))):
        planted = Planted()
        one = search(
            tutor_model, data, budget=0.1, method=mean_shift, effect=planted.effect, utility=planted.utility,
            shift="last_prompt", progress=False, **GRID,
        )  # fmt: skip
        found.append((one.chosen, one.trials, one.test_effect))
    assert found[0] == found[1]
    assert isinstance(TOLD, SplitData) and not isinstance(TOLD.train, SplitData)


def test_of_equal_effects_the_smaller_strength_wins(tutor_model: SteerableModel) -> None:
    planted = Planted()
    one = search(
        tutor_model, replace(SPLITS, test=(), general_test=()), budget=1.0, layers=[3], strengths=[4.0, 2.0, 3.0],
        method=mean_shift, effect=planted.effect, utility=planted.utility, shift="last_prompt", progress=False,
    )  # fmt: skip
    assert one.chosen.strength == 2.0
    assert one.test_effect is None and one.test_utility is None


def test_one_test_part_without_the_other_is_refused(tutor_model: SteerableModel) -> None:
    with pytest.raises(DataError, match="or neither"):
        search(tutor_model, replace(SPLITS, general_test=()), budget=1.0, progress=False)
    assert repr(SPLITS).startswith(f"Splits(train: {len(SPLITS.train)}, valid: ")


def test_no_setting_within_the_budget_is_said(tutor_model: SteerableModel) -> None:
    planted = Planted()
    with pytest.raises(InputError, match=r"no setting within the budget.*at best 0\.65"):
        search(
            tutor_model, SPLITS, budget=0.05, layers=[4], strengths=[1.0, 4.0], method=mean_shift,
            effect=planted.effect, utility=planted.utility, shift="last_prompt", progress=False,
        )  # fmt: skip


def test_measures_by_default_and_of_the_tutor(tutor_model: SteerableModel) -> None:
    one = search(
        tutor_model, SPLITS, budget=0.05, layers=[4], strengths=[0.5, 1.0], ranks=[4, 6], shift="last_prompt",
        progress=False,
    )  # fmt: skip
    assert one.chosen.rank in (4, 6) and len(one.trials) == 4
    assert "nats" in one.effect_name and "nats" in one.utility_name
    gate = one.steering.gate_at(4)
    assert gate is not None and gate.leaves[0].rank == one.chosen.rank
    assert all(trial.utility <= 0 for trial in one.trials)
    exact = search(
        tutor_model, replace(SPLITS, general_train=TOLD.general_train[::60]), budget=0.2, layers=[4], strengths=[1.25],
        effect=tutor.exact, utility=tutor.exact, shift="last_prompt", progress=False,
    )  # fmt: skip
    assert exact.effect_name == "exact" and exact.test_effect is not None
    prompts = [contrast.prompt for contrast in SPLITS.test]
    texts = generate(tutor_model, prompts, exact.steering, max_new_tokens=32, progress=False)
    right = [text.text == contrast.preferred for text, contrast in zip(texts, SPLITS.test, strict=True)]
    assert exact.test_effect.value == pytest.approx(sum(right) / len(right))


def test_general_prompts_reach_the_method(tutor_model: SteerableModel) -> None:
    planted, seen = Planted(), []

    def method(own: Activations, general: Activations | None) -> Steering:
        seen.append((own.layer, None if general is None else (general.layer, len(general.queries))))
        return fit_mean_shift(own)

    for general in ((), TOLD.general_train[:7]):
        search(
            tutor_model, replace(SPLITS, general_train=general), budget=1.0, method=method, effect=planted.effect,
            utility=planted.utility, shift="last_prompt", progress=False, **GRID,
        )  # fmt: skip
    assert seen == [(3, None), (4, None), (3, (3, 7)), (4, (4, 7))]


def test_an_interrupted_search_goes_on_where_it_was(tutor_model: SteerableModel, tmp_path: Path) -> None:
    journal = tmp_path / "search.jsonl"
    options = {"budget": 1.0, "method": mean_shift, "shift": "last_prompt", "progress": False, **GRID}

    class Interrupted(Planted):
        def utility(self, model: SteerableModel, steering: HookObject | None, items: object) -> Tensor:
            if sum(what == "utility" for what, *_ in self.asked) == 4:
                raise KeyboardInterrupt
            return super().utility(model, steering, items)

    first, whole = Interrupted(), Planted()
    with pytest.raises(KeyboardInterrupt):
        search(tutor_model, SPLITS, effect=first.effect, utility=first.utility, resume=journal, **options)  # type: ignore[arg-type]
    with journal.open("a") as file:
        file.write('{"layer": 4, "rank": nu')  # a line that was cut off
    again = search(tutor_model, SPLITS, effect=whole.effect, utility=whole.utility, resume=journal, **options)  # type: ignore[arg-type]
    asked = [ask[1:3] for ask in whole.asked if ask[0] == "effect" and ask[3] == id(SPLITS.valid)]
    assert asked == [(4, 0.5), (4, 1.0), (4, 4.0)], "the three trials of layer 3 were there already"
    fresh = Planted()
    assert again.trials == search(
        tutor_model, SPLITS, effect=fresh.effect, utility=fresh.utility, **options  # type: ignore[arg-type]
    ).trials  # fmt: skip
    assert [json.loads(line).get("layer") for line in journal.read_text().splitlines()] == [None, 3, 3, 3, 4, 4, 4]
    other = replace(SPLITS, valid=TOLD.valid[::29])
    with pytest.raises(DataError, match="another search"):
        search(tutor_model, other, effect=fresh.effect, utility=fresh.utility, resume=journal, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="another search"):
        search(
            tutor_model, SPLITS, effect=fresh.effect, utility=fresh.utility, resume=journal,
            **{**options, "method": other_method},  # type: ignore[arg-type]
        )  # fmt: skip
    with pytest.raises(InputError, match="functions with names"):
        search(
            tutor_model, SPLITS, effect=fresh.effect, utility=fresh.utility, resume=journal,
            **{**options, "method": lambda own, general: fit_mean_shift(own)},  # type: ignore[arg-type]
        )  # fmt: skip
    journal.write_text("hello\n")
    with pytest.raises(DataError, match="earlier search"):
        search(tutor_model, SPLITS, effect=fresh.effect, utility=fresh.utility, resume=journal, **options)  # type: ignore[arg-type]
    missing = tmp_path / "no" / "x.jsonl"
    with pytest.raises(InputError, match="existing folder"):
        search(tutor_model, SPLITS, effect=fresh.effect, utility=fresh.utility, resume=missing, **options)  # type: ignore[arg-type]


def test_a_method_without_ranks_is_not_asked_for_one(tutor_model: SteerableModel) -> None:
    with pytest.raises(InputError, match="gives a FineSteer"):
        search(
            tutor_model, SPLITS, budget=1.0, layers=[4], ranks=[4], method=lambda own, general: fit_mean_shift(own),
            shift="last_prompt", progress=False,
        )  # fmt: skip
    with pytest.raises(InputError, match="a tensor of"):
        search(
            tutor_model, SPLITS, budget=1.0, layers=[4], strengths=[1.0], shift="last_prompt", progress=False,
            method=lambda own, general: made_up.steering(layer=4), effect=lambda *_: torch.zeros(3),
        )  # fmt: skip

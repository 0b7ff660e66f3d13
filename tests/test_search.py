"""`search`: the grid is tried whole, the choice is the best within the budget, test is read once, work is not lost."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fsteer_lens import Activations, Schedule, Window, collect, evaluate, fit, generate, search, tutor
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.evaluation import Measure, RefusalSuite, Setting, Suite, TruthfulQA
from fsteer_lens.evaluation.truthfulness import Choice
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


# ------------------------------------------------------------------------------------------------ scopes and schedules

DECAY = Schedule.decay(0.5)


def by_place(model: SteerableModel, steering: HookObject | None, items: object) -> Tensor:
    """An effect that is known for every scope and schedule."""
    assert isinstance(steering, Steering)
    told = {"all": 1.0, "prompt": 2.0, "generated": 3.0}.get(str(steering.scope), 4.0)
    return torch.full((len(items),), told + 10 * (steering.schedule is DECAY))  # type: ignore[arg-type]


def nothing_lost(model: SteerableModel, steering: HookObject | None, items: object) -> Tensor:
    return torch.zeros(len(items))  # type: ignore[arg-type]


PLACED = {
    "budget": 1.0, "method": mean_shift, "effect": by_place, "utility": nothing_lost, "layers": [3],
    "strengths": [1.0], "shift": "last_prompt", "progress": False,
}  # fmt: skip


def test_scopes_and_schedules_are_part_of_the_grid(tutor_model: SteerableModel) -> None:
    scopes = [None, "all", Window(1, 3)]
    found = search(tutor_model, SPLITS, scopes=scopes, schedules=[None, DECAY], **PLACED)  # type: ignore[arg-type]
    tried = {(trial.scope, trial.schedule): trial.effect for trial in found.trials}
    assert tried == {
        (None, None): 2.0, (None, DECAY): 12.0, ("all", None): 1.0, ("all", DECAY): 11.0,
        (Window(1, 3), None): 4.0, (Window(1, 3), DECAY): 14.0,
    }, "None is the method's own: that of last-prompt shifts is the prompt"  # fmt: skip
    assert (found.steering.scope, found.steering.schedule) == (Window(1, 3), DECAY)
    assert (found.chosen.scope, found.chosen.schedule) == (Window(1, 3), DECAY) and "scope=" in repr(found)
    records = found.to_records()
    assert json.loads(json.dumps(records)) == records
    assert records[-1]["scope"] == "1:3" and records[-1]["schedule"].startswith("1 0.5 0.25 ")
    for options, message in (
        ({"scopes": ["everywhere"]}, "scope"),
        ({"schedules": [[1.0, 0.5]]}, "schedules"),
        ({"scopes": []}, "no scopes"),
    ):
        with pytest.raises(InputError, match=message):
            search(tutor_model, SPLITS, **PLACED, **options)  # type: ignore[arg-type]


def test_decay_is_geometric_and_ends() -> None:
    steps = torch.arange(-2, 40)
    wanted = torch.tensor([0.8 ** max(int(step), 0) for step in steps])
    found = Schedule.decay(0.8).at(steps)
    assert torch.allclose(found, torch.where(wanted < 1e-3, torch.zeros(()), wanted)) and found[-1] == 0
    assert Schedule.decay(0.1).factors == pytest.approx((1, 0.1, 0.01, 0.001, 0))
    for rate in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="rate"):
            Schedule.decay(rate)


def test_a_file_of_an_earlier_version_is_gone_on_with(tutor_model: SteerableModel, tmp_path: Path) -> None:
    """Its trials know no scope, schedule or length: they are those of the method's own, and are not run again."""
    journal = tmp_path / "search.jsonl"
    search(tutor_model, SPLITS, resume=journal, **PLACED)  # type: ignore[arg-type]
    header, line = journal.read_text().splitlines()
    before = {name: json.loads(line)[name] for name in ("layer", "rank", "strength", "effect", "utility")}
    journal.write_text(f"{header}\n{json.dumps({**before, 'effect': 2.5})}\n")
    scopes = [None, "generated", Window(1)]
    again = search(tutor_model, SPLITS, resume=journal, scopes=scopes, schedules=[None, DECAY], **PLACED)  # type: ignore[arg-type]
    assert again.trials[0].effect == 2.5 and again.trials[0].length is None, "as it stood in the file"
    assert [trial.effect for trial in again.trials[1:]] == [12, 3, 13, 4, 14]
    lines = journal.read_text().splitlines()
    assert len(lines) == 7
    once_more = search(
        tutor_model, SPLITS, resume=journal, scopes=scopes, schedules=[None, Schedule(DECAY.factors)], **PLACED  # type: ignore[arg-type]
    )  # fmt: skip
    assert once_more.trials == again.trials and journal.read_text().splitlines() == lines


def test_trials_tell_how_much_is_added(tutor_model: SteerableModel) -> None:
    def experts(own: Activations, general: Activations | None) -> Steering:
        return fit(own, preset="0.1", epochs=5, rank=8)

    options = {**PLACED, "layers": [3, 4], "strengths": [0.5, 2.0]}
    plain = search(tutor_model, SPLITS, **options)  # type: ignore[arg-type]
    assert [trial.length for trial in plain.trials] == pytest.approx([0.5, 2.0, 0.5, 2.0])
    mixed = search(tutor_model, SPLITS, **{**options, "method": experts})  # type: ignore[arg-type]
    trained = collect(tutor_model, SPLITS.train, layer=[3, 4], shift="last_prompt", progress=False)
    for trial in mixed.trials:
        own = trained[trial.layer]
        assert own.shifts is not None and trial.length is not None
        method = experts(own, None)
        gate = method.gate_at(trial.layer)
        assert gate is not None
        added = trial.strength * gate(own.queries) * method.vectors(trial.layer, own.queries).vector.norm(dim=1)
        assert trial.length == pytest.approx(float(added.mean() / own.shifts.mean(dim=0).norm()), rel=1e-3)
    elsewhere = search(
        tutor_model, SPLITS, **{**PLACED, "method": lambda own, general: made_up.steering(layer=2)}  # type: ignore[arg-type]
    )  # fmt: skip
    assert elsewhere.trials[0].length is None


# -------------------------------------------------------------------------------------------------------------- suites


@dataclass(frozen=True, eq=False, repr=False)
class PlantedSuite(Suite):
    """Rows with a known effect and utility at every strength; remembers what it was asked."""

    rows: tuple[int, ...]
    asked: ClassVar[list[tuple[tuple[int, ...], float]]] = []
    name = "planted"

    @property
    def measures(self) -> tuple[Measure, ...]:
        groups = ("all",) * len(self.rows)
        return Measure("gain", groups, "effect"), Measure("kept", groups, "utility"), Measure("other", groups)

    def taking(self, rows: object) -> "PlantedSuite":
        return PlantedSuite(tuple(self.rows[row] for row in rows))  # type: ignore[attr-defined]

    def measure(self, model: SteerableModel, steering: HookObject | None, setting: Setting) -> tuple[Tensor, ...]:
        strength = steering.strength if isinstance(steering, Steering) else 0.0
        self.asked.append((self.rows, strength))
        rows = torch.tensor(self.rows, dtype=torch.float32)
        return rows + strength, 1 - 0.1 * strength * torch.ones(len(rows)), rows - strength


def test_a_part_of_a_suite_is_chosen_on_and_another_tested_on(tutor_model: SteerableModel, tmp_path: Path) -> None:
    suite, asked = PlantedSuite(tuple(range(10))), PlantedSuite.asked
    asked.clear()
    splits = Splits(TOLD.train[::12], suite[:4], suite[4:6], test=suite[6:9], general_test=suite[[9]])
    options = {"method": mean_shift, "layers": [3], "strengths": [1.0, 2.0, 4.0], "shift": "last_prompt"}
    found = search(tutor_model, splits, budget=0.25, progress=False, **options)  # type: ignore[arg-type]
    assert [trial.effect for trial in found.trials] == [2.5, 3.5, 5.5]
    assert [trial.utility for trial in found.trials] == pytest.approx([0.9, 0.8, 0.6])
    assert found.chosen.strength == 2.0 and (found.effect_name, found.utility_name) == ("gain", "kept")
    assert found.test_effect is not None and found.test_effect.value == 9.0
    assert found.test_utility is not None and found.test_utility.value == pytest.approx(0.8)
    assert {strength for rows, strength in asked if rows in ((6, 7, 8), (9,))} == {2.0}, "test is read once"
    other = search(tutor_model, splits, budget=9, effect="other", utility="other", progress=False, **options)  # type: ignore[arg-type]
    assert other.chosen.effect == 0.5 and other.effect_name == "other"
    journal = tmp_path / "suite.jsonl"
    search(tutor_model, splits, budget=0.25, resume=journal, progress=False, **options)  # type: ignore[arg-type]
    asked.clear()
    search(tutor_model, splits, budget=0.25, resume=journal, progress=False, **options)  # type: ignore[arg-type]
    assert (suite.rows[:4], 1.0) not in asked, "it is all in the file"
    for changed in (replace(splits, valid=suite[1:5]), replace(splits, general_valid=suite[3:5])):
        with pytest.raises(DataError, match="another search"):
            search(tutor_model, changed, budget=0.25, resume=journal, progress=False, **options)  # type: ignore[arg-type]


def test_the_numbers_are_those_of_an_evaluation(tutor_model: SteerableModel) -> None:
    """MC1 and MC2 of the chosen steering, and the phrases of answers that it left alone, by `evaluate`."""
    answers = (("yes it is.", True), ("no, not so.", False), ("five.", False))
    questions = TruthfulQA(tuple(Choice(task.prompt, answers, answers) for task in TOLD.general_valid[:6]))
    phrases = RefusalSuite("made", (), (), tuple(t.prompt for t in TOLD.general_test[:4]), ("x",) * 4, ("the", "it"), 6)
    splits = Splits(TOLD.train[::12], questions[:4], phrases[:2], test=questions[4:], general_test=phrases[2:])
    for effect, name in ((None, "MC2"), ("MC1", "MC1")):
        found = search(
            tutor_model, splits, budget=1.0, method=mean_shift, effect=effect, layers=[3], strengths=[2.0],
            shift="last_prompt", progress=False,
        )  # fmt: skip
        table = [
            evaluate(tutor_model, {"it": found.steering}, part, progress=False) for part in (splits.valid, splits.test)
        ]  # type: ignore[arg-type]
        values = [float(one.items("it", name).double().mean()) for one in table]
        assert found.effect_name == name and found.test_effect is not None
        assert [found.chosen.effect, found.test_effect.value] == pytest.approx(values, abs=1e-6)
        assert found.utility_name == "not over-refused"


def test_suites_and_measures_that_do_not_fit_are_refused(tutor_model: SteerableModel) -> None:
    suite = PlantedSuite((0, 1, 2, 3))
    options = {"budget": 1.0, "method": mean_shift, "layers": [3], "shift": "last_prompt", "progress": False}
    whole = Splits(TOLD.train[::12], suite[:2], suite[2:])
    for splits, more, error, message in (
        (whole, {"effect": "gains"}, InputError, "effect= on .*one of"),
        (whole, {"effect": by_place}, InputError, "effect= on .*one of"),
        (SPLITS, {"effect": "gain"}, InputError, "a measure by name"),
        (replace(whole, test=SPLITS.test, general_test=suite), {}, DataError, "in valid and in its test part"),
        (replace(whole, test=suite, general_test=SPLITS.general_test), {}, DataError, "in general_valid and"),
    ):
        with pytest.raises(error, match=message):
            search(tutor_model, splits, **options, **more)  # type: ignore[arg-type]
    two = RefusalSuite("made", ("a",), ("x",))
    with pytest.raises(InputError, match=r"utility= on .*one of \['refused'\]"):
        search(tutor_model, replace(whole, general_valid=two), **options)  # type: ignore[arg-type]

"""`evaluate` and its suites: numbers from plain computations, pairs that are pairs, files that are refused."""

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fsteer_lens import Activations, FineSteer, evaluate, generate, tutor
from fsteer_lens.effects import exact_answers
from fsteer_lens.errors import DataError, InputError, NonFiniteError, ShapeError
from fsteer_lens.evaluation import (
    Evaluation,
    Measure,
    Prompting,
    Setting,
    Suite,
    TruthfulQA,
    every,
    fit_ablations,
    harmbench,
    refuses,
    truthfulness,
    xstest,
)
from fsteer_lens.evaluation.truthfulness import Choice
from fsteer_lens.ground.tables import markdown
from fsteer_lens.hooks import HookObject
from fsteer_lens.method.controller import Controller, QuadraticController
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import answer_ids, prompt_ids
from fsteer_lens.tutor import TutorSuite
from tests import made_up
from tests.running import n_hooks

DATA = Path(__file__).parents[2] / "shared" / "data"


# ---------------------------------------------------------------------------------------------------- exact answers


@pytest.mark.parametrize("strength", [None, 2.0, 3.0])
def test_an_exact_answer_is_what_greedy_decoding_says(
    model: SteerableModel, steering: FineSteer, strength: float | None
) -> None:
    told = tutor.data("safe")
    items = [*told.test[::20], *told.general_test[::40], *told.near_miss_test[::30]]
    used = None if strength is None else steering.with_gate(None).with_strength(strength)
    texts = generate(model, [item.prompt for item in items], used, max_new_tokens=40, batch_size=64, progress=False)
    wanted = [item.answer if isinstance(item, tutor.Task) else item.preferred for item in items]
    said = [float(text.text == answer) for text, answer in zip(texts, wanted, strict=True)]
    assert tutor.exact(model, used, items).tolist() == said
    assert 0 < sum(said) < len(said)


def test_an_answer_that_goes_on_is_not_exact(tutor_model: SteerableModel) -> None:
    task = tutor.data("safe").general_test[0]
    cut = task.answer[:-1]
    found = exact_answers(tutor_model, None, [task.prompt] * 3, [task.answer, cut, task.answer + " and so on"])
    assert found.tolist() == [1, 0, 0]


# ------------------------------------------------------------------------------------------------------ the evaluation


@dataclass(frozen=True, eq=False)
class Planted(Suite):
    """Numbers that are known beforehand, by the strength of what is measured; 0 is no steering."""

    values: Mapping[float, tuple[Tensor, Tensor]]
    name: str = "planted"

    @property
    def measures(self) -> tuple[Measure, ...]:
        effect, utility = self.values[0.0]
        kinds = tuple("ab"[index % 2] for index in range(len(effect)))
        return Measure("gain", kinds, "effect"), Measure("kept", ("all",) * len(utility), "utility")

    def measure(self, model: SteerableModel, steering: HookObject | None, setting: Setting) -> tuple[Tensor, ...]:
        return self.values[float(getattr(steering, "strength", 0.0))]


def planted() -> Planted:
    generator = torch.Generator().manual_seed(3)
    none = (torch.zeros(40), torch.ones(30))
    values = {0.0: none}
    for strength, chance in ((1.0, 0.6), (2.0, 0.9)):
        draws = [torch.rand(n, generator=generator) for n in (40, 30)]
        values[strength] = ((draws[0] < chance).float(), (draws[1] < 0.8).float())
    return Planted(values)


def evaluated(tutor_model: SteerableModel, **options: object) -> Evaluation:
    steerings = {f"at {strength:g}": made_up.steering(strength=strength) for strength in (1.0, 2.0)}
    return evaluate(tutor_model, {"none": None, **steerings}, planted(), progress=False, **options)


def test_estimates_and_differences_are_the_plain_ones(tutor_model: SteerableModel) -> None:
    found, suite = evaluated(tutor_model), planted()
    one, two = suite.values[1.0], suite.values[2.0]
    assert found.methods == ("none", "at 1", "at 2")
    assert found.estimate("at 1", "gain").value == pytest.approx(float(one[0].mean()))
    assert found.estimate("at 1", "gain", "b").value == pytest.approx(float(one[0][1::2].mean()))
    paired = found.difference("at 2", "at 1", "gain")
    index = np.random.default_rng(0).integers(40, size=(2000, 40))
    draws = (two[0] - one[0]).numpy()[index].mean(axis=1)
    assert paired.interval == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=1e-6)
    apart = [found.estimate(name, "gain") for name in ("at 1", "at 2")]
    assert paired.value == pytest.approx(apart[1].value - apart[0].value)


def test_harmonic_mean_and_its_paired_difference(tutor_model: SteerableModel) -> None:
    found, suite = evaluated(tutor_model), planted()
    effect = np.random.default_rng(0).integers(40, size=(2000, 40))
    utility = np.random.default_rng(1).integers(30, size=(2000, 30))

    def draws(strength: float) -> np.ndarray:
        values = [part.double().numpy() for part in suite.values[strength]]
        means = [part[index].mean(axis=1) for part, index in zip(values, (effect, utility), strict=True)]
        return 2 / (1 / means[0] + 1 / means[1])

    difference = found.harmonic_difference("at 2", "at 1")
    low, high = np.quantile(draws(2.0) - draws(1.0), [0.025, 0.975])
    assert difference.interval == pytest.approx((low, high), abs=1e-9)
    two = found.harmonic_mean("at 2")
    assert two.value - found.harmonic_mean("at 1").value == pytest.approx(difference.value)
    assert found.harmonic_mean("none").value == 0, "no effect at all"
    assert found.harmonic_difference("at 1", "at 1").interval == (0, 0)


def test_made_methods_are_averaged_over_seeds_item_by_item(tutor_model: SteerableModel) -> None:
    asked = []

    def made(seed: int) -> FineSteer:
        asked.append(seed)
        return made_up.steering(strength=1.0 + seed)

    found = evaluate(tutor_model, {"made": made, "none": None}, planted(), seeds=(0, 1), progress=False)
    both = torch.stack([planted().values[1.0][0], planted().values[2.0][0]])
    assert asked == [0, 1]
    assert torch.equal(found.items("made", "gain"), both.mean(dim=0))
    counts = {record["method"]: record["seeds"] for record in found.to_records()}
    assert counts == {"made": 2, "none": 1}


def test_records_and_table_say_the_same(tutor_model: SteerableModel) -> None:
    found = evaluated(tutor_model)
    records = found.to_records()
    json.dumps(records)
    assert {record["group"] for record in records if record["measure"] == "gain"} == {"all", "a", "b"}
    one = next(r for r in records if (r["method"], r["measure"], r["group"]) == ("at 2", "gain", "all"))
    table = found.to_markdown(reference="at 2")
    row = next(line for line in table.splitlines() if line.startswith("| at 2 "))
    assert f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]" in row
    assert row.endswith("|  |"), "nothing is compared with itself"
    assert f"{found.harmonic_difference('at 2', 'none'):+.3f}" in table
    assert "gain, a" in found.to_markdown(groups=True)
    assert markdown(["a|b"], [["c"]]).splitlines() == ["| a\\|b |", "| --- |", "| c |"]


def test_bad_requests_are_refused(tutor_model: SteerableModel, stories: SteerableModel, steering: FineSteer) -> None:
    suite = planted()
    with pytest.raises(InputError, match="at least one method"):
        evaluate(tutor_model, {}, suite, progress=False)
    with pytest.raises(InputError, match="one seed"):
        evaluate(tutor_model, {"made": lambda seed: None}, suite, seeds=(), progress=False)
    found = evaluated(tutor_model)
    for wrong in (("nobody", "gain"), ("none", "loss"), ("none", "gain", "z")):
        with pytest.raises(InputError, match="one of"):
            found.items(*wrong)
    values = dict(suite.values)
    with pytest.raises(InputError, match="reference"):
        found.to_markdown(reference="nobody")
    values[0.0] = (torch.full((40,), 2.0), torch.ones(30))
    beyond = evaluate(tutor_model, {"none": None, "again": None}, Planted(values), progress=False)
    with pytest.raises(InputError, match=r"values in \[0, 1\]"):
        beyond.harmonic_mean("none")
    table = beyond.to_markdown(reference="none")
    assert "harmonic" not in table and "| +0.000 [+0.000, +0.000] |" in table, "the effect is compared instead"
    values[1.0] = (torch.zeros(3), torch.ones(30))
    with pytest.raises(InputError, match="40 numbers"):
        evaluate(tutor_model, {"short": made_up.steering(strength=1.0)}, Planted(values), progress=False)
    with pytest.raises(InputError, match="exact model input"):
        evaluate(tutor_model, {"none": None}, TutorSuite("safe", limit=4), chat=True, progress=False)
    with pytest.raises(ShapeError, match="another model"):
        evaluate(stories, {"other model's": steering}, TutorSuite("safe", limit=4), progress=False)
    assert n_hooks(stories) == 0


# ---------------------------------------------------------------------------------------------------------- the suites


def test_the_tutors_suite(tutor_model: SteerableModel, steering: FineSteer) -> None:
    suite = TutorSuite("safe", "valid", limit=20)
    methods = {"none": None, "tag": Prompting("<safe>"), "steered": steering}
    found = evaluate(tutor_model, methods, suite, batch_size=64, progress=False)
    assert found.estimate("none", "refused exactly").value == 0
    assert found.estimate("tag", "refused exactly").value == 1
    kept = tutor.exact(tutor_model, steering, suite.tasks)
    assert torch.equal(found.items("steered", "left alone exactly"), kept)
    assert {"near miss", "sum"} < set(suite.measures[1].groups)
    assert set(suite.measures[0].groups) == {"new pair", "new template"}
    for wrong in ({"behaviour": "rude"}, {"limit": 0}):
        with pytest.raises(InputError):
            TutorSuite(**wrong)


@pytest.mark.parametrize("behaviour", ["safe", "honest"])
def test_a_limited_suite_is_a_fair_sample_of_the_whole(behaviour: str) -> None:
    whole, some = TutorSuite(behaviour), TutorSuite(behaviour, limit=60)
    for all_items, items in (
        (whole.contrasts, some.contrasts),
        (whole.general, some.general),
        (whole.near_misses, some.near_misses),
    ):
        places = [all_items.index(item) for item in items]
        assert len(items) == 60 and places == sorted(set(places))
    assert some.tasks == some.general + some.near_misses == TutorSuite(behaviour, limit=60).tasks
    for kind in ("new pair", "new template"):
        share, drawn = (one.measures[0].groups.count(kind) / len(one.contrasts) for one in (whole, some))
        assert abs(share - drawn) < 0.15


QUESTIONS = [
    {
        "question": "where is it?",
        "mc1_targets": {"here.": 0, "over there, by the hill.": 1},
        "mc2_targets": {"here.": 0, "over there, by the hill.": 1, "there.": 1},
    },
    {
        "question": "who knows the capital of france?",
        "mc1_targets": {"nobody.": 1, "somebody.": 0, "the king.": 0},
        "mc2_targets": {"nobody.": 1, "somebody.": 0, "the king.": 0},
    },
]


def test_mc1_and_mc2_are_those_of_plain_log_probabilities(model: SteerableModel, tmp_path: Path) -> None:
    path = tmp_path / "mc_task.json"
    path.write_text(json.dumps(QUESTIONS))
    suite = TruthfulQA.from_json(path)
    steering = made_up.steering(strength=4.0)
    found = evaluate(model, {"none": None, "steered": steering}, suite, batch_size=3, progress=False)

    def score(question: str, answer: str, steered: bool) -> float:
        prompt, ids = prompt_ids(model, f"Q: {question}\nA:"), answer_ids(model, f" {answer}")
        tokens = torch.tensor([prompt + ids])
        with torch.no_grad():
            if steered:
                with steering.on(model, prompt_lengths=torch.tensor([len(prompt)])):
                    logits = model(tokens, return_type="logits")
            else:
                logits = model(tokens, return_type="logits")
        return float(
            logits[0, len(prompt) - 1 : -1].double().log_softmax(-1).gather(1, tokens[0, len(prompt) :, None]).sum()
        )

    for method in ("none", "steered"):
        for number, row in enumerate(QUESTIONS):
            one, several = (
                {text: score(row["question"], text, method == "steered") for text in row[name]}
                for name in ("mc1_targets", "mc2_targets")
            )
            assert found.items(method, "MC1")[number] == row["mc1_targets"][max(one, key=one.__getitem__)]
            mass = {text: np.exp(value) for text, value in several.items()}
            share = sum(mass[text] for text, true in row["mc2_targets"].items() if true) / sum(mass.values())
            assert float(found.items(method, "MC2")[number]) == pytest.approx(share, abs=1e-4)
    assert not torch.equal(found.items("none", "MC2"), found.items("steered", "MC2"))


def test_ties_and_broken_numbers_are_not_right(tutor_model: SteerableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = (("true", True), ("false", False))
    suite = TruthfulQA((Choice("what?", answers, answers),))
    for scores, wanted in (((-1.0, -1.0), 0), ((-1.0, -1.5), 1), ((-1.5, -1.0), 0)):
        made = [[torch.tensor([score]) for score in scores]]
        monkeypatch.setattr(f"{truthfulness.__name__}.answer_logprobs_of_each", lambda *_, made=made, **__: made)
        found = evaluate(tutor_model, {"none": None}, suite, progress=False)
        assert found.items("none", "MC1").tolist() == [wanted]
    broken = [[torch.tensor([math.nan])] * 2]
    monkeypatch.setattr(f"{truthfulness.__name__}.answer_logprobs_of_each", lambda *_, **__: broken)
    with pytest.raises(NonFiniteError, match="NaN"):
        evaluate(tutor_model, {"none": None}, suite, progress=False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "JSON"),
        ("{}", "list of questions"),
        ('[{"question": "a"}]', "question 0"),
        ('[{"question": "a", "mc1_targets": {"b": 1}, "mc2_targets": {"b": 1, "c": 0}}]', "true and a false"),
    ],
)
def test_a_broken_truthfulqa_file_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "mc_task.json"
    path.write_text(content)
    with pytest.raises(DataError, match=says):
        TruthfulQA.from_json(path)


def test_a_refusal_is_a_phrase_whatever_its_case_and_apostrophe() -> None:
    assert refuses("I\u2019m sorry, no.") and refuses("well, as an ai I must say") and refuses("I CANNOT do that")
    assert not refuses("Sure, here is how.") and not refuses("")
    assert refuses("nope", phrases=("NOPE",))


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_refusal_suites_read_their_files_and_count_phrases(tutor_model: SteerableModel, tmp_path: Path) -> None:
    harm = write_csv(
        tmp_path / "harm.csv",
        [
            {"Behavior": "do harm", "SemanticCategory": "x", "ContextString": ""},
            {"Behavior": "do more", "SemanticCategory": "y", "ContextString": "given this,\nand that"},
        ],
    )
    suite = harmbench(harm)
    assert suite.harmful == ("do harm", "given this,\nand that\n\ndo more") and suite.harmful_groups == ("x", "y")
    assert [measure.role for measure in suite.measures] == ["effect"]
    rows = [{"prompt": f"p{i}", "type": f"t{i % 2}", "label": ("safe", "unsafe")[i % 3 == 0]} for i in range(9)]
    both = xstest(write_csv(tmp_path / "xs.csv", rows), limit=2)
    assert both.harmful == ("p0", "p3") and len(both.harmless) == 2
    phrased = {"phrases": ("well", "the"), "max_new_tokens": 12}
    told = tutor.data("safe")
    suite = type(both)(
        "made", tuple(told.test.prompts[::60]), ("h",) * 5, (told.general_test[0].prompt,), ("g",), **phrased
    )
    found = evaluate(tutor_model, {"none": None}, suite, progress=False)
    texts = [
        a.text for a in generate(tutor_model, [*suite.harmful, *suite.harmless], max_new_tokens=12, progress=False)
    ]
    hits = [float("well" in text or "the" in text) for text in texts]
    assert found.items("none", "refused").tolist() == hits[:5]
    assert found.items("none", "not over-refused").tolist() == [1 - hits[5]]
    with pytest.raises(DataError, match="columns"):
        xstest(harm)
    with pytest.raises(DataError, match="labels"):
        xstest(write_csv(tmp_path / "odd.csv", [{"prompt": "p", "type": "t", "label": "odd"}]))
    with pytest.raises(DataError, match="group for every prompt"):
        type(both)("made", ("a",), ())


def test_items_are_spread_evenly() -> None:
    assert every(range(10), None) == list(range(10)) and every(range(3), 5) == [0, 1, 2]
    assert every(range(10), 3) == [0, 3, 6]
    with pytest.raises(InputError, match="limit: expected an int >= 1, got 0"):
        every(range(3), 0)


@pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not here: they lie beside the checkout")
def test_the_real_files(stories: SteerableModel) -> None:
    truthful = TruthfulQA.from_json(DATA / "truthfulqa" / "mc_task.json")
    assert (
        len(truthful.choices) == 817
        and len(TruthfulQA.from_json(DATA / "truthfulqa" / "mc_task.json", limit=6).choices) == 6
    )
    harm = harmbench(DATA / "harmbench" / "harmbench_behaviors_text_all.csv")
    assert len(harm.harmful) == 400 and len(set(harm.harmful_groups)) == 7
    contrasted = xstest(DATA / "xstest" / "xstest_prompts.csv", limit=3)
    whole = xstest(DATA / "xstest" / "xstest_prompts.csv")
    assert (len(whole.harmful), len(whole.harmless)) == (200, 250)
    few = TruthfulQA(truthful.choices[::200])
    for suite in (few, contrasted):
        found = evaluate(stories, {"none": None, "asked": Prompting("Once upon a time. ")}, suite, progress=False)
        for record in found.to_records():
            assert 0 <= record["value"] <= 1
    told = evaluate(stories, {"none": None, "asked": Prompting("Lily. ")}, few, progress=False)
    assert not torch.equal(told.items("none", "MC2"), told.items("asked", "MC2"))


# ----------------------------------------------------------------------------------------------------------- ablations


def test_every_ablation_lacks_its_part_and_keeps_the_rest(trained: dict[int, Activations]) -> None:
    own = trained[4]
    found = fit_ablations(own, rank=6, strength=1.5)
    whole = found.pop("whole")
    assert isinstance(whole, FineSteer)
    gate, experts, h = whole.gate_at(4), whole.experts_at(4), own.queries
    assert gate is not None and own.shifts is not None
    assert {one.strength for one in found.values()} == {1.5}
    assert found["no gate"].gate_at(4) is None
    for name in set(found) - {"no gate", "no cross-fitting"}:
        assert torch.equal(found[name].gate_at(4).gate(h), gate.gate(h)), name  # type: ignore[union-attr]
    assert torch.allclose(found["no experts"].vectors(4, h[:1]).vector, own.shifts.mean(dim=0), atol=1e-5)
    mixed = {name: one.experts_at(4) for name, one in found.items() if isinstance(one, FineSteer)}
    assert mixed["one expert"].n_experts == 1 < experts.n_experts
    assert torch.allclose(mixed["one expert"].prototypes[0], own.shifts.mean(dim=0), atol=1e-5)
    assert torch.equal(mixed["no residual"].vector(h), experts.parts(h).prototype_part)
    in_sample = found["no cross-fitting"].gate_at(4)
    assert float(in_sample.leaves[0].threshold) > float(gate.leaves[0].threshold)  # type: ignore[union-attr]
    assert torch.equal(mixed["no cross-fitting"].vector(h), experts.vector(h))
    trained, plain = mixed["trained"], mixed["trained, no routing loss"]
    assert plain.report is not None and trained.report is not None
    assert isinstance(trained.controller, Controller) and isinstance(experts.controller, QuadraticController)
    assert plain.report.prototype_share < trained.report.prototype_share - 0.1
    assert float(mixed["trained, unit prototypes"].prototypes.norm(dim=1).max()) <= 1 + 1e-5

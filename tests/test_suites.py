"""Suites in parts, and the two that say what steering costs: divergence on general prompts, and repetition."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fsteer_lens import evaluate, generate, tutor
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.evaluation import (
    GeneralKL,
    Prompting,
    RefusalSuite,
    Repetition,
    Suite,
    TruthfulQA,
    harmbench,
    xstest,
)
from fsteer_lens.evaluation.suites import Setting
from fsteer_lens.evaluation.truthfulness import Choice
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import answer_ids, pad, prompt_ids
from fsteer_lens.tutor import TutorSuite
from tests import made_up
from tests.running import logits_of

DATA = Path(__file__).parents[2] / "shared" / "data"
TOLD = tutor.data("safe")
PROMPTS = tuple(task.prompt for task in TOLD.general_valid[:5])
ANSWERS = ("the answer is five.", "look, i will not help.", "no.", "yes it is.", "five and two.")
GROUPS = ("sums", "facts", "sums", "facts", "sums")
KL = "−KL(steered ‖ unsteered) (nats per token)"
PAIR = (("yes.", True), ("no.", False))
QUESTIONS = TruthfulQA(tuple(Choice(f"question {number}", PAIR, PAIR) for number in range(6)))
REFUSALS = RefusalSuite("made", ("h0", "h1", "h2"), ("a", "b", "a"), ("s0", "s1"), ("x", "y"), ("no",), 7)


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("which", "wanted"),
    [
        (slice(2), [0, 1]),
        (slice(1, None, 2), [1, 3, 5]),
        ([4, 0], [4, 0]),
        ([-1], [5]),
        (np.array([2, 3]), [2, 3]),
        (torch.tensor([2, 3]), [2, 3]),
        ([True, False, False, False, False, True], [0, 5]),
        (torch.arange(6) > 3, [4, 5]),
        ((row for row in (1, 2)), [1, 2]),
    ],
)
def test_a_part_holds_the_items_that_were_asked_for(which: Any, wanted: list[int]) -> None:
    part = QUESTIONS[which]
    assert [choice.question for choice in part.choices] == [f"question {row}" for row in wanted]
    assert isinstance(part, TruthfulQA) and len(part) == len(wanted) and len(QUESTIONS) == 6
    assert all(measure.groups == ("all",) * len(wanted) for measure in part.measures)


def test_a_part_of_refusals_keeps_kinds_apart() -> None:
    assert len(REFUSALS) == 5
    part = REFUSALS[[4, 1, 2]]
    assert (part.harmful, part.harmful_groups) == (("h1", "h2"), ("b", "a"))
    assert (part.harmless, part.harmless_groups) == (("s1",), ("y",))
    assert (part.name, part.phrases, part.max_new_tokens) == ("made", ("no",), 7)
    assert [measure.name for measure in REFUSALS[:3].measures] == ["refused"]
    assert [measure.name for measure in REFUSALS[3:].measures] == ["not over-refused"]


def test_numbers_of_a_part_are_those_of_its_items(tutor_model: SteerableModel) -> None:
    """Every suite: what is measured on a part is what was measured on the whole, there."""
    steering = made_up.steering(strength=3.0)
    prompts = tuple(contrast.prompt for contrast in TOLD.test[:3])
    questions = TruthfulQA(
        tuple(Choice(prompt, (("five.", True), (answer, False)), (("five.", True), (answer, False)))
              for prompt, answer in zip(PROMPTS, ("no.", "yes it is.", "two.", "well.", "it is."), strict=True))
    )  # fmt: skip
    refusals = RefusalSuite("made", prompts, ("h",) * 3, PROMPTS[:2], ("s",) * 2, ("well", "the"), 8)
    for suite in (questions, refusals, GeneralKL(PROMPTS, ANSWERS, GROUPS), Repetition(PROMPTS, GROUPS, 8)):
        rows = [0, 3, 4]
        whole, part = (evaluate(tutor_model, {"it": steering}, one, progress=False) for one in (suite, suite[rows]))
        before = 0
        for measure in suite.measures:
            n = len(measure.groups)
            shift = before if isinstance(suite, RefusalSuite) else 0
            kept = [row - shift for row in rows if 0 <= row - shift < n]
            assert torch.allclose(whole.items("it", measure.name)[kept], part.items("it", measure.name), atol=1e-5), (
                suite
            )
            before += n


def test_parts_that_cannot_be_are_refused() -> None:
    for which, message in (
        (0, "a slice"),
        ("all", "a slice"),
        ([6], "in -6..5"),
        ([0.5], "row of a suite"),
        ([True], "a bool for each of 6"),
        (slice(9, None), "at least one of 6"),
        ([], "at least one of 6"),
    ):
        with pytest.raises(InputError, match=message):
            QUESTIONS[which]
    with pytest.raises(InputError, match="cannot be cut"):
        TutorSuite(limit=3)[:2]
    with pytest.raises(DataError, match="a group for every prompt"):
        RefusalSuite("made", (), ())


# ---------------------------------------------------------------------------------------------------------- divergence


def plain_kl(model: SteerableModel, steering: Any, told: str, bare: str, answer: list[int]) -> float:
    """Mean KL over an answer in float64, row by row, by the model's own forward."""
    logits = []
    for prompt, used in ((told, steering), (bare, None)):
        ids = prompt_ids(model, prompt)
        text = pad(model, [[*ids, *answer]], "right")
        if used is None:
            found = logits_of(model, text)
        else:
            with used.on(model, prompt_lengths=torch.tensor([len(ids)])):
                found = logits_of(model, text)
        logits.append(found[0, len(ids) - 1 : -1].double().log_softmax(-1))
    p, q = logits
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_general_kl_is_the_mean_over_answer_tokens(model: SteerableModel) -> None:
    steering = made_up.steering(strength=2.0)
    ids = [answer_ids(model, answer) for answer in ANSWERS]
    suite = GeneralKL(PROMPTS, (*ANSWERS[:3], tuple(ids[3]), tuple(ids[4])), GROUPS)
    methods = {"none": None, "steered": steering, "words": Prompting("look, ")}
    found = evaluate(model, methods, suite, batch_size=2, progress=False)
    assert found.items("none", KL).tolist() == [0.0] * 5
    pairs = list(zip(PROMPTS, ids, strict=True))
    wanted = [-plain_kl(model, steering, prompt, prompt, answer) for prompt, answer in pairs]
    assert found.items("steered", KL).tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    wanted = [-plain_kl(model, None, f"look, {prompt}", prompt, answer) for prompt, answer in pairs]
    assert found.items("words", KL).tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert found.items("steered", KL).max() < -1e-3 and found.items("words", KL).max() < -1e-3
    assert suite.measures[0].role == "utility" and suite.measures[0].kinds == ("facts", "sums")
    together = suite.measure_each(model, [steering, None, steering.with_strength(1.0)], Setting())
    alone = [suite.measure(model, one, Setting()) for one in (steering, None, steering.with_strength(1.0))]
    for (one,), (other,) in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    in_facts = float(found.items("steered", KL, "facts").mean())
    assert found.estimate("steered", KL, "facts").value == pytest.approx(in_facts)


def test_answers_are_the_bare_models_own(tutor_model: SteerableModel) -> None:
    handle = made_up.steering(strength=50.0).attach(tutor_model)
    suite = GeneralKL.answered_by(tutor_model, PROMPTS, GROUPS, max_new_tokens=6, progress=False)
    handle.detach()
    made = generate(tutor_model, PROMPTS, max_new_tokens=6, progress=False)
    assert suite.answers == tuple(one.tokens for one in made) and suite.prompts == PROMPTS
    with pytest.raises(DataError, match="an answer and a group for every prompt"):
        GeneralKL.answered_by(tutor_model, PROMPTS, GROUPS[:2], max_new_tokens=2, progress=False)
    with pytest.raises(InputError, match="at least one"):
        GeneralKL((), (), ())
    with pytest.raises(InputError, match="at least one token"):
        evaluate(tutor_model, {"none": None}, GeneralKL(PROMPTS[:1], ("",), ("x",)), progress=False)


# ---------------------------------------------------------------------------------------------------------- repetition


def test_repetition_is_that_of_the_answers(tutor_model: SteerableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [SimpleNamespace(tokens=tokens) for tokens in ((1, 2, 3, 4) * 3, (1, 2, 3, 4) * 2, range(9), (5,) * 6, ())]
    lengths = []

    def answers(*_: Any, max_new_tokens: int, **__: Any) -> list[Any]:
        lengths.append(max_new_tokens)
        return made

    monkeypatch.setattr("fsteer_lens.evaluation.fluency.generate", answers)
    for suite, length in ((Repetition(PROMPTS, GROUPS), 40), (Repetition(PROMPTS, max_new_tokens=9), 9)):
        found = evaluate(tutor_model, {"none": None}, suite, progress=False)
        assert found.items("none", "no repeated 4-gram").tolist() == [0, 1, 1, 0, 1] and lengths[-1] == length
    with pytest.raises(DataError, match="a group for each prompt"):
        Repetition(PROMPTS, GROUPS[:2])


# --------------------------------------------------------------------------------------------------------------- files


def test_harmbench_by_functional_category(tmp_path: Path) -> None:
    kinds = ("standard", "contextual", "copyright", "standard")
    path = tmp_path / "harm.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["Behavior", "FunctionalCategory", "SemanticCategory", "ContextString"])
        writer.writeheader()
        for number, kind in enumerate(kinds):
            row = {"Behavior": f"b{number}", "FunctionalCategory": kind, "SemanticCategory": "s", "ContextString": ""}
            writer.writerow(row)
    assert harmbench(path).harmful == ("b0", "b1", "b2", "b3")
    assert harmbench(path, functional="standard").harmful == ("b0", "b3")
    assert harmbench(path, functional=["copyright", "contextual"]).harmful == ("b1", "b2")
    assert harmbench(path, functional="standard", limit=1).harmful == ("b0",)
    for wrong in ("Standard", ["standard", "other"]):
        with pytest.raises(InputError, match="functional: expected one of"):
            harmbench(path, functional=wrong)
    path.write_text("Behavior,SemanticCategory,ContextString\nb,s,\n")
    assert harmbench(path).harmful == ("b",), "the column is asked for only where it is needed"
    with pytest.raises(DataError, match="FunctionalCategory"):
        harmbench(path, functional="standard")


@pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not here: they lie beside the checkout")
def test_parts_of_the_real_files() -> None:
    path = DATA / "harmbench" / "harmbench_behaviors_text_all.csv"
    sizes = {kind: len(harmbench(path, functional=kind)) for kind in ("standard", "contextual", "copyright")}
    assert sizes == {"standard": 200, "contextual": 100, "copyright": 100}
    suites: list[Suite] = [harmbench(path), xstest(DATA / "xstest" / "xstest_prompts.csv")]
    suites.append(TruthfulQA.from_json(DATA / "truthfulqa" / "mc_task.json"))
    assert [len(suite) for suite in suites] == [400, 450, 817]
    for suite in suites:
        halves = suite[::2], suite[1::2]
        assert sum(map(len, halves)) == len(suite)

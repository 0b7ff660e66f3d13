"""The attack against brute force, and the controls in which it must not succeed."""

import itertools

import pytest
import torch

from fsteer_lens import FineSteer, collect_queries, tutor
from fsteer_lens.errors import InputError
from fsteer_lens.evaluation.attacks import WORD, Attack, AttackReport, attack_gate
from fsteer_lens.evaluation.perturbations import gives_same_answer
from fsteer_lens.method.gates import Gate, oriented
from fsteer_lens.models import SteerableModel

WORDS = ["friend", "lemon", "tell", "seven"]


@pytest.fixture(scope="module")
def gate(steering: FineSteer) -> Gate:
    found = steering.gate_at(4)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [tutor.user_text(one.prompt) for one in tutor.data("safe").test[::60]]


def replayed(attack: Attack) -> str:
    text = attack.text
    for change in attack.substitutions:
        match = next(itertools.islice(WORD.finditer(text), change.place, None))
        assert match.group() == change.old
        text = text[: match.start()] + change.new + text[match.end() :]
    return text


def scores(model: SteerableModel, gate: Gate, texts: list[str]) -> torch.Tensor:
    h = collect_queries(model, [tutor.chat(text) for text in texts], layer=4, progress=False).queries
    return oriented(gate, h)


def test_one_step_finds_the_best_single_word(tutor_model: SteerableModel, gate: Gate, texts: list[str]) -> None:
    report = attack_gate(
        tutor_model, gate, texts, layer=4, words=WORDS, format=tutor.chat, budget=1, candidates=9, progress=False
    )
    for attack in report.attacks:
        tried = [
            attack.text[: match.start()] + word + attack.text[match.end() :]
            for match in WORD.finditer(attack.text)
            for word in WORDS
        ]
        assert attack.attacked_score == pytest.approx(float(scores(tutor_model, gate, tried).min()), abs=1e-4)
        assert attack.attacked in tried


def test_a_constraint_takes_the_best_of_what_it_allows(
    tutor_model: SteerableModel, gate: Gate, texts: list[str]
) -> None:
    """Every text of a prompt but its ten worst is forbidden: the search must look beyond the first few."""
    words = sorted(tutor.world.vocabulary())[::60]
    text = texts[0]
    tried = [text[: m.start()] + word + text[m.end() :] for m in WORD.finditer(text) for word in words]
    ordered = scores(tutor_model, gate, tried).sort()
    lower = int((ordered.values < scores(tutor_model, gate, [text])[0] - 1e-4).sum())
    assert lower > 30
    allowed = {tutor.chat(tried[int(at)]) for at in ordered.indices[lower - 10 : lower]}
    report = attack_gate(
        tutor_model,
        gate,
        [text],
        layer=4,
        words=words,
        format=tutor.chat,
        keeps=lambda texts, prompts: [prompt in allowed for prompt in prompts],
        budget=1,
        candidates=len(words),
        progress=False,
    )
    assert report.attacks[0].attacked_score == pytest.approx(float(ordered.values[lower - 10]), abs=1e-4)
    assert report.attacks[0].kept


def test_what_is_reported_holds_of_the_attacked_texts(
    tutor_model: SteerableModel, gate: Gate, texts: list[str]
) -> None:
    told = tutor.data("safe").test[::60]
    keeps = gives_same_answer(tutor_model, {tutor.user_text(one.prompt): one.undesired for one in told})
    words = sorted(tutor.world.vocabulary())
    report = attack_gate(
        tutor_model, gate, texts, layer=4, words=words, format=tutor.chat, keeps=keeps, budget=2, progress=False
    )
    found = scores(tutor_model, gate, [attack.attacked for attack in report.attacks])
    h = collect_queries(tutor_model, [tutor.chat(a.attacked) for a in report.attacks], layer=4, progress=False).queries
    assert [attack.shut for attack in report.attacks] == (gate.gate(h) < 0.5).tolist()
    assert torch.allclose(torch.tensor([attack.attacked_score for attack in report.attacks]), found, atol=1e-4)
    for attack in report.attacks:
        assert attack.opened and attack.kept and replayed(attack) == attack.attacked
        assert 1 <= len(attack.substitutions) <= 2 and attack.attacked_score < attack.score
    assert report.succeeded.value >= 0.8  # one word in the right place is enough: a gate is no security boundary
    assert report.succeeded == report.shut and "succeeded" in repr(report)
    assert report.to_records()[0]["substitutions"][0]["new"] in words
    again = attack_gate(
        tutor_model, gate, texts, layer=4, words=words, format=tutor.chat, keeps=keeps, budget=2, progress=False
    )
    assert again == report


def test_controls_in_which_nothing_may_succeed(tutor_model: SteerableModel, gate: Gate, texts: list[str]) -> None:
    options = {"layer": 4, "words": WORDS, "format": tutor.chat, "budget": 2, "candidates": 4, "progress": False}

    def never(texts: list[str], prompts: list[str]) -> list[bool]:
        return [False] * len(prompts)

    held = attack_gate(tutor_model, gate, texts, keeps=never, **options)  # pyright: ignore[reportArgumentType]
    assert held.succeeded.hits == held.shut.hits == 0
    assert all(attack.attacked == attack.text and not attack.substitutions for attack in held.attacks)
    free = attack_gate(tutor_model, gate, texts, keeps=never, constrained=False, **options)  # pyright: ignore
    assert free.shut.hits > 0 == free.succeeded.hits
    blind = attack_gate(tutor_model, gate, texts, **options)  # pyright: ignore[reportArgumentType]
    assert blind.succeeded == blind.shut == free.shut and blind.attacks[0].kept is None

    class Fixed(Gate):
        def __init__(self, value: float, flat: bool = False) -> None:
            self.value, self.flat = value, flat

        def gate(self, h: torch.Tensor) -> torch.Tensor:
            return h.new_full(h.shape[:-1], self.value)

        def score(self, h: torch.Tensor) -> torch.Tensor:
            return h.new_zeros(h.shape[:-1]) if self.flat else oriented(gate, h)

    assert attack_gate(tutor_model, Fixed(1.0), texts, **options).shut.hits == 0  # pyright: ignore[reportArgumentType]
    closed = Fixed(0.0)
    left = attack_gate(tutor_model, closed, texts, **options)  # pyright: ignore[reportArgumentType]
    assert all(attack.attacked == attack.text and not attack.opened for attack in left.attacks)
    assert left.shut is None and left.succeeded is None and repr(left) == "AttackReport(shut 0, succeeded 0 of 0 open)"
    constant = Fixed(1.0, flat=True)  # a flat score gives nothing to go down
    assert not any(a.substitutions for a in attack_gate(tutor_model, constant, texts, **options).attacks)  # pyright: ignore


def test_shares_count_open_prompts_alone() -> None:
    def one(opened: bool, shut: bool, kept: bool | None) -> Attack:
        return Attack("a", "b", (), 1.0, 0.0, opened, shut, kept)

    report = AttackReport(
        (one(True, True, True), one(True, True, False), one(True, False, True), one(False, True, True)), 3
    )
    assert (report.shut.hits, report.succeeded.hits, report.shut.total, report.succeeded.total) == (2, 1, 3, 3)


def test_an_attack_needs_prompts_words_and_a_budget(tutor_model: SteerableModel, gate: Gate) -> None:
    good = {"layer": 4, "words": WORDS, "format": tutor.chat, "progress": False}
    for prompts, change in (
        ([], {}),
        ("how?", {}),
        (["how?"], {"words": []}),
        (["how?"], {"budget": 0}),
        (["how?"], {"candidates": 0}),
    ):
        with pytest.raises(InputError, match=r"prompts|words|budget|candidates"):
            attack_gate(tutor_model, gate, prompts, **{**good, **change})  # pyright: ignore[reportArgumentType]

"""Scoring given answers under several methods: passes that share what is the same, against plain ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.measuring import Kept, Ratio, Row, Section, Settings, compare
from fsteer_lens import FineSteer, evaluate, models
from fsteer_lens.evaluation import TruthfulQA
from fsteer_lens.evaluation.truthfulness import Choice
from fsteer_lens.hooks import HookObject
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.run.answer_passes import Answered
from fsteer_lens.run.teacher_forcing import (
    answer_divergences,
    answer_logits,
    answered,
    batches,
    divergences,
    known_logprobs,
    session_for,
)

BATCH = 16
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)


def run(settings: Settings) -> Section:
    """Time and values against plain passes, of multiple choice and of a round of `calibrate`, on every class."""
    shape, questions = ("tiny", 2) if settings.quick else ("gpt2-small", 4)
    suite, rows = choices(shape, questions), texts(shape, questions)
    told: list[Row] = []
    for kind in models.available_kinds():
        model, name = shapes.model(shape, kind, settings.device), models.CLASS_NAMES[kind]
        steering = shapes.steering(model.cfg.d_model, model.cfg.n_layers // 2, settings.device)
        rounds = settings.rounds_or(2)
        for what, ratio, error in (
            ("MC1 and MC2 of the bare model and three methods", *choosing(model, steering, suite, rounds)),
            ("KL at eight strengths", *costing(model, steering, rows, rounds)),
        ):
            note = f"Largest difference {error:.1e}."
            told.append(Row(f"{name}, {what}", "plain passes / ours", ratio, note=note))
    text = f"""
{questions} questions of random words, 20 to 40 tokens with six answers of 5 to 15 to each, and as many texts of 20 to
40 tokens with answers of 32, {shape} shape with random weights; steered half way up. Plain passes run every answer with
its prompt, whole and once for each method, with logits at every position. `evaluate` and `calibrate` run a prompt once
for its answers, the layers below the steered one once for all methods, and the model's head where a token of an answer
is predicted.
""".strip()
    return Section("Scoring answers", text, tuple(told))


def choosing(
    model: Any, steering: FineSteer, suite: TruthfulQA, rounds: int, *, chat: bool = False
) -> tuple[Ratio, float]:
    """How many times as fast `evaluate` is on multiple choice, and the largest difference of an MC2."""
    methods = {"none": None, **{f"at {by:g}": steering.with_strength(by) for by in (0.5, 1.0, 2.0)}}
    ours = Kept(lambda: evaluate(model, methods, suite, chat=chat, progress=False))
    plain = Kept(lambda: plain_mc2(model, suite, list(methods.values()), chat=chat))
    ratio = compare(plain, ours, rounds=rounds, warmup=0).inverse
    pairs = zip(methods, plain.value, strict=True)
    return ratio, max(float((ours.value.items(name, "MC2") - one).abs().max()) for name, one in pairs)


def costing(model: Any, steering: FineSteer, rows: Sequence[Answered], rounds: int) -> tuple[Ratio, float]:
    """How many times as fast a round of `calibrate` is, and the largest difference of a KL."""
    variants = [steering.with_strength(strength) for strength in STRENGTHS]
    ours = Kept(lambda: answer_divergences(model, rows, variants, batch_size=BATCH))
    plain = Kept(lambda: plain_divergences(model, rows, variants))
    ratio = compare(plain, ours, rounds=rounds, warmup=0).inverse
    pairs = zip(ours.value, plain.value, strict=True)
    return ratio, max(float((torch.cat(mine) - torch.cat(other)).abs().max()) for mine, other in pairs)


def plain_logits(model: Any, rows: Sequence[Answered], hook_object: HookObject | None) -> list[Tensor]:
    """Logits of the answers, every one of which is run with its prompt."""
    found: dict[int, Tensor] = {}
    for chosen, batch in batches(model, rows, BATCH):
        group = [rows[index] for index in chosen]
        session = None if hook_object is None else session_for(model, batch, group, hook_object)
        found |= zip(chosen, answer_logits(model, batch, group, session), strict=True)
    return [found[index] for index in range(len(rows))]


def plain_mc2(
    model: Any, suite: TruthfulQA, methods: Sequence[HookObject | None], *, chat: bool = False
) -> list[Tensor]:
    """MC2 of every question under each method."""
    found = []
    for method in methods:
        around, space = ("{}", "") if chat else ("Q: {}\nA:", " ")
        prompts = [around.format(choice.question) for choice in suite.choices for _ in choice.mc2]
        answers = [space + text for choice in suite.choices for text, _ in choice.mc2]
        rows = answered(model, prompts, answers, Passes(chat=chat))
        logits = plain_logits(model, rows, method)
        scores = [known_logprobs(one, row.answer).double().sum() for one, row in zip(logits, rows, strict=True)]
        shares = torch.stack(scores).cpu().reshape(len(suite.choices), -1).softmax(dim=1)
        true = torch.tensor([[true for _, true in choice.mc2] for choice in suite.choices])
        found.append((shares * true).sum(dim=1).float())
    return found


def plain_divergences(model: Any, rows: Sequence[Answered], hook_objects: Sequence[HookObject]) -> list[list[Tensor]]:
    """KL(steered ‖ unsteered) at every token of each answer, under each hook object."""
    base = plain_logits(model, rows, None)
    return [
        [divergences(*pair) for pair in zip(plain_logits(model, rows, one), base, strict=True)] for one in hook_objects
    ]


def choices(shape: str, count: int) -> TruthfulQA:
    """Questions of random words, each with six answers, two of them true and all of one length: of random words the
    longer answer is always the less likely."""
    generator = torch.Generator().manual_seed(0)

    def words(length: int) -> str:
        drawn = torch.randint(1, shapes.SHAPES[shape]["vocab_size"], (length,), generator=generator)
        return " ".join(f"w{number}" for number in drawn.tolist())

    made = []
    for number in range(count):
        answers = tuple((words(5 + 10 * number // count), place < 2) for place in range(6))
        made.append(Choice(words(20 + 20 * number // count), answers[1:], answers))
    return TruthfulQA(tuple(made))


def texts(shape: str, count: int) -> list[Answered]:
    """Random tokens: prompts of 20 to 40 with answers of 32."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = shapes.SHAPES[shape]["vocab_size"]

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, vocabulary, (length,), generator=generator).tolist())

    return [Answered(ids(20 + 20 * number // count), ids(32)) for number in range(count)]

"""Measuring methods side by side on the tutor's test prompts.

An answer counts as right where it is exactly the wanted one, letter by letter: the tutor's world is small enough for
that. Every share comes with a 95 % Wilson interval; two methods are compared prompt by prompt, with a paired bootstrap.
"""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from fsteer_lens import tutor
from fsteer_lens.effects import Knockout, RoutingReport, expert_knockout, routing_report
from fsteer_lens.errors import InputError
from fsteer_lens.evaluation.suites import WANTED
from fsteer_lens.ground.estimates import Estimate, Proportion, auroc, bootstrap
from fsteer_lens.method.gates import OPEN
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.contrasts import Contrast
from fsteer_lens.reading.activations import Activations, collect, collect_queries
from fsteer_lens.run.generation import Generations, generate
from fsteer_lens.steering.baselines import fit_mean_shift
from fsteer_lens.steering.steering import FineSteer, Steering
from fsteer_lens.tutor import Task, TutorData, world

Item = TypeVar("Item")

MAX_NEW_TOKENS = 32
BATCH_SIZE = 128

NO_STEERING = "no steering"
TAG = "tag in the prompt"
MEAN_SHIFT = "mean shift"
GATED_MEAN_SHIFT = "mean shift, gated"
UNGATED = "MoSE, no gate"
PAPER = 'FineSteer, preset="paper"'
DEFAULT = "FineSteer, default"
METHODS = (NO_STEERING, TAG, MEAN_SHIFT, GATED_MEAN_SHIFT, UNGATED, PAPER, DEFAULT)


@dataclass(frozen=True, eq=False)
class MethodRow:
    """What one method did on the test prompts.

    Attributes:
        name: of the method.
        measures: shares by name; a measure that the method does not have is missing.
        routing: how the experts routed the test contrasts; None for methods without experts.
        seconds: of generating all answers.
        right: which test contrasts got exactly the wanted answer, [n].
        answers: the generated answers to the test contrasts.
    """

    name: str
    measures: Mapping[str, Proportion]
    routing: RoutingReport | None
    seconds: float
    right: Bool[Tensor, " n"]
    answers: Generations


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods side by side on one behaviour of the tutor.

    Attributes:
        behaviour: "safe" or "honest".
        rows: one per method, in the order of the table.
        steering: FineSteer as it is by default, and `paper` as published.
        contrasts, general, near_misses: the test prompts.
        queries: activations of these three at the steered layer, by name.
        seed: of the controllers.
    """

    behaviour: str
    rows: tuple[MethodRow, ...]
    steering: FineSteer
    paper: FineSteer
    contrasts: Sequence[Contrast]
    general: Sequence[Task]
    near_misses: Sequence[Task]
    queries: Mapping[str, Activations]
    seed: int

    def row(self, name: str) -> MethodRow:
        """The row of one method."""
        return next(row for row in self.rows if row.name == name)

    def difference(self, first: str, second: str) -> Estimate:
        """Share of right answers of `first` minus `second`, paired over the test contrasts."""
        return bootstrap(self.row(first).right.double() - self.row(second).right.double(), seed=self.seed)

    @property
    def auroc(self) -> float:
        """AUROC of the energy ratio at the gate's rank: test contrasts against general prompts and near misses."""
        gate = self.steering.gate_at(self.steering.layers[0])
        assert gate is not None
        scores = {name: gate.score(one.queries) for name, one in self.queries.items()}
        return float(auroc(scores["contrasts"], torch.cat([scores["general"], scores["near misses"]])))


def compare_on_tutor(
    model: SteerableModel,
    behaviour: str = "safe",
    *,
    seed: int = 0,
    limit: int | None = None,
    only: Sequence[str] | None = None,
    progress: bool = True,
) -> Comparison:
    """Fit every method on the tutor's training split and measure it on its test split.

    Args:
        model: the tutor.
        behaviour: "safe" or "honest".
        seed: of the controllers' training.
        limit: take at most so many of the contrasts, of the general prompts and of the near misses, always the same
            ones; None takes all.
        only: names of the methods to measure; None measures all of `METHODS`.
        progress: show progress bars.

    Raises:
        InputError: an unknown behaviour or method.
    """
    unknown = set(only or ()) - set(METHODS)
    if unknown:
        raise InputError("methods", expected=f"names among {METHODS}", got=sorted(unknown))
    told = tutor.data(behaviour)
    contrasts = _spread(told.test, limit)
    general, near = _spread(told.general_test, limit), _spread(told.near_miss_test, limit)
    trained = tutor.activations(model, behaviour, progress=progress)
    default = tutor.fit(model, behaviour, activations=trained, seed=seed, progress=progress)
    paper = tutor.fit(model, behaviour, "paper", activations=trained, seed=seed, progress=progress)
    gate = default.gate_at(trained.layer)
    scope = default.scope
    mean = fit_mean_shift(trained, scope=scope, strength=default.strength)
    gated_mean = fit_mean_shift(trained, gate=gate, scope=scope, strength=default.strength)
    steerings = (None, None, mean, gated_mean, default.with_gate(None), paper, default)
    methods: dict[str, Steering | None] = dict(zip(METHODS, steerings, strict=True))
    tested = collect(
        model, contrasts, layer=trained.layer, shift="last_prompt", batch_size=BATCH_SIZE, progress=progress
    )
    queries = {"contrasts": tested}
    for name, tasks in (("general", general), ("near misses", near)):
        prompts = [task.prompt for task in tasks]
        queries[name] = collect_queries(model, prompts, layer=trained.layer, batch_size=BATCH_SIZE, progress=progress)
    rows = [
        _measure(model, name, steering, told, contrasts, general, near, tested, progress)
        for name, steering in methods.items()
        if only is None or name in only
    ]
    return Comparison(behaviour, tuple(rows), default, paper, contrasts, general, near, queries, seed)


def _spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, drawn once and for all, in their order."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[index] for index in sorted(random.Random(0).sample(range(len(items)), limit))]


def _measure(
    model: SteerableModel,
    name: str,
    steering: Steering | None,
    told: TutorData,
    contrasts: Sequence[Contrast],
    general: Sequence[Task],
    near: Sequence[Task],
    tested: Activations,
    progress: bool,
) -> MethodRow:
    tagged = name == TAG

    def answer(prompts: Sequence[str]) -> Generations:
        tag = tutor.BEHAVIOURS[told.behaviour] if tagged else ""
        return generate(
            model,
            [tag + prompt for prompt in prompts],
            steering,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=BATCH_SIZE,
            progress=progress,
        )

    start = time.perf_counter()
    steered = answer([str(contrast.prompt) for contrast in contrasts])
    kept, missed = (answer([task.prompt for task in tasks]) for tasks in (general, near))
    seconds = time.perf_counter() - start
    right = torch.tensor([a.text == c.preferred for a, c in zip(steered, contrasts, strict=True)])
    new = [told.heldout(contrast) for contrast in contrasts]
    wanted = WANTED[told.behaviour]
    measures = {wanted: _share(right)}
    for kind, what in (("pair", "new pairs"), ("template", "new templates")):
        measures[f"{wanted}, {what}"] = _share(right[torch.tensor([one == kind for one in new])])
    if told.behaviour == "safe":
        refusals = set(world.REFUSALS.values())
        measures["any refusal"] = _share(torch.tensor([a.text in refusals for a in steered]))
    for what, texts, tasks in (("benign kept", kept, general), ("near misses kept", missed, near)):
        measures[what] = _share(torch.tensor([a.text == task.answer for a, task in zip(texts, tasks, strict=True)]))
    if steering is not None and steering.gate_at(steering.layers[0]) is not None:
        layer = steering.layers[0]
        for what, texts in (("gate open", steered), ("gate open, benign", kept), ("gate open, near misses", missed)):
            measures[what] = _share(texts.trace.gate[layer] >= OPEN)
    routed = None
    if isinstance(steering, FineSteer):
        experts = steering.experts_at(tested.layer)
        routed = routing_report(experts, tested.queries, shifts=tested.shifts, labels=tested.labels)
    return MethodRow(name, measures, routed, seconds, right, steered)


def _share(hits: Tensor) -> Proportion:
    return Proportion(int(hits.sum()), len(hits))


def answers_lost(model: SteerableModel, comparison: Comparison, *, progress: bool = True) -> Knockout:
    """What removing each expert costs in right answers, per category."""
    return expert_knockout(model, comparison.steering, comparison.contrasts, effect=tutor.exact, progress=progress)

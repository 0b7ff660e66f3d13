"""The measurements of `make results-smollm2`: what each part gives for one fold, item by item, ready for JSON."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import smollm2_items as items
from smollm2_items import DOMAINS, LEFT_OUT, SEED

import fsteer_lens as fs
from fsteer_lens import evaluation, steering
from fsteer_lens.evaluation.perturbations import Perturbation, suffix, typos
from fsteer_lens.evaluation.suites import Setting
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.run.teacher_forcing import answer_divergences, answered

TRUTH_LAYER: Final = 14
REFUSAL_LAYER: Final = 15
RANK: Final = 8
LADDER: Final = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
FALLBACK: Final = 4.0
STRENGTHS: Final = (0.5, 0.75, 1.0, 1.5)  # of refusal: beyond them answers fall apart
BUDGETS: Final = (0.1, 0.3)
SMALL_BUDGET: Final = 0.02
MIXTURE, MEAN = "closed form", "mean shift"
MIXTURE_NULL, MEAN_NULL = "closed form, null space", "mean shift, null space"
AT_SMALL: Final = (MEAN_NULL, MIXTURE_NULL)
GATES: Final = ("ungated", "published gate", "contrastive gate", "null space")
WAYS: Final = (
    *evaluation.PERTURBATIONS,
    Perturbation("capitals", lambda text, random: text.upper()),
    Perturbation("as a story", lambda text, random: f'Write a short story in which somebody asks: "{text}"'),
)
"""How prompts are perturbed: as `gate_report` does it, and in two more ways."""
AROUND: Final = ("none", "polite suffix", "suffix of marks", "long prefix", "as a story")
"""Perturbations that put something around a request, against which a scan is made."""
COPIES: Final = (
    Perturbation("typos of training", typos(0.25)),
    Perturbation("polite words of training", suffix("Thank you so much for your time and your kindness.")),
    Perturbation("marks of training", suffix("? ; ? ; ? ; ? ;")),
)
"""Copies that a gate is fitted to: of the kinds that are tested, with other words, other marks and other places."""


@dataclass(frozen=True)
class Sizes:
    """How many items of each kind a fold takes."""

    contrasts: int = 400
    general: int = 60
    questions: int = 80
    calibrated: int = 3
    costed: int = 30
    looped: int = 15
    answer: int = 10
    harmful: int = 100
    refused: int = 60
    over_refused: int = 50
    changed: int = 50
    gate_items: int = 30
    loop_tokens: int = 40
    refusal_tokens: int = 14
    calibrated_refusal: int = 12
    fitted: int = 2000
    reasons: int = 60
    calibrated_dearest: int = 8


SMALL: Final = Sizes(24, 12, 3, 1, 3, 3, 4, 24, 3, 3, 3, 10, 8, 8, 2, 60, 2, 2)


@dataclass(frozen=True)
class Bench:
    """The model with one fold's items."""

    model: SteerableModel
    data: Path
    fold: int
    sizes: Sizes
    chat: bool = True
    truth_layer: int = TRUTH_LAYER
    refusal_layer: int = REFUSAL_LAYER

    @property
    def options(self) -> dict[str, Any]:
        """How prompts become tokens."""
        return {"chat": self.chat, "progress": False}

    @property
    def setting(self) -> Setting:
        """The same for suites."""
        return Setting(None, Passes(**self.options))

    def queries(self, by_label: Mapping[str, Sequence[str]], layer: int) -> fs.Activations:
        """Queries of prompts with their domains as labels."""
        prompts = [prompt for given in by_label.values() for prompt in given]
        labels = [label for label, given in by_label.items() for _ in given]
        return fs.collect_queries(self.model, prompts, layer=[layer], labels=labels, **self.options)[layer]

    def answers(self, prompts: Sequence[str], method: HookObject | None, tokens: int) -> list[fs.Generation]:
        """Greedy answers."""
        return list(fs.generate(self.model, list(prompts), method, max_new_tokens=tokens, **self.options))


def some(known: Mapping[str, Sequence[str]], n: int, start: int = 0, names: Iterable[str] = DOMAINS) -> dict[str, Any]:
    """Prompts of some domains."""
    return {name: known[name][start : start + n] for name in names}


# ------------------------------------------------------------------------------------------------------ truthfulness


def truthful_methods(bench: Bench, own: fs.Activations, general: fs.Activations) -> dict[str, steering.Steering]:
    """Every method, fitted and without a gate but the null space."""
    old = fs.fit(own, preset="0.1", seed=SEED).with_gate(None)
    mixed = fs.fit(own, null_space=general, seed=SEED)
    null = mixed.gate_at(bench.truth_layer)
    return {
        MEAN: steering.fit_mean_shift(own),
        "PCA direction": steering.fit_pca_direction(own),
        "nearest centroid": steering.fit_nearest_centroid(own, old.experts_at(bench.truth_layer)),
        "ridge": steering.fit_ridge(own, seed=SEED),
        "AlphaSteer": steering.fit_null_space(own, general.queries),
        "default of 0.1": old,
        "published": fs.fit(own, preset="paper", seed=SEED).with_gate(None),
        MIXTURE: mixed.with_gate(None),
        MEAN_NULL: steering.fit_mean_shift(own, gate=null),
        MIXTURE_NULL: mixed,
    }


def divergences(bench: Bench, prompts: Sequence[str], methods: Sequence[HookObject]) -> list[list[float]]:
    """Mean KL per answer token to the bare model's own answers, of every prompt under every method."""
    said = [list(one.tokens) for one in bench.answers(prompts, None, bench.sizes.answer)]
    rows = answered(bench.model, bench.setting.ids(bench.model, prompts), said, bench.setting.passes)
    return [
        [float(one.mean()) for one in found] for found in answer_divergences(bench.model, rows, methods, beyond=True)
    ]


def strength_at(budget: float, costs: Sequence[float]) -> float | None:
    """Strength at which the cost is `budget`, on straight lines between logarithms; None where no strength costs it.

    Below the ladder the cost is taken to grow with the square of the strength.
    """
    for place, cost in enumerate(costs):
        if cost < budget:
            continue
        if place == 0:
            return LADDER[0] * math.sqrt(budget / cost)
        below = max(costs[place - 1], 1e-9)
        if math.isinf(cost):
            return LADDER[place - 1]
        share = math.log(budget / below) / math.log(cost / below)
        return LADDER[place - 1] * (LADDER[place] / LADDER[place - 1]) ** share
    return None


def truthfulness(bench: Bench) -> dict[str, Any]:
    """MC1, MC2, loops and costs of every method at every budget."""
    sizes, layer = bench.sizes, bench.truth_layer
    train, test = items.sides(bench.data, bench.fold)
    contrasts = train.contrasts[: sizes.contrasts]
    own = fs.collect(bench.model, contrasts, layer=[layer], **bench.options)[layer]
    methods = truthful_methods(bench, own, bench.queries(some(train.general, sizes.general), layer))
    calibration = some(test.general, sizes.calibrated, sizes.costed)
    prompts = [prompt for given in calibration.values() for prompt in given]
    ladder = [method.with_strength(strength) for method in methods.values() for strength in LADDER]
    costs = [sum(row) / len(row) for row in divergences(bench, prompts, ladder)]
    curves = {name: costs[len(LADDER) * at : len(LADDER) * (at + 1)] for at, name in enumerate(methods)}
    settings: dict[str, tuple[str, float]] = {"unsteered": ("unsteered", 0.0)}
    chosen: list[dict[str, Any]] = []
    for name in methods:
        fallback = FALLBACK
        for budget in (*((SMALL_BUDGET,) if name in AT_SMALL else ()), *BUDGETS):
            found = strength_at(budget, curves[name])
            strength = fallback if found is None else found
            fallback = max(fallback, strength)
            key = f"{name} at {strength:.6g}"
            settings[key] = (name, strength)
            chosen.append(
                {"method": name, "budget": budget, "strength": strength, "below": found is None, "setting": key}
            )
    hooks = [None if name == "unsteered" else methods[name].with_strength(at) for name, at in settings.values()]
    return {
        "curves": curves,
        "chosen": chosen,
        "items": dict(zip(settings, effects_and_costs(bench, test, hooks), strict=True)),
        "experts": {
            name: one.experts_at(layer).n_experts
            for name, one in methods.items()
            if isinstance(one, fs.FineSteer) and name != MIXTURE_NULL
        },
    }


def null_spaces(bench: Bench) -> dict[str, Any]:
    """What steering in the null space does at the strength at which its dearest domain costs the smallest budget."""
    sizes, layer = bench.sizes, bench.truth_layer
    train, test = items.sides(bench.data, bench.fold)
    own = fs.collect(bench.model, train.contrasts[: sizes.contrasts], layer=[layer], **bench.options)[layer]
    mixed = fs.fit(own, null_space=bench.queries(some(train.general, sizes.general), layer), seed=SEED)
    methods = {MEAN_NULL: steering.fit_mean_shift(own, gate=mixed.gate_at(layer)), MIXTURE_NULL: mixed}
    chosen: list[dict[str, Any]] = []
    hooks: dict[str, HookObject | None] = {"unsteered": None}
    for name, method in methods.items():
        ladder = [method.with_strength(strength) for strength in LADDER]
        by_domain = [
            [sum(row) / len(row) for row in divergences(bench, prompts, ladder)]
            for prompts in some(test.general, sizes.calibrated_dearest, sizes.costed).values()
        ]
        found = strength_at(SMALL_BUDGET, [max(costs) for costs in zip(*by_domain, strict=True)])
        strength = FALLBACK if found is None else found
        hooks[name] = method.with_strength(strength)
        chosen.append(
            {"method": name, "budget": SMALL_BUDGET, "strength": strength, "below": found is None, "setting": name}
        )
    measured = effects_and_costs(bench, test, list(hooks.values()))
    return {"chosen": chosen, "items": dict(zip(hooks, measured, strict=True))}


def effects_and_costs(bench: Bench, test: items.Items, hooks: Sequence[HookObject | None]) -> list[dict[str, Any]]:
    """Of each steering: what it does to TruthfulQA's questions, how often it loops, and what it costs by domain."""
    sizes = bench.sizes
    suite = evaluation.TruthfulQA.from_json(bench.data / "truthfulqa" / "mc_task.json")
    places = {choice.question: row for row, choice in enumerate(suite.choices)}
    asked = [str(one.prompt) for one in test.contrasts]
    rows = [places[question] for question in asked[: sizes.questions]]
    scores = suite[rows].measure_each(bench.model, hooks, bench.setting)
    others = asked[sizes.questions : sizes.questions + sizes.looped]
    found: list[dict[str, Any]] = []
    for hook, (mc1, mc2) in zip(hooks, scores, strict=True):
        loops = [float(evaluation.repeats(one.tokens)) for one in bench.answers(others, hook, sizes.loop_tokens)]
        found.append({"MC1": mc1.tolist(), "MC2": mc2.tolist(), "loops": loops, "KL": {}})
    for name, prompts in some(test.general, sizes.costed, names=(*DOMAINS, LEFT_OUT)).items():
        steered = [hook for hook in hooks if hook is not None]
        for one, costs in zip(found[1:], divergences(bench, prompts, steered), strict=True):
            one["KL"][name] = costs
    return found


# ----------------------------------------------------------------------------------------------------------- refusal


def refusal_contrasts(prompts: Iterable[str]) -> list[fs.Contrast]:
    """Requests, each with the same refusal and the same consent."""
    return [fs.Contrast(one, items.REFUSED, items.COMPLIED) for one in prompts]


def refusal_activations(bench: Bench, train: items.Items) -> tuple[fs.Activations, dict[str, Any]]:
    """Of harmful requests, and of those to be left alone by what they are there for."""
    sizes, layer = bench.sizes, bench.refusal_layer
    contrasts = refusal_contrasts(train.harmful[: sizes.harmful])
    own = fs.collect(bench.model, contrasts, layer=[layer], **bench.options)[layer]
    return own, {
        "general": bench.queries(plain_of(train, sizes.general), layer),
        "near_misses": bench.queries(some(train.general, sizes.general, names=("XSTest-safe", "imperatives")), layer),
    }


def most_refusing(bench: Bench, method: Any, prompts: Sequence[str]) -> float:
    """The smallest strength at which most of these are refused."""
    said = {one: bench.answers(prompts, method.with_strength(one), bench.sizes.refusal_tokens) for one in STRENGTHS}
    return max(STRENGTHS, key=lambda one: (sum(evaluation.refuses(answer.text) for answer in said[one]), -one))


def plain_of(side: items.Items, n: int, start: int = 0) -> dict[str, Any]:
    """GSM8K and TruthfulQA, which are like no harmful request."""
    questions = [str(one.prompt) for one in side.contrasts]
    return some({**side.general, "TruthfulQA": questions}, n, start, ("GSM8K", "TruthfulQA"))


def refusal(bench: Bench) -> dict[str, Any]:
    """Refusals and changed answers of the mixture and of one vector behind each gate."""
    sizes, layer = bench.sizes, bench.refusal_layer
    train, test = items.sides(bench.data, bench.fold)
    own, alone = refusal_activations(bench, train)
    whole = fs.fit(own, **alone, read="mean", seed=SEED)
    gates: dict[str, fs.Gate | None] = {
        "ungated": None,
        "published gate": fs.fit_gate(own.queries, kind="quantile", rank=RANK, folds=None, cdf="step", layer=layer),
        "contrastive gate": whole.gate_at(layer),
        "null space": fs.fit(
            own, null_space=alone["general"] + alone["near_misses"], experts=whole.experts_at(layer), seed=SEED
        ).gate_at(layer),
    }
    tried = test.harmful[sizes.refused : sizes.refused + sizes.calibrated_refusal]
    strengths = {
        MIXTURE: most_refusing(bench, whole.with_gate(None), tried),
        MEAN: most_refusing(bench, steering.fit_mean_shift(own), tried),
    }
    methods: dict[str, HookObject | None] = {"unsteered": None}
    for gate, fitted in gates.items():
        methods[f"{MIXTURE}, {gate}"] = whole.with_gate(fitted).with_strength(strengths[MIXTURE])
        methods[f"{MEAN}, {gate}"] = steering.fit_mean_shift(own, gate=fitted, strength=strengths[MEAN])
    harmful, safe = test.harmful[: sizes.refused], test.general["XSTest-safe"][: sizes.over_refused]
    sums = test.general["GSM8K"][: sizes.changed]
    bare = [one.text for one in bench.answers(sums, None, sizes.refusal_tokens)]
    found = {}
    for name, method in methods.items():
        said = bench.answers([*harmful, *safe, *sums], method, sizes.refusal_tokens)
        refused = [float(evaluation.refuses(one.text)) for one in said]
        changed = [float(one.text != text) for one, text in zip(said[-len(sums) :], bare, strict=True)]
        found[name] = {
            "HarmBench": refused[: len(harmful)],
            "XSTest-safe": refused[len(harmful) : -len(sums)],
            "GSM8K": changed,
        }
    return {"items": found, "strengths": strengths, "experts": whole.experts_at(layer).n_experts}


# ------------------------------------------------------------------------------------------------------------- gates


def gates_of(bench: Bench, train: items.Items) -> dict[str, fs.Gate]:
    """The gates of the table, all fitted to the same prompts."""
    layer = bench.refusal_layer
    own, alone = refusal_activations(bench, train)
    means = {name: one.reading("mean").queries for name, one in alone.items()}
    harmful = own.reading("mean").queries
    last: Any = {"layer": layer, **{name: one.queries for name, one in alone.items()}}
    mean: Any = {"layer": layer, "read": "mean", **means}
    copies = {
        "queries": copies_of(bench, train.harmful[: bench.sizes.harmful]),
        "general": copies_of(bench, flat(plain_of(train, bench.sizes.general))),
        "near_misses": copies_of(
            bench, flat(some(train.general, bench.sizes.general, names=("XSTest-safe", "imperatives")))
        ),
    }
    return {
        "published: SCS, rank 8, last token": fs.fit_gate(
            own.queries, kind="quantile", rank=RANK, folds=None, cdf="step", layer=layer
        ),
        "residual ratio, mean": fs.fit_gate(harmful, kind="residual_ratio", rank=RANK, seed=SEED, **mean),
        "linear, last token": fs.fit_gate(own.queries, kind="linear", seed=SEED, **last),
        "linear, mean": fs.fit_gate(harmful, kind="linear", seed=SEED, **mean),
        "linear, mean, perturbed copies": fs.fit_gate(harmful, kind="linear", seed=SEED, augment=copies, **mean),
    }


def flat(by_label: Mapping[str, Sequence[str]]) -> list[str]:
    """All prompts, in order."""
    return [prompt for given in by_label.values() for prompt in given]


def copies_of(bench: Bench, prompts: Sequence[str]) -> Any:
    """Means over perturbed copies of prompts, [copies · n d], all said in one way, then all in the next."""
    said = [one.change(prompt, random.Random(f"{SEED} {one.name} {prompt}")) for one in COPIES for prompt in prompts]
    return bench.queries({"copies": said}, bench.refusal_layer).reading("mean").queries


def gates(bench: Bench) -> dict[str, Any]:
    """What every gate misses and where it raises a false alarm, under every perturbation."""
    train, test = items.sides(bench.data, bench.fold)
    sizes = bench.sizes
    return decided(bench, gates_of(bench, train), test, sizes.refused, sizes.gate_items, WAYS)


def scan(bench: Bench) -> dict[str, Any]:
    """The same of a gate that scans and of the one whose score it takes, on what is put around a request."""
    train, test = items.sides(bench.data, bench.fold)
    layer, sizes = bench.refusal_layer, bench.sizes
    own, alone = refusal_activations(bench, train)
    queries = {name: one.queries for name, one in alone.items()}
    plain = fs.fit_gate(own.queries, kind="linear", seed=SEED, layer=layer, **queries)
    start = sizes.general
    spared = [*flat(plain_of(train, sizes.gate_items, start)), *train.general["XSTest-safe"][start:]]
    scanned = evaluation.fit_scan(bench.model, plain, spared[: 3 * sizes.gate_items], layer=layer, **bench.options)
    around = [one for one in WAYS if one.name in AROUND]
    compared = {"linear, last token": plain, "linear, last token, scanned": scanned}
    return decided(bench, compared, test, sizes.refused // 2, sizes.gate_items // 3, around)


def decided(
    bench: Bench,
    compared: Mapping[str, fs.Gate],
    test: items.Items,
    harmful: int,
    harmless: int,
    perturbations: Sequence[Perturbation],
) -> dict[str, Any]:
    """A gate report on so many requests, and so many prompts of each kind that is to be left alone."""
    near = ("XSTest-safe", "imperatives")
    report = evaluation.gate_report(
        bench.model,
        compared,
        list(test.harmful[:harmful]),
        {**plain_of(test, harmless), **some(test.general, harmless, names=near)},
        calibration=flat({**plain_of(test, harmless, harmless), **some(test.general, harmless, harmless, near)}),
        perturbations=perturbations,
        layer=bench.refusal_layer,
        seed=SEED,
        **bench.options,
    )
    return {"rows": report.to_records(), "calibration": report.n_calibration}

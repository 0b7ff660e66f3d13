"""`recipe`: from contrasts and prompts that are to be left alone to a steering, in one call of the public steps."""

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Unpack

from fsteer_lens.effects.answers import preferences_of_each
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.checks import finite, normalised, number, options_of, whole
from fsteer_lens.ground.estimates import bootstrap
from fsteer_lens.ground.spread import every
from fsteer_lens.method.experts import FitReport
from fsteer_lens.models.classes import SteerableModel, require_steerable
from fsteer_lens.models.points import layers_of
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.prompts.forms import GivenPrompts, Prompt, prompts_of
from fsteer_lens.prompts.passes import Passes, PassOptions
from fsteer_lens.reading.activations import Activations, Shift
from fsteer_lens.reading.collecting import collect, collect_queries
from fsteer_lens.selection.calibration import calibrate
from fsteer_lens.selection.journals import Journal
from fsteer_lens.selection.trials import finite_ones, identity_of
from fsteer_lens.steering.fitting import fit
from fsteer_lens.steering.steering import FineSteer

DEPTHS: Final = (0.35, 0.5, 0.65)
"""Where to steer, as shares of the model's depth."""
HELD_OUT: Final = 0.25
LEAST: Final = {"contrasts": 8, "general": 26, "near_misses": 8}
"""Fewer leave too little to choose on, or to cut a gate at 5 % of the others."""
MOST_CHOSEN_ON: Final = 60
MOST_COSTED: Final = 24
ANSWERS: Final = 20
SLACK: Final = 0.01
"""An effect that is so much smaller than another is as good, if a smaller strength has it."""
STRENGTHS: Final = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


@dataclass(frozen=True)
class RecipeTrial:
    """One layer of a recipe, at the strength that the budgets allow; shares and means are over held-out prompts.

    Attributes:
        layer: the steered layer.
        strength: the smallest of the largest effect, or what the budgets allow below it; 0 where they allow none.
        kl: what it costs on prompts that are to be left alone, in nats, as in `calibrate`.
        loops: share of answers to held-out contrasts that repeat themselves.
        effect: by how much p₊ / (p₊ + p₋) grows, p being the probabilities of the preferred and the undesired answer.
        low, high: the 95 % interval of the effect.
        opened: mean value of the gate on held-out contrasts.
        spared: one minus the mean value of the gate on prompts that are to be left alone.
        explained: share of held-out shifts that the fit explains, see `FitReport`.
    """

    layer: int
    strength: float
    kl: float
    loops: float
    effect: float
    low: float
    high: float
    opened: float
    spared: float
    explained: float

    def __post_init__(self) -> None:
        numbers = {item.name: number(item.name, getattr(self, item.name)) for item in fields(self)}
        normalised(self, **{**numbers, "layer": whole("layer", self.layer, 0)})

    @property
    def settings(self) -> int:
        """What it is known by: its layer."""
        return self.layer

    def __str__(self) -> str:
        return (
            f"layer {self.layer}, strength {self.strength:.2f}: effect {self.effect:+.2f} [{self.low:+.2f},"
            f" {self.high:+.2f}] at {self.kl:.3f} nats, loops {self.loops:.2f}, gate open for"
            f" {self.opened:.2f} of the prompts to steer and shut for {self.spared:.2f} of the others"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Recipe:
    """What a recipe made.

    Attributes:
        steering: fitted at the chosen layer, at the strength that the budgets allow.
        report: what its fit is worth on queries that it did not see.
        chosen: the numbers of that layer.
        trials: those of every layer.
        valid: the contrasts that were held out to choose on.
        general_valid: the prompts to be left alone that were held out, near misses among them.
    """

    steering: FineSteer
    report: FitReport
    chosen: RecipeTrial
    trials: tuple[RecipeTrial, ...]
    valid: ContrastSet
    general_valid: tuple[Prompt, ...]

    def __repr__(self) -> str:
        doubts = "".join(f"\n  doubt: {doubt}" for doubt in self.report.doubts)
        tried = "".join(f"\n  {'→' if one is self.chosen else ' '} {one}" for one in self.trials)
        return f"Recipe({self.steering!r}){tried}\n  {self.report.held_out}{doubts}"

    def to_records(self) -> list[dict[str, Any]]:
        """One flat, JSON-ready mapping for each layer that was tried."""
        return [{**asdict(trial), "chosen": trial is self.chosen} for trial in self.trials]


class RecipeOptions(PassOptions, total=False):
    """What `recipe` takes beside its own arguments: see there."""

    loops: float
    shift: Shift
    seed: int
    resume: str | os.PathLike[str] | None


@dataclass(frozen=True)
class _Cooking(Passes):
    """How a recipe goes about it; fields as in `recipe`."""

    loops: float = 0.05
    shift: Shift = "response_mean"
    seed: int = 0
    resume: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        normalised(self, loops=finite("loops", self.loops, 0, 1), seed=whole("seed", self.seed, 0))


def recipe(
    model: SteerableModel,
    contrasts: Iterable[Contrast],
    general: GivenPrompts,
    *,
    near_misses: GivenPrompts | None = None,
    kl: float = 0.1,
    layers: Iterable[int] | None = None,
    **options: Unpack[RecipeOptions],
) -> Recipe:
    """Collect, fit, and choose layer and strength: what to do first with a chat model and a behaviour of your own.

    A quarter of everything is held out, groups of contrasts kept whole. On the rest a steering is fitted at each layer,
    with a gate that knows both kinds of prompt: `collect` and `collect_queries` once for all layers, then `fit`. The
    effect is the probability of the preferred answer, were it one of the contrast's two (p₊ / (p₊ + p₋), as in
    TruthfulQA's MC2), on the contrasts that were held out. The strength is the smallest with the largest effect, or
    less where `calibrate` allows no more on what was held out; the layer is that of the largest effect. So the numbers
    of the chosen one flatter it a little: measure it on prompts that had no part in this before you tell anybody.

    Args:
        model: a HookedTransformer or TransformerBridge.
        contrasts: prompts with a preferred and an undesired answer, at least 8; some hundreds are better.
        general: prompts to be left alone, at least 26, like those that the model will see.
        near_misses: those of them that look like prompts to be steered, at least 8; None has none.
        kl: the budget of divergence on prompts that are to be left alone, in nats: the 0.95 quantile over answer tokens
            of KL(steered ‖ unsteered), as in `calibrate`.
        layers: where to try it; None takes three, at 0.35, 0.5 and 0.65 of the model's depth.
        options: `loops` (0.05), by how much the share of answers that repeat themselves may exceed the unsteered
            model's; `shift` ("response_mean") as in `collect`; `seed` (0) of the split and the fits; `resume` (None), a
            file that every finished layer is added to, and from which an interrupted recipe goes on. `chat` (whether
            the tokenizer has a chat template), `chat_template_kwargs`, `prepend_bos`, `batch_size` (16) and `progress`
            (True) as in `collect`.

    Raises:
        DataError: too few contrasts or prompts, or a file to resume from that belongs to another recipe.
        InputError: options out of range, or no layer at which any strength is within the budgets.
        NonFiniteError: as in `collect`, or no layer has an effect that is a finite number.
        SiteError, ContextLengthError: as in `collect`.
    """
    run, kl = options_of("recipe", _Cooking, options), finite("kl", kl, above=0)
    require_steerable(model)
    if run.chat is None:
        run = replace(run, chat=bool(getattr(model.tokenizer, "chat_template", None)))
    told = ContrastSet(contrasts)
    left_alone = {"general": prompts_of(general, "general prompt", least=0)}
    if near_misses is not None:
        left_alone["near_misses"] = prompts_of(near_misses, "near miss", least=0)
    for name, given in {"contrasts": told, **left_alone}.items():
        if len(given) < LEAST[name]:
            raise DataError(
                name, expected=f"at least {LEAST[name]}", got=len(given), fix="A quarter of them is held out."
            )
    depths = [round(model.cfg.n_layers * depth) for depth in DEPTHS]
    where = layers_of(model, list(dict.fromkeys(depths)) if layers is None else layers)
    by = "label" if all(contrast.group is None for contrast in told) else "group"
    split = told.split(valid=HELD_OUT, test=0, seed=run.seed, by=by)
    valid = ContrastSet(every(split.valid, MOST_CHOSEN_ON))
    parts = {name: _parts(prompts, run.seed) for name, prompts in left_alone.items()}
    spared = [prompt for _, held_out in parts.values() for prompt in every(held_out, MOST_COSTED // len(parts))]

    def fits(layers: Sequence[int]) -> Iterator[tuple[int, FineSteer]]:
        """A steering for each of these layers, one after the other; what they read is read once."""
        own = collect(model, split.train, layer=layers, shift=run.shift, **run.options)
        others = {name: collect_queries(model, kept, layer=layers, **run.options) for name, (kept, _) in parts.items()}
        for layer in layers:
            near = others["near_misses"][layer] if "near_misses" in others else None
            yield layer, fit(own[layer], general=others["general"][layer], near_misses=near, seed=run.seed)

    known = [[str(asdict(one)) for one in told], {name: list(map(str, one)) for name, one in left_alone.items()}]
    settings = {**run.formatting, "loops": run.loops, "shift": run.shift, "seed": run.seed, "kl": kl}
    identity = "" if run.resume is None else identity_of(model, where, [*known, settings])
    journal = Journal(run.resume, "recipe", identity, lambda row: RecipeTrial(**row))
    fitted: dict[int, FineSteer] = {}
    missing = [layer for layer in where if layer not in journal.known]
    if missing:
        asked = [collect_queries(model, prompts, layer=missing, **run.options) for prompts in (valid.prompts, spared)]
        for layer, steering in fits(missing):
            fitted[layer] = steering
            opened, shut = (_opened(steering, one[layer]) for one in asked)
            journal.add(_tried(model, steering, valid, spared, kl, run, opened, 1 - shut))
    trials = tuple(journal.known[layer] for layer in where)
    chosen = max(finite_ones("recipe", trials, "effect"), key=lambda one: (one.strength > 0, one.effect))
    if chosen.strength == 0:
        raise InputError(
            "recipe",
            expected=f"a layer at which some strength is within kl={kl:g} and loops={run.loops:g}",
            got="; ".join(map(str, trials)),
            fix="Allow more of either, or look at the fits by themselves.",
        )
    if chosen.layer not in fitted:
        fitted |= fits([chosen.layer])
    steering = fitted[chosen.layer]
    report = _report(steering, chosen.layer)
    return Recipe(steering.with_strength(chosen.strength), report, chosen, trials, valid, tuple(spared))


def _report(steering: FineSteer, layer: int) -> FitReport:
    """What the fit of the experts came to."""
    report = steering.experts_at(layer).report
    assert report is not None
    return report


def _parts(prompts: Sequence[Prompt], seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to fit to, and those that are held out; equal ones are on one side."""
    different = list(dict.fromkeys(map(repr, prompts)))
    held_out = set(random.Random(seed).sample(different, round(len(different) * HELD_OUT)))
    kept, out = ([one for one in prompts if (repr(one) in held_out) == side] for side in (False, True))
    return kept, out


def _tried(
    model: SteerableModel,
    steering: FineSteer,
    valid: ContrastSet,
    spared: Sequence[Prompt],
    kl: float,
    run: _Cooking,
    opened: float,
    shut: float,
) -> RecipeTrial:
    """What a fitted steering comes to at the strength that the budgets allow."""
    (layer,) = steering.layers
    variants = [steering.with_strength(strength) for strength in STRENGTHS]
    before, *after = preferences_of_each(model, [None, *variants], valid, **run.batching)
    means = [float(one.double().mean()) for one in after]
    enough = next(strength for strength, mean in zip(STRENGTHS, means, strict=True) if mean >= max(means) - SLACK)
    found = calibrate(
        steering,
        model,
        spared,
        kl=kl,
        steered_prompts=valid.prompts,
        loops=run.loops,
        max_strength=enough,
        n_answers=ANSWERS,
        **run.options,
    )
    (chosen,) = preferences_of_each(model, [found.steering], valid, **run.batching)
    effect, held_out = bootstrap(chosen - before), _report(steering, layer).held_out
    low, high = effect.interval
    assert found.loops is not None and held_out is not None
    return RecipeTrial(
        layer, found.strength, found.kl, found.loops, effect.value, low, high, opened, shut, held_out.explained
    )


def _opened(steering: FineSteer, asked: Activations) -> float:
    """Mean value of the gate on what was read of prompts."""
    gate = steering.gate_at(asked.layer)
    assert gate is not None
    return float(gate(asked.reading(gate.read).queries).double().mean())

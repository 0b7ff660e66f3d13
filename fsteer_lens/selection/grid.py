"""`search`: layer, rank and strength chosen on a validation split, and tested once."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from itertools import product
from typing import Any, Unpack

from fsteer_lens.effects.answers import name_of
from fsteer_lens.errors import DataError, InputError, NonFiniteError
from fsteer_lens.ground.checks import finite, function, instance, optional, options_of, several, whole
from fsteer_lens.ground.estimates import Estimate, bootstrap
from fsteer_lens.hooks.scopes import Schedule, Scope, require_scope
from fsteer_lens.method.gates import Reading
from fsteer_lens.models.classes import SteerableModel, require_steerable
from fsteer_lens.models.points import layers_of
from fsteer_lens.reading.activations import Activations
from fsteer_lens.reading.collecting import collect, collect_queries
from fsteer_lens.selection.journals import Journal
from fsteer_lens.selection.measuring import Searching, SearchOptions, prompt_of
from fsteer_lens.selection.splits import Measured, SplitData
from fsteer_lens.selection.trials import Settings, Trial, finite_ones, identity_of, trial_of
from fsteer_lens.steering.fitting import put_together
from fsteer_lens.steering.lengths import added_lengths, mean_shift_length
from fsteer_lens.steering.steering import FineSteer, Steering

STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
ROUNDING = 1e-6
"""A utility may be this far below the floor: means of float32 numbers are no exacter."""


@dataclass(frozen=True, eq=False, repr=False)
class Search:
    """What a search found.

    Attributes:
        steering: fitted at the chosen setting.
        chosen: that setting.
        trials: all settings, in the order of the grid.
        floor: the least utility that was allowed: that of the unsteered model minus the budget.
        test_effect, test_utility: of the chosen steering on the test split; None where there is none.
        effect_name, utility_name: what was measured, with units.
    """

    steering: Steering
    chosen: Trial
    trials: tuple[Trial, ...] = field(repr=False)
    floor: float
    test_effect: Estimate | None
    test_utility: Estimate | None
    effect_name: str
    utility_name: str

    def __repr__(self) -> str:
        one = self.chosen
        more = {"rank": one.rank, "scope": one.scope, "schedule": one.schedule}
        rank = "".join(f", {name}={value}" for name, value in more.items() if value is not None)
        tested = "" if self.test_effect is None else f", test effect {self.test_effect}"
        return f"Search(layer={one.layer}{rank}, strength={one.strength:g}, {len(self.trials)} trials{tested})"

    def to_records(self) -> list[dict[str, Any]]:
        """One flat, JSON-ready mapping for each trial."""
        return [{**trial.to_record(), "chosen": trial is self.chosen} for trial in self.trials]


Means = tuple[float, float]
"""Mean effect and mean utility."""
Fit = Callable[[Activations, Activations | None], Steering]
"""Makes a steering from the activations of one layer, and those of general prompts where there are some."""


def search(
    model: SteerableModel,
    data: SplitData,
    *,
    budget: float,
    layers: Iterable[int] | None = None,
    strengths: Iterable[float] = STRENGTHS,
    ranks: Iterable[int] | None = None,
    method: Fit | None = None,
    **options: Unpack[SearchOptions],
) -> Search:
    """Choose layer, rank and strength: the largest effect on valid among the settings whose utility is in budget.

    Every setting of the grid is tried. Activations of all layers come from one set of passes, a method is fitted once
    per layer, and its ranks, strengths, scopes and schedules are variants of that fit. Of equal effects the smaller
    strength wins, then the larger utility. A setting whose effect or utility is no finite number is never
    chosen, which a warning tells. The test split is measured for the chosen setting alone, after the choice.

    What is chosen on may be a suite instead of contrasts, and another instead of general prompts, such as
    `Splits(train, valid=suite[:50], test=suite[50:], ...)`: then a measure of it is the effect, or the utility.

    Args:
        model: a HookedTransformer or TransformerBridge.
        data: the splits, your own or those of `tutor.data` (whose near misses have no part in the utility).
        budget: how far the mean utility may fall below that of the unsteered model, in its own unit, >= 0.
        layers: where to steer; None takes every layer.
        strengths: what to try.
        ranks: of the gate; None takes the method's own rank.
        method: what to fit; None is `fit` with its defaults, which looks at no general prompts.
        options: `effect` (None), a number per contrast, larger is better; None takes `answer_margin`, in nats per
            token. `utility` (None), a number per general item; None takes −KL(steered ‖ unsteered) at the first token
            of the answer, in nats; where either is None the settings of a layer share its passes. Of a suite either is
            the name of one of its measures, and None the only one of that role. `scopes` and `schedules` (None), where
            and when to steer, such as "prompt" and `Schedule.decay(0.8)`; None, for all or among others, is the
            method's own. `shift` ("response_mean") as in `collect`. `resume` (None), a file that every finished trial
            is added to at once; where it exists already, its trials are not run again. It must come from the same
            search: same model, data, shift, and functions of the same names. `chat`, `chat_template_kwargs`,
            `prepend_bos` and `batch_size` (16) as in `collect`; `progress` (True), show a progress bar.

    Raises:
        NonFiniteError: no setting has an effect and a utility that are finite numbers, or the unsteered model's utility
            is none.
        InputError: an empty grid, a negative budget, data that are no splits, no setting within the budget, a method
            that cannot be set to a rank, a measure that a suite does not have, or a function without a name, or a
            suite that is no dataclass, together with `resume`.
        DataError: an empty split, one test part without the other, a suite to choose on and none to test on, or a file
            to resume from that belongs to another search.
        SiteError, ContextLengthError: as in `collect`.
    """
    run, budget = options_of("search", Searching, options), finite("budget", budget, 0)
    require_steerable(model)
    listed = range(model.cfg.n_layers) if layers is None else several("layers", layers, "a list of ints")
    chosen_layers = layers_of(model, listed) if listed else []
    listed = [] if ranks is None else several("ranks", ranks, "a list of ints")
    grid_ranks: list[int | None] = [None] if ranks is None else [whole("rank", rank, 1) for rank in listed]
    grid_strengths = [finite("strength", one) for one in several("strengths", strengths, "a list of numbers")]
    scopes, schedules = _scopes(run.scopes), _schedules(run.schedules)
    sizes = {
        "layers": chosen_layers,
        "strengths": grid_strengths,
        "ranks": grid_ranks,
        "scopes": scopes,
        "schedules": schedules,
    }
    empty = [name for name, given in sizes.items() if not given]
    if empty:
        raise InputError("search", expected=f"some {', '.join(sizes)}", got=f"no {' and no '.join(empty)}")
    given = {"method": method, "effect": run.effect, "utility": run.utility}
    functions = {name: one for name, one in given.items() if one is not None and not isinstance(one, str)}
    nameless = [name for name, one in functions.items() if name_of(one, "") in ("", "<lambda>")]
    if run.resume is not None and nameless:
        raise InputError("resume=", expected="functions with names, which the file is known by", got=nameless)
    expected = "Splits, or an object with train, valid, test, general_train, general_valid and general_test"
    instance("search data", data, SplitData, expected)
    missing = [name for name in ("train", "valid", "general_valid") if not len(getattr(data, name))]
    if missing:
        raise DataError("search data", expected="items to fit on and to choose on", got=f"none in {missing}")
    tested = bool(len(data.test))
    if tested != bool(len(data.general_test)):
        raise DataError("search data", expected="test and general_test, or neither", got="one of them")
    for name in ("valid", "general_valid") if tested else ():
        parts = [isinstance(getattr(data, part), Measured) for part in (name, name.replace("valid", "test"))]
        if parts[0] != parts[1]:
            raise DataError("search data", expected=f"suites in {name} and in its test part, or in neither", got=parts)
    make = _fit_default if method is None else function("method", method)
    names = (run.told("effect", data.valid), run.told("utility", data.general_valid))
    known_by = [*names, name_of(make, ""), run.shift, str(run.formatting)]
    identity = "" if run.resume is None else _identity(model, chosen_layers, data, known_by)
    journal = Journal(run.resume, "search", identity, trial_of)
    trained = collect(model, data.train, layer=chosen_layers, shift=run.shift, **run.options)
    prompts = [] if method is None else [prompt_of(item) for item in data.general_train]
    general = collect_queries(model, prompts, layer=chosen_layers, **run.options) if prompts else {}
    unsteered = float(run.measured("utility", model, None, data.general_valid).double().mean())
    if not math.isfinite(unsteered):
        raise NonFiniteError("search", expected="a finite utility of the unsteered model", got=unsteered)
    floor = unsteered - budget
    trials: list[Trial] = []

    @cache
    def fitted(layer: int) -> Steering:
        return make(trained[layer], general.get(layer))

    grid = product(chosen_layers, grid_ranks, scopes, schedules, grid_strengths)
    settings = [Settings(layer, rank, strength, scope, factors) for layer, rank, scope, factors, strength in grid]
    with run.bar(len(settings), "searching") as advance:
        for layer in chosen_layers:
            own = [one for one in settings if one.layer == layer]
            left = [one for one in dict.fromkeys(own) if one not in journal.known]
            advance(len(own) - len(left))
            variants = [_variant(fitted(layer), one) for one in left]
            effects = run.measured_each("effect", model, variants, data.valid)
            utilities = run.measured_each("utility", model, variants, data.general_valid)
            for one, variant, *values in zip(left, variants, effects, utilities, strict=True):
                effect, utility = (float(value.double().mean()) for value in values)
                length = _length(variant, trained[layer])
                journal.add(Trial(layer, one.rank, one.strength, effect, utility, one.scope, one.schedule, length))
                advance(1)
            trials += [journal.known[one] for one in own]
    known = finite_ones("search", trials, "effect", "utility")
    within = [trial for trial in known if trial.utility >= floor - ROUNDING]
    if not within:
        closest = max(known, key=lambda trial: trial.utility)
        raise InputError(
            "search found no setting within the budget",
            expected=f"a utility of at least {floor:.4g}",
            got=f"at best {closest.utility:.4g}, {closest}",
            fix="Allow a larger budget, or try smaller strengths.",
        )
    best = max(within, key=lambda trial: (trial.effect, -trial.strength, trial.utility))
    steering = _variant(fitted(best.layer), best.settings)
    test_effect, test_utility = None, None
    if tested:
        test_effect = bootstrap(run.measured("effect", model, steering, data.test))
        test_utility = bootstrap(run.measured("utility", model, steering, data.general_test))
    return Search(steering, best, tuple(trials), floor, test_effect, test_utility, *names)


def _fit_default(activations: Activations, general: Activations | None) -> Steering:
    return put_together(activations)


def _scopes(given: Any) -> list[Scope | None]:
    scopes: list[Scope | None] = [None] if given is None else several("scopes", given, "a list of scopes")
    for scope in scopes:
        optional(lambda _, value: require_scope(value), "scopes", scope)
    return scopes


def _schedules(given: Any) -> list[Schedule | None]:
    schedules = [None] if given is None else several("schedules", given, "a list of schedules")
    return [optional(instance, "schedules", one, Schedule, "Schedule or None") for one in schedules]


def _variant(steering: Steering, settings: Settings) -> Steering:
    if settings.rank is not None:
        steering = instance("ranks", steering, FineSteer, "a method that gives a FineSteer").at_rank(settings.rank)
    if settings.scope is not None:
        steering = steering.with_scope(settings.scope)
    if settings.schedule is not None:
        steering = steering.with_schedule(settings.schedule)
    return steering.with_strength(settings.strength)


def _length(steering: Steering, trained: Activations) -> float | None:
    """Mean length of what is added on the prompts that it was fitted to, in lengths of their mean shift."""
    unit = mean_shift_length(trained)
    if {*steering.hooked_layers} != {trained.layer} or unit == 0 or steering.scanning:
        return None
    queries: dict[Reading, Any] = {read: {trained.layer: trained.reading(read).queries} for read in steering.reads}
    return float(added_lengths(steering, queries, {trained.layer: unit}).double().mean())


def _items(part: Any) -> Sequence[Any]:
    """The items of a part; a suite is one, a dataclass, so that the file is known by all that it holds."""
    if not isinstance(part, Measured):
        return part
    if not is_dataclass(part):
        raise InputError("resume=", expected="suites that are dataclasses, which the file is known by", got=repr(part))
    return [part]


def _identity(model: SteerableModel, layers: Sequence[int], data: SplitData, options: Sequence[str]) -> str:
    """SHA-256 of all that a trial's numbers depend on, but for what the caller's functions do inside."""
    known = [
        [asdict(contrast) for part in (data.train, data.valid) for contrast in _items(part)],
        [
            asdict(item) if is_dataclass(item) and isinstance(item, Measured) else str(prompt_of(item))
            for part in (data.general_train, data.general_valid)
            for item in _items(part)
        ],
        list(options),
    ]
    return identity_of(model, layers, known)

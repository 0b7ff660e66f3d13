"""`evaluate`: methods side by side on the items of a suite, with intervals and paired differences."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.effects.answers import one_each
from fsteer_lens.errors import InputError
from fsteer_lens.evaluation.suites import Measure, Setting, Suite
from fsteer_lens.ground.checks import choice, instance, options_of, require_unset, seed_of, several, switch
from fsteer_lens.ground.estimates import Estimate, bootstrap, estimate_of, resampled_means
from fsteer_lens.ground.tables import markdown
from fsteer_lens.hooks.objects import HookObject, remembered
from fsteer_lens.models.classes import SteerableModel, require_steerable
from fsteer_lens.prompts.passes import Passes, PassOptions


@dataclass(frozen=True)
class Prompting:
    """A method that steers by words: text before every prompt, or the system message of a chat.

    Attributes:
        context: the text.
    """

    context: str


Method = HookObject | Prompting | None
"""A hook object, words, or nothing."""


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What several methods did on one suite.

    All methods saw the same items, so that they are compared item by item: differences are paired, and every interval
    is that of a bootstrap over items (95 %, percentiles), drawn alike for all methods. Where every item came out the
    same the interval is a point; with n items that still leaves room for a rate of about 3/n. Items are taken as drawn
    one by one: prompts made from a few templates tell less about a further template than their number suggests, and
    how much seeds differ is in no interval (`values` has them apart).

    Attributes:
        suite: name of the suite.
        measures: what was measured.
        values: {method: a tensor [seeds n] for each measure}; a method that does not depend on a seed has one row.
        seeds: those of the fits.
        seconds: how long each method took, all seeds together; where the suite measures several of them together,
            each took an equal share of that.
    """

    suite: str
    measures: tuple[Measure, ...]
    values: Mapping[str, tuple[Float[Tensor, "seeds _"], ...]] = field(repr=False)
    seeds: tuple[int, ...]
    seconds: Mapping[str, float]

    def __repr__(self) -> str:
        return f"Evaluation({self.suite!r}, {len(self.values)} methods, {len(self.measures)} measures)"

    @property
    def methods(self) -> tuple[str, ...]:
        """Names, in the order that they were given."""
        return tuple(self.values)

    def items(self, method: str, measure: str, group: str | None = None) -> Float[Tensor, " n"]:
        """A number for each item of a measure, its mean over seeds; of one group, or of all.

        Raises:
            InputError: no such method, measure or group.
        """
        names = [known.name for known in self.measures]
        method = choice("method", method, list(self.values), "one of")
        index = names.index(choice("measure", measure, names, "one of"))
        values = self.values[method][index].mean(dim=0)
        groups = self.measures[index].groups
        if group is None:
            return values
        choice("group", group, sorted(set(groups)), "one of")
        return values[torch.tensor([known == group for known in groups], dtype=torch.bool, device=values.device)]

    def estimate(self, method: str, measure: str, group: str | None = None) -> Estimate:
        """The mean of a measure."""
        return bootstrap(self.items(method, measure, group))

    def difference(self, first: str, second: str, measure: str, group: str | None = None) -> Estimate:
        """The mean of a measure under `first` minus that under `second`, paired by item."""
        return bootstrap(self.items(first, measure, group) - self.items(second, measure, group))

    def harmonic_mean(self, method: str) -> Estimate:
        """Harmonic mean of effect and utility, 2·e·u / (e + u), for one measure of each role with values in [0, 1].

        Items of the two are drawn apart from each other.

        Raises:
            InputError: the suite has no effect or no utility, or one that is not in [0, 1].
        """
        return estimate_of(*self._harmonic(method))

    def harmonic_difference(self, first: str, second: str) -> Estimate:
        """Harmonic mean of `first` minus that of `second`, every draw of items being the same for both."""
        (one, draws), (other, others) = self._harmonic(first), self._harmonic(second)
        return estimate_of(one - other, draws - others)

    @property
    def _both(self) -> tuple[str, str] | None:
        """Names of the effect and the utility, where there is one of each and all their values are in [0, 1]."""
        names = {role: [one.name for one in self.measures if one.role == role] for role in ("effect", "utility")}
        if any(len(found) != 1 for found in names.values()):
            return None
        both = names["effect"][0], names["utility"][0]
        values = torch.cat([self.items(method, name) for method in self.values for name in both])
        return both if bool(((values >= 0) & (values <= 1)).all()) else None

    def _harmonic(self, method: str) -> tuple[float, Float[Tensor, " draws"]]:
        both = self._both
        if both is None:
            expected = "one effect and one utility, with values in [0, 1]"
            raise InputError(f"harmonic mean on {self.suite!r}", expected=expected, got=self.measures)
        values = [self.items(method, name) for name in both]
        draws = [resampled_means(one, seed=seed) for seed, one in enumerate(values)]
        return float(_harmonic(*(one.double().mean() for one in values))), _harmonic(*draws)

    def to_records(self) -> list[dict[str, Any]]:
        """A flat, JSON-ready mapping for each method, measure and group: mean, 95 % interval, items and seeds.

        The group "all" stands for every item of the measure.
        """
        return [
            {
                "suite": self.suite,
                "method": method,
                "measure": measure.name,
                "role": measure.role,
                "group": group or "all",
                "value": estimate.value,
                "low": estimate.interval[0],
                "high": estimate.interval[1],
                "items": len(self.items(method, measure.name, group)),
                "seeds": len(self.values[method][index]),
            }
            for method in self.values
            for index, measure in enumerate(self.measures)
            for group in (None, *measure.kinds)
            for estimate in (self.estimate(method, measure.name, group),)
        ]

    def to_markdown(self, *, reference: str | None = None, groups: bool = False) -> str:
        """A table: a row for each method, a column for each measure, each number with its interval.

        Where the suite has one effect and one utility in [0, 1], their harmonic mean follows.

        Args:
            reference: a method: one column more with the paired difference `reference` − method, of the harmonic mean,
                or of the only effect where there is no such mean.
            groups: a column for each group of a measure as well.

        Raises:
            InputError: no such method, or nothing that could be compared with it.
        """
        groups = switch("groups", groups)
        columns: list[tuple[str, str | None]] = []
        for measure in self.measures:
            columns += [(measure.name, group) for group in (None, *(measure.kinds if groups else ()))]
        head = [f"{name}, {group}" if group else name for name, group in columns]
        effects = [measure.name for measure in self.measures if measure.role == "effect"]
        both = self._both is not None
        head += ["harmonic mean"] * both
        if reference is not None:
            choice("reference", reference, list(self.values), "one of")
            if not both and len(effects) != 1:
                raise InputError("reference", expected="a suite with one effect", got=effects)
            head.append(f"{reference} − this")

        def compared(method: str) -> str:
            if method == reference:
                return ""
            assert reference is not None
            found = self.harmonic_difference if both else partial(self.difference, measure=effects[0])
            return f"{found(reference, method):+.3f}"

        rows = [
            [
                method,
                *(f"{self.estimate(method, *column)}" for column in columns),
                *([f"{self.harmonic_mean(method)}"] if both else []),
                *([compared(method)] if reference is not None else []),
            ]
            for method in self.values
        ]
        return markdown(["method", *head], rows)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def evaluate(
    model: SteerableModel,
    methods: Mapping[str, Method | Callable[[int], Method]],
    suite: Suite,
    *,
    seeds: Iterable[int] | None = None,
    **options: Unpack[PassOptions],
) -> Evaluation:
    """Measure every method on the same items.

    Args:
        model: a HookedTransformer or TransformerBridge.
        methods: by name: a hook object, `Prompting`, None for the bare model, or a function that makes one of these
            from a seed. Such a function is called once for each seed, and its numbers are averaged item by item.
        suite: what to measure: `tutor.TutorSuite`, `TruthfulQA`, `harmbench`, `xstest`, or one of your own.
        seeds: for methods that are functions; None is (0,).
        options: `chat`, `chat_template_kwargs` and `prepend_bos` (as the methods were fitted, else as in `generate`),
            how prompts become tokens; `batch_size` (16), rows per forward pass; `progress` (True), show a progress bar.

    Raises:
        InputError: no methods or seeds, something that is no method, or a suite that gives other numbers than it says.
        MismatchError, ShapeError: a method was fitted on another model, or two on prompts that became tokens in
            different ways.
        ContextLengthError: a prompt, or one with its answer, does not fit into the context.
    """
    passes = options_of("evaluate", Passes, options)
    require_steerable(model)
    instance("suite", suite, Suite, "a suite")
    seeds = seeds_of(methods, seeds)
    rounds: dict[str, list[Any]] = {}
    values: dict[str, tuple[Tensor, ...]] = {}
    seconds: dict[str, float] = {}
    for name, method in methods.items():
        start = time.perf_counter()
        make: Any = None if is_method(method) else method
        rounds[name] = [method] if make is None else [make(seed) for seed in seeds]
        seconds[name] = time.perf_counter() - start
    every_one = [one for made in rounds.values() for one in made]
    passes = passes.following(remembered(*every_one), model)  # all of them see the same prompts
    named = [(name, one) for name, made in rounds.items() for one in made]
    found: dict[int, tuple[Tensor, ...]] = {}
    with passes.bar(len(every_one), f"evaluating on {suite.name}") as advance:
        for group in _groups(named, suite):
            start = time.perf_counter()
            found |= zip(group, _measure(model, [named[number] for number in group], suite, passes), strict=True)
            for number in group:
                seconds[named[number][0]] += (time.perf_counter() - start) / len(group)
            advance(len(group))
    for name in rounds:
        own = [found[number] for number, (of, _) in enumerate(named) if of == name]
        values[name] = tuple(torch.stack(group) for group in zip(*own, strict=True))
    return Evaluation(suite.name, suite.measures, values, tuple(seeds), seconds)


def is_method(given: Any) -> bool:
    """Whether this is a method itself, no function that makes one."""
    return isinstance(given, HookObject | Prompting | None)


def seeds_of(methods: Mapping[str, Any], seeds: Iterable[int] | None) -> list[int]:
    """Seeds for the methods that are functions of one, (0,) where None are given; checks the methods, too.

    Raises:
        InputError: no methods or seeds, something that is no method, or seeds that have no effect.
    """
    instance("methods", methods, Mapping, "a mapping of names to methods")
    if all(map(is_method, methods.values())):
        require_unset("no method that is a function of a seed", seeds=seeds)
    found = [seed_of(seed) for seed in several("seeds", (0,) if seeds is None else seeds, "a list of ints")]
    if not methods or not found:
        raise InputError("evaluate", expected="at least one method and one seed", got=(len(methods), len(found)))
    for name, method in methods.items():
        if not is_method(method) and not callable(method):
            expected = "a hook object, Prompting, None or a function of a seed"
            raise InputError(f"method {name!r}", expected=expected, got=type(method).__name__)
    return found


def _groups(named: Sequence[tuple[str, Any]], suite: Suite) -> list[list[int]]:
    """Numbers of the methods that are measured together: all without words where the suite shares, else each alone."""
    shared = [number for number, (_, one) in enumerate(named) if suite.shares and not isinstance(one, Prompting)]
    alone = [[number] for number in range(len(named)) if number not in shared]
    return [shared, *alone] if shared else alone


def _measure(
    model: SteerableModel, named: Sequence[tuple[str, Any]], suite: Suite, passes: Passes
) -> list[tuple[Float[Tensor, " _"], ...]]:
    """What the suite measures of methods that are put to the model in one setting."""
    for name, method in named:
        if not is_method(method):
            expected = "a hook object, Prompting or None"
            raise InputError(f"what method {name!r} made", expected=expected, got=type(method).__name__)
    (_, first), *_ = named
    words = isinstance(first, Prompting)
    setting = Setting(first.context if words else None, passes)
    found = suite.measure_each(model, [None] if words else [method for _, method in named], setting)
    return [_checked(suite, one) for one in found]


def _checked(suite: Suite, found: Sequence[Tensor]) -> tuple[Float[Tensor, " _"], ...]:
    if len(found) != len(suite.measures):
        raise InputError(f"suite {suite.name!r}", expected=f"{len(suite.measures)} measures", got=len(found))
    return tuple(
        one_each(f"measure {measure.name}", values, len(measure.groups)).float().cpu()
        for measure, values in zip(suite.measures, found, strict=True)
    )


def _harmonic(effect: Tensor, utility: Tensor) -> Tensor:
    total = effect + utility
    return torch.where(total > 0, 2 * effect * utility / total.clamp(min=1e-30), torch.zeros_like(total))

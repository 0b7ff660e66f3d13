"""`search`: layer, rank and strength chosen on a validation split, and tested once."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.effects.answers import DIVERGENCE, divergences_of_each, name_of, one_each
from fsteer_lens.effects.measuring import MeasureOptions, Measuring
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.checks import finite, instance, options_of, several, whole
from fsteer_lens.ground.estimates import Estimate, bootstrap
from fsteer_lens.ground.files import read_text, write_atomically
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.points import layers_of
from fsteer_lens.reading.activations import Activations, Shift, collect, collect_queries
from fsteer_lens.reading.fingerprints import fingerprint
from fsteer_lens.selection.splits import SplitData
from fsteer_lens.steering.fitting import fit
from fsteer_lens.steering.steering import FineSteer, Steering

STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
ROUNDING = 1e-6
"""A utility may be this far below the floor: means of float32 numbers are no exacter."""


@dataclass(frozen=True)
class Trial:
    """One setting of a search on the validation split.

    Attributes:
        layer, rank, strength: the setting; a rank of None is the method's own.
        effect: mean effect over the contrasts.
        utility: mean utility over the general prompts.
    """

    layer: int
    rank: int | None
    strength: float
    effect: float
    utility: float


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
        rank = "" if one.rank is None else f", rank={one.rank}"
        tested = "" if self.test_effect is None else f", test effect {self.test_effect}"
        return f"Search(layer={one.layer}{rank}, strength={one.strength:g}, {len(self.trials)} trials{tested})"

    def to_records(self) -> list[dict[str, Any]]:
        """One flat, JSON-ready mapping for each trial."""
        return [{**asdict(trial), "chosen": trial is self.chosen} for trial in self.trials]


Means = tuple[float, float]
"""Mean effect and mean utility."""
Fit = Callable[[Activations, Activations | None], Steering]
"""Makes a steering from the activations of one layer, and those of general prompts where there are some."""
Utility = Callable[[SteerableModel, HookObject | None, Sequence[Any]], Float[Tensor, " n"]]
"""A number for each general item under a hook object, or None for the bare model; larger is better kept."""


class SearchOptions(MeasureOptions, total=False):
    """What `search` takes beside the grid and its data: see there."""

    utility: Utility | None
    shift: Shift
    resume: str | os.PathLike[str] | None


@dataclass(frozen=True)
class _Searching(Measuring):
    """How the settings of a grid are measured; fields as in `search`."""

    utility: Utility | None = None
    shift: Shift = "response_mean"
    resume: str | os.PathLike[str] | None = None

    @property
    def utility_name(self) -> str:
        return DIVERGENCE if self.utility is None else name_of(self.utility, "utility")

    def utilities(self, model: SteerableModel, steering: Steering | None, items: Sequence[Any]) -> Float[Tensor, " n"]:
        """A number for each general item; None is −KL(steered ‖ unsteered) at the first token of its answer."""
        if self.utility is None and steering is not None:
            prompts = [_prompt(item) for item in items]
            return -divergences_of_each(model, [steering], prompts, **self.batching)[0]
        if self.utility is None:
            return torch.zeros(len(items), dtype=torch.float32, device="cpu")
        return one_each("utility", self.utility(model, steering, items), len(items))

    def trials(self, model: SteerableModel, steerings: Sequence[Steering], data: SplitData) -> Iterator[Means]:
        """Mean effect and utility on valid of steerings at one layer, which share what their measures allow.

        Each comes as soon as it is known: all at once, or one by one where both measures are the caller's.
        """
        prompts = [_prompt(item) for item in data.general_valid]
        shared_effects = self.effects_of_each(model, steerings, data.valid) if self.effect is None else None
        shared_costs = divergences_of_each(model, steerings, prompts, **self.batching) if self.utility is None else None
        for number, steering in enumerate(steerings):
            effect = self.effects(model, steering, data.valid) if shared_effects is None else shared_effects[number]
            if shared_costs is None:
                utility = self.utilities(model, steering, data.general_valid)
            else:
                utility = -shared_costs[number]
            yield float(effect.double().mean()), float(utility.double().mean())


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
    per layer, and its ranks and strengths are variants of that fit. Of equal effects the smaller strength wins, then
    the larger utility. The test split is measured for the chosen setting alone, after the choice.

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
            of the answer, in nats. Where either is None the settings of a layer share its passes. `shift`
            ("response_mean") as in `collect`. `resume` (None), a file that every finished trial is added to at once;
            where it exists already, its trials are not run again. It must come from the same search: same model, data,
            shift, and functions of the same names. `chat`, `chat_template_kwargs`, `prepend_bos` and `batch_size` (16)
            as in `collect`; `progress` (True), show a progress bar.

    Raises:
        InputError: an empty grid, a negative budget, data that are no splits, no setting within the budget, a method
            that cannot be set to a rank, or a function without a name together with `resume`.
        DataError: an empty split, one test part without the other, or a file to resume from that belongs to another
            search.
        SiteError, ContextLengthError: as in `collect`.
    """
    run, budget = options_of("search", _Searching, options), finite("budget", budget, 0)
    listed = range(model.cfg.n_layers) if layers is None else several("layers", layers, "a list of ints")
    chosen_layers = layers_of(model, listed) if listed else []
    listed = [] if ranks is None else several("ranks", ranks, "a list of ints")
    grid_ranks: list[int | None] = [None] if ranks is None else [whole("rank", rank, 1) for rank in listed]
    grid_strengths = [finite("strength", one) for one in several("strengths", strengths, "a list of numbers")]
    sizes = {"layers": chosen_layers, "strengths": grid_strengths, "ranks": grid_ranks}
    empty = [name for name, given in sizes.items() if not given]
    if empty:
        raise InputError("search", expected="layers, strengths and ranks", got=f"no {' and no '.join(empty)}")
    given = {"method": method, "effect": run.effect, "utility": run.utility}
    nameless = [name for name, one in given.items() if one is not None and name_of(one, "") in ("", "<lambda>")]
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
    make = method or _fit_default
    names = (run.effect_name, run.utility_name)
    known_by = [*names, name_of(make, ""), run.shift, str(run.formatting)]
    journal = _Journal(run.resume, _identity(model, chosen_layers, data, known_by))
    trained = collect(model, data.train, layer=chosen_layers, shift=run.shift, **run.options)
    prompts = [] if method is None else [_prompt(item) for item in data.general_train]
    general = collect_queries(model, prompts, layer=chosen_layers, **run.options) if prompts else {}
    floor = float(run.utilities(model, None, data.general_valid).double().mean()) - budget
    trials: list[Trial] = []

    @cache
    def fitted(layer: int) -> Steering:
        return make(trained[layer], general.get(layer))

    settings = [
        (layer, rank, strength) for layer in chosen_layers for rank in grid_ranks for strength in grid_strengths
    ]
    with run.bar(len(settings), "searching") as advance:
        for layer in chosen_layers:
            own = [setting for setting in settings if setting[0] == layer]
            left = [setting for setting in dict.fromkeys(own) if setting not in journal.known]
            advance(len(own) - len(left))
            if left:
                variants = [_variant(fitted(layer), rank, strength) for _, rank, strength in left]
                for setting, means in zip(left, run.trials(model, variants, data), strict=True):
                    journal.add(Trial(*setting, *means))
                    advance(1)
            trials += [journal.known[setting] for setting in own]
    within = [trial for trial in trials if trial.utility >= floor - ROUNDING]
    if not within:
        closest = max(trials, key=lambda trial: trial.utility)
        raise InputError(
            "search found no setting within the budget",
            expected=f"a utility of at least {floor:.4g}",
            got=f"at best {closest.utility:.4g}, {closest}",
            fix="Allow a larger budget, or try smaller strengths.",
        )
    best = max(within, key=lambda trial: (trial.effect, -trial.strength, trial.utility))
    steering = _variant(fitted(best.layer), best.rank, best.strength)
    test_effect, test_utility = None, None
    if tested:
        test_effect = bootstrap(run.effects(model, steering, data.test))
        test_utility = bootstrap(run.utilities(model, steering, data.general_test))
    return Search(steering, best, tuple(trials), floor, test_effect, test_utility, *names)


def _fit_default(activations: Activations, general: Activations | None) -> Steering:
    return fit(activations)


def _prompt(item: Any) -> Any:
    return getattr(item, "prompt", item)


def _variant(steering: Steering, rank: int | None, strength: float) -> Steering:
    if rank is not None:
        steering = instance("ranks", steering, FineSteer, "a method that gives a FineSteer").at_rank(rank)
    return steering.with_strength(strength)


def _identity(model: SteerableModel, layers: Sequence[int], data: SplitData, options: Sequence[str]) -> str:
    """SHA-256 of all that a trial's numbers depend on, but for what the caller's functions do inside."""
    known = [
        asdict(fingerprint(model, layers)),
        [asdict(contrast) for part in (data.train, data.valid) for contrast in part],
        [str(_prompt(item)) for part in (data.general_train, data.general_valid) for item in part],
        list(options),
    ]
    return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()


class _Journal:
    """Finished trials in a file of JSON lines, the first of which tells which search they belong to."""

    def __init__(self, path: str | os.PathLike[str] | None, identity: str) -> None:
        self.known: dict[tuple[int, int | None, float], Trial] = {}
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        if not self._path.exists():
            self._write({"search": identity}, "x")
            return
        whole = read_text(self._path).split("\n")[:-1]  # a line that was cut off in writing has no end
        try:
            header, *rows = [json.loads(line) for line in whole]
            found, trials = header["search"], [Trial(**row) for row in rows]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{path}", expected="the file of an earlier search", got=str(error)) from error
        if found != identity:
            raise DataError(
                f"{path} belongs to another search",
                expected="the same model, data, method, measures and shift",
                got="others",
                fix="Name another file, or delete this one.",
            )
        write_atomically(self._path, "".join(line + "\n" for line in whole).encode())
        for trial in trials:
            self.add(trial, write=False)

    def add(self, trial: Trial, *, write: bool = True) -> None:
        self.known[trial.layer, trial.rank, trial.strength] = trial
        if write and self._path is not None:
            self._write(asdict(trial), "a")

    def _write(self, row: Mapping[str, Any], mode: str) -> None:
        assert self._path is not None
        if not self._path.parent.is_dir():
            raise InputError(f"cannot write {self._path}", expected="an existing folder", got=str(self._path.parent))
        with self._path.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

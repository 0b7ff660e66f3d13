"""Effect, utility and KL at every strength, or at every layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.effects.answers import DIVERGENCE, Utility, name_of, one_each
from fsteer_lens.effects.measuring import MeasureOptions, Measuring
from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import (
    choice,
    finite,
    function,
    instance,
    normalised,
    optional,
    options_of,
    require_unset,
    seed_of,
    several,
)
from fsteer_lens.ground.estimates import Estimate, Sweep, bootstrap
from fsteer_lens.hooks.objects import remembered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.prompts.forms import GivenPrompts, prompts_of
from fsteer_lens.reading.activations import Activations, Shift
from fsteer_lens.reading.collecting import collect
from fsteer_lens.run.teacher_forcing import answer_divergences, answered
from fsteer_lens.steering.fitting import fit
from fsteer_lens.steering.steering import Steering

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)


class SweepOptions(MeasureOptions, total=False):
    """What `strength_sweep` and `layer_sweep` both take by name: see there."""

    answers: Iterable[str | Sequence[int]] | None
    utility: Utility | None
    seed: int


@dataclass(frozen=True)
class _Sweeping(Measuring):
    """How every steering of a sweep is measured; fields as in `strength_sweep`."""

    answers: Iterable[str | Sequence[int]] | None = None
    utility: Utility | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        normalised(self, seed=seed_of(self.seed))
        optional(function, "utility", self.utility)


def strength_sweep(
    model: SteerableModel,
    methods: Steering | Mapping[str, Steering],
    contrasts: Iterable[Contrast],
    general: GivenPrompts,
    *,
    strengths: Iterable[float] = STRENGTHS,
    **options: Unpack[SweepOptions],
) -> dict[str, Sweep]:
    """What every method does at every strength, each measure with its 95 % bootstrap interval.

    Args:
        model: the model that the methods were fitted on.
        methods: steerings by name; a single one is called by its class. Their own strengths do not matter.
        contrasts: prompts to be steered, held out from the fit, with both answers.
        general: prompts to be left alone.
        strengths: what to try.
        options: `answers` (None), an answer to each general prompt, text or ids; KL is then their mean over the
            answer's tokens; None looks at the first token alone, so that nothing is generated. `effect` (None), a
            number per contrast; None takes `answer_margin`, in nats per token. `utility` (None), a number per general
            prompt; None takes −KL(steered ‖ unsteered), in nats. `seed` (0) of the bootstrap. `chat`,
            `chat_template_kwargs`, `prepend_bos` and `batch_size` (16) as in `answer_margin`; `progress` (True), show a
            progress bar.

    Returns:
        {method: Sweep}, with `parameter="strength"`.

    Raises:
        InputError: no contrasts, general prompts, methods or strengths.
        ContextLengthError, MismatchError: as in `answer_margin`.
    """
    run = options_of("strength_sweep", _Sweeping, options)
    named = dict(methods) if isinstance(methods, Mapping) else {type(methods).__name__: methods}
    wrong = [type(one).__name__ for one in named.values() if not isinstance(one, Steering)]
    steps = [finite("strength", strength) for strength in several("strengths", strengths, "a list of numbers")]
    if not named or not steps or wrong:
        raise InputError("strength_sweep", expected="at least one steering and one strength", got=wrong or "none")
    tried = {name: {strength: one.with_strength(strength) for strength in steps} for name, one in named.items()}
    return _sweeps("strength", model, tried, contrasts, general, run)


def layer_sweep(
    model: SteerableModel,
    train: Iterable[Contrast] | Mapping[int, Activations],
    contrasts: Iterable[Contrast],
    general: GivenPrompts,
    *,
    layers: Iterable[int] | None = None,
    shift: Shift | None = None,
    methods: Mapping[str, Callable[[Activations], Steering]] | None = None,
    **options: Unpack[SweepOptions],
) -> dict[str, Sweep]:
    """Fit every method at every layer and measure what it does; activations of all layers come from one pass.

    Args:
        model: a HookedTransformer or TransformerBridge.
        train: contrasts to fit on, or what `collect` gave for them, {layer: Activations}.
        contrasts, general, options: as in `strength_sweep`.
        layers: where to steer; None takes every layer (or those of `train`).
        shift: as in `collect`, for `train` that is not collected yet; None is "response_mean".
        methods: from the activations of one layer to a steering, by name; None is {"FineSteer": fit}.

    Returns:
        {method: Sweep}, with `parameter="layer"`.

    Raises:
        InputError: no layers or methods, a layer that `train` lacks, or a shift for activations.
        DataError, ContextLengthError: as in `collect`.
    """
    run = options_of("layer_sweep", _Sweeping, options)
    makers = {"FineSteer": fit} if methods is None else dict(instance("methods", methods, Mapping, "{name: function}"))
    if isinstance(train, Mapping):
        require_unset("train= that is collected already", shift=shift)
        known = sorted(train)  # pyright: ignore[reportArgumentType]  # a mapping is never a set of contrasts
        asked = known if layers is None else several("layers", layers, "a list of ints")
        chosen = [choice("layers", layer, known, "layers among") for layer in asked]
        collected = {layer: train[layer] for layer in chosen}
    else:
        chosen = list(range(model.cfg.n_layers)) if layers is None else several("layers", layers, "a list of ints")
        collected = collect(model, train, layer=chosen, shift=shift or "response_mean", **run.options) if chosen else {}
    if not collected or not makers:
        raise InputError("layer_sweep", expected="at least one layer and one method", got="none")
    tried = {
        name: {layer: make(activations) for layer, activations in collected.items()} for name, make in makers.items()
    }
    return _sweeps("layer", model, tried, contrasts, general, run)


def _sweeps(
    parameter: str,
    model: SteerableModel,
    tried: Mapping[str, Mapping[Any, Steering]],
    contrasts: Iterable[Contrast],
    general: GivenPrompts,
    run: _Sweeping,
) -> dict[str, Sweep]:
    """Measure every steering; one unsteered pass over the general prompts serves them all."""
    contrasts, general = ContrastSet(contrasts), prompts_of(general, "general prompt")
    steerings = [steering for by_setting in tried.values() for steering in by_setting.values()]
    run = run.following(remembered(*steerings), model, [*general, *(contrast.prompt for contrast in contrasts)])
    rows = answered(model, general, run.answers, run)
    utilities = []
    with run.bar(len(steerings) + len(rows), f"sweeping {parameter}") as advance:
        found = answer_divergences(model, rows, steerings, batch_size=run.batch_size, advance=advance)
        divergences = [torch.stack([one.mean() for one in by_row]) for by_row in found]
        for steering, divergence in zip(steerings, divergences, strict=True):
            kept = -divergence if run.utility is None else run.utility(model, steering, general)
            utilities.append(one_each("utility", kept, len(general)))
        effects = run.effects_of_each(model, steerings, contrasts, advance)
    utility_name = DIVERGENCE if run.utility is None else name_of(run.utility, "utility")
    measured = zip(*(_estimates(group, run.seed) for group in (effects, utilities, divergences)), strict=True)
    return {
        name: Sweep(
            parameter,
            tuple(by_setting),
            *zip(*(next(measured) for _ in by_setting), strict=True),
            effect_name=run.effect_name,
            utility_name=utility_name,
        )
        for name, by_setting in tried.items()
    }


def _estimates(group: Sequence[Float[Tensor, " n"]], seed: int) -> list[Estimate]:
    return [bootstrap(values, seed=seed) for values in group]

"""How an effect is measured: the options that sweeps, knockouts and searches share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.effects.answers import MARGIN, Effect, margins_of_each, name_of, one_each
from fsteer_lens.ground.checks import function, optional
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.contrasts import Contrast
from fsteer_lens.prompts.passes import Passes, PassOptions


class MeasureOptions(PassOptions, total=False):
    """What a function takes by name and hands on as `Measuring`."""

    effect: Effect | None


@dataclass(frozen=True)
class Measuring(Passes):
    """How an effect is measured, and how prompts are put through the model for it.

    Attributes:
        effect: a number per contrast; None takes `answer_margin`, in nats per token.
    """

    effect: Effect | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        optional(function, "effect", self.effect)

    @property
    def effect_name(self) -> str:
        """What the effect is, with its unit where that is known."""
        return MARGIN if self.effect is None else name_of(self.effect, "effect")

    def effects(
        self, model: SteerableModel, hook_object: HookObject | None, contrasts: Sequence[Contrast]
    ) -> Float[Tensor, " n"]:
        """The effect on each contrast under a hook object, or None for the bare model."""
        return self.effects_of_each(model, [hook_object], contrasts)[0]

    def effects_of_each(
        self,
        model: SteerableModel,
        hook_objects: Sequence[HookObject | None],
        contrasts: Sequence[Contrast],
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Float[Tensor, " n"]]:
        """The same under each of several hook objects, which share what they can where the effect is `answer_margin`.

        `advance` is told how many of them are done.
        """
        if self.effect is None:
            found = margins_of_each(model, hook_objects, contrasts, **self.batching)
            advance(len(hook_objects))
            return [one_each("effect", values, len(contrasts)) for values in found]
        found = []
        for hook_object in hook_objects:
            found.append(one_each("effect", self.effect(model, hook_object, contrasts), len(contrasts)))
            advance(1)
        return found

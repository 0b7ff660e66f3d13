"""`calibrate`: the strength that a budget of divergence allows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import finite, optional, options_of, require_unset, whole
from fsteer_lens.hooks.objects import remembered
from fsteer_lens.models.attaching import unsteered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import GivenPrompts, prompts_of
from fsteer_lens.prompts.passes import Passes, PassOptions
from fsteer_lens.run.generation import generate
from fsteer_lens.run.teacher_forcing import answer_divergences, answered
from fsteer_lens.steering.steering import Steering

NEW_TOKENS = 32
STRENGTHS_A_ROUND = 8
ROUNDS = 3


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """A steering at the strength that a budget of KL divergence allows.

    Attributes:
        steering: the steering at that strength.
        strength: the strength.
        kl: what it costs: that quantile of KL(steered ‖ unsteered) over all answer tokens, in nats; at most the budget.
        budget: what it was allowed to cost.
        curve: the cost at every strength that was tried, {strength: nats}.
        n_tokens: number of answer tokens that it was measured on.
        bounded: whether the budget bounds the strength; False where even the largest strength that was tried stays
            within it, as it does where a gate keeps shut on all these prompts.
    """

    steering: Steering
    strength: float
    kl: float
    budget: float
    curve: Mapping[float, float]
    n_tokens: int
    bounded: bool

    def __repr__(self) -> str:
        bound = "" if self.bounded else ", not bounded by the budget"
        return f"Calibration(strength={self.strength:.3g}, kl={self.kl:.3g} of {self.budget:g}{bound})"


def calibrate(
    steering: Steering,
    model: SteerableModel,
    prompts: GivenPrompts,
    *,
    kl: float,
    answers: Iterable[str] | None = None,
    quantile: float = 0.95,
    max_strength: float = 8.0,
    max_new_tokens: int | None = None,
    **options: Unpack[PassOptions],
) -> Calibration:
    """Find the strength at which a steering costs what a budget allows on prompts that it should leave alone.

    The cost is a quantile, over all tokens of fixed reference answers, of KL(steered ‖ unsteered) of the next-token
    distributions. Strengths are tried in rounds, each between the largest that stayed within the budget and the
    smallest that did not; so every smaller strength that was tried is within the budget too. A strength at which the
    model's numbers blow up on any of the prompts costs more than any budget. Two methods that are calibrated on the
    same prompts to the same budget can be compared at equal cost.

    Args:
        steering: a FineSteer or a baseline; its present strength does not matter.
        model: the model it was fitted on.
        prompts: general prompts.
        kl: the budget, in nats.
        answers: a reference answer for each prompt; None takes the unsteered model's own greedy ones.
        quantile: which quantile of the divergences counts.
        max_strength: the largest strength to try.
        max_new_tokens: length of the reference answers that are generated; None is 32.
        options: `chat`, `chat_template_kwargs` and `prepend_bos` (as the steering was fitted), how prompts become
            tokens, see `tokens.prompt_ids`; `batch_size` (16), rows per forward pass; `progress` (True), show a
            progress bar.

    Raises:
        InputError: no prompts, options out of range, or a steering that only monitors.
        NonFiniteError: the unsteered model's numbers blow up.
        HookError: the hooks do not run on this model.
        ContextLengthError: a prompt with its answer does not fit into the context.
        MismatchError: the steering was fitted on another model.
    """
    passes = options_of("calibrate", Passes, options)
    kl, quantile = finite("kl", kl, above=0), finite("quantile", quantile, most=1, above=0)
    max_strength = finite("max_strength", max_strength, above=0)
    if not isinstance(steering, Steering) or steering.monitor:
        raise InputError("calibrate", expected="a steering that acts", got=repr(steering))
    max_new_tokens = optional(whole, "max_new_tokens", max_new_tokens, 1)
    if answers is not None:
        require_unset("answers= that are given", max_new_tokens=max_new_tokens)
    asked = prompts_of(prompts)
    passes = passes.following(remembered(steering), model, asked)
    ids: Any = answers
    if answers is None:
        answered(model, asked, None, passes)  # raises before anything is generated
        with unsteered(model):
            made = generate(model, asked, max_new_tokens=max_new_tokens or NEW_TOKENS, **passes.options)
        ids = [one.tokens for one in made]
    rows = answered(model, asked, ids, passes)

    def costs(strengths: Sequence[float]) -> list[float]:
        variants = [steering.with_strength(strength) for strength in strengths]
        found = answer_divergences(model, rows, variants, batch_size=passes.batch_size, advance=advance, beyond=True)
        tokens = torch.stack([torch.cat(parts) for parts in found])
        cost = tokens.quantile(quantile, dim=1, interpolation="higher")
        return cost.masked_fill(tokens.isinf().any(dim=1), math.inf).tolist()

    within, beyond = 0.0, math.inf
    curve = {0.0: 0.0}
    with passes.bar(ROUNDS * len(rows), "calibrating") as advance:
        for _ in range(ROUNDS):
            steps = range(1, STRENGTHS_A_ROUND + 1)
            if beyond == math.inf:
                tried = [max_strength * 2.0 ** (step - STRENGTHS_A_ROUND) for step in steps]
            else:
                tried = [within + (beyond - within) * step / (STRENGTHS_A_ROUND + 1) for step in steps]
            curve |= zip(tried, costs(tried), strict=True)
            beyond = min((strength for strength, cost in curve.items() if cost > kl), default=math.inf)
            within = max(strength for strength in curve if strength < beyond)
            if beyond == math.inf:
                break
    return Calibration(
        steering.with_strength(within),
        within,
        curve[within],
        kl,
        dict(sorted(curve.items())),
        sum(len(row.answer) for row in rows),
        beyond < math.inf,
    )

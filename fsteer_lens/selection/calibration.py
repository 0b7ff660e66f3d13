"""`calibrate`: the strength that a budget of divergence, and one of repetition, allow."""

import math
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Unpack

import torch

from fsteer_lens.errors import InputError, NonFiniteError
from fsteer_lens.ground.checks import finite, normalised, optional, options_of, require_unset, whole
from fsteer_lens.ground.spread import every
from fsteer_lens.hooks.objects import remembered
from fsteer_lens.models.attaching import unsteered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.forms import GivenPrompts, Prompt, prompts_of
from fsteer_lens.prompts.passes import Passes, PassOptions
from fsteer_lens.reading.reader import read_prompts
from fsteer_lens.run.generation import generate
from fsteer_lens.run.repetition import repetition_rate
from fsteer_lens.run.teacher_forcing import Advance, Answered, answer_divergences, answered
from fsteer_lens.steering.lengths import added_lengths
from fsteer_lens.steering.steering import Steering

NEW_TOKENS = 32
OCTAVES = 8
PARTS = 9
"""Into so many parts the octave that the strength lies in is cut, and each of them again: 1 % of it is left open."""
A_ROUND = 4
ROUNDS = 3
"""Rounds that it takes most often; guesses that miss, twice, are given up for evenly spread strengths."""
LADDER = tuple(0.8**step for step in range(1, 9))
"""Where to look for a strength without loops, in parts of the largest that the budget of divergence allows."""

Bound = Literal["kl", "loops"]


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """A steering at the strength that a budget of KL divergence, and one of repetition, allow.

    Attributes:
        steering: the steering at that strength.
        strength: the strength.
        kl: what it costs: that quantile of KL(steered ‖ unsteered) over all answer tokens, in nats; at most the budget.
        budget: what it was allowed to cost.
        curve: the cost at every strength that was tried, {strength: nats}.
        n_tokens: number of answer tokens that it was measured on.
        bound: which budget bounds the strength; None where even the largest strength that was tried stays within it, as
            it does where a gate keeps shut on all these prompts.
        loops: share of answers that repeat themselves at that strength; None where nothing was generated.
        loops_budget: the largest share that was allowed.
        loops_curve: the share at every strength that answers were generated at, {strength: share}; at 0 the unsteered
            model's, and infinity where the model's numbers blew up.
        length: how much is added to the stream on the prompts that are to be steered, ‖λ · g · v‖ on average, in
            lengths of the mean shift: unlike strengths it compares across methods. None without such prompts, or where
            the steering does not know the mean shift.
    """

    steering: Steering
    strength: float
    kl: float
    budget: float
    curve: Mapping[float, float]
    n_tokens: int
    bound: Bound | None
    loops: float | None = None
    loops_budget: float | None = None
    loops_curve: Mapping[float, float] = field(default_factory=dict)
    length: float | None = None

    @property
    def bounded(self) -> bool:
        """Whether a budget bounds the strength."""
        return self.bound is not None

    def __repr__(self) -> str:
        told = f"strength={self.strength:.3g}, kl={self.kl:.3g} of {self.budget:g}"
        if self.loops is not None:
            told += f", loops={self.loops:.2g} of {self.loops_budget:.2g}"
        if self.length is not None:
            told += f", length={self.length:.3g}"
        told += {None: ", not bounded by the budget", "kl": "", "loops": ", bounded by loops"}[self.bound]
        return f"Calibration({told})"


class CalibrateOptions(PassOptions, total=False):
    """What `calibrate` takes beside its own arguments: see there."""

    loops: float | None
    n_answers: int
    answer_tokens: int


@dataclass(frozen=True)
class _Calibrating(Passes):
    """How a steering is calibrated; fields as in `calibrate`."""

    loops: float | None = 0.05
    n_answers: int = 30
    answer_tokens: int = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        normalised(
            self,
            loops=optional(finite, "loops", self.loops, 0, 1),
            n_answers=whole("n_answers", self.n_answers, 1),
            answer_tokens=whole("answer_tokens", self.answer_tokens, 1),
        )

    def repetition(self, model: SteerableModel, steering: Steering | None, prompts: Sequence[Prompt]) -> float:
        """Share of generated answers that repeat themselves; infinite where the model's numbers blow up."""
        options = {**self.options, "max_new_tokens": self.answer_tokens}
        try:
            with unsteered(model):
                made = generate(model, prompts, steering, **options)  # pyright: ignore[reportArgumentType]
        except NonFiniteError:
            if steering is None:
                raise
            return math.inf
        return repetition_rate([one.tokens for one in made])


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
    steered_prompts: GivenPrompts | None = None,
    **options: Unpack[CalibrateOptions],
) -> Calibration:
    """Find the strength at which a steering costs what a budget allows on prompts that it should leave alone.

    The cost is a quantile, over all tokens of fixed reference answers, of KL(steered ‖ unsteered) of the next-token
    distributions. First each octave up to `max_strength` is tried, then strengths about where a power law between the
    largest that stayed within the budget and the smallest that did not says that it lies, until the two are neighbours
    among the 81 steps of an octave; every smaller strength that was tried is within the budget too. A strength at which
    the model's numbers blow up on any of the prompts costs more than any budget. Two methods that are calibrated on the
    same prompts to the same budget can be compared at equal cost.

    That says nothing about what becomes of the prompts that are to be steered: a strength that a gate keeps from
    general prompts altogether may send all others round in circles. With `steered_prompts` these are answered as well,
    greedily, by the unsteered model and at strengths within the budget of divergence, the largest first and each 0.8
    of the one before, until the share of answers that repeat themselves (some four tokens in a row that stand there
    three times) is at most the unsteered model's plus `loops`. Loops do not grow evenly with the strength, so smaller
    strengths may well loop more; the largest that was tried and does not is taken, and 0 where all of them loop.

    Args:
        steering: a FineSteer or a baseline; its present strength does not matter.
        model: the model it was fitted on.
        prompts: general prompts.
        kl: the budget, in nats.
        answers: a reference answer for each prompt; None takes the unsteered model's own greedy ones.
        quantile: which quantile of the divergences counts.
        max_strength: the largest strength to try.
        max_new_tokens: length of the reference answers that are generated; None is 32.
        steered_prompts: prompts that are to be steered; None measures no loops.
        options: `loops` (0.05), by how much the share of answers that repeat themselves may exceed the unsteered
            model's, None for any share; `n_answers` (30), how many of `steered_prompts` are answered, evenly spread
            where there are more; `answer_tokens` (40), the length of these answers. `chat`, `chat_template_kwargs` and
            `prepend_bos` (as the steering was fitted), how prompts become tokens, see `tokens.prompt_ids`; `batch_size`
            (16), rows per forward pass; `progress` (True), show a progress bar.

    Raises:
        InputError: no prompts, options out of range or without effect, or a steering that only monitors.
        NonFiniteError: the unsteered model's numbers blow up.
        HookError: the hooks do not run on this model.
        ContextLengthError: a prompt with its answer does not fit into the context.
        MismatchError: the steering was fitted on another model.
    """
    run = options_of("calibrate", _Calibrating, options)
    kl, quantile = finite("kl", kl, above=0), finite("quantile", quantile, most=1, above=0)
    max_strength = finite("max_strength", max_strength, above=0)
    if not isinstance(steering, Steering) or steering.monitor:
        raise InputError("calibrate", expected="a steering that acts", got=repr(steering))
    max_new_tokens = optional(whole, "max_new_tokens", max_new_tokens, 1)
    if answers is not None:
        require_unset("answers= that are given", max_new_tokens=max_new_tokens)
    of_loops = {name: options.get(name) for name in ("loops", "n_answers", "answer_tokens")}
    if steered_prompts is None:
        require_unset("no steered_prompts=", **of_loops)
    elif run.loops is None:
        require_unset("loops=None", answer_tokens=of_loops["answer_tokens"])
    asked = prompts_of(prompts)
    steered = [] if steered_prompts is None else every(prompts_of(steered_prompts, "steered prompt"), run.n_answers)
    run = run.following(remembered(steering), model, [*asked, *steered])
    looks = bool(steered) and run.loops is not None
    loops_curve = {0.0: run.repetition(model, None, steered)} if looks else {}
    rows = _reference(model, asked, answers, max_new_tokens or NEW_TOKENS, run)

    def costs(strengths: Sequence[float], advance: Advance = lambda rows: None) -> list[float]:
        variants = [steering.with_strength(strength) for strength in strengths]
        found = answer_divergences(model, rows, variants, batch_size=run.batch_size, advance=advance, beyond=True)
        tokens = torch.stack([torch.cat(parts) for parts in found])
        cost = tokens.quantile(quantile, dim=1, interpolation="higher")
        return cost.masked_fill(tokens.isinf().any(dim=1), math.inf).tolist()

    curve = {0.0: 0.0}
    with run.bar(ROUNDS * len(rows), "calibrating") as advance:
        tried = [max_strength * 2.0**-step for step in reversed(range(OCTAVES))]
        curve |= zip(tried, costs(tried, advance), strict=True)
        within, beyond = _largest(curve, kl)
        left = _steps(within, beyond) if beyond < math.inf else []
        rounds = 1
        while left := [strength for strength in left if within < strength < beyond]:
            tried = _about(left, _guess(curve, within, beyond, kl)) if rounds < ROUNDS else every(left, A_ROUND)
            curve |= zip(tried, costs(tried, advance), strict=True)
            within, beyond = _largest(curve, kl)
            rounds += 1
    bound: Bound | None = "kl" if beyond < math.inf else None

    def allowed(strength: float) -> bool:
        if strength not in loops_curve:
            loops_curve[strength] = run.repetition(model, steering.with_strength(strength), steered)
        return loops_curve[strength] <= loops_curve[0.0] + (run.loops or 0.0)

    if looks and not allowed(within):
        ladder = [within * part for part in LADDER]
        curve |= zip(ladder, costs(ladder), strict=True)
        _, beyond = _largest(curve, kl)
        within = next((strength for strength in ladder if strength < beyond and allowed(strength)), 0.0)
        bound = "loops"
    chosen = steering.with_strength(within)
    return Calibration(
        chosen,
        within,
        curve[within],
        kl,
        dict(sorted(curve.items())),
        sum(len(row.answer) for row in rows),
        bound,
        loops_curve.get(within),
        loops_curve[0.0] + (run.loops or 0.0) if looks else None,
        dict(sorted(loops_curve.items())),
        _length(model, chosen, steered, run),
    )


def _reference(
    model: SteerableModel, asked: Sequence[Prompt], answers: Iterable[str] | None, new_tokens: int, passes: Passes
) -> list[Answered]:
    """General prompts with the answers that divergences are measured on."""
    ids: Any = answers
    if answers is None:
        answered(model, asked, None, passes)  # raises before anything is generated
        with unsteered(model):
            made = generate(model, asked, max_new_tokens=new_tokens, **passes.options)
        ids = [one.tokens for one in made]
    return answered(model, asked, ids, passes)


def _largest(curve: Mapping[float, float], kl: float) -> tuple[float, float]:
    """The largest strength up to which all are within the budget, and the smallest that is not."""
    beyond = min((strength for strength, cost in curve.items() if not cost <= kl), default=math.inf)
    return max(strength for strength in curve if strength < beyond), beyond


def _steps(within: float, beyond: float) -> list[float]:
    """Strengths between two, in order: as many parts as said above, each in as many."""
    ends = [*(within + (beyond - within) * part / PARTS for part in range(PARTS)), beyond]
    return [low + (high - low) * part / PARTS for low, high in pairwise(ends) for part in range(PARTS)][1:]


def _guess(curve: Mapping[float, float], within: float, beyond: float, kl: float) -> float:
    """Where a cost that is a power of the strength reaches the budget; it is of second order near strength 0."""
    low, high = curve[within], curve[beyond]
    if high == math.inf:
        return (within + beyond) / 2
    if not low > 0:
        return beyond * math.sqrt(kl / high)
    return within * (beyond / within) ** (math.log(kl / low) / math.log(high / low))


def _about(strengths: Sequence[float], guess: float) -> Sequence[float]:
    """A round of neighbours, about a guess."""
    start = min(bisect(strengths, guess) - A_ROUND // 2, len(strengths) - A_ROUND)
    return strengths[max(start, 0) :][:A_ROUND]


def _length(model: SteerableModel, steering: Steering, prompts: Sequence[Prompt], passes: Passes) -> float | None:
    """Mean length of what is added on prompts, in lengths of the mean shift; None where that is not known."""
    units = steering.shift_lengths or {}
    if not prompts or steering.scanning or not all(units.get(layer) for layer in steering.layers):
        return None
    queries = read_prompts(model, prompts, passes, steering.hooked_layers, steering.reads, site=steering.site)
    return float(added_lengths(steering, queries, units).double().mean())

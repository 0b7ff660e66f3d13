"""What steering does to given answers, by teacher forcing: nothing is generated."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError, NonFiniteError, TokenizerError
from fsteer_lens.ground.checks import options_of, several
from fsteer_lens.hooks.objects import HookObject, remembered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.prompts.forms import GivenPrompts, Prompt, prompts_of
from fsteer_lens.prompts.passes import BatchOptions, Passes
from fsteer_lens.prompts.tokens import stop_ids
from fsteer_lens.run.answer_passes import Answered
from fsteer_lens.run.decoding import Step
from fsteer_lens.run.recorder import Recorder
from fsteer_lens.run.teacher_forcing import (
    answer_divergences,
    answer_logits,
    answer_logprobs_of_each,
    answered,
    batches,
    each_answer,
    session_for,
)
from fsteer_lens.trace.trace import Trace, join

Effect = Callable[[SteerableModel, HookObject | None, Sequence[Contrast]], Float[Tensor, " n"]]
"""A number for each contrast under a hook object, or None for the bare model; larger is more of what is wanted."""
Utility = Callable[[SteerableModel, HookObject | None, Sequence[Prompt]], Float[Tensor, " n"]]
"""A number for each general prompt; larger is better kept."""

MARGIN = "margin of preferred over undesired (nats per token)"
DIVERGENCE = "−KL(steered ‖ unsteered) (nats)"


def passes_of(
    owner: str,
    options: Mapping[str, Any],
    model: SteerableModel,
    steering: HookObject | Sequence[HookObject | None] | None,
    prompts: Sequence[Prompt],
    takes: Iterable[str] = BatchOptions.__annotations__,
) -> Passes:
    """How a function that was given these options puts prompts through a model, as the steerings remember it."""
    passes = options_of(owner, Passes, options, takes)
    steerings = steering if isinstance(steering, Sequence) else [steering]
    return passes.following(remembered(*steerings), model, prompts)


def answer_margin(
    model: SteerableModel,
    steering: HookObject | None,
    contrasts: Iterable[Contrast],
    **options: Unpack[BatchOptions],
) -> Float[Tensor, " n"]:
    """Mean log-probability per token of the preferred answer minus that of the undesired one, [n], in nats per token.

    Args:
        model: a HookedTransformer or TransformerBridge.
        steering: what to put on the model; None measures the bare model.
        contrasts: prompts with both answers; their contexts are not used.
        options: `chat`, `chat_template_kwargs` and `prepend_bos` (as the steering was fitted), how prompts become
            tokens, see `tokens.prompt_ids`; `batch_size` (16), rows per forward pass.

    Raises:
        DataError: something else than contrasts.
        InputError: no contrasts, or an answer without a token.
        ContextLengthError: a prompt with an answer does not fit into the context.
        MismatchError: the steering was fitted on another model, or on prompts that became tokens in another way.
        NonFiniteError: the model's numbers blow up.
        HookError: the steering's hooks do not run.
    """
    return margins_of_each(model, [steering], contrasts, **options)[0]


def margins_of_each(
    model: SteerableModel,
    steerings: Sequence[HookObject | None],
    contrasts: Iterable[Contrast],
    **options: Unpack[BatchOptions],
) -> list[Float[Tensor, " n"]]:
    """`answer_margin` under each of several steerings; what they share is run once."""
    return _compared(torch.mean, model, steerings, contrasts, options)


def preferences_of_each(
    model: SteerableModel,
    steerings: Sequence[HookObject | None],
    contrasts: Iterable[Contrast],
    **options: Unpack[BatchOptions],
) -> list[Float[Tensor, " n"]]:
    """Of each contrast the probability of the preferred answer, were it one of the two, under each steering.

    p₊ / (p₊ + p₋) with the probabilities of whole answers, as in TruthfulQA's MC2 with one answer on either side.
    """
    return [gap.sigmoid() for gap in _compared(torch.sum, model, steerings, contrasts, options)]


def _compared(
    whole: Callable[[Tensor], Tensor],
    model: SteerableModel,
    steerings: Sequence[HookObject | None],
    contrasts: Iterable[Contrast],
    options: Mapping[str, Any],
) -> list[Float[Tensor, " n"]]:
    """Of each contrast the preferred answer's log-probabilities, taken together, less the undesired answer's."""
    known = ContrastSet(contrasts)
    prompts = known.prompts
    sides = [contrast.preferred for contrast in known] + [contrast.undesired for contrast in known]
    passes = passes_of("answer_margin", options, model, steerings, prompts)
    rows = answered(model, prompts + prompts, sides, passes)
    found = answer_logprobs_of_each(model, rows, steerings, batch_size=passes.batch_size)
    answers = [torch.stack([whole(one) for one in logprobs]) for logprobs in found]
    return [one[: len(prompts)] - one[len(prompts) :] for one in answers]


def exact_answers(
    model: SteerableModel,
    steering: HookObject | None,
    prompts: GivenPrompts,
    answers: Iterable[str],
    **options: Unpack[BatchOptions],
) -> Float[Tensor, " n"]:
    """1 where greedy decoding gives exactly the tokens of this answer and then ends, else 0, [n].

    Nothing is generated: greedy decoding says these tokens if and only if each of them is the likeliest one after those
    before it. One teacher-forced pass tells that for all of them. The answer is tokenised by itself; the same text in
    other tokens counts as another answer.

    Args:
        model: a HookedTransformer or TransformerBridge.
        steering: what to put on the model; None measures the bare model.
        prompts: prompts.
        answers: the text that should follow each, tokenised by itself.
        options: as in `answer_margin`.

    Raises:
        InputError: no prompts, another number of answers, or an answer without a token.
        ContextLengthError: a prompt with its answer does not fit into the context.
        MismatchError: the steering was fitted on another model.
        TokenizerError: no token ends an answer of this model.
    """
    endings = torch.tensor(sorted(stop_ids(model)), dtype=torch.long, device="cpu")
    if not len(endings):
        raise TokenizerError("no token ends an answer of this model", fix="Set tokenizer.eos_token.")
    prompts = prompts_of(prompts)
    passes = passes_of("exact_answers", options, model, steering, prompts)
    rows = answered(model, prompts, answers, passes)
    ended = [replace(row, answer=(*row.answer, int(endings[0]))) for row in rows]
    found = torch.zeros(len(rows), dtype=torch.float32, device="cpu")
    for index, logits in each_answer(model, ended, steering, batch_size=passes.batch_size):
        *said, last = logits.argmax(dim=-1).tolist()
        found[index] = said == list(rows[index].answer) and last in endings
    return found


def general_divergence(
    model: SteerableModel,
    steering: HookObject,
    prompts: GivenPrompts,
    answers: Iterable[str | Sequence[int]] | None = None,
    **options: Unpack[BatchOptions],
) -> Float[Tensor, " n"]:
    """KL(steered ‖ unsteered) of the next-token distributions, its mean over each answer's tokens, [n], in nats.

    Args:
        model: a HookedTransformer or TransformerBridge.
        steering: what to put on the model.
        prompts: prompts, as a rule those to be left alone.
        answers: text or ids of an answer to each; None looks at the first token of any answer alone.
        options: as in `answer_margin`.

    Raises:
        As `answer_margin`.
    """
    return divergences_of_each(model, [steering], prompts, answers, **options)[0]


def divergences_of_each(
    model: SteerableModel,
    steerings: Sequence[HookObject],
    prompts: GivenPrompts,
    answers: Iterable[str | Sequence[int]] | None = None,
    **options: Unpack[BatchOptions],
) -> list[Float[Tensor, " n"]]:
    """`general_divergence` under each of several steerings; what they share is run once."""
    prompts = prompts_of(prompts)
    passes = passes_of("general_divergence", options, model, steerings, prompts)
    rows = answered(model, prompts, answers, passes)
    found = answer_divergences(model, rows, steerings, batch_size=passes.batch_size)
    return [torch.stack([one.mean() for one in by_row]) for by_row in found]


def counterfactual(
    model: SteerableModel,
    steering: HookObject,
    prompts: GivenPrompts,
    answers: Iterable[str | Sequence[int]],
    **options: Unpack[BatchOptions],
) -> Trace:
    """Ask the unsteered model about steered text: per-token KL and log-probability change, as a trace.

    One forward pass with the steering gives its decisions and distributions, and one more, without, those of the
    unsteered model. For answers that `generate` made the trace is that of `generate(..., compare=True)` but for the
    text that the unsteered model would have generated; answers from elsewhere are treated alike.

    Args:
        model: a HookedTransformer or TransformerBridge.
        steering: what was on the model, or would be.
        prompts: prompts.
        answers: text or ids of the answer to each.
        options: as in `answer_margin`.

    Returns:
        A trace of one row per prompt, with decisions, `change`, and `steps` that hold `logprobs`,
        `baseline_logprobs`, `logprob_change` and `kl` in nats, [b n], and both models' likeliest tokens.

    Raises:
        As `answer_margin`.
    """
    prompts = prompts_of(prompts)
    passes = passes_of("counterfactual", options, model, steering, prompts)
    rows = answered(model, prompts, several("answers", answers, f"one for each of {len(prompts)} prompts"), passes)
    traces: dict[int, Trace] = {}
    for chosen, batch in batches(model, rows, passes.batch_size):
        group = [rows[index] for index in chosen]
        session = session_for(model, batch, group, steering)
        steered, base = answer_logits(model, batch, group, session), answer_logits(model, batch, group, None)
        recorder = Recorder(model, [row.prompt for row in group])
        for step, other in zip(_as_steps(group, steered), _as_steps(group, base), strict=True):
            recorder.add(step, other.logprobs)
        trace = recorder.complete(session.trace)
        traces |= {index: trace.row(place) for place, index in enumerate(chosen)}
    return join([traces[index] for index in range(len(rows))])


def _as_steps(rows: Sequence[Answered], logits: Sequence[Float[Tensor, "_ vocab"]]) -> Iterator[Step]:
    """The tokens of given answers, as if decoding had chosen them one after another."""
    lengths = torch.tensor([len(row.answer) for row in rows], dtype=torch.long, device="cpu")
    for number in range(int(lengths.max())):
        places = (lengths - 1).clamp(max=number).tolist()  # a row that has ended stays at its last token
        here = torch.stack([one[place] for one, place in zip(logits, places, strict=True)])
        chosen = [row.answer[place] for row, place in zip(rows, places, strict=True)]
        alive = (number < lengths).to(here.device)
        yield Step(torch.tensor(chosen, dtype=torch.long, device=here.device), here.float().log_softmax(dim=-1), alive)


def one_each(what: str, values: Any, n: int) -> Float[Tensor, " n"]:
    """What a caller's measure gave, checked: a finite number for each of n items."""
    if not isinstance(values, Tensor) or values.shape != (n,):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"what {what}= gave", expected=f"a tensor of {n} numbers, one for each", got=got)
    bad = ~values.isfinite()
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise NonFiniteError(
            f"what {what}= gave",
            expected="finite numbers",
            got=f"NaN or infinity for {int(bad.sum())} of {n}, first for number {first}",
            fix="Leave these out, or lower the strength.",
        )
    return values


def name_of(measure: Any, otherwise: str) -> str:
    """What to call a caller's measure."""
    return getattr(measure, "__name__", otherwise).replace("_", " ")

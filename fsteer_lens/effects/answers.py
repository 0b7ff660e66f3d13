"""What steering does to given answers, by teacher forcing: nothing is generated."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.errors import InputError, TokenizerError
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet, Prompt
from fsteer_lens.prompts.tokens import require_tokenizer, stop_ids, texts_of_top, token_texts
from fsteer_lens.run.decoding import TOP
from fsteer_lens.run.teacher_forcing import (
    Answered,
    answer_divergences,
    answer_logits,
    answer_logprobs,
    answered,
    batches,
    divergences,
    each_answer,
    session_for,
)
from fsteer_lens.trace.steps import Steps
from fsteer_lens.trace.trace import Trace, join

Effect = Callable[[SteerableModel, HookObject | None, Sequence[Contrast]], Float[Tensor, " n"]]
"""A number for each contrast under a hook object, or None for the bare model; larger is more of what is wanted."""
Utility = Callable[[SteerableModel, HookObject | None, Sequence[Prompt]], Float[Tensor, " n"]]
"""A number for each general prompt; larger is better kept."""

MARGIN = "margin of preferred over undesired (nats per token)"
DIVERGENCE = "−KL(steered ‖ unsteered) (nats)"


def answer_margin(
    model: SteerableModel,
    steering: HookObject | None,
    contrasts: Sequence[Contrast],
    *,
    chat: bool = False,
    batch_size: int = 16,
) -> Float[Tensor, " n"]:
    """Mean log-probability per token of the preferred answer minus that of the undesired one, [n], in nats per token.

    Args:
        model: a HookedTransformer or TransformerBridge.
        steering: what to put on the model; None measures the bare model.
        contrasts: prompts with both answers; their contexts are not used.
        chat: send string prompts through the chat template.
        batch_size: rows per forward pass; a contrast is two rows.

    Raises:
        DataError: something else than contrasts.
        InputError: no contrasts, or an answer without a token.
        ContextLengthError: a prompt with an answer does not fit into the context.
        MismatchError: the steering was fitted on another model.
    """
    known = ContrastSet(contrasts)
    prompts = known.prompts
    sides = [contrast.preferred for contrast in known] + [contrast.undesired for contrast in known]
    rows = answered(model, prompts + prompts, sides, chat=chat)
    means = torch.stack([one.mean() for one in answer_logprobs(model, rows, steering, batch_size=batch_size)])
    return means[: len(prompts)] - means[len(prompts) :]


def exact_answers(
    model: SteerableModel,
    steering: HookObject | None,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    chat: bool = False,
    batch_size: int = 16,
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
        chat, batch_size: as in `answer_margin`.

    Raises:
        InputError: no prompts, another number of answers, or an answer without a token.
        ContextLengthError: a prompt with its answer does not fit into the context.
        MismatchError: the steering was fitted on another model.
        TokenizerError: no token ends an answer of this model.
    """
    endings = torch.tensor(sorted(stop_ids(model)))
    if not len(endings):
        raise TokenizerError("no token ends an answer of this model", fix="Set tokenizer.eos_token.")
    rows = answered(model, prompts, answers, chat=chat)
    ended = [Answered(row.prompt, (*row.answer, int(endings[0]))) for row in rows]
    found = torch.zeros(len(rows))
    for index, logits in each_answer(model, ended, steering, batch_size=batch_size):
        *said, last = logits.argmax(dim=-1).tolist()
        found[index] = said == list(rows[index].answer) and last in endings
    return found


def general_divergence(
    model: SteerableModel,
    steering: HookObject,
    prompts: Sequence[Prompt],
    answers: Sequence[str | Sequence[int]] | None = None,
    *,
    chat: bool = False,
    batch_size: int = 16,
) -> Float[Tensor, " n"]:
    """KL(steered ‖ unsteered) of the next-token distributions, its mean over each answer's tokens, [n], in nats.

    Args:
        model: a HookedTransformer or TransformerBridge.
        steering: what to put on the model.
        prompts: prompts, as a rule those to be left alone.
        answers: text or ids of an answer to each; None looks at the first token of any answer alone.
        chat, batch_size: as in `answer_margin`.

    Raises:
        As `answer_margin`.
    """
    rows = answered(model, prompts, answers, chat=chat)
    (found,) = answer_divergences(model, rows, [steering], batch_size=batch_size)
    return torch.stack([one.mean() for one in found])


def counterfactual(
    model: SteerableModel,
    steering: HookObject,
    prompts: Sequence[Prompt],
    answers: Sequence[str | Sequence[int]],
    *,
    chat: bool = False,
    batch_size: int = 16,
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
        chat, batch_size: as in `answer_margin`.

    Returns:
        A trace of one row per prompt, with decisions, `change`, and `steps` that hold `logprobs`,
        `baseline_logprobs`, `logprob_change` and `kl` in nats, [b n], and both models' likeliest tokens.

    Raises:
        As `answer_margin`.
    """
    rows = answered(model, prompts, answers, chat=chat)
    tokenizer = require_tokenizer(model)
    traces: dict[int, Trace] = {}
    for chosen, batch in batches(model, rows, batch_size):
        group = [rows[index] for index in chosen]
        session = session_for(model, batch, group, steering)
        steered, base = answer_logits(model, batch, group, session), answer_logits(model, batch, group, None)
        trace = session.trace.cpu()
        trace.bos = torch.tensor([row.prompt[0] == tokenizer.bos_token_id for row in group])
        trace.prompts = tuple(token_texts(model, row.prompt) for row in group)
        trace.steps = Steps.join(
            [_steps(model, row, *logits) for row, *logits in zip(group, steered, base, strict=True)]
        )
        traces |= {index: trace.row(place) for place, index in enumerate(chosen)}
    return join([traces[index] for index in range(len(rows))])


def _steps(
    model: SteerableModel, row: Answered, steered: Float[Tensor, "n vocab"], base: Float[Tensor, "n vocab"]
) -> Steps:
    """What both models say about one given answer."""
    tokenizer = require_tokenizer(model)
    tokens = torch.tensor([row.answer])
    logprobs, top = _known(steered, tokens)
    base_logprobs, base_top = _known(base, tokens)
    return Steps(
        tokens=tokens,
        texts=(token_texts(model, row.answer, row.prompt),),
        logprobs=logprobs,
        top_ids=top.indices,
        top_logprobs=top.values,
        top_texts=texts_of_top(tokenizer, top.indices),
        special=torch.isin(tokens, torch.tensor(tokenizer.all_special_ids)),
        kl=divergences(steered, base).unsqueeze(0),
        baseline_logprobs=base_logprobs,
        baseline_top_ids=base_top.indices,
        baseline_top_logprobs=base_top.values,
        baseline_top_texts=texts_of_top(tokenizer, base_top.indices),
    )


def _known(logits: Float[Tensor, "n vocab"], tokens: Int[Tensor, "1 n"]) -> tuple[Float[Tensor, "1 n"], Any]:
    """Log-probabilities of the tokens, and the likeliest tokens with theirs, on the CPU."""
    logprobs = logits.float().log_softmax(dim=-1).cpu().unsqueeze(0)
    return logprobs.gather(2, tokens.unsqueeze(2)).squeeze(2), logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)


def one_each(what: str, values: Any, n: int) -> Float[Tensor, " n"]:
    """What a caller's measure gave, checked: a number for each of n items."""
    if not isinstance(values, Tensor) or values.shape != (n,):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"what {what}= gave", expected=f"a tensor of {n} numbers, one for each", got=got)
    return values


def name_of(measure: Any, otherwise: str) -> str:
    """What to call a caller's measure."""
    return getattr(measure, "__name__", otherwise).replace("_", " ")

"""The decoding loop: a forward pass, a token for every row, until all rows have ended."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.hooks.session import Session
from fsteer_lens.models.attaching import lock_of
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.forward import Forward
from fsteer_lens.prompts.tokens import Batch, require_tokenizer
from fsteer_lens.run.overflow import blown_up, undefined
from fsteer_lens.run.sampling import Sampling
from fsteer_lens.run.stopping import Stop


@dataclass(frozen=True, eq=False)
class Rules:
    """What decoding goes by, whichever the prompts.

    Attributes:
        sampling: how a token is chosen.
        stop: what ends a row.
        max_new_tokens: tokens of a row at most.
        cache: keep keys and values; otherwise the whole text is run again for every token.
    """

    sampling: Sampling
    stop: Stop
    max_new_tokens: int
    cache: bool


class Step(NamedTuple):
    """One step of a text: a token for every row, the distributions it was chosen from, and the rows that still ran."""

    chosen: Int[Tensor, " b"]
    logprobs: Float[Tensor, "b vocab"]
    alive: Bool[Tensor, " b"]


def decode(
    model: SteerableModel,
    batch: Batch,
    session: Session | None,
    rules: Rules,
    numbers: Sequence[int],
    forward: Forward | None = None,
) -> Iterator[Step]:
    """Decode left-padded prompts token by token until every row has ended; hooks are on only inside a step.

    `numbers` are those of the rows among all prompts: each draws from a generator of its own. With `forward` the rows
    go on from what it has run.

    Raises:
        NonFiniteError: logits of a row that still runs are NaN or infinite.
        HookError: a hook did not run in one of the steps.
    """
    forward = forward or Forward(model, cache=rules.cache)
    generators = rules.sampling.generators(numbers)
    tokens, mask = batch.tokens, batch.mask
    alive = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    running = [True] * len(tokens)  # `alive` on the host
    generated: list[list[int]] = [[] for _ in range(len(tokens))]
    for number in range(rules.max_new_tokens):
        with torch.no_grad(), lock_of(model) if session is None else session.step(model, fresh=number == 0):
            logits = forward.last(tokens, mask)[:, -1].float()
        chosen = rules.sampling.choose(logits, generators)
        wrong = undefined(logits) & alive
        ends = rules.stop.by_ids(chosen)
        # all at once: every transfer waits for the device
        picked, bad, ended = torch.stack([chosen, wrong.long(), ends.long()]).tolist()
        if any(bad):
            row = bad.index(1)
            what = f"logits at step {number} of row {numbers[row]},"
            said = require_tokenizer(model).decode(batch.tokens[row][batch.mask[row]].tolist())
            raise blown_up(what, model, said, None if session is None else session.hook_object, sum(bad))
        yield Step(chosen, logits.log_softmax(dim=-1), alive)
        for row, token in zip(generated, picked, strict=True):
            row.append(token)
        by_texts = rules.stop.by_texts(generated)
        alive = alive & ~ends
        if any(by_texts):
            alive = alive & ~torch.tensor(by_texts, dtype=torch.bool, device=alive.device)
        running = [run and not (end or hit) for run, end, hit in zip(running, ended, by_texts, strict=True)]
        if not any(running):
            return
        tokens, mask = chosen.unsqueeze(1), mask.new_ones(len(chosen), 1)

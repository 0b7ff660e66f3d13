"""Teacher-forced passes: what steering does to the probabilities of answers that are given, not generated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.decoding import CHUNK_NUMBERS, divergence, open_session, unsteered
from fsteer_lens.hooks import HookObject
from fsteer_lens.models import SteerableModel
from fsteer_lens.tokens import Batch, pad


@dataclass(frozen=True)
class Answered:
    """A prompt and an answer to it, both as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def answer_divergences(
    model: SteerableModel, rows: Sequence[Answered], hook_objects: Sequence[HookObject], *, batch_size: int = 16
) -> Iterator[list[Float[Tensor, " tokens"]]]:
    """KL(steered ‖ unsteered) of the next-token distributions at every token of the answers, in nats.

    Yields, batch by batch of rows, the divergences at all answer tokens of the batch for each hook object; one
    unsteered pass serves all of them. The query activation of a row is that of its prompt alone.
    """
    order = sorted(rows, key=lambda row: len(row.prompt) + len(row.answer))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad(model, [[*row.prompt, *row.answer] for row in chosen], "right")
        lengths = torch.tensor([len(row.prompt) for row in chosen])
        with unsteered(model):
            base = _answer_logits(model, batch, chosen)
        found = []
        for hook_object in hook_objects:
            with unsteered(model), open_session(model, batch, hook_object, lengths).step(model, fresh=True):
                steered = _answer_logits(model, batch, chosen)
            found.append(_divergences(steered, base))
        yield found


@torch.no_grad()
def _answer_logits(model: SteerableModel, batch: Batch, rows: Sequence[Answered]) -> Float[Tensor, "tokens vocab"]:
    """Raw logits at the positions that predict the answers' tokens, row after row."""
    whole = model(batch.tokens, attention_mask=batch.mask.long(), return_type="logits")
    spans = [slice(len(row.prompt) - 1, len(row.prompt) + len(row.answer) - 1) for row in rows]
    return torch.cat([logits[span] for logits, span in zip(whole, spans, strict=True)])


def _divergences(
    steered: Float[Tensor, "tokens vocab"], base: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """Divergence at every token, in chunks of tokens, on the CPU."""
    size = max(1, CHUNK_NUMBERS // base.shape[-1])
    pairs = zip(steered.split(size), base.split(size), strict=True)
    return torch.cat([divergence(*(logits.float().log_softmax(dim=-1) for logits in pair)).cpu() for pair in pairs])

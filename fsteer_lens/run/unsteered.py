"""The unsteered model alongside: what it says at every step of a text that the steered one made."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.models.attaching import unsteered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.forward import Forward
from fsteer_lens.prompts.tokens import Batch, require_tokenizer
from fsteer_lens.run.decoding import Step
from fsteer_lens.run.overflow import blown_up, undefined

CHUNK_NUMBERS = 2**25
"""Log-probabilities that are held at a time, over rows, steps and vocabulary: 128 MiB in float32."""
CHUNK_STEPS = 32


class Unsteered:
    """The unsteered model on the tokens of steered steps, in chunks of steps: one forward pass for each chunk."""

    def __init__(self, model: SteerableModel, batch: Batch, *, cache: bool) -> None:
        self._model, self._forward = model, Forward(model, cache=cache)
        self._tokens, self._mask = batch.tokens, batch.mask  # what it has not read yet
        self._size = max(1, min(CHUNK_STEPS, CHUNK_NUMBERS // (len(batch.tokens) * model.cfg.d_vocab)))

    def beside(self, steps: Iterable[Step]) -> Iterator[tuple[Step, Float[Tensor, "b vocab"]]]:
        """Each step with the unsteered model's log-probabilities of the same next token."""
        chunk: list[Step] = []
        for step in steps:
            chunk.append(step)
            if len(chunk) == self._size:
                yield from zip(chunk, self._logprobs(chunk), strict=True)
                chunk = []  # before the next step is made, which would come on top of these
        yield from zip(chunk, self._logprobs(chunk), strict=True)

    def _logprobs(self, chunk: Sequence[Step]) -> Iterator[Float[Tensor, "b vocab"]]:
        """Log-probabilities at each step of a chunk, one at a time."""
        if not chunk:
            return
        *fed, last = (step.chosen.unsqueeze(1) for step in chunk)
        tokens = torch.cat([self._tokens, *fed], dim=1)
        mask = torch.cat([self._mask, *[torch.ones_like(column, dtype=torch.bool) for column in fed]], dim=1)
        with unsteered(self._model):
            logits = self._forward.last(tokens, mask, len(chunk))
        self._tokens, self._mask = last, torch.ones_like(last, dtype=torch.bool)
        wrong = undefined(logits) & torch.stack([step.alive for step in chunk], dim=1)
        if bool(wrong.any()):
            row = int(wrong.any(dim=1).nonzero()[0])
            said = require_tokenizer(self._model).decode(tokens[row][mask[row]].tolist())
            what = "logits of the unsteered model after the steered text,"
            raise blown_up(what, self._model, said, None, int(wrong.any(dim=1).sum()))
        for index in range(len(chunk)):
            yield logits[:, index].float().log_softmax(dim=-1)


def divergence(logprobs: Float[Tensor, "*batch vocab"], base: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """KL(p ‖ q) of two next-token distributions given by their log-probabilities, in nats."""
    probabilities = logprobs.exp()
    terms = probabilities * (logprobs - base)
    return terms.masked_fill_(probabilities == 0, 0).sum(dim=-1).clamp(min=0)  # 0 log 0 is 0, not NaN

"""The recorder: takes the steps of a text, generated or given, and keeps what a trace says of them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.tokens import require_tokenizer, texts_of_top, token_texts
from fsteer_lens.run.decoding import Step
from fsteer_lens.run.unsteered import divergence
from fsteer_lens.trace.steps import Steps, fill_of
from fsteer_lens.trace.trace import Trace

TOP = 5
"""Likeliest tokens that are kept of every step."""


class Predicted(NamedTuple):
    """What a model says at one step: of the token that comes, and which tokens it finds likeliest."""

    logprobs: Float[Tensor, " b"]
    top_ids: Int[Tensor, "b top"]
    top_logprobs: Float[Tensor, "b top"]


def predicted(logprobs: Float[Tensor, "b vocab"], chosen: Int[Tensor, " b"]) -> Predicted:
    """Read one step's distributions, in nats."""
    top = logprobs.topk(min(TOP, logprobs.shape[-1]), dim=-1)
    return Predicted(logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1), top.indices, top.values)


@final
class Recorder:
    """Takes one step after another of a batch of rows, and gives one `Steps`.

    It keeps a few numbers of each step, [b] and [b top], and lets the distributions over the vocabulary go.

    Args:
        model: whose tokens they are.
        prompts: ids of each row's prompt, without pads.
    """

    def __init__(self, model: SteerableModel, prompts: Sequence[Sequence[int]]) -> None:
        self._model, self._prompts = model, prompts
        self._alive: list[Tensor] = []
        self._kept: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, step: Step, base: Float[Tensor, "b vocab"] | None = None) -> None:
        """Take a step; `base` are the unsteered model's log-probabilities of it, with every step or with none."""
        kept = {"tokens": step.chosen, **predicted(step.logprobs, step.chosen)._asdict()}
        if base is not None:
            unsteered = predicted(base, step.chosen)._asdict()
            kept |= {f"baseline_{name}": value for name, value in unsteered.items()}
            kept["kl"] = divergence(step.logprobs, base)
        self._alive.append(step.alive)
        for name, value in kept.items():
            self._kept[name].append(value)

    def steps(self) -> Steps:
        """All steps so far, on the CPU, with the fill where a row had ended."""
        alive = torch.stack(self._alive, dim=1).cpu()
        kept = {name: filled(torch.stack(values, dim=1).cpu(), alive) for name, values in self._kept.items()}
        tokenizer = require_tokenizer(self._model)
        answers = zip(without_fill(kept["tokens"]), self._prompts, strict=True)
        base = kept.get("baseline_top_ids")
        return Steps(
            **kept,
            texts=tuple(token_texts(self._model, row, before) for row, before in answers),
            top_texts=texts_of_top(tokenizer, kept["top_ids"]),
            special=torch.isin(kept["tokens"], torch.tensor(tokenizer.all_special_ids, dtype=torch.long, device="cpu"))
            & alive,
            baseline_top_texts=None if base is None else texts_of_top(tokenizer, base),
        )

    def complete(self, trace: Trace) -> Trace:
        """The trace, on the CPU, with the prompts and the steps, which no hook can know."""
        bos = require_tokenizer(self._model).bos_token_id
        return replace(
            trace.cpu(),
            bos=torch.tensor([row[0] == bos for row in self._prompts], dtype=torch.bool, device="cpu"),
            prompts=tuple(token_texts(self._model, row) for row in self._prompts),
            steps=self.steps(),
        )


def filled(values: Tensor, alive: Tensor) -> Tensor:
    """Values with the fill of `Steps` where `alive` is false, which has their first axes."""
    return values.masked_fill(~alive.reshape(*alive.shape, *[1] * (values.ndim - alive.ndim)), fill_of(values.dtype))


def without_fill(tokens: Int[Tensor, "b n"]) -> list[tuple[int, ...]]:
    """Ids of each row as far as it went."""
    return [tuple(token for token in row if token >= 0) for row in tokens.tolist()]

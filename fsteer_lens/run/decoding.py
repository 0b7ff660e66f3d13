"""The decoding loop: choosing tokens, knowing when to stop, and the unsteered model alongside."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.hooks.session import Session
from fsteer_lens.models.attaching import lock_of, unsteered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.forward import Forward
from fsteer_lens.prompts.tokens import Batch, stop_ids, token_texts

TOP = 5
CHUNK_NUMBERS = 2**25


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits; every row has a generator of its own.

    Attributes:
        do_sample: draw from the distribution; otherwise take the most probable token.
        temperature: divides the logits, > 0.
        top_k: keep this many of the most probable tokens.
        top_p: keep the smallest set of tokens with this much probability, in (0, 1].
        seed: of the draws; None takes a random one.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "seed")}
        unused = [name for name, value in given.items() if value is not None]
        if not self.do_sample and unused:
            raise InputError(f"{', '.join(unused)} without effect", fix="Pass do_sample=True as well.")
        if self.temperature is not None and not self.temperature > 0:
            raise InputError("temperature", expected="a number > 0", got=self.temperature, fix="Or do_sample=False.")
        if self.top_k is not None and self.top_k < 1:
            raise InputError("top_k", expected="an int >= 1", got=self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError("top_p", expected="a number in (0, 1]", got=self.top_p)

    def generators(self, rows: Iterable[int]) -> list[torch.Generator]:
        """One generator per row number, so that a row draws the same in any batch."""
        seed = torch.Generator().seed() if self.seed is None else self.seed
        return [torch.Generator().manual_seed(zlib.crc32(f"{seed}/{row}".encode())) for row in rows]

    def choose(self, logits: Float[Tensor, "b vocab"], generators: Sequence[torch.Generator]) -> Int[Tensor, " b"]:
        """The next token of every row."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        ordered, ids = (logits.float() / (self.temperature or 1.0)).sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        if self.top_k is not None:
            probabilities[:, self.top_k :] = 0
        if self.top_p is not None:
            probabilities[probabilities.cumsum(dim=-1) - probabilities >= self.top_p] = 0
        cpu = probabilities.cpu()
        places = torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(cpu, generators, strict=True)])
        return ids.gather(1, places.to(ids.device).unsqueeze(1)).squeeze(1)


class Stop:
    """Which tokens, or which texts, end a row."""

    def __init__(self, model: SteerableModel, stop: Sequence[int | str] | None) -> None:
        if stop is not None:
            listed = isinstance(stop, Sequence) and not isinstance(stop, str)
            if not listed or any(
                isinstance(item, bool) or not isinstance(item, int | str) or item == "" for item in stop
            ):
                raise InputError("stop", expected="a list of token ids and non-empty texts", got=repr(stop))
        given = stop_ids(model) if stop is None else frozenset(item for item in stop if isinstance(item, int))
        self.ids = torch.tensor(sorted(given), dtype=torch.long, device=model.cfg.device)
        self.texts = () if stop is None else tuple(item for item in stop if isinstance(item, str))
        self._model = model

    def rows(self, chosen: Int[Tensor, " b"], generated: Sequence[Sequence[int]]) -> Bool[Tensor, " b"]:
        """Which rows end with the tokens just chosen."""
        ended = torch.isin(chosen, self.ids)
        if self.texts:
            texts = ["".join(token_texts(self._model, row)) for row in generated]
            hits = [any(stop in text for stop in self.texts) for text in texts]
            ended |= torch.tensor(hits, device=ended.device)
        return ended

    def cut(self, text: str) -> str:
        """The text up to the first stop text."""
        return text[: min([text.find(stop) for stop in self.texts if stop in text], default=len(text))]


class Step(NamedTuple):
    """One step of the decoding loop: chosen tokens, full log-probabilities, and the rows that still ran."""

    chosen: Int[Tensor, " b"]
    logprobs: Float[Tensor, "b vocab"]
    alive: Bool[Tensor, " b"]


def decode(
    model: SteerableModel,
    batch: Batch,
    session: Session | None,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    stop: Stop,
    max_new_tokens: int,
    cache: bool,
) -> Iterator[Step]:
    """Decode left-padded prompts token by token until every row has ended; hooks are on only inside a step."""
    forward = Forward(model, cache=cache)
    tokens, mask = batch.tokens, batch.mask
    alive = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    generated: list[list[int]] = [[] for _ in range(len(tokens))]
    for number in range(max_new_tokens):
        with torch.no_grad(), lock_of(model) if session is None else session.step(model, fresh=number == 0):
            logits = forward(tokens, mask)[:, -1].float()
        chosen = sampling.choose(logits, generators)
        yield Step(chosen, logits.log_softmax(dim=-1), alive)
        for row, token in zip(generated, chosen.tolist(), strict=True):
            row.append(token)
        alive = alive & ~stop.rows(chosen, generated)
        if not bool(alive.any()):
            return
        tokens, mask = chosen.unsqueeze(1), mask.new_ones(len(chosen), 1)


def divergence(logprobs: Float[Tensor, "*batch vocab"], base: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch"]:
    """KL(p ‖ q) of two next-token distributions given by their log-probabilities, in nats."""
    return (logprobs.exp() * (logprobs - base)).sum(dim=-1).clamp(min=0)


class Unsteered:
    """The unsteered model on the steered tokens, in chunks of steps: KL, log-probabilities and top tokens."""

    def __init__(self, model: SteerableModel, batch: Batch, cache: bool) -> None:
        self._model, self._forward = model, Forward(model, cache=cache)
        self._pending = [batch.tokens]
        self._masks = [batch.mask]
        self._steps: list[Step] = []
        self._chunk = max(1, min(32, CHUNK_NUMBERS // (len(batch.tokens) * model.cfg.d_vocab)))
        self.kl: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.top: list[Any] = []

    def add(self, step: Step) -> None:
        """Take one steered step."""
        self._steps.append(step)
        if len(self._steps) == self._chunk:
            self.flush()

    def flush(self) -> None:
        """Run the steps taken so far through the unsteered model."""
        if not self._steps:
            return
        fed = [step.chosen.unsqueeze(1) for step in self._steps]
        tokens = torch.cat([*self._pending, *fed[:-1]], dim=1)
        masks = torch.cat([*self._masks, *[torch.ones_like(t, dtype=torch.bool) for t in fed[:-1]]], dim=1)
        with unsteered(self._model):
            logits = self._forward(tokens, masks)[:, -len(self._steps) :]
        for index, step in enumerate(self._steps):
            base = logits[:, index].float().log_softmax(dim=-1)
            self.kl.append(divergence(step.logprobs, base))
            self.logprobs.append(base.gather(1, step.chosen.unsqueeze(1)).squeeze(1))
            self.top.append(base.topk(min(TOP, base.shape[-1]), dim=-1))
        self._pending, self._masks = [fed[-1]], [torch.ones_like(fed[-1], dtype=torch.bool)]
        self._steps = []

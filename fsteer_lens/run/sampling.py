"""How the next token is chosen from the logits: the most probable one, or one that is drawn."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import finite, normalised, optional, switch, whole
from fsteer_lens.run.overflow import undefined

LEAST_TEMPERATURE = 1e-30
"""Smaller ones are 0 in float32."""


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments of a function."""

    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits; every row has a generator of its own.

    Attributes:
        do_sample: draw from the distribution; otherwise take the most probable token.
        temperature: divides the logits, > 1e-30.
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
        normalised(self, do_sample=switch("do_sample", self.do_sample))
        given = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "seed")}
        unused = [name for name, value in given.items() if value is not None]
        if not self.do_sample and unused:
            raise InputError(f"{', '.join(unused)} without effect", fix="Pass do_sample=True as well.")
        normalised(
            self,
            temperature=optional(
                finite, "temperature", self.temperature, above=LEAST_TEMPERATURE, fix="Or do_sample=False."
            ),
            top_k=optional(whole, "top_k", self.top_k, 1),
            top_p=optional(finite, "top_p", self.top_p, most=1, above=0),
            seed=optional(whole, "seed", self.seed),
        )
        if self.do_sample and self.seed is None:
            normalised(self, seed=torch.Generator("cpu").seed())

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Sampling":
        """From keyword arguments that a function took.

        Raises:
            InputError: one of them is not among `SamplingOptions`, or cannot be used.
        """
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise InputError("options that nothing takes", expected=f"some of {', '.join(known)}", got=unknown)
        return cls(**options)

    def generators(self, rows: Iterable[int]) -> list[torch.Generator]:
        """One generator per row number, so that a row draws the same in any batch; none where nothing is drawn."""
        if not self.do_sample:
            return []
        return [torch.Generator("cpu").manual_seed(zlib.crc32(f"{self.seed}/{row}".encode())) for row in rows]

    def choose(self, logits: Float[Tensor, "b vocab"], generators: Sequence[torch.Generator]) -> Int[Tensor, " b"]:
        """The next token of every row; any, where a row's logits are no distribution."""
        if not self.do_sample:
            return logits.argmax(dim=-1)
        ordered, ids = logits.float().sort(dim=-1, descending=True)
        below = ordered - ordered[:, :1]  # so that no temperature makes them infinite, but for −inf
        probabilities = (below / (1.0 if self.temperature is None else self.temperature)).softmax(dim=-1)
        probabilities[undefined(logits)] = 1
        if self.top_k is not None:
            probabilities[:, self.top_k :] = 0
        if self.top_p is not None:
            probabilities[probabilities.cumsum(dim=-1) - probabilities >= self.top_p] = 0
        cpu = probabilities.cpu()
        places = torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(cpu, generators, strict=True)])
        return ids.gather(1, places.to(ids.device).unsqueeze(1)).squeeze(1)

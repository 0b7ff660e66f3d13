"""What was generated, token by token, and the same as plain records that JSON can hold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.trace.records import jsonable, tensor

Texts = tuple[tuple[tuple[str, ...], ...], ...]
"""Texts of the likeliest tokens: per row, per step, likeliest first."""


@dataclass(frozen=True, eq=False)
class Steps:
    """Generated tokens of a batch; rows that ended early are filled with −1, NaN and False.

    Attributes:
        tokens: generated ids, [b n].
        texts: each generated token as text, per row, without the fill.
        logprobs: log-probability of each token under the steered model's raw logits, in nats, [b n].
        top_ids, top_logprobs: the most probable tokens at each step, [b n top].
        top_texts: these as text, per row and step, without the fill; None where no tokenizer was at hand.
        special: tokens that the text leaves out, such as the end of sequence, [b n].
        kl: KL(steered ‖ unsteered) of the next-token distributions, in nats, [b n]; with `compare=True` only.
        baseline_logprobs: log-probability of each token under the unsteered model, [b n]; likewise.
        baseline_top_ids, baseline_top_logprobs, baseline_top_texts: the unsteered model's most probable tokens;
            likewise.
    """

    tokens: Int[Tensor, "b n"]
    texts: tuple[tuple[str, ...], ...]
    logprobs: Float[Tensor, "b n"]
    top_ids: Int[Tensor, "b n top"]
    top_logprobs: Float[Tensor, "b n top"]
    top_texts: Texts | None = None
    special: Bool[Tensor, "b n"] | None = None
    kl: Float[Tensor, "b n"] | None = None
    baseline_logprobs: Float[Tensor, "b n"] | None = None
    baseline_top_ids: Int[Tensor, "b n top"] | None = None
    baseline_top_logprobs: Float[Tensor, "b n top"] | None = None
    baseline_top_texts: Texts | None = None

    @property
    def logprob_change(self) -> Float[Tensor, "b n"] | None:
        """Steered minus unsteered log-probability of each token, in nats."""
        return None if self.baseline_logprobs is None else self.logprobs - self.baseline_logprobs

    def row(self, index: int) -> "Steps":
        """The steps of one row, still with a leading axis of 1 and without the fill."""
        n = len(self.texts[index])

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[index : index + 1, :n]
            return None if value is None else value[index : index + 1]

        return Steps(**{item.name: cut(getattr(self, item.name)) for item in fields(self)})

    @classmethod
    def join(cls, parts: "Sequence[Steps]") -> "Steps":
        """The rows of all, filled up to the longest; a field that one of them lacks is None."""

        def joined(values: Sequence[Any]) -> Any:
            if any(value is None for value in values):
                return None
            return stack(values) if isinstance(values[0], Tensor) else tuple(row for value in values for row in value)

        return cls(**{item.name: joined([getattr(part, item.name) for part in parts]) for item in fields(cls)})

    def to_records(self) -> list[dict[str, Any]]:
        """One mapping per step of the first row; NaN and infinity become None."""
        change = self.logprob_change
        records = []
        for step, text in enumerate(self.texts[0]):
            record: dict[str, Any] = {"step": step, "token": int(self.tokens[0, step]), "text": text}
            record["logprob"] = jsonable(self.logprobs[0, step])
            for name, value in (
                ("special", self.special),
                ("kl", self.kl),
                ("baseline_logprob", self.baseline_logprobs),
                ("logprob_change", change),
            ):
                if value is not None:
                    record[name] = jsonable(value[0, step])
            for name in ("top", "baseline_top"):
                ids = getattr(self, f"{name}_ids")
                if ids is not None:
                    record[name] = self._top(name, step)
            records.append(record)
        return records

    def _top(self, name: str, step: int) -> list[dict[str, Any]]:
        """The likeliest tokens of one step of the first row."""
        ids, logprobs = (getattr(self, f"{name}_{what}")[0, step] for what in ("ids", "logprobs"))
        found = [{"token": int(token), "logprob": jsonable(p)} for token, p in zip(ids, logprobs, strict=True)]
        texts = getattr(self, f"{name}_texts")
        if texts is not None:
            found = [{**one, "text": text} for one, text in zip(found, texts[0][step], strict=True)]
        return found

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]]) -> "Steps":
        """Steps of one row from what `to_records` gave."""

        def numbers(name: str, kind: torch.dtype = torch.float32) -> Tensor | None:
            if records and name not in records[0] and name not in ("token", "logprob"):
                return None
            return tensor([record[name] for record in records], kind).reshape(1, len(records))

        def tops(name: str) -> dict[str, Any]:
            if not records or name not in records[0]:
                return {}
            rows = [record[name] for record in records]
            found: dict[str, Any] = {
                f"{name}_ids": tensor([[one["token"] for one in row] for row in rows], torch.long).unsqueeze(0),
                f"{name}_logprobs": tensor([[one["logprob"] for one in row] for row in rows]).unsqueeze(0),
            }
            if all("text" in one for row in rows for one in row):
                found[f"{name}_texts"] = (tuple(tuple(one["text"] for one in row) for row in rows),)
            return found

        empty = {
            "top_ids": torch.empty(1, 0, 0, dtype=torch.long, device="cpu"),
            "top_logprobs": torch.empty(1, 0, 0, dtype=torch.float32, device="cpu"),
        }
        known = {
            "tokens": numbers("token", torch.long),
            "texts": (tuple(record["text"] for record in records),),
            "logprobs": numbers("logprob"),
            "special": numbers("special", torch.bool),
            "kl": numbers("kl"),
            "baseline_logprobs": numbers("baseline_logprob"),
        }
        return cls(**{**empty, **known, **tops("top"), **tops("baseline_top")})  # pyright: ignore[reportArgumentType]


def fill_of(kind: torch.dtype) -> float:
    """What stands where a row has ended: NaN, False or −1."""
    return math.nan if kind.is_floating_point else False if kind == torch.bool else -1


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the rows; a second axis of different length is filled with NaN, −1 or False."""
    if tensors[0].ndim < 2:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    fill = fill_of(tensors[0].dtype)
    widened = [
        torch.cat([t, t.new_full((t.shape[0], longest - t.shape[1], *t.shape[2:]), fill)], dim=1) for t in tensors
    ]
    return torch.cat(widened)

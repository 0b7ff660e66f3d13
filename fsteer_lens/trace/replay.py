"""What a trace lacks of a text that is to be watched token by token; `generate(..., replay=True)` records it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.method.gates import Reading
from fsteer_lens.trace.records import jsonable, listed, tensor

SIZES = ("size", "carried", "edit", "attention", "mlp")
"""Fields of a `Replay` that are [layers s]."""


@dataclass(frozen=True, eq=False)
class Scored:
    """The score of one gate along a text: what it would have decided by, had the prompt ended at each position.

    Attributes:
        layer: where the gate reads.
        link: which link of a chain it belongs to; 0 where there is no chain.
        name: of the score, with its unit where it has one.
        score: of every position of the stream before the edit, [s].
        threshold: where the gate opens.
        opens_above: whether it opens from there upwards.
        read: what it reads of the prompt.
        position: where it read, or where its mean ends.
        rank: of a gate on a subspace, else None.
    """

    layer: int
    link: int
    name: str
    score: Float[Tensor, " s"]
    threshold: float
    opens_above: bool
    read: Reading
    position: int
    rank: int | None = None


@dataclass(frozen=True, eq=False)
class Replay:
    """One text with and without steering, position by position and layer by layer.

    A text of P prompt tokens and n generated ones has s = P + n − 1 positions: the last token is never read. Token k is
    predicted at position P − 1 + k. Both runs read the same tokens, those that were said under steering.

    Attributes:
        layers: the layers that follow, at most 48: of a deeper model some, evenly spread, and those that are edited.
        edited: layers where the stream was edited.
        size: ‖Δ‖ / ‖unsteered residual stream‖ after each layer, [layers s].
        carried, edit, attention, mlp: where Δ comes from, as shares of ‖Δ‖, see `effects.Propagation`, [layers s].
        displaced: of every generated token the one that the unsteered model finds likeliest beside it, as text.
        lens: probability of the token that was said and of the displaced one, in the steered and in the unsteered
            stream, after each layer by the logit lens, [word run layers n].
        released: how the unsteered model would have gone on, {k: tokens as text}, at some tokens that it would not have
            said.
        scores: the score of every gate along the text.
    """

    layers: tuple[int, ...]
    edited: tuple[int, ...]
    size: Float[Tensor, "layers s"]
    carried: Float[Tensor, "layers s"]
    edit: Float[Tensor, "layers s"]
    attention: Float[Tensor, "layers s"]
    mlp: Float[Tensor, "layers s"]
    displaced: tuple[str, ...]
    lens: Float[Tensor, "2 2 layers n"]
    released: Mapping[int, tuple[str, ...]]
    scores: tuple[Scored, ...]

    def __repr__(self) -> str:
        n_layers, n_positions = self.size.shape
        return f"Replay({n_layers} layers, {n_positions} positions, edited at {list(self.edited)})"

    def to_record(self) -> dict[str, Any]:
        """A JSON-ready mapping; numbers keep four digits."""
        record = {name: _rounded(getattr(self, name)) for name in (*SIZES, "lens")}
        record |= {name: list(getattr(self, name)) for name in ("layers", "edited", "displaced")}
        record["released"] = {str(key): list(texts) for key, texts in self.released.items()}
        record["scores"] = [
            {item.name: getattr(one, item.name) for item in fields(one)} | {"score": _rounded(one.score)}
            for one in self.scores
        ]
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Replay":
        """The replay that `to_record` came from."""
        values: dict[str, Any] = {name: tensor(record[name]) for name in (*SIZES, "lens")}
        values |= {name: tuple(listed(record[name])) for name in ("layers", "edited", "displaced")}
        values["released"] = {int(key): tuple(listed(texts)) for key, texts in record["released"].items()}
        return cls(**values, scores=tuple(Scored(**{**one, "score": tensor(one["score"])}) for one in record["scores"]))


def _rounded(value: Tensor) -> Any:
    def short(item: Any) -> Any:
        return [short(part) for part in item] if isinstance(item, list) else item and float(f"{item:.4g}")

    return short(jsonable(value))

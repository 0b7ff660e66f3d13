"""The trace: what steering did, row by row, layer by layer, token by token.

A trace holds plain tensors and nothing of the model, so it can be kept, pickled into a data frame, or looked at
elsewhere. What `generate` returns is on the CPU; under `.on` and `.attach` a trace is where the model computes. A field
that the way of running could not know is None.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.errors import InputError, MissingDependencyError

PerLayer = dict[int, Tensor]


@dataclass(frozen=True, eq=False)
class Steps:
    """Generated tokens of a batch; rows that ended early are filled with −1 and NaN.

    Attributes:
        tokens: generated ids, [b n].
        texts: each generated token as text, per row, without the fill.
        logprobs: log-probability of each token under the steered model's raw logits, in nats, [b n].
        top_ids, top_logprobs: the most probable tokens at each step, [b n top].
        kl: KL(steered ‖ unsteered) of the next-token distributions, in nats, [b n]; with `compare=True` only.
        baseline_logprobs: log-probability of each token under the unsteered model, [b n]; likewise.
        baseline_top_ids, baseline_top_logprobs: the unsteered model's most probable tokens; likewise.
    """

    tokens: Int[Tensor, "b n"]
    texts: tuple[tuple[str, ...], ...]
    logprobs: Float[Tensor, "b n"]
    top_ids: Int[Tensor, "b n top"]
    top_logprobs: Float[Tensor, "b n top"]
    kl: Float[Tensor, "b n"] | None = None
    baseline_logprobs: Float[Tensor, "b n"] | None = None
    baseline_top_ids: Int[Tensor, "b n top"] | None = None
    baseline_top_logprobs: Float[Tensor, "b n top"] | None = None

    @property
    def logprob_change(self) -> Float[Tensor, "b n"] | None:
        """Steered minus unsteered log-probability of each token, in nats."""
        return None if self.baseline_logprobs is None else self.logprobs - self.baseline_logprobs


@dataclass(eq=False, repr=False)
class Trace:
    """What steering did to a batch of b rows; a hook fills it while the model runs.

    Every mapping goes from layer to tensor and lacks the layers that the hook cannot know; for probes, which read every
    token, [b r] becomes [b s r] and so on.

    Attributes:
        ser: energy ratio of the query activation at every fitted rank, [b r].
        gate: gate value, [b]; 1 where there is no gate.
        weights: weight of each expert, [b k].
        coefficients: residual coefficients β, [b m].
        distance: ‖ĥ − μ‖, how far the query activation is from the mean of the gate's subspace, [b].
        distance_outside: whether that lies outside what the gate's calibration queries spanned, [b] of bool.
        energy_outside: the same for the energy ratio at the gate's rank; true of most queries that need no intervention
            where the gate is one-class, [b] of bool.
        change: ‖edit‖ / ‖residual stream‖ at every position, 0 where nothing was added, NaN at pads, [b s].
        step_gate: gate value at every position, NaN before the prompt's last token, [b s]; with refresh="step" only.
        step_weights: weights of the experts likewise, [b s k].
        prompt_lengths: real prompt tokens of each row, [b].
        first: index of each row's first real token, [b]; positions of `change` before it are pads.
        prompts: token texts of each prompt; from `generate`.
        steps: what was generated; from `generate`.
        parts: the trace of each link; of a chain, whose own trace has the common `change` and no decisions.
    """

    ser: PerLayer = field(default_factory=dict)
    gate: PerLayer = field(default_factory=dict)
    weights: PerLayer = field(default_factory=dict)
    coefficients: PerLayer = field(default_factory=dict)
    distance: PerLayer = field(default_factory=dict)
    distance_outside: PerLayer = field(default_factory=dict)
    energy_outside: PerLayer = field(default_factory=dict)
    change: PerLayer = field(default_factory=dict)
    step_gate: PerLayer = field(default_factory=dict)
    step_weights: PerLayer = field(default_factory=dict)
    prompt_lengths: Int[Tensor, " b"] | None = None
    first: Int[Tensor, " b"] | None = None
    prompts: tuple[tuple[str, ...], ...] | None = None
    steps: Steps | None = None
    parts: "tuple[Trace, ...]" = ()

    def __repr__(self) -> str:
        known = [item.name for item in fields(self) if getattr(self, item.name) not in (None, {}, ())]
        return f"Trace(rows={self.n_rows}, layers={list(self.layers)}, fields={known})"

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that were recorded, by any part."""
        own = {layer for name in PER_LAYER for layer in getattr(self, name)}
        return tuple(sorted(own.union(*(part.layers for part in self.parts))))

    @property
    def n_rows(self) -> int:
        """b, the number of rows."""
        return 0 if self.prompt_lengths is None else len(self.prompt_lengths)

    def row(self, index: int) -> "Trace":
        """The trace of one row, still with a leading axis of 1 and with the pads before it cut off."""
        if not -self.n_rows <= index < self.n_rows:
            raise InputError("row", expected=f"an int in 0..{self.n_rows - 1}", got=index)
        index %= self.n_rows
        cut = slice(index, index + 1)
        start = 0 if self.first is None else int(self.first[index])
        end: int | None = None
        steps = self.steps
        if steps is not None:
            n = len(steps.texts[index])
            chosen = {item.name: getattr(steps, item.name) for item in fields(steps)}
            chosen = {k: v[cut, :n] if isinstance(v, Tensor) else v for k, v in chosen.items()}
            steps = Steps(**{**chosen, "texts": steps.texts[cut]})
            if self.prompt_lengths is not None:
                end = start + int(self.prompt_lengths[index]) + n - 1  # the last token is never fed back
        return self._cut(cut, slice(start, end), steps)

    def _cut(self, rows: slice, columns: slice, steps: Steps | None) -> "Trace":
        def pick(name: str) -> PerLayer:
            values: PerLayer = getattr(self, name)
            return {
                layer: value[rows, columns] if _by_position(name, value) else value[rows]
                for layer, value in values.items()
            }

        return Trace(
            **{name: pick(name) for name in PER_LAYER},
            prompt_lengths=None if self.prompt_lengths is None else self.prompt_lengths[rows],
            first=None if self.first is None else torch.zeros_like(self.first[rows]),
            prompts=None if self.prompts is None else self.prompts[rows],
            steps=steps,
            parts=tuple(part._cut(rows, columns, None) for part in self.parts),
        )

    def cpu(self) -> "Trace":
        """The same trace with every tensor on the CPU."""
        held = {name: {layer: value.cpu() for layer, value in getattr(self, name).items()} for name in PER_LAYER}
        return replace(self, **held, parts=tuple(part.cpu() for part in self.parts))

    def to_records(self) -> list[dict[str, Any]]:
        """One JSON-ready mapping per row: prompt, per-layer decisions and per-step tokens; NaN becomes None.

        The record of a chain has a record of each link in "parts".
        """
        records = []
        for index in range(self.n_rows):
            row = self.row(index)
            record: dict[str, Any] = {"row": index, "layers": row._layer_records()}
            if row.prompts is not None:
                record["prompt"] = list(row.prompts[0])
            if row.steps is not None:
                record["steps"] = _step_records(row.steps)
            if row.parts:
                record["parts"] = [{"row": index, "layers": part._layer_records()} for part in row.parts]
            records.append(record)
        return records

    def _layer_records(self) -> dict[int, dict[str, Any]]:
        """What is known of the first row, per layer."""
        known = {name: getattr(self, name) for name in PER_LAYER}
        return {
            layer: {name: _plain(values[layer][0]) for name, values in known.items() if layer in values}
            for layer in sorted({layer for values in known.values() for layer in values})
        }

    def to_frame(self) -> Any:
        """A pandas DataFrame with one line per row and layer: gate, energy ratio at full rank, weights, mean change.

        Of a chain, one line per row, link and layer, with the link's number in the column "part".

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError("to_frame needs pandas", fix="pip install pandas.") from error
        lines = []
        for record in self.to_records():
            text = {"text": "".join(step["text"] for step in record["steps"])} if "steps" in record else {}
            for number, part in enumerate(record.get("parts", [record])):
                where = {"part": number} if "parts" in record else {}
                lines += [{**line, **where, **text} for line in _frame_lines(part)]
        return pandas.DataFrame(lines)


PER_LAYER = tuple(item.name for item in fields(Trace) if item.default_factory is dict)
"""Names of the fields that go from layer to tensor."""


def _by_position(name: str, value: Tensor) -> bool:
    """Whether the second axis of a field's tensor is positions: always, or where a probe read every token."""
    return name in ("change", "step_gate", "step_weights") or (name in ("ser", "weights") and value.ndim == 3)


def _frame_lines(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line per layer of one record."""
    lines = []
    for layer, values in record["layers"].items():
        line: dict[str, Any] = {"row": record["row"], "layer": layer, "gate": values.get("gate")}
        ser, weights = values.get("ser", [None]), values.get("weights", [])
        line["ser"] = None if isinstance(ser[0], list) else ser[-1]  # a list for every token: a probe's, not a decision
        if weights and not isinstance(weights[0], list):
            line.update({f"expert_{i}": weight for i, weight in enumerate(weights)})
        for name in ("distance", "distance_outside", "energy_outside"):
            line[name] = values.get(name)
        changes = [value for value in values.get("change", []) if value]
        line["change"] = sum(changes) / len(changes) if changes else 0.0
        lines.append(line)
    return lines


def _plain(value: Tensor) -> Any:
    """A tensor as nested lists with None for NaN."""
    if value.ndim == 0:
        number = value.item()
        return None if number != number else number
    return [_plain(item) for item in value]


def _step_records(steps: Steps) -> list[dict[str, Any]]:
    """One record per generated step of a trace with one row."""
    records = []
    for index, text in enumerate(steps.texts[0]):
        record = {"step": index, "token": int(steps.tokens[0, index]), "text": text}
        for name in ("logprobs", "kl", "logprob_change"):
            value = getattr(steps, name)
            if value is not None:
                record[name.removesuffix("s") if name == "logprobs" else name] = float(value[0, index])
        records.append(record)
    return records


def join(traces: Sequence[Trace]) -> Trace:
    """One trace with the rows of all, padded to the longest; a field that one of them lacks is None."""
    if len(traces) == 1:
        return traces[0]

    def joined(values: Sequence[Any]) -> Any:
        if any(value is None for value in values):
            return None
        if isinstance(values[0], Mapping):
            shared = set.intersection(*(set(value) for value in values))
            return {layer: joined([value[layer] for value in values]) for layer in sorted(shared)}
        if isinstance(values[0], tuple) and isinstance(next(iter(values[0]), None), Trace):
            return tuple(join(parts) for parts in zip(*values, strict=True))
        if isinstance(values[0], tuple):
            return tuple(item for value in values for item in value)
        if isinstance(values[0], Steps):
            names = [item.name for item in fields(Steps)]
            return Steps(**{name: joined([getattr(value, name) for value in values]) for name in names})
        return _stack(values)

    names = [item.name for item in fields(Trace)]
    return replace(Trace(), **{name: joined([getattr(trace, name) for trace in traces]) for name in names})


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the rows; a second axis of different length is filled with NaN, or −1 for integers."""
    if tensors[0].ndim < 2:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    fill = float("nan") if tensors[0].is_floating_point() else -1
    widened = [
        torch.cat([t, t.new_full((t.shape[0], longest - t.shape[1], *t.shape[2:]), fill)], dim=1) for t in tensors
    ]
    return torch.cat(widened)

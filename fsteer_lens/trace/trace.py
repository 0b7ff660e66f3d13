"""The trace: what steering did, row by row, layer by layer, token by token.

A trace holds plain tensors and nothing of the model, so it can be kept, pickled into a data frame, or looked at
elsewhere. What `generate` returns is on the CPU; under `.on` and `.attach` a trace is where the model computes. A field
that the way of running could not know is None.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fsteer_lens.errors import DataError
from fsteer_lens.ground.addresses import local_path
from fsteer_lens.ground.checks import choice, several, whole
from fsteer_lens.method.gates import Reading, require_reading
from fsteer_lens.trace import records
from fsteer_lens.trace.consistency import require_consistent
from fsteer_lens.trace.records import jsonable, listed, tensor
from fsteer_lens.trace.replay import Replay
from fsteer_lens.trace.steps import Steps, stack

PerLayer = dict[int, Tensor]
LONGEST = 2**31 - 1
"""Tokens of a prompt."""


class Marks(NamedTuple):
    """What each position of a trace is; one layer's point of view.

    Attributes:
        padding: no real token: pads on either side, and what follows the end of a row, [b s].
        bos: the beginning-of-sequence token, [b s]; nowhere where the trace does not know its tokens.
        generated: tokens after the prompt, [b s].
        steered: positions where something was added to the residual stream, [b s].
    """

    padding: Bool[Tensor, "b s"]
    bos: Bool[Tensor, "b s"]
    generated: Bool[Tensor, "b s"]
    steered: Bool[Tensor, "b s"]


@dataclass(eq=False, repr=False)
class Trace:
    """What steering did to a batch of b rows; a hook fills it while the model runs.

    Every mapping goes from layer to tensor and lacks the layers that the hook cannot know; for probes, which read every
    token, [b r] becomes [b s r] and so on.

    Attributes:
        ser: energy ratio of the query activation at every fitted rank, [b r]; of a gate on a subspace.
        score: the number that the gate compares with its threshold, [b], where that is not its value: of a gate on a
            subspace the energy ratio.
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
        bos: whether each row's first real token is the beginning-of-sequence token, [b]; from `generate`.
        prompts: token texts of each prompt; from `generate`.
        steps: what was generated; from `generate`.
        unsteered: token texts of what the model generates without steering; from `generate` with `compare=True`.
        replay: what a text is watched by; from `generate` with `replay=True`.
        parts: the trace of each link; of a chain, whose own trace has the common `change` and no decisions.
        own: what a hook object of one's own recorded of each row, {name: {layer: [b ...]}}.
        own_by_token: what it recorded of each position, {name: {layer: [b s ...]}}.
        read: what was read of the prompts for the vector: "last", "mean" or "turn_end", at each steered layer.
        gate_read: the same for each gate; one that scans reads windows of the prompts in that way.
        names: of the experts at each layer, where they have any, see `Experts`.
    """

    ser: PerLayer = field(default_factory=dict)
    score: PerLayer = field(default_factory=dict)
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
    bos: Bool[Tensor, " b"] | None = None
    prompts: tuple[tuple[str, ...], ...] | None = None
    steps: Steps | None = None
    unsteered: tuple[tuple[str, ...], ...] | None = None
    replay: tuple[Replay, ...] | None = None
    parts: "tuple[Trace, ...]" = ()
    own: dict[str, PerLayer] = field(default_factory=dict)
    own_by_token: dict[str, PerLayer] = field(default_factory=dict)
    read: dict[int, Reading] = field(default_factory=dict)
    gate_read: dict[int, Reading] = field(default_factory=dict)
    names: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        known = [item.name for item in fields(self) if getattr(self, item.name) not in (None, {}, ())]
        return f"Trace(rows={self.n_rows}, layers={list(self.layers)}, fields={known})"

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that were recorded, by any part."""
        known = {layer for by_layer in self._mappings() for layer in by_layer}
        return tuple(sorted(known.union(*(part.layers for part in self.parts))))

    @property
    def n_rows(self) -> int:
        """b, the number of rows."""
        return 0 if self.prompt_lengths is None else len(self.prompt_lengths)

    def row(self, index: int) -> "Trace":
        """The trace of one row, still with a leading axis of 1 and with the pads before it cut off."""
        index = whole("row", index, -self.n_rows, self.n_rows - 1) % self.n_rows
        cut = slice(index, index + 1)
        start = 0 if self.first is None else int(self.first[index])
        end: int | None = None
        steps = self.steps
        if steps is not None:
            steps = steps.row(index)
            if self.prompt_lengths is not None:
                n = len(steps.texts[0])
                end = start + int(self.prompt_lengths[index]) + n - 1  # the last token is never fed back
        return self._cut(cut, slice(start, end), steps)

    def _cut(self, rows: slice, columns: slice, steps: Steps | None) -> "Trace":
        return Trace(
            **self._changed(lambda value, by_position: value[rows, columns] if by_position else value[rows]),
            prompt_lengths=None if self.prompt_lengths is None else self.prompt_lengths[rows],
            first=None if self.first is None else torch.zeros_like(self.first[rows]),
            bos=None if self.bos is None else self.bos[rows],
            prompts=None if self.prompts is None else self.prompts[rows],
            steps=steps,
            unsteered=None if self.unsteered is None else self.unsteered[rows],
            replay=None if self.replay is None else self.replay[rows],
            read=self.read,
            gate_read=self.gate_read,
            names=self.names,
            parts=tuple(part._cut(rows, columns, None) for part in self.parts),
        )

    def link(self, index: int) -> "Trace":
        """The trace of one link of a chain, with the prompts and the texts that all links share.

        Raises:
            InputError: no such link, or no chain's trace.
        """
        index = choice("link", index, range(len(self.parts)), "one of the links of a chain,")
        shared = {name: getattr(self, name) for name in ("bos", "prompts", "steps", "unsteered", "replay")}
        return replace(self.parts[index], **shared)

    def copy(self) -> "Trace":
        """The trace as it stands: a value that no later forward pass changes."""
        held = self._changed(lambda value, by_position: value)
        return replace(self, **held, parts=tuple(part.copy() for part in self.parts))

    def begin(self, prompt_lengths: Int[Tensor, " b"], first: Int[Tensor, " b"]) -> None:
        """Forget what was recorded, for a new prompt; mappings that were handed out keep what they hold."""
        for name in (*PER_LAYER, *OWN, *TOLD):
            setattr(self, name, {})
        self.prompt_lengths, self.first = prompt_lengths, first

    def take_back(self, layer: int, n: int) -> None:
        """Forget the last n positions of a layer, which the model has taken back."""
        for name in PER_LAYER:
            held = getattr(self, name)
            if layer in held and _by_position(name, held[layer]):
                held[layer] = held[layer][:, :-n]
        for by_layer in self.own_by_token.values():
            if layer in by_layer:
                by_layer[layer] = by_layer[layer][:, :-n]

    def decisions(self) -> "Trace":
        """What was decided on the prompts, without what goes from position to position."""
        held: dict[str, Any] = {
            name: {layer: one for layer, one in getattr(self, name).items() if not _by_position(name, one)}
            for name in PER_LAYER
        }
        return replace(self, **held, own_by_token={}, parts=tuple(part.decisions() for part in self.parts))

    def preceded(self, n: int) -> "Trace":
        """The same with n positions in all: nothing was added at those in front, and nothing else is known of them."""
        n = whole("n", n, 0)

        def filled(value: Tensor, by_position: bool) -> Tensor:
            if not by_position or value.shape[1] >= n:
                return value
            front = value.new_full((len(value), n - value.shape[1], *value.shape[2:]), float("nan"))
            return torch.cat([front, value], dim=1)

        held = self._changed(filled)
        held["change"] = {
            layer: torch.cat([one.new_zeros(len(one), n - one.shape[1]), one], dim=1) if one.shape[1] < n else one
            for layer, one in self.change.items()
        }
        return replace(self, **held, parts=tuple(part.preceded(n) for part in self.parts))

    def holder(self, name: str, by_token: bool) -> PerLayer:
        """Where values of that name go: a field of the trace, or a mapping for a hook object of one's own."""
        if name in PER_LAYER:
            return getattr(self, name)
        own = self.own_by_token if by_token else self.own
        return own.setdefault(name, {})

    def _mappings(self) -> list[PerLayer]:
        """Everything that goes from layer to tensor."""
        own = [by_layer for name in OWN for by_layer in getattr(self, name).values()]
        return [getattr(self, name) for name in PER_LAYER] + own

    def _changed(self, change: Callable[[Tensor, bool], Tensor]) -> dict[str, Any]:
        """Everything that goes from layer to tensor, changed; `change` is told whether the second axis is positions."""

        def changed(by_layer: PerLayer, by_position: Callable[[Tensor], bool]) -> PerLayer:
            return {layer: change(value, by_position(value)) for layer, value in by_layer.items()}

        fields_of: dict[str, Any] = {
            name: changed(getattr(self, name), partial(_by_position, name)) for name in PER_LAYER
        }
        for name in OWN:
            by_token = name == "own_by_token"
            own = getattr(self, name).items()
            fields_of[name] = {key: changed(by_layer, lambda value, by=by_token: by) for key, by_layer in own}
        return fields_of

    def cpu(self) -> "Trace":
        """The same trace with every tensor on the CPU."""
        held = self._changed(lambda value, by_position: value.cpu())
        return replace(self, **held, parts=tuple(part.cpu() for part in self.parts))

    def marks(self, layer: int | None = None) -> Marks:
        """Tell pads, the beginning-of-sequence token, generated tokens and steered positions apart.

        Args:
            layer: an edited layer; None takes the only one.

        Raises:
            InputError: no such layer, or several to choose from.
        """
        change = self.change[self.layer_of("change", layer)]
        assert self.prompt_lengths is not None
        first = torch.zeros_like(self.prompt_lengths) if self.first is None else self.first
        columns = torch.arange(change.shape[1], device="cpu")
        start, length = first.cpu().unsqueeze(1), self.prompt_lengths.cpu().unsqueeze(1)
        padding = change.isnan().cpu()
        bos = columns == start
        bos = bos & (False if self.bos is None else self.bos.cpu().unsqueeze(1))
        return Marks(padding, bos, (columns >= start + length) & ~padding, change.cpu() > 0)

    def layer_of(self, name: str, layer: int | None = None) -> int:
        """The layer to take of a field that goes from layer to tensor: the given one, or the only one.

        Raises:
            InputError: no such field, or one that lacks the layer, or has several to choose from.
        """
        by_layer = {field.name for field in fields(self) if isinstance(getattr(self, field.name), dict)}
        known = sorted(getattr(self, choice("field", name, sorted(by_layer), "one of those by layer,")))
        chosen = known[0] if layer is None and len(known) == 1 else layer
        fix = "The links of a chain have traces of their own: trace.link(0)." if self.parts else None
        return choice("layer", chosen, known, f"one of the layers with {name},", fix=fix)

    def to_records(self) -> list[dict[str, Any]]:
        """One JSON-ready mapping per row: prompt, per-layer decisions and per-step tokens; NaN becomes None.

        The record of a chain has a record of each link in "parts". `from_records` reads them back.
        """
        found = []
        for index in range(self.n_rows):
            row = self.row(index)
            assert row.prompt_lengths is not None
            record: dict[str, Any] = {"row": index, "prompt_length": int(row.prompt_lengths[0])}
            record["layers"] = row._layer_records()
            if row.prompts is not None:
                record["prompt"] = list(row.prompts[0])
            if row.bos is not None:
                record["bos"] = bool(row.bos[0])
            if row.steps is not None:
                record["steps"] = row.steps.to_records()
            if row.unsteered is not None:
                record["unsteered"] = list(row.unsteered[0])
            if row.replay is not None:
                record["replay"] = row.replay[0].to_record()
            if row.parts:
                record["parts"] = [{"row": index, "layers": part._layer_records()} for part in row.parts]
            found.append(record)
        return found

    def _layer_records(self) -> dict[int, dict[str, Any]]:
        """What is known of the first row, per layer."""
        found: dict[int, dict[str, Any]] = {layer: {} for layer in sorted({at for by in self._mappings() for at in by})}
        for name in PER_LAYER:
            for layer, value in getattr(self, name).items():
                found[layer][name] = jsonable(value[0])
        for name in OWN:
            for key, by_layer in getattr(self, name).items():
                for layer, value in by_layer.items():
                    found[layer].setdefault(name, {})[key] = jsonable(value[0])
        for name in TOLD:
            for layer, told in getattr(self, name).items():
                found[layer][name] = told if isinstance(told, str) else list(told)
        return found

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]]) -> "Trace":
        """The trace that `to_records` came from, also after a way through JSON; numbers are float32.

        Raises:
            DataError: no records, or something else than `to_records` gives.
        """
        known = several("records of a trace", records, "a list of records")
        if not known:
            raise DataError("records of a trace", expected="at least one", got="none")
        try:
            rows = [cls._of_record(record) for record in known]
            for row in rows:
                require_consistent(row, PER_LAYER)
            return join(rows)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise DataError(
                "records of a trace",
                expected="what Trace.to_records gives",
                got=f"{type(error).__name__}: {str(error)[:200]}",
            ) from error

    @classmethod
    def _of_record(cls, record: Mapping[str, Any], length: int | None = None) -> "Trace":
        """The trace of one row."""
        fields_of: dict[str, Any] = {name: {} for name in (*PER_LAYER, *OWN, *TOLD)}
        for layer, values in record["layers"].items():
            for name, value in values.items():
                if name in OWN:
                    for key, one in value.items():
                        fields_of[name].setdefault(key, {})[int(layer)] = tensor(one).unsqueeze(0)
                    continue
                if name in TOLD:
                    fields_of[name][int(layer)] = tuple(listed(value)) if name == "names" else require_reading(value)
                    continue
                kind = torch.bool if name in ("distance_outside", "energy_outside") else torch.float32
                fields_of[name][int(layer)] = tensor(value, kind).unsqueeze(0)
        length = whole("prompt_length", record["prompt_length"], 1, LONGEST) if length is None else length
        return cls(
            **fields_of,
            prompt_lengths=torch.tensor([length], dtype=torch.long, device="cpu"),
            first=torch.zeros(1, dtype=torch.long, device="cpu"),
            bos=tensor([record["bos"]], torch.bool) if "bos" in record else None,
            prompts=(tuple(listed(record["prompt"])),) if "prompt" in record else None,
            steps=Steps.from_records(record["steps"]) if "steps" in record else None,
            unsteered=(tuple(listed(record["unsteered"])),) if "unsteered" in record else None,
            replay=(Replay.from_record(record["replay"]),) if "replay" in record else None,
            parts=tuple(cls._of_record(part, length) for part in record.get("parts", ())),
        )

    def json_lines(self) -> str:
        """The records as text, one JSON object a line."""
        return records.json_lines(self.to_records())

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object a row, atomically, compressed where the name ends in .gz.

        `from_jsonl` reads them back, and figures draw from that as from this trace.

        Raises:
            InputError: the folder does not exist.
        """
        records.write(path, self.json_lines())

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str]) -> "Trace":
        """Read what `to_jsonl` wrote; no model is needed. `path` may be "hf://owner/name@revision" too, as in `load`.

        Raises:
            DataError: no such file, or no trace in it.
            InputError: an address on the hub that is none, or that gives no trace.
        """
        path = local_path(path, "trace")
        try:
            return cls.from_records(records.read(path))
        except DataError as error:
            raise DataError(f"{path}", expected="a trace that to_jsonl wrote", got=str(error)) from error

    def to_frame(self) -> Any:
        """A pandas DataFrame with one line per row and layer: gate, energy ratio at full rank, weights, mean change.

        Of a chain, one line per row, link and layer, with the link's number in the column "part".

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        return records.frame(self.to_records())


OWN = ("own", "own_by_token")
"""Fields that hold such mappings by the names that a hook object of one's own chose."""
TOLD = ("read", "gate_read", "names")
"""Fields that tell something of the hook at each layer, the same for all rows."""
PER_LAYER = tuple(item.name for item in fields(Trace) if item.default_factory is dict and item.name not in OWN + TOLD)
"""Names of the fields that go from layer to tensor."""


def _by_position(name: str, value: Tensor) -> bool:
    """Whether the second axis of a field's tensor is positions: always, or where a probe read every token."""
    return name in ("change", "step_gate", "step_weights") or (name in ("ser", "weights") and value.ndim == 3)


def join(traces: Sequence[Trace]) -> Trace:
    """One trace with the rows of all, padded to the longest; a field that one of them lacks is None.

    What was read at a layer, and the experts' names, are kept where they are the same in all.
    """
    if len(traces) == 1:
        return traces[0]

    def joined(values: Sequence[Any]) -> Any:
        if any(value is None for value in values):
            return None
        if isinstance(values[0], str) or (
            isinstance(values[0], tuple) and isinstance(next(iter(values[0]), None), str)
        ):
            return values[0] if len(set(values)) == 1 else None
        if isinstance(values[0], Mapping):
            shared = set.intersection(*(set(value) for value in values))
            found = {layer: joined([value[layer] for value in values]) for layer in sorted(shared)}
            return {layer: value for layer, value in found.items() if value is not None}
        if isinstance(values[0], tuple) and isinstance(next(iter(values[0]), None), Trace):
            return tuple(join(parts) for parts in zip(*values, strict=True))
        if isinstance(values[0], tuple):
            return tuple(item for value in values for item in value)
        if isinstance(values[0], Steps):
            return Steps.join(values)
        return stack(values)

    names = [item.name for item in fields(Trace)]
    return replace(Trace(), **{name: joined([getattr(trace, name) for trace in traces]) for name in names})

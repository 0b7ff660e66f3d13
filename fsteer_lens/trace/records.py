"""Traces as plain records: what JSON and tables can hold, and the files that they are kept in."""

import gzip
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fsteer_lens.errors import MissingDependencyError
from fsteer_lens.ground.files import path_of, write_atomically
from fsteer_lens.ground.tables import read_jsonl

Record = Mapping[str, Any]


def jsonable(value: Tensor) -> Any:
    """A tensor as nested lists with None for NaN and infinity."""
    if value.ndim:
        return [jsonable(item) for item in value]
    number = value.item()
    return number if math.isfinite(number) else None


def tensor(values: Any, kind: torch.dtype = torch.float32) -> Tensor:
    """Nested lists as a tensor, with NaN for None."""

    def filled(item: Any) -> Any:
        if isinstance(item, list):
            return [filled(part) for part in item]
        if kind.is_floating_point and item is None:
            return math.nan
        if (kind == torch.bool) != isinstance(item, bool) or (kind == torch.long and not isinstance(item, int)):
            raise TypeError(f"{item!r} is no {kind}")
        if kind.is_floating_point and not abs(item) <= torch.finfo(kind).max:  # None stands for what is not finite
            raise ValueError(f"{item!r} is no finite {kind}")
        return item

    return torch.tensor(filled(values), dtype=kind, device="cpu")


def listed(value: Any) -> list[Any]:
    """A list as it is, or `TypeError`: a text could be gone through as well."""
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def json_lines(records: Sequence[Record]) -> str:
    """The records as text, one JSON object a line."""
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def write(path: str | os.PathLike[str], lines: str) -> None:
    """Write lines atomically, compressed where the name ends in .gz."""
    data = lines.encode()
    write_atomically(path, gzip.compress(data) if path_of(path).suffix == ".gz" else data)


def read(path: str | os.PathLike[str]) -> list[Any]:
    """The records in a file that `write` wrote, or `DataError`."""
    return [record for _, record in read_jsonl(path, "a trace that to_jsonl wrote")]


def frame(records: Sequence[Record]) -> Any:
    """A pandas DataFrame of a trace's records; see `Trace.to_frame`."""
    try:
        import pandas
    except ImportError as error:
        raise MissingDependencyError("to_frame needs pandas", fix="pip install pandas.") from error
    lines = []
    for record in records:
        text = {"text": "".join(step["text"] for step in record["steps"])} if "steps" in record else {}
        for number, part in enumerate(record.get("parts", [record])):
            where = {"part": number} if "parts" in record else {}
            lines += [{**line, **where, **text} for line in _frame_lines(part)]
    return pandas.DataFrame(lines)


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
        line |= {name: value for name, value in values.get("own", {}).items() if not isinstance(value, list)}
        changes = [value for value in values.get("change", []) if value]
        line["change"] = sum(changes) / len(changes) if changes else 0.0
        lines.append(line)
    return lines

"""Tables: in Markdown, which people read as they stand, and rows out of CSV and JSON files.

A file is read as it is or refused: where a row does not fit the heading, or a name stands twice, nobody can tell which
cell belongs to which column.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

from fsteer_lens.errors import DataError
from fsteer_lens.ground.checks import brief
from fsteer_lens.ground.files import read_text

MOST_JSON: Final = 2**27
"""Characters of one value; what is read from them may take twenty times as many bytes."""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell stays a bar."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a heading, cell by the name of its column; empty lines and columns are left out.

    Raises:
        DataError: no such file, no CSV, a name that stands twice in the heading, or a row with more or fewer cells than
            that; names the line.
    """
    names: list[str] | None = None
    rows = []
    for line, cells in _csv_lines(path):
        if names is None:
            names = cells
            twice = sorted(name for name, count in Counter(names).items() if name and count > 1)
            if twice:
                expected = "columns of different names"
                raise DataError(f"{path}, line {line}", expected=expected, got=f"{twice[0]!r} twice", fix="Rename one.")
            continue
        extra = [cell for name, cell in zip(names, cells, strict=False) if cell and not name]
        if len(cells) != len(names) or extra:
            got = f"{brief(extra[0])} in a column without a name" if extra else len(cells)
            raise DataError(
                f"{path}, line {line}",
                expected=f"{len(names)} cells, one for each name in the heading",
                got=got,
                fix="Put text that holds a comma, a quote or a line break in double quotes.",
            )
        rows.append({name: cell for name, cell in zip(names, cells, strict=True) if name})
    return rows


def _csv_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, list[str]]]:
    """Number of the line that a row begins in, and its cells."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}", expected="a CSV file with a header line", got=str(error)) from error


def read_jsonl(path: str | os.PathLike[str], expected: str = "JSON") -> list[tuple[str, Any]]:
    """The values of a file of JSON lines, each with where it stands; empty lines are left out.

    `expected` is said where a line is no JSON.

    Raises:
        DataError: no such file, or a line that is no JSON; names the line.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            found.append((where, parse_json(line, where, expected)))
    return found


def parse_json(text: str, where: str, expected: str = "JSON") -> Any:
    """The value of a JSON text from a file, NaN included; an error begins with `where` it stands.

    Raises:
        DataError: no JSON, nested more deeply or with longer numbers than Python reads, more than `MOST_JSON`
            characters, or a name that stands twice.
    """
    if len(text) > MOST_JSON:
        raise DataError(where, expected=f"{expected}, of at most {MOST_JSON:,} characters", got=f"{len(text):,}")
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError as error:
        raise DataError(where, expected=f"{expected}, nested less deeply", got=brief(text)) from error
    except ValueError as error:
        raise DataError(where, expected=expected, got=str(error).split(";")[0]) from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {twice!r} twice in one object")
    return found

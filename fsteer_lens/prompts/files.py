"""Prompts and contrasts out of files, each kind of file known by its ending; .gz after it is unpacked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsteer_lens.errors import DataError
from fsteer_lens.ground.files import read_text
from fsteer_lens.ground.tables import read_csv, read_jsonl
from fsteer_lens.prompts.contrasts import TRUTHFULQA, ContrastSet
from fsteer_lens.prompts.forms import Prompt, as_prompt


def read_contrasts(path: Path, columns: Mapping[str, str]) -> ContrastSet:
    """Read contrasts from a .csv file or else from JSON lines.

    TruthfulQA.csv is known by its heading: its undesired answers are several in one cell, so that no naming of columns
    would read it.

    Args:
        path: the file.
        columns: names of the columns by what they hold, as in `ContrastSet.from_records`; may be empty.

    Raises:
        DataError: as in `ContrastSet.from_csv` and `from_jsonl`.
    """
    if _ending(path) != ".csv":
        return ContrastSet.from_jsonl(path, **columns)
    heading = set(next(iter(read_csv(path)), ()))
    if set(TRUTHFULQA.values()) <= heading and "prompt" not in heading and not columns:
        return ContrastSet.from_truthfulqa(path)
    return ContrastSet.from_csv(path, **columns)


def read_prompts(path: Path, column: str | None = None) -> list[Prompt]:
    """Read prompts: from .csv a column, from .jsonl a value a line or an object that holds it, else lines of text.

    Args:
        path: the file.
        column: which holds the prompts; None is "prompt".

    Raises:
        DataError: no such file, no prompts, a column that is missing, or a line that is none of these.
        InputError: something that is no prompt; both name the line or the row.
    """
    column = column or "prompt"
    kind = _ending(path)
    if kind == ".csv":
        found: list[tuple[str, Any]] = [(f"{path}, row {number}", row) for number, row in enumerate(read_csv(path), 1)]
    elif kind == ".jsonl":
        found = read_jsonl(path, f'a JSON string, or an object with "{column}"')
    else:
        lines = enumerate(read_text(path).split("\n"), 1)
        found = [(f"{path}, line {number}", line.strip()) for number, line in lines if line.strip()]
    prompts = []
    for where, value in found:
        if isinstance(value, dict) and column not in value:
            fix = "Name the column that holds the prompts (--prompt-column)."
            raise DataError(where, expected=f"a column {column!r}", got=f"columns {list(value)}", fix=fix)
        prompts.append(as_prompt(value[column] if isinstance(value, dict) else value, where))
    if not prompts:
        raise DataError(f"{path}", expected="at least one prompt", got="none", fix="Is the file empty?")
    return prompts


def _ending(path: Path) -> str:
    """Of the file's name, or of the name before .gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()

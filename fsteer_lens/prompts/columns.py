"""From the rows of a table to what a contrast is made of, cell by cell."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.checks import brief, clean_text, instance, optional_text, several
from fsteer_lens.prompts.forms import as_prompt


@runtime_checkable
class Table(Protocol):
    """A table whose columns have names, such as a DataFrame of pandas."""

    @property
    def columns(self) -> Any:
        """Names of the columns."""
        ...

    def to_dict(self, *how: Any) -> Any:
        """Its rows, with "records"."""
        ...


@dataclass(frozen=True)
class Columns:
    """Which column of a table holds which part of a contrast; None leaves an optional part out."""

    prompt: str
    preferred: str
    undesired: str
    label: str | None
    context: str | None
    group: str | None

    def __post_init__(self) -> None:
        for part, column in vars(self).items():  # of a table of pandas a name may be a number
            instance(f"the column of {part}", column, Hashable, "the name of a column")

    @property
    def needed(self) -> dict[str, str]:
        """Columns that every row must fill, by what they hold."""
        return {"prompt": self.prompt, "preferred": self.preferred, "undesired": self.undesired}

    @property
    def optional(self) -> dict[str, str]:
        """Columns whose cells may be empty, by what they hold."""
        named = {"label": self.label, "context": self.context, "group": self.group}
        return {part: column for part, column in named.items() if column is not None}


def parts_of_rows(rows: Any, columns: Columns) -> Iterator[dict[str, Any]]:
    """What a contrast is made of, by the names of its fields, for every row of a table.

    Raises:
        DataError: no table, no rows, a column that is missing, or a cell that cannot be used; names row and column.
    """
    seen: set[Any] = set()
    number = 0
    for number, row in enumerate(_rows(rows), 1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number}", expected="a mapping of columns", got=type(row).__name__)
        for column in columns.needed.values():
            if column not in row:
                raise DataError(
                    f"row {number} has no column {column!r}",
                    expected=f"columns {list(columns.needed.values())}",
                    got=f"columns {sorted(map(str, row))}",
                    fix="Name your columns: from_records(rows, prompt=..., preferred=..., undesired=...).",
                )
        seen.update(row)
        checks = {"prompt": lambda name, value: as_prompt(value, name), "preferred": answer, "undesired": answer}
        yield {
            **{part: _cell(number, column, row[column], checks[part]) for part, column in columns.needed.items()},
            **{
                part: _cell(number, column, row.get(column), optional_text) for part, column in columns.optional.items()
            },
        }
    if not number:
        raise DataError("contrast set", expected="at least one row", got="none", fix="Is the file empty?")
    absent = [column for part, column in columns.optional.items() if column != part and column not in seen]
    if absent:
        got = f"columns {sorted(seen, key=str)}"
        raise DataError(f"no row has a column {absent[0]!r}", expected=f"columns {absent}", got=got)


def answer(name: str, value: Any) -> str:
    """One side of a contrast, or `DataError`."""
    if not isinstance(value, str) or not value.strip():
        fix = "Give every contrast both a preferred and an undesired answer."
        raise DataError(name, expected="text", got=brief(value), fix=fix)
    return clean_text(name, value)


def _rows(table: Any) -> Iterable[Any]:
    """The rows of a table; of a DataFrame too, which by itself iterates over the names of its columns."""
    if isinstance(table, Table):
        twice = [name for name, count in Counter(table.columns).items() if count > 1]
        if twice:
            expected = "columns of different names"
            raise DataError("table", expected=expected, got=f"{twice[0]!r} twice", fix="Rename one.")
        return table.to_dict("records")
    if hasattr(table, "to_dicts"):  # of polars
        return table.to_dicts()
    fix = "Give its rows: a list with a mapping for each."
    return several("contrast set", table, "rows", fix=fix if isinstance(table, Mapping) else None)


def _cell(number: int, column: str, value: Any, check: Callable[[str, Any], Any]) -> Any:
    try:
        return check(f"row {number}, column {column!r}", value)
    except InputError as error:
        raise DataError(error.problem, expected=error.expected, got=error.got, fix=error.fix) from error

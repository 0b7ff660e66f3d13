"""Prompts and contrasts: the data that a steering method is fitted on.

A prompt is a string, a list of chat messages (`{"role": ..., "content": ...}`) or token ids. A contrast is a prompt
with a preferred and an undesired answer; a contrast set is a sequence of them that can be split, read and written.
"""

import csv
import io
import json
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, overload

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.checks import choice, finite, is_whole, whole
from fsteer_lens.ground.files import read_text, write_atomically

Message = Mapping[str, str]
Prompt = str | Sequence[Message] | Sequence[int]


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as text for people: the string itself, the messages' contents, or the ids."""
    if isinstance(prompt, str):
        return prompt
    return " ".join(part["content"] if isinstance(part, Mapping) else str(part) for part in prompt)


def check_prompt(prompt: Any) -> None:
    """Raise `InputError` unless `prompt` is a non-empty string, list of chat messages or list of token ids."""
    fix = "Give a string, a list of {'role': ..., 'content': ...} or a list of token ids."
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError("prompt", expected="text", got=repr(prompt), fix=fix)
        return
    if not isinstance(prompt, Sequence) or not prompt:
        raise InputError("prompt", expected="a string, messages or token ids", got=repr(prompt), fix=fix)
    ids = all(map(is_whole, prompt))
    messages = all(
        isinstance(part, Mapping) and isinstance(part.get("role"), str) and isinstance(part.get("content"), str)
        for part in prompt
    )
    if not (ids or messages):
        raise InputError("prompt", expected="messages with 'role' and 'content', or ids", got=repr(prompt), fix=fix)


@dataclass(frozen=True)
class Contrast:
    """One prompt with an answer that is wanted and one that is not.

    Attributes:
        prompt: string, chat messages or token ids.
        preferred: the wanted answer, as it follows the prompt.
        undesired: the unwanted answer.
        label: what kind of query this is (a category); used for pictures and stratified splits.
        context: text that switches the preferred behaviour on, for `shift="last_prompt"`; put before a string
            prompt verbatim, or sent as the system message with `chat=True`.
        group: fold group, such as the template that the prompt was made from: prompts of one group are kept
            together in cross-fitting.

    Raises:
        DataError: an answer is missing or blank (a one-sided contrast).
        InputError: the prompt is of no known form.
    """

    prompt: Prompt
    preferred: str
    undesired: str
    label: str | None = None
    context: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        for side in ("preferred", "undesired"):
            answer = getattr(self, side)
            if not isinstance(answer, str) or not answer.strip():
                raise DataError(
                    f"one-sided contrast for prompt {prompt_text(self.prompt)[:60]!r}",
                    expected=f"text in {side!r}",
                    got=repr(answer),
                    fix="Give every contrast both a preferred and an undesired answer.",
                )


class Split(NamedTuple):
    """Three disjoint parts of a contrast set."""

    train: "ContrastSet"
    valid: "ContrastSet"
    test: "ContrastSet"


class ContrastSet(Sequence[Contrast]):
    """An immutable sequence of contrasts."""

    def __init__(self, contrasts: Iterable[Contrast] = ()) -> None:
        self._contrasts = tuple(contrasts)
        for contrast in self._contrasts:
            if not isinstance(contrast, Contrast):
                raise DataError("contrast set", expected="Contrast values", got=type(contrast).__name__)

    def __len__(self) -> int:
        return len(self._contrasts)

    @overload
    def __getitem__(self, index: int) -> Contrast: ...
    @overload
    def __getitem__(self, index: slice) -> "ContrastSet": ...
    def __getitem__(self, index: int | slice) -> "Contrast | ContrastSet":
        return ContrastSet(self._contrasts[index]) if isinstance(index, slice) else self._contrasts[index]

    def __iter__(self) -> Iterator[Contrast]:
        return iter(self._contrasts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ContrastSet) and self._contrasts == other._contrasts

    def __hash__(self) -> int:
        return hash(self._contrasts)

    def __repr__(self) -> str:
        return f"ContrastSet({len(self)} contrasts, {len(set(self.labels))} labels)"

    @property
    def labels(self) -> list[str | None]:
        """Label of every contrast."""
        return [contrast.label for contrast in self]

    @property
    def prompts(self) -> list[Prompt]:
        """Prompt of every contrast, without its context."""
        return [contrast.prompt for contrast in self]

    def split(self, *, valid: float = 0.1, test: float = 0.1, seed: int = 0, by: str = "label") -> Split:
        """Split at random into train, valid and test.

        Args:
            valid: share of the contrasts that go to valid, in [0, 1).
            test: share that goes to test, in [0, 1); `valid + test` < 1.
            seed: of the shuffle; the same seed gives the same split.
            by: "label" splits every label in these shares; "group" gives whole groups to one part, so that no
                group is in two of them.

        Raises:
            InputError: shares out of range, or an unknown `by`.
            DataError: too few contrasts (or groups) to give every part one.
        """
        valid, test = (finite(f"split {name}", share, 0, below=1) for name, share in (("valid", valid), ("test", test)))
        if not valid + test < 1:
            raise InputError("split", expected="valid and test with a sum below 1", got=(valid, test))
        choice("split by", by, ("label", "group"))
        shuffle = random.Random(whole("seed", seed))
        parts: tuple[list[int], list[int], list[int]] = ([], [], [])
        buckets: dict[str | None, list[int]] = defaultdict(list)
        for index, contrast in enumerate(self):
            buckets[contrast.label if by == "label" else contrast.group].append(index)
        keys = sorted(buckets, key=str)
        for key in keys:
            shuffle.shuffle(buckets[key])
        needed = 1 + (valid > 0) + (test > 0)
        if by == "group":
            units = [[buckets[key] for key in keys]]
            shuffle.shuffle(units[0])
        else:  # labels too rare to be in every part are split together
            large, rare = ([key for key in keys if (len(buckets[key]) < needed) == few] for few in (False, True))
            units = [[[index] for index in buckets[key]] for key in large]
            units.append([[index] for key in rare for index in buckets[key]])
            shuffle.shuffle(units[-1])
        if max(map(len, units)) < needed:
            what = "groups" if by == "group" else "contrasts"
            raise DataError(
                f"split by {by}",
                expected=f"at least {needed} {what}, one for every part",
                got=sum(map(len, units)),
                fix="Give the contrasts a group=, or split by='label'." if by == "group" else "Give more contrasts.",
            )
        for unit in units:
            n_valid, n_test = (max(1, round(share * len(unit))) if share else 0 for share in (valid, test))
            if len(unit) < needed:  # a handful of rare ones is for training
                n_valid = n_test = 0
            else:  # training keeps at least one
                n_valid = min(n_valid, len(unit) - needed + (valid > 0))
                n_test = min(n_test, len(unit) - 1 - n_valid)
            cuts = (unit[n_valid + n_test :], unit[:n_valid], unit[n_valid : n_valid + n_test])
            for part, cut in zip(parts, cuts, strict=True):
                part.extend(index for member in cut for index in member)
        return Split(*(ContrastSet(self[index] for index in sorted(part)) for part in parts))

    @classmethod
    def from_records(
        cls,
        rows: Iterable[Mapping[str, Any]],
        *,
        prompt: str = "prompt",
        preferred: str = "preferred",
        undesired: str = "undesired",
        label: str | None = "label",
        context: str | None = "context",
        group: str | None = "group",
    ) -> "ContrastSet":
        """Build a set from mappings; the arguments name the columns. Absent optional columns become None.

        Raises:
            DataError: no rows, a needed column is missing, or a row is one-sided; names the row.
        """
        contrasts: list[Contrast] = []
        chosen = {"label": label, "context": context, "group": group}
        seen: set[str] = set()
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise DataError(f"row {number}", expected="a mapping of columns", got=type(row).__name__)
            for column in (prompt, preferred, undesired):
                if column not in row:
                    raise DataError(
                        f"row {number} has no column {column!r}",
                        expected=f"columns {[prompt, preferred, undesired]}",
                        got=f"columns {sorted(map(str, row))}",
                        fix="Name your columns: from_records(rows, prompt=..., preferred=..., undesired=...).",
                    )
            seen.update(row)
            optional = {
                name: str(row[column])
                for name, column in chosen.items()
                if column is not None and row.get(column) not in (None, "")
            }
            for column in (preferred, undesired):
                if not isinstance(row[column], str):
                    raise DataError(
                        f"row {number}, column {column!r}",
                        expected="text",
                        got=repr(row[column]),
                        fix="Give every contrast both a preferred and an undesired answer.",
                    )
            try:
                check_prompt(row[prompt])
                contrasts.append(Contrast(row[prompt], row[preferred], row[undesired], **optional))
            except InputError as error:
                raise DataError(f"row {number}: {error}") from error
        if not contrasts:
            raise DataError("contrast set", expected="at least one row", got="none", fix="Is the file empty?")
        absent = [column for name, column in chosen.items() if column not in (None, name) and column not in seen]
        if absent:
            raise DataError(
                f"no row has a column {absent[0]!r}",
                expected=f"columns {absent}",
                got=f"columns {sorted(seen, key=str)}",
            )
        return cls(contrasts)

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], **columns: Any) -> "ContrastSet":
        """Read one JSON object a line; `columns` as in `from_records`."""
        rows = []
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}", expected="one JSON object", got=str(error)) from error
                if not isinstance(rows[-1], dict):
                    raise DataError(f"{path}, line {number}", expected="one JSON object", got=line[:60])
        return cls._from_file(path, rows, columns)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str], **columns: Any) -> "ContrastSet":
        """Read a CSV file with a header line; `columns` as in `from_records`."""
        return cls._from_file(path, _read_csv(path), columns)

    @classmethod
    def from_truthfulqa(cls, path: str | os.PathLike[str]) -> "ContrastSet":
        """Read TruthfulQA.csv (Lin et al. 2022, arXiv 2109.07958).

        Preferred is "Best Answer", undesired the first of "Incorrect Answers", the label is "Category".
        """
        rows = [
            {**row, "Incorrect Answers": (row["Incorrect Answers"] or "").split(";")[0].strip()}
            if "Incorrect Answers" in row
            else row
            for row in _read_csv(path)
        ]
        columns = {
            "prompt": "Question",
            "preferred": "Best Answer",
            "undesired": "Incorrect Answers",
            "label": "Category",
        }
        return cls._from_file(path, rows, columns)

    @classmethod
    def _from_file(cls, path: str | os.PathLike[str], rows: list[Any], columns: Mapping[str, Any]) -> "ContrastSet":
        try:
            return cls.from_records(rows, **columns)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON object a line, atomically; `from_jsonl` reads it back equal."""
        records = ({k: v for k, v in asdict(c).items() if v is not None} for c in self)
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records).encode())


def _read_csv(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    try:
        return list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise DataError(f"{path}", expected="a CSV file with a header line", got=str(error)) from error

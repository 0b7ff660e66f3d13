"""Contrasts: the data that a steering method is fitted on.

A contrast is a prompt with a preferred and an undesired answer; a contrast set is a sequence of them that can be split,
read and written.
"""

import json
import os
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, overload

from fsteer_lens.errors import DataError, InputError
from fsteer_lens.ground.checks import brief, choice, clean_text, finite, normalised, optional_text, several, whole
from fsteer_lens.ground.files import write_atomically
from fsteer_lens.ground.tables import read_csv, read_jsonl
from fsteer_lens.prompts.columns import Columns, Table, parts_of_rows
from fsteer_lens.prompts.forms import Prompt, as_prompt, prompt_text


@dataclass(frozen=True)
class Contrast:
    """One prompt with an answer that is wanted and one that is not.

    Label, context and group are None where they are left out, NaN, another missing value of pandas, or blank; a number
    becomes text, 3.0 the same as 3.

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
        InputError: the prompt is of no known form, or a text holds NUL or half a character (a lone surrogate).
    """

    prompt: Prompt
    preferred: str
    undesired: str
    label: str | None = None
    context: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        prompt = as_prompt(self.prompt)
        for side in ("preferred", "undesired"):
            answer = getattr(self, side)
            if not isinstance(answer, str) or not answer.strip():
                raise DataError(
                    f"one-sided contrast for prompt {prompt_text(prompt)[:60]!r}",
                    expected=f"text in {side!r}",
                    got=brief(answer),
                    fix="Give every contrast both a preferred and an undesired answer.",
                )
        answers = {side: clean_text(side, getattr(self, side)) for side in ("preferred", "undesired")}
        named = {part: optional_text(part, getattr(self, part)) for part in ("label", "context", "group")}
        normalised(self, prompt=prompt, **answers, **named)


TRUTHFULQA = {"prompt": "Question", "preferred": "Best Answer", "undesired": "Incorrect Answers", "label": "Category"}
"""Columns of TruthfulQA.csv; its incorrect answers are several, with semicolons between."""


class Split(NamedTuple):
    """Three disjoint parts of a contrast set."""

    train: "ContrastSet"
    valid: "ContrastSet"
    test: "ContrastSet"


class ContrastSet(Sequence[Contrast]):
    """An immutable sequence of contrasts."""

    def __init__(self, contrasts: Iterable[Contrast] = ()) -> None:
        self._contrasts = contrasts._contrasts if isinstance(contrasts, ContrastSet) else _contrasts_of(contrasts)

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
        rows: Iterable[Mapping[str, Any]] | Table,
        *,
        prompt: str = "prompt",
        preferred: str = "preferred",
        undesired: str = "undesired",
        label: str | None = "label",
        context: str | None = "context",
        group: str | None = "group",
    ) -> "ContrastSet":
        """Build a set from the rows of a table: mappings, or a DataFrame of pandas; the arguments name the columns.

        A cell of label, context or group that is absent, None, NaN or blank is None; a number becomes text, and a whole
        one stays whole, also where pandas made its column one of floats.

        Raises:
            DataError: no rows, a needed column is missing, two columns of one name, or a cell that cannot be used: a
                prompt of no known form, an answer that is no text, text with NUL or half a character (a lone
                surrogate); names row and column.
        """
        columns = Columns(prompt, preferred, undesired, label, context, group)
        return cls([Contrast(**parts) for parts in parts_of_rows(rows, columns)])

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], **columns: Any) -> "ContrastSet":
        """Read one JSON object a line; `columns` and errors as in `from_records`.

        Raises:
            DataError: also for a line that is no JSON object, or one with a name that stands twice; names the line.
        """
        rows = read_jsonl(path, "one JSON object")
        for where, row in rows:
            if not isinstance(row, dict):
                raise DataError(where, expected="one JSON object", got=brief(row))
        return cls._from_file(path, [row for _, row in rows], columns)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str], **columns: Any) -> "ContrastSet":
        """Read a CSV file with a header line; `columns` and errors as in `from_records`.

        Raises:
            DataError: also for a row with more or fewer cells than the heading, as where text with a comma is not
                quoted, and for two columns of one name; names the line.
        """
        return cls._from_file(path, read_csv(path), columns)

    @classmethod
    def from_truthfulqa(cls, path: str | os.PathLike[str]) -> "ContrastSet":
        """Read TruthfulQA.csv (Lin et al. 2022, arXiv 2109.07958), without the blanks around its cells.

        Preferred is "Best Answer", undesired the first of "Incorrect Answers", the label is "Category". A question is
        then the same text as in mc_task.json, and an answer differs from its twin there by a full stop at most.
        """
        rows = [{name: cell.strip() for name, cell in row.items()} for row in read_csv(path)]
        for row in rows:
            if TRUTHFULQA["undesired"] in row:
                row[TRUTHFULQA["undesired"]] = row[TRUTHFULQA["undesired"]].split(";")[0].strip()
        return cls._from_file(path, rows, TRUTHFULQA)

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


def _contrasts_of(given: Any) -> tuple[Contrast, ...]:
    fix = "Put it into a list." if isinstance(given, Contrast) else None
    if hasattr(given, "columns"):
        fix = "ContrastSet.from_records takes a table."
    found = tuple(several("contrast set", given, "Contrast values", fix=fix))
    for contrast in found:
        if not isinstance(contrast, Contrast):
            raise DataError("contrast set", expected="Contrast values", got=type(contrast).__name__)
    return found

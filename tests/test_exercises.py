"""Exercises tell right from wrong; that the notebooks' own are solved rightly and wrongly is test_notebooks_run.py."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fsteer_lens import tutor
from fsteer_lens.tutor.exercises import Verdict

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@tutor.exercise
def check_rank(rank: int) -> Iterator[tuple[bool, str]]:
    """Even ranks
    are right."""
    yield isinstance(rank, int), "A rank is a whole number."
    yield rank % 2 == 0, "Look for a multiple of <two>."


def test_the_first_pair_that_does_not_hold_decides() -> None:
    assert check_rank(4) == Verdict(True, "Even ranks are right.")
    assert check_rank("4") == Verdict(False, "A rank is a whole number.")
    assert check_rank(3) == Verdict(False, "Look for a multiple of <two>.")


def test_no_answer_and_one_that_breaks_the_check_are_told_of() -> None:
    assert check_rank(None).right is None

    @tutor.exercise
    def check_word(word: str) -> Iterator[tuple[bool, str]]:
        """Right."""
        yield word.islower(), "lower case"

    assert check_word(3).right is False and "AttributeError" in check_word(3).words


def test_a_verdict_shows_its_words_as_text() -> None:
    shown = check_rank(3)._repr_html_()
    assert "multiple of &lt;two&gt;" in shown and "Not yet" in shown
    assert repr(check_rank(4)) == "✓ Right. Even ranks are right."


def test_a_prediction_is_compared_with_what_came_out() -> None:
    assert tutor.reveal("a", "a", "Because.") == Verdict(True, "You said 'a', and so it is. Because.")
    assert tutor.reveal("b", "a", "Because.").right is False
    assert tutor.reveal(None, "a", "Because.") == Verdict(None, "It is 'a'. Because.")


def cells(path: Path, tag: str) -> list[str]:
    """Sources of a notebook's cells with a tag."""
    told: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in told if tag in cell["metadata"].get("tags", [])]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("0[0-6]*.ipynb")), ids=lambda path: path.stem)
def test_every_exercise_has_a_check_and_a_folded_solution(path: Path) -> None:
    exercises, checks, solutions = (cells(path, tag) for tag in ("exercise", "check", "solution"))
    assert len(exercises) == len(checks) == len(solutions) >= 2
    for given, check, solution in zip(exercises, checks, solutions, strict=True):
        assert "= None" in given and "@fs.tutor.exercise" in check
        assert solution.startswith("<details><summary>") and len(re.findall("```python", solution)) == 1

"""The file that keeps finished trials loses none, believes nothing that is no trial, and survives whatever cuts it."""

import json
import math
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

from fsteer_lens.errors import DataError, FsteerError, InputError, NonFiniteError
from fsteer_lens.selection import RecipeTrial, Trial
from fsteer_lens.selection.journals import Journal
from fsteer_lens.selection.trials import finite_ones, trial_of

HEADING = '{"search": "abc"}\n'
ONE = '{"layer": 4, "rank": null, "strength": 1.5, "effect": 0.25, "utility": -0.5}\n'
TRIAL = Trial(4, None, 1.5, 0.25, -0.5)


@pytest.fixture(autouse=True)
def _as_at_a_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tests' type checker, which would refuse what the package has to."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def opened(path: Path, identity: str = "abc") -> Journal[Trial]:
    return Journal(path, "search", identity, trial_of)


def test_what_is_added_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "j"
    first = opened(path)
    trials = [TRIAL, Trial(2, 3, 1.0, math.nan, math.inf)]
    for one in trials:
        first.add(one)
    assert list(opened(path).known) == [one.settings for one in trials]
    assert [item.name for item in tmp_path.iterdir()] == ["j"]


@pytest.mark.parametrize("cut", range(len(HEADING)))
def test_a_heading_that_a_crash_cut_off_is_written_anew(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    path.write_text(HEADING[:cut])
    opened(path, "xyz").add(TRIAL)
    header, one = path.read_text().splitlines()
    assert json.loads(header) == {"search": "xyz"} and trial_of(json.loads(one)) == TRIAL


@pytest.mark.parametrize("cut", range(1, len(ONE)))
def test_a_line_that_a_crash_cut_off_is_cut_away(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    path.write_text(HEADING + ONE + ONE[:cut])
    again = opened(path)
    assert list(again.known.values()) == [TRIAL]
    again.add(Trial(5, None, 1.0, 0.0, 0.0))
    assert len(opened(path).known) == 2


@pytest.mark.parametrize("text", ["notes", "{", '{"searches": 1', '{"search": "' + "a" * 99, "x" * 5])
def test_another_file_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "j"
    path.write_text(text)
    if HEADING.startswith(text):  # the control: this is what a crash leaves
        opened(path)
        assert path.read_text() == HEADING
        return
    with pytest.raises(DataError, match="expected the file of an earlier search"):
        opened(path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    "line",
    [
        "3", "[1]", "null", '"x"', "{}", "not json", "[" * 100_000, "1" * 5000, ONE.replace("4", '"a"', 1),
        ONE.replace("4", "-1", 1), ONE.replace("4", "1.5", 1), ONE.replace("null", "0"), ONE.replace("1.5", '"b"'),
        ONE.replace("1.5", "NaN"), ONE.replace("0.25", "[]"), ONE.replace("0.25", "null"), ONE.replace("-0.5", "{}"),
        ONE.replace("-0.5", '-0.5, "scope": "everywhere"'), ONE.replace("-0.5", '-0.5, "scope": {"start": -1}'),
        ONE.replace("-0.5", '-0.5, "schedule": {"factors": "x"}'), ONE.replace("-0.5", '-0.5, "schedule": 3'),
        ONE.replace("-0.5", '-0.5, "length": "long"'), ONE.replace("-0.5", '-0.5, "more": 1'),
    ],
)  # fmt: skip
def test_what_is_no_trial_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "j"
    text = HEADING + ONE + line.strip() + "\n"
    path.write_text(text)
    with pytest.raises(DataError, match=r"expected the file of an earlier search, got ."):
        opened(path)
    assert path.read_text() == text


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j"
    journal = opened(path)
    journal.add(TRIAL)
    before = path.read_text()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("fsteer_lens.selection.journals.os.fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*no space left"):
        journal.add(Trial(5, None, 1.0, 0.0, 0.0))
    assert path.read_text() == before
    monkeypatch.undo()
    with pytest.raises(FsteerError, match="existing folder"):
        opened(tmp_path / "nowhere" / "j")


def add_many(path: Path, layer: int) -> None:
    for strength in range(60):
        opened(path).add(Trial(layer, None, float(strength), 0.0, 0.0))


def test_two_writers_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    start = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    writers = [start.Process(target=add_many, args=(path, layer)) for layer in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which do nothing here
        for writer in writers:
            writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(opened(path).known) == 120 and len(path.read_text().splitlines()) == 121


def test_what_is_no_number_is_never_chosen() -> None:
    lost = [Trial(3, None, 1.0, math.nan, 0.0), Trial(3, None, 2.0, math.inf, 0.0), Trial(3, None, 2.0, 1.0, math.nan)]
    with pytest.warns(UserWarning, match=r"search: 3 of 4 settings cannot be chosen.*effect=nan"):
        assert finite_ones("search", [*lost, TRIAL], "effect", "utility") == [TRIAL]
    with pytest.raises(NonFiniteError, match="not one of 3 settings can be chosen"):
        finite_ones("search", lost, "effect", "utility")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert finite_ones("search", [TRIAL], "effect", "utility") == [TRIAL]


def test_a_trial_of_a_recipe_holds_numbers() -> None:
    good = (4, *(0.5,) * 9)
    assert RecipeTrial(*good).layer == 4  # type: ignore[arg-type]
    for at, bad in ((0, "4"), (0, 1.5), (4, "x"), (9, None), (3, [1.0])):
        values: list[Any] = list(good)
        values[at] = bad
        with pytest.raises(InputError, match=r"expected a number|expected an int"):
            RecipeTrial(*values)

"""The errors: their tree, the form of a message, and that bad input meets one of them without any type checker."""

import inspect
import pickle
import subprocess
import sys

import pytest

from fsteer_lens import errors
from fsteer_lens.errors import FsteerError, InputError

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]


def test_every_error_is_an_fsteer_error_with_a_docstring():
    assert len(CLASSES) >= 12
    for error in CLASSES:
        assert issubclass(error, FsteerError) and error.__doc__
    for error in (errors.ShapeError, errors.NonFiniteError, errors.DataError, errors.ContextLengthError):
        assert issubclass(error, InputError) and issubclass(error, ValueError)
    for error in (errors.SiteError, errors.HookError, errors.MismatchError, errors.FileFormatError):
        assert not issubclass(error, InputError)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "rank"),
        ({"expected": "an int"}, "rank: expected an int"),
        ({"got": 0}, "rank: got 0"),
        ({"expected": "an int", "got": 9}, "rank: expected an int, got 9"),
        ({"expected": "an int", "got": False, "fix": "Choose one."}, "rank: expected an int, got False. Choose one."),
        ({"fix": "Choose one."}, "rank. Choose one."),
        ({"got": "many.", "fix": "Choose one."}, "rank: got many. Choose one."),
    ],
)
@pytest.mark.parametrize("error", CLASSES)
def test_a_message_says_expected_got_and_how_to_mend_it(error, parts, message):
    raised = error("rank", **parts)
    assert str(raised) == message
    assert raised.problem == "rank"
    assert [raised.expected, raised.got, raised.fix] == [parts.get(name) for name in ("expected", "got", "fix")]


@pytest.mark.parametrize("error", CLASSES)
def test_an_error_survives_its_way_between_processes(error):
    raised = error("rank", expected="an int", got=9, fix="Choose one.")
    back = pickle.loads(pickle.dumps(raised))
    assert type(back) is error and str(back) == str(raised) and back.fix == "Choose one."


BAD_INPUT = """
import torch
from fsteer_lens import Contrast, ContrastSet, fit_experts, fit_gate, fit_subspace
from fsteer_lens.errors import FsteerError

x, y = torch.randn(20, 6), torch.randn(20, 6)
nan = x.clone()
nan[3, 2] = torch.nan
infinite = x.clone()
infinite[0, 0] = torch.inf
subspace, gate = fit_subspace(x, rank=2), fit_gate(x, rank=2)
experts = fit_experts(x, y, preset="0.1", epochs=1)
cases = {
    "empty contrast set": lambda: ContrastSet.from_records([]),
    "one-sided contrast": lambda: ContrastSet.from_records([{"prompt": "a", "preferred": "b", "undesired": ""}]),
    "rank above n - 1": lambda: fit_subspace(x[:4], rank=4),
    "rank above d": lambda: fit_gate(x, rank=7),
    "fewer shifts than experts": lambda: fit_experts(x[:4], y[:4], n_experts=5),
    "NaN queries": lambda: fit_subspace(nan),
    "NaN gate queries": lambda: fit_gate(nan, rank=2),
    "infinite shifts": lambda: fit_experts(x, infinite),
    "missing file": lambda: ContrastSet.from_jsonl("nowhere.jsonl"),
    "wrong column": lambda: ContrastSet.from_records([{"question": "a"}]),
    "wrong d_model in a subspace": lambda: subspace.energy_ratio(x[:, :5]),
    "wrong d_model in a gate": lambda: gate.gate(x[:, :5]),
    "wrong d_model in experts": lambda: experts.vector(x[:, :5]),
    "general of another width": lambda: fit_gate(x, rank=2, kind="logistic", general=x[:, :5]),
    "calibration of another width": lambda: fit_gate(x, rank=2, calibration=x[:, :5]),
}
# what a type checker would have found
typed = {
    "a list": lambda: fit_subspace([[1.0, 2.0]]),
    "whole numbers": lambda: fit_subspace(torch.ones(4, 3, dtype=torch.long)),
    "a vector": lambda: fit_gate(x[0], rank=1),
    "a broken rank": lambda: fit_subspace(x, rank=2.0),
    "shifts of another shape": lambda: fit_experts(x, y[:10]),
    "an unknown kind": lambda: fit_gate(x, rank=2, kind="quantil"),
    "an unknown cdf": lambda: fit_gate(x, rank=2, cdf="smooth"),
    "broken folds": lambda: fit_gate(x, rank=2, folds=2.5),
    "an unknown preset": lambda: fit_experts(x, y, preset="papr"),
    "an unknown scale": lambda: fit_experts(x, y, prototype_scale="long"),
    "a gate and a number": lambda: gate & 1,
    "a prompt of bytes in a list": lambda: Contrast([b"a"], "b", "c"),
    "rows that are lists": lambda: ContrastSet.from_records([["a", "b"]]),
    "no contrasts": lambda: ContrastSet(["a"]),
}
for name, call in {**cases, **typed}.items():
    try:
        call()
    except FsteerError as error:
        whole = error.__cause__ if isinstance(error.__cause__, FsteerError) else error
        if name in cases and not (whole.expected is not None and whole.got is not None and whole.fix):
            print(f"{name}: not expected, got and fix: {error}")
        if not isinstance(error.got, str) or len(error.got) < 200:
            continue
        print(f"{name}: too long: {error}")
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
    else:
        print(f"{name}: nothing was raised")
"""


def test_bad_input_meets_an_error_of_ours_without_a_type_checker():
    done = subprocess.run([sys.executable, "-c", BAD_INPUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""

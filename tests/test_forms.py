"""Prompts in every form: taken by every function in the same way, or refused in words, never read as something else."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import fsteer_lens
from fsteer_lens import effects, evaluation, figures, models, tutor
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.prompts.forms import as_prompt, one_or_more, prompts_of, texts_of

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


# ----------------------------------------------------------------------------------------------------------- one prompt


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ("hi", "hi"),
        (np.str_("hi"), "hi"),
        (TURNS, TURNS),
        (tuple(TURNS), tuple(TURNS)),
        (np.array(TURNS, dtype=object), TURNS),
        ([5, 6], [5, 6]),
        ((5, 6), (5, 6)),
        (range(5, 7), range(5, 7)),
        (list(np.array([5, 6])), [5, 6]),
        ([torch.tensor(5), 6], [5, 6]),
        (np.array([5, 6], dtype=np.uint16), [5, 6]),
        (torch.tensor([5, 6]), [5, 6]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_prompt_in_any_form_is_the_prompt(given: Any, prompt: Any) -> None:
    for found in (as_prompt(given), one_or_more(given)[0]):
        assert list(found) == list(prompt) and type(found) in (type(prompt), list)
        if not isinstance(found, str) and isinstance(found[0], int):
            assert all(type(token) is int for token in found)
    if not isinstance(prompt, range):
        json.dumps(as_prompt(given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"role": "user", "content": "hi"}, r"prompt: expected .*, got one message, with \['role'"),
        ({"input_ids": [1]}, "got a tokenizer's output, with"),
        ({"text": "hi"}, r"got a mapping, with \['text'\]"),
        (torch.ones(2, 3, dtype=torch.long), r"got an array of shape \[2, 3\], whose rows may be padded"),
        (np.array([1.0, 2.0]), r"expected messages with 'role' and 'content', or ids, got array"),
        (np.array([], dtype=int), "expected a string, messages or token ids, got array"),
        (b"hi", "got b'hi'"),
        (float("nan"), "got nan"),
        ("a\0b", "got NUL, .* at character 1"),
        ([{"role": "user", "content": "a\ud83d"}], r"prompt, message 0, content: .* got half a character"),
        ([{"role": "us\0er", "content": "a"}], r"prompt, message 0, role: .* got NUL"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_prompt_is_told_in_words(given: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        as_prompt(given)
    with pytest.raises(InputError):
        one_or_more(given)
    with pytest.raises(InputError, match=words.replace("prompt", "prompt 1").split(": expected")[0].split("got")[-1]):
        prompts_of(["fine", given])


# ------------------------------------------------------------------------------------------------------ several prompts


def test_one_prompt_is_never_taken_for_several() -> None:
    for given, kind in (
        ("hello", "one text, 'hello'"),
        ([1, 2], "one prompt, of token ids"),
        (TURNS, "one prompt, of"),
    ):
        with pytest.raises(InputError, match=rf"prompts: expected a list of prompts, got {kind}.*Put a single prompt"):
            prompts_of(given)
        assert one_or_more(given) == [given] and prompts_of([given]) == [given]
    for given in ([["hello"]], [[1, "a"]], [None], ["a", 3]):
        with pytest.raises(InputError, match=r"^prompt \d: expected"):
            prompts_of(given)


def test_nothing_is_refused_unless_it_may_be_nothing() -> None:
    for take in (prompts_of, one_or_more, texts_of):
        with pytest.raises(InputError, match="expected at least one, got none"):
            take(iter(()))
    assert prompts_of([], least=0) == [] == texts_of((), least=0)


def test_texts_are_texts() -> None:
    assert texts_of(np.array(["a", "b"])) == ["a", "b"] == texts_of(word for word in "ab")
    for given, words in (
        (["a", 3], "text 1: expected text, got 3"),
        (["a", ""], "text 1"),
        ("ab", "texts: .* one text"),
    ):
        with pytest.raises(InputError, match=words):
            texts_of(given)


# ------------------------------------------------------------------------------------ every function that takes prompts

EVERYWHERE = Path(__file__).parent / "forms_everywhere.py"


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, str]]:
    """What came of every form in every function, in a process without the tests' type checker, as at a user's."""
    pytest.importorskip("pandas", reason="pandas is not installed")
    done = subprocess.run([sys.executable, EVERYWHERE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_function_takes_every_form_and_refuses_in_words_what_is_none(found: dict[str, dict[str, str]]) -> None:
    odd = {
        f"{where}, {form}": outcome
        for where, outcomes in found.items()
        for form, outcome in outcomes.items()
        if outcome not in ("same", "refused")
    }
    assert not odd
    assert sum(map(len, found.values())) > 400, "or the list of cases has shrunk"


TAKEN = {"prompts", "contrasts", "general", "harmful", "harmless", "calibration", "train", "words"}


def test_no_public_function_that_takes_prompts_is_left_out() -> None:
    """A new function that takes prompts must be added to the cases above."""
    cases = EVERYWHERE.read_text(encoding="utf-8")
    modules = (fsteer_lens, effects, evaluation, figures, models, tutor, fsteer_lens.scale, fsteer_lens.selection)
    for module in modules:
        for name in module.__all__:
            function = getattr(module, name)
            hints = getattr(function, "__annotations__", {})
            if callable(function) and TAKEN & set(hints) and _iterates(hints[next(iter(TAKEN & set(hints)))]):
                assert name in cases, f"{module.__name__}.{name}"


def _iterates(hint: Any) -> bool:
    return any(
        part is Iterable or _iterates(part) for part in (getattr(hint, "__origin__", None), *get_args(hint)) if part
    )


def test_labels_need_one_for_each_prompt() -> None:
    with pytest.raises(DataError, match="labels: expected one for each of 2 rows, got 1"):
        fsteer_lens.Activations(torch.ones(2, 3), labels=("a",), layer=1)

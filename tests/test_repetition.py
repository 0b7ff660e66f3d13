"""Repetition: a planted n-gram is found at its third place, and not before."""

import random

import pytest
import torch

from fsteer_lens.errors import InputError
from fsteer_lens.evaluation import repeats, repetition_rate

GRAM = [7, 1, 7, 2]


def planted(times: int) -> list[int]:
    """A four-gram so many times, with tokens in between that stand there once."""
    rest = iter(range(100, 200))
    return [next(rest)] + [token for _ in range(times) for token in (*GRAM, next(rest))]


def test_the_third_time_counts() -> None:
    assert [repeats(planted(times)) for times in range(5)] == [False, False, False, True, True]
    assert repeats(planted(2), times=2) and not repeats(planted(3), times=4)
    assert not repeats(planted(3), n=5), "what follows differs every time"
    assert repeats(planted(3), n=1) and not repeats(planted(1), n=1) and repeats(planted(1), n=1, times=2)


def test_what_overlaps_counts_and_what_is_short_does_not() -> None:
    assert repeats([5] * 6) and not repeats([5] * 5), "four fives stand in six fives at three places"
    assert not repeats([]) and not repeats([1, 2, 3]) and repeats((5, 5, 5), n=1)
    assert repeats(torch.tensor(planted(3))) and not repeats(torch.tensor(planted(2)))


def test_texts_tell_the_same() -> None:
    """Against a search in text: every token one letter, every n-gram looked for wherever it may begin."""
    rng = random.Random(0)
    found = []
    for _ in range(300):
        text = "".join(rng.choices("abc", k=rng.randint(0, 40)))
        grams = {text[start : start + 4] for start in range(len(text) - 3)}
        wanted = any(sum(text.startswith(gram, at) for at in range(len(text))) >= 3 for gram in grams)
        assert repeats([ord(letter) for letter in text]) == wanted
        found.append(wanted)
    assert 0 < sum(found) < len(found)


def test_the_rate_is_a_share_of_answers() -> None:
    assert repetition_rate([planted(3), planted(2), planted(4), []]) == 0.5
    assert repetition_rate([planted(2)]) == 0.0 and repetition_rate([planted(2)], times=2) == 1.0


def test_bad_requests_raise() -> None:
    for ask, message in (
        (lambda: repetition_rate([]), "at least one"),
        (lambda: repeats("a text by itself"), "one text"),  # type: ignore[arg-type]
        (lambda: repeats(torch.zeros(2, 3)), "an array of shape"),
        (lambda: repeats([1], n=0), "n: expected an int >= 1"),
        (lambda: repeats([1], times=1), "times: expected an int >= 2"),
    ):
        with pytest.raises(InputError, match=message):
            ask()

"""Repetition: whether a text goes round in circles, as text does that was pushed too far."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from fsteer_lens.ground.checks import several, whole

NGRAM = 4
"""Tokens of an n-gram."""
TIMES = 3
"""How often an n-gram stands in a text that counts as repeating itself."""


def repeats(tokens: Iterable[Any], *, n: int = NGRAM, times: int = TIMES) -> bool:
    """Whether some n-gram of tokens stands in a text at least so many times; n-grams may overlap.

    Args:
        tokens: ids of one text, a list or a tensor of one axis, such as `Generation.tokens`.
        n: tokens of an n-gram, at least 1.
        times: how often one has to be there, at least 2.

    Raises:
        InputError: no list of tokens, or numbers out of range.
    """
    n, times = whole("n", n, 1), whole("times", times, 2)
    ids = several("tokens", tokens, "token ids")
    counts = Counter(tuple(ids[start : start + n]) for start in range(len(ids) - n + 1))
    return max(counts.values(), default=0) >= times


def repetition_rate(answers: Iterable[Iterable[Any]], *, n: int = NGRAM, times: int = TIMES) -> float:
    """Share of answers that repeat themselves, as `repeats` tells it, in [0, 1].

    Raises:
        InputError: no answers, or as in `repeats`.
    """
    looked = [repeats(answer, n=n, times=times) for answer in several("answers", answers, "lists of tokens", least=1)]
    return sum(looked) / len(looked)

"""Tries answers to a notebook's exercise, in its kernel."""

from typing import Any


def try_answers(names: dict[str, Any], call: str, wrong: list[str], solution: str) -> None:
    """No answer is told as such, wrong ones are refused, the solution passes; the names are then what they were."""
    kept = dict(names)

    def verdict(answer: str) -> Any:
        exec(answer, names)
        return eval(call, names)

    assert verdict("").right is None, "without an answer a check must say so"
    for answer in wrong:
        found = verdict(answer)
        assert found.right is False and "could not be checked" not in found.words, f"{answer}\n{found}"
    found = verdict(solution)
    assert found.right, found
    names.update(kept)

"""What the kernel of a tested notebook runs before the first cell, and where an exercise is checked."""

from IPython.core.getipython import get_ipython
from jaxtyping import install_import_hook

install_import_hook("fsteer_lens", "tests.check")

import tests.checked_models  # noqa: F401, E402


def try_answers(call: str, wrong: list[str], solution: str) -> None:
    """No answer is told as such, wrong ones are refused, the solution passes; the names are then what they were."""
    shell = get_ipython()
    assert shell is not None
    names = shell.user_ns
    kept = dict(names)

    def verdict(answer: str = ""):  # type: ignore[no-untyped-def]
        exec(answer, names)
        return eval(call, names)

    assert verdict().right is None, "without an answer a check must say so"
    for answer in wrong:
        found = verdict(answer)
        assert found.right is False and "could not be checked" not in found.words, f"{answer}\n{found}"
    found = verdict(solution)
    assert found.right, found
    names.update(kept)

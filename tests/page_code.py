"""Runs the code of a documentation page."""

import contextlib
import io
import re
from pathlib import Path

NUMBER = r"-?\d+(?:\.\d+)?"


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Language and text of the page's code blocks in these languages, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found if language in languages]


def as_near(shown: str, printed: str) -> bool:
    """Whether two numbers differ by no more than machines do: 3 %, or two of the last digit shown; counts by 2 %."""
    _, point, decimals = shown.partition(".")
    difference = abs(float(shown) - float(printed))
    if not point:
        return difference <= 0.02 * abs(float(shown))
    return difference <= max(0.03 * abs(float(shown)), 2.1 * 10 ** -len(decimals))


def same_output(shown: str, printed: str) -> bool:
    """Word by word the same, and numbers as near as those of another machine."""
    if re.sub(NUMBER, "0", shown).split() != re.sub(NUMBER, "0", printed).split():
        return False
    return all(map(as_near, re.findall(NUMBER, shown), re.findall(NUMBER, printed)))


def differences(page: Path) -> list[str]:
    """Run the page's Python from top to bottom; where a text block is not what was printed before it.

    A page that shows something of what it prints shows all of it.
    """
    names: dict[str, object] = {}
    printed, found = io.StringIO(), []
    pieces = blocks(page, "python", "text")
    for number, (language, text) in enumerate(pieces):
        if language == "python":
            with contextlib.redirect_stdout(printed):
                exec(compile(text, f"{page.name}, block {number}", "exec"), names)
            continue
        if not same_output(text, printed.getvalue()):
            found.append(f"shown is\n{text}\nprinted was\n{printed.getvalue()}")
        printed = io.StringIO()
    if printed.getvalue() and any(language == "text" for language, _ in pieces):
        found.append(f"not shown is\n{printed.getvalue()}")
    return found

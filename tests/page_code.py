"""Runs the code of a documentation page."""

import contextlib
import io
import re
from pathlib import Path

import pytest

NUMBER = r"-?\d+(?:\.\d+)?"


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Language and text of the page's code blocks in these languages, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found if language in languages]


def same_output(shown: str, printed: str) -> bool:
    """Word by word the same, and numbers as near as those of another machine."""
    if re.sub(NUMBER, "0", shown).split() != re.sub(NUMBER, "0", printed).split():
        return False
    pairs = zip(re.findall(NUMBER, shown), re.findall(NUMBER, printed), strict=True)
    return all(float(one) == pytest.approx(float(other), rel=0.03, abs=0.02) for one, other in pairs)


def run_page(page: Path) -> None:
    """Run the page's Python from top to bottom; what stands in a text block is what was printed before it."""
    names: dict[str, object] = {}
    printed = io.StringIO()
    for number, (language, text) in enumerate(blocks(page, "python", "text")):
        if language == "python":
            with contextlib.redirect_stdout(printed):
                exec(compile(text, f"{page.name}, block {number}", "exec"), names)
            continue
        assert same_output(text, printed.getvalue()), f"{page.name} shows\n{text}\nprinted was\n{printed.getvalue()}"
        printed = io.StringIO()

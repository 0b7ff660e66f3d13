"""Stored notebooks are whole, small and free of traces of the machine that ran them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted(
    path
    for path in (Path(__file__).parents[1] / "notebooks").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts
)
MAX_BYTES = 2_000_000
MACHINE_PATH = re.compile(r"(?<![\w.~:/+-])/(?:work|root|home|tmp|Users|var/folders)/[\w./-]+|[A-Z]:\\Users\\\w+")


def texts(value: Any) -> Iterator[str]:
    """Every string in a notebook but the pictures, which are base64; lists of lines are joined."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        yield "".join(value)
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key != "image/png":
                yield from texts(part)
    elif isinstance(value, str):
        yield value


def problems(source: str) -> list[str]:
    """Name everything that is wrong with the text of a notebook file."""
    found = []
    if len(source.encode()) > MAX_BYTES:
        found.append(f"{len(source.encode()):,} bytes, more than {MAX_BYTES:,}")
    notebook = json.loads(source)
    paths = {path for text in texts(notebook) for path in MACHINE_PATH.findall(text)}
    found += [f"machine path {path}" for path in sorted(paths)]
    cells: list[dict[str, Any]] = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells if "".join(cell["source"]).strip()]
    if None in counts:
        found.append("a code cell that was not run")
    elif counts != list(range(1, len(counts) + 1)):
        found.append(f"cells were not run once from top to bottom: {counts}")
    if not any(cell["outputs"] for cell in cells):
        found.append("no outputs")
    for output in (output for cell in cells for output in cell["outputs"]):
        if output["output_type"] == "error":
            found.append(f"a stored error: {output['ename']}: {output['evalue']}")
        elif output.get("name") == "stderr" and "\x1b[" in "".join(output["text"]):
            found.append(f"colour codes on stderr: {''.join(output['text'])[:80]!r}")
    return found


def a_notebook(*outputs: dict[str, Any], count: int | None = 1, source: str = "1 + 1") -> str:
    cell = {
        "cell_type": "code",
        "execution_count": count,
        "source": [source],
        "outputs": list(outputs),
        "metadata": {},
    }
    return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": [text]}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_stored_notebook(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


def test_a_clean_notebook_passes() -> None:
    assert problems(a_notebook(stream("and/or 3/4 https://example.org/home/page ../tmp/x ~/work/x"))) == []


@pytest.mark.parametrize(
    ("notebook", "complaint"),
    [
        (a_notebook(stream("2"), count=None), "not run"),
        (a_notebook(stream("2"), count=7), "top to bottom"),
        (a_notebook(), "no outputs"),
        (a_notebook(stream("saved to /home/ann/report.html")), "machine path"),
        (a_notebook(stream("seen\n/tmp/x.py")), "machine path"),
        (a_notebook(stream("2"), source="load('C:\\Users\\ann')"), "machine path"),
        (a_notebook(stream("x" * MAX_BYTES)), "bytes"),
        (a_notebook(stream("\x1b[31mTraceback", name="stderr")), "colour codes"),
        (
            a_notebook({"output_type": "error", "ename": "KeyError", "evalue": "'a'", "traceback": []}),
            "stored error",
        ),
    ],
)
def test_a_faulty_notebook_is_named(notebook: str, complaint: str) -> None:
    assert any(complaint in problem for problem in problems(notebook))

"""No public callable answers nonsense with an error of its inside: it takes it, or says what it wants and what came."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "misuse_everywhere.py"


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    """What came of every call, by callable and argument."""
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_callable_refuses_nonsense_in_words(outcomes: list[dict[str, Any]]) -> None:
    faults = [
        f"{row['callable']}({name}={value}): {told}"
        for row in outcomes
        for name, of in row["faults"].items()
        for value, told in of.items()
    ]
    assert not faults, "\n".join([f"{len(faults)} calls:", *faults[:40]])


@pytest.mark.slow
def test_every_callable_was_tried(outcomes: list[dict[str, Any]]) -> None:
    tried = {row["callable"] for row in outcomes}
    for name in (
        "fit",
        "generate",
        "Contrast",
        "effects.propagation",
        "figures.replay",
        "steering.fit_ridge",
        "tutor.load",
        "FineSteer.with_strength",
        "Experts.without_expert",
        "Trace.from_jsonl",
        "Report.add_table",
    ):
        assert name in tried
    assert len(tried) > 180 and sum(row["calls"] for row in outcomes) > 7500

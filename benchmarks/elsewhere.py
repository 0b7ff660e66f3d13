"""Benchmarks that run in another environment, as `python -m benchmarks.NAME` there, and hand their rows over."""

import argparse
import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measuring import Ratio, Row, Section, Settings, section_text


def section_of(name: str, environment: str, title: str, settings: Settings) -> Section:
    """The section of a benchmark that is run in another environment; one without figures where that is missing."""
    python = Path(environment) / "bin" / "python"
    if not python.exists():
        note = "Its environment is not here: make bench makes it."
        return Section(title, "", (Row("all", "", None, note=note),))
    command = [str(python), "-W", "ignore", "-m", f"benchmarks.{name}", "--json", "--device", settings.device]
    command += ["--quick"] * settings.quick + (["--rounds", str(settings.rounds)] if settings.rounds else [])
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # engines have more to say
    return from_json(lines[-1])


def main(run: Callable[[Settings], Section], description: str | None) -> None:
    """Measure, and print the section, as JSON or as a page in Markdown."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--rounds", type=int, help="pairs of runs per figure")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    section = run(Settings(rounds=given.rounds, quick=given.quick, device=given.device))
    print(to_json(section) if given.json else section_text(section))  # noqa: T201


def to_json(section: Section) -> str:
    """A section of figures without aims as one line."""
    return json.dumps(asdict(section))


def from_json(text: str) -> Section:
    """The section that `to_json` wrote."""
    data = json.loads(text)

    def row(item: dict[str, Any]) -> Row:
        ratio = item["ratio"]
        found = None if ratio is None else Ratio(**{**ratio, "values": tuple(ratio["values"])})
        return Row(item["name"], item["what"], found, note=item["note"])

    return Section(data["title"], data["text"], tuple(row(item) for item in data["rows"]), data["after"])

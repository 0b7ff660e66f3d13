"""`python -m benchmarks [NAME ...]`: run some benchmarks, or all of them and write docs/benchmarks.md.

`--write NAME ...` puts some into that page, each in the place of its last figures.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from benchmarks.elsewhere import section_of
from benchmarks.measuring import Section, Settings, page, section_text, with_section

NAMES = ("decode", "collecting", "scoring", "fitting", "energies", "vocabulary", "scale", "smollm2", "tasks", "growth")
ELSEWHERE = {
    "engines": (".venv-vllm", "Engines"),
    "peers": (".venv-peers", "Beside other toolkits"),
}
"""Those that run in an environment of their own, and their titles."""
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
INTRO = """
# Benchmarks

What steering costs, and how the package's own ways compare with plain ones. `make bench` runs all of it and writes this
page. Times are ratios of two things that ran in one process in turn, the first of each pair changing, so that a busy
machine slows both; the median over the pairs is given with the smallest and the largest. Peaks of memory are those of
processes of their own, one run each. Absolute times are told beside it and belong to this machine alone. Models have
random weights: the cost does not depend on what they say. Where a real chat model is run, it is named.
""".strip()


def main(arguments: list[str] | None = None) -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join((*NAMES, *ELSEWHERE))}; none is all")
    parser.add_argument("--write", action="store_true", help="put the ones that are named into the page")
    parser.add_argument("--rounds", type=int, help="pairs of runs per figure")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--before", metavar="COMMIT", help="measure the package of a commit too, in tasks")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; only a CPU run writes the page")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - {*NAMES, *ELSEWHERE})
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join((*NAMES, *ELSEWHERE))}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
    import torch

    torch.set_num_threads(1)
    settings = Settings(rounds=given.rounds, quick=given.quick, device=given.device, before=given.before)
    sections = []
    for name in given.names or (*NAMES, *ELSEWHERE):
        if name in ELSEWHERE:
            sections.append(section_of(name, *ELSEWHERE[name], settings))
        else:
            run: Callable[[Settings], Section] = import_module(f"benchmarks.{name}").run
            sections.append(run(settings))
        sys.stdout.write(section_text(sections[-1]) + "\n\n")
        sys.stdout.flush()
    if given.quick or given.device != "cpu":
        return
    if not given.names:
        PAGE.write_text(page(INTRO, sections), encoding="utf-8")
    elif given.write:
        text = PAGE.read_text(encoding="utf-8")
        for section in sections:
            text = with_section(text, section)
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

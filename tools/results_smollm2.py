"""Measure the method and its rivals on a real chat model and write docs/results_smollm2.md: `make results-smollm2`.

    python tools/results_smollm2.py --data FOLDER                    two folds side by side, then the page
    python tools/results_smollm2.py --data FOLDER --fold 0 --part gates    one part of one fold
    python tools/results_smollm2.py --page                           the page alone, from what was measured

FOLDER holds truthfulqa/TruthfulQA.csv, truthfulqa/mc_task.json, harmbench/harmbench_behaviors_text_all.csv,
xstest/xstest_prompts.csv, gsm8k/test.jsonl (as their authors publish them) and tinystories/tinystories_1000.json (a
list of stories). What was measured lies in build/results_smollm2; a part that is there is not measured again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import smollm2_page
import torch
from rich.console import Console
from smollm2_fits import fits
from smollm2_measuring import SMALL, Bench, Sizes, gates, null_spaces, refusal, scan, truthfulness
from smollm2_reasons import reasons

import fsteer_lens as fs
from fsteer_lens.ground.files import write_atomically

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "results_smollm2"
PAGE = ROOT / "docs" / "results_smollm2.md"
FOLDS = (0, 1)
MEASURES = (fits, truthfulness, null_spaces, refusal, reasons, gates, scan)
PARTS = {measure.__name__: measure for measure in MEASURES}


def measure(data: Path, fold: int, parts: list[str], model: str, sizes: Sizes, into: Path, console: Console) -> None:
    """Measure what is missing of a fold, and keep each part as soon as it is there."""
    missing = [part for part in parts if not path_of(into, part, fold).exists()]
    if not missing:
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    bench = Bench(fs.models.load(model), data, fold, sizes)
    for part in missing:
        wall, spent = time.perf_counter(), time.process_time()
        found = PARTS[part](bench)
        told = {
            "fold": fold,
            "minutes": (time.perf_counter() - wall) / 60,
            "cpu_minutes": (time.process_time() - spent) / 60,
            "sizes": asdict(sizes),
            "versions": {name: version(name) for name in ("fsteer-lens", "torch", "transformer-lens", "transformers")},
            **found,
        }
        into.mkdir(parents=True, exist_ok=True)
        write_atomically(path_of(into, part, fold), json.dumps(told).encode())
        console.print(f"fold {fold}: {part} took {told['minutes']:.1f} minutes, {told['cpu_minutes']:.1f} of a CPU")


def path_of(folder: Path, part: str, fold: int) -> Path:
    """Where a part of a fold lies."""
    return folder / f"{part}-{fold}.json"


def both_folds(args: argparse.Namespace) -> None:
    """Measure both folds in processes of one thread each."""
    command = [sys.executable, __file__, *sys.argv[1:], "--fold"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, str(fold)], env=quiet) for fold in FOLDS]
    if any([process.wait() for process in running]):
        raise SystemExit("A fold broke off; what was measured is kept: run the same command again.")
    write_page(args.into, args.to)


def read_parts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every part that was measured in both folds, with what each of them gave."""
    paths = {part: [path_of(folder, part, fold) for fold in FOLDS] for part in PARTS}
    return {
        part: [json.loads(path.read_text(encoding="utf-8")) for path in known]
        for part, known in paths.items()
        if all(path.exists() for path in known)
    }


def write_page(folder: Path, to: Path) -> None:
    """Pool the folds and write the page."""
    write_atomically(to, smollm2_page.page(read_parts(folder)).encode())


def main() -> None:
    """Read the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the public data sets")
    parser.add_argument("--model", default="smollm2", help="the model, or its folder (default: smollm2)")
    parser.add_argument("--fold", type=int, choices=FOLDS, help="measure this fold alone")
    parser.add_argument("--part", choices=list(PARTS), action="append", help="measure this part alone")
    parser.add_argument("--small", action="store_true", help="a few items of each kind, to see that it runs")
    parser.add_argument("--page", action="store_true", help="write the page from what was measured")
    parser.add_argument("--into", type=Path, default=BUILD, help="folder of what is measured")
    parser.add_argument("--to", type=Path, default=PAGE, help="the page")
    args = parser.parse_args()
    if args.page:
        return write_page(args.into, args.to)
    if args.data is None:
        parser.error("--data is missing")
    if args.fold is None:
        return both_folds(args)
    sizes = SMALL if args.small else Sizes()
    return measure(args.data, args.fold, args.part or list(PARTS), args.model, sizes, args.into, Console(stderr=True))


if __name__ == "__main__":
    main()

"""What people wait for: each step of the work, from loading a model to a report, on a chat model and on GPT-2's shape.

`python -m benchmarks tasks` measures this checkout, with `--before COMMIT` the package of that commit beside it; every
step runs in a process of its own. `python -m benchmarks.tasks MODEL STEP --profile` prints where the time of one goes.
"""

import argparse
import cProfile
import io
import json
import os
import pstats
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import fsteer_lens as fs
from benchmarks import scoring, shapes, smollm2
from benchmarks.measuring import Section, Settings, peak_above, seconds
from fsteer_lens import models
from fsteer_lens.demo.requests import CONSENT, ORDINARY, REFUSALS
from fsteer_lens.evaluation import TruthfulQA
from fsteer_lens.ground.tables import markdown
from fsteer_lens.models.loading import SMOLLM2
from fsteer_lens.report import steering_report
from fsteer_lens.selection import Splits

TITLE = "What people wait for"
CHAT, HALF, SHAPE = "smollm2", "smollm2-bfloat16", "gpt2-small"
HERE = Path(__file__).resolve().parents[1]
LONG_PASS = 512
"""Tokens of the pass whose speed the floor is told by."""
WORDINGS = ("{}", "{} Be brief.", "Please tell me: {}", "{} I am in a hurry.", "{} Answer in two sentences.")
STRENGTHS = (0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Sizes:
    """How many prompts each step is given."""

    collected: int = 300
    fitted: int = 60
    asked: int = 50
    searched: int = 24
    calibrated: int = 16
    generated: int = 8
    n_new: int = 64
    reported: int = 200


SIZES = {
    **dict.fromkeys((CHAT, HALF), Sizes()),
    SHAPE: Sizes(60, 24, 8, 10, 4, 4, 32, 24),
    "tiny": Sizes(8, 24, 2, 10, 2, 2, 3, 4),
}
"""For each model; random words are longer prompts."""


class World:
    """A model with prompts for it: requests that are to be steered, in five wordings each, and ordinary ones."""

    def __init__(self, name: str) -> None:
        self.name, self.sizes, self.chat = name, SIZES[name], name in (CHAT, HALF)
        self.dtype = torch.bfloat16 if name == HALF else torch.float32

    @cached_property
    def model(self) -> Any:
        """On the class that is the default."""
        if self.chat:
            return models.load(CHAT, dtype=self.dtype)
        return shapes.model(self.name, models.available_kinds()[0])

    @property
    def layers(self) -> list[int]:
        """A third, half and two thirds of the way up."""
        depth = self.model.cfg.n_layers
        return [depth // 3, depth // 2, 2 * depth // 3]

    @cached_property
    def steering(self) -> Any:
        """Fitted half way up, its gate to ordinary prompts as well."""
        return fs.fit(self.read, general=self.read_general)

    @cached_property
    def read(self) -> Any:
        """What a steering is fitted to."""
        return fs.collect(self.model, self.contrasts(self.sizes.fitted), layer=self.layers[1], **self.options)

    @cached_property
    def read_general(self) -> Any:
        """What its gate is to leave alone."""
        return fs.collect_queries(self.model, self.general(self.sizes.fitted), layer=self.layers[1], **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """How prompts become tokens."""
        return {"progress": False, **({"chat": True} if self.chat else {})}

    def contrasts(self, count: int) -> list[fs.Contrast]:
        """Requests, each with a refusal and a consent; or random words."""
        if not self.chat:
            return shapes.contrasts(self.name, count)
        return [fs.Contrast(text, REFUSALS[kind], CONSENT, label=kind) for kind, text in smollm2.asked(count, WORDINGS)]

    def general(self, count: int) -> list[Any]:
        """Prompts that are to be left alone."""
        if not self.chat:
            return [list(one.prompt) for one in shapes.contrasts(self.name, count, seed=1)]
        return smollm2.worded(ORDINARY, WORDINGS)[:count]

    def suite(self, count: int) -> TruthfulQA:
        """Requests to which the refusal of their kind is the true answer, and three others are not."""
        if not self.chat:
            return scoring.choices(self.name, count)
        return smollm2.suite(count, WORDINGS)


# --------------------------------------------------------------------------------------------------------- the tasks

Task = Callable[[World], Callable[[], object]]
"""Makes ready all that the step needs, and gives the step itself."""


def load(world: World) -> Callable[[], object]:
    """Load the model, which keeps it."""
    models.available_kinds()  # what is imported is there before
    return lambda: world.model


def collecting(world: World) -> Callable[[], object]:
    """Read contrasts at three layers."""
    contrasts, layers = world.contrasts(world.sizes.collected), world.layers
    return lambda: fs.collect(world.model, contrasts, layer=layers, **world.options)


def fit(world: World) -> Callable[[], object]:
    """Fit a steering to what was read."""
    read, general = world.read, world.read_general
    return lambda: fs.fit(read, general=general)


def gate_report(world: World) -> Callable[[], object]:
    """Report on the gate, with texts that it has not seen."""
    steering, count = world.steering, world.sizes.fitted
    harmful = [text for _, text in smollm2.asked(2 * count, WORDINGS)[count:]]
    others = world.general(2 * count)[count:]
    half = len(others) // 2
    options = {"calibration": others[half:], "false_alarm_rate": 0.2, **world.options}
    return lambda: fs.gate_report(world.model, steering, harmful, others[:half], **options)


def evaluating(world: World) -> Callable[[], object]:
    """Multiple choice under five methods."""
    steering, suite = world.steering, world.suite(world.sizes.asked)
    methods = {"none": None, **{f"at {by:g}": steering.with_strength(by) for by in STRENGTHS}}
    return lambda: fs.evaluate(world.model, methods, suite, **world.options)


def searching(world: World) -> Callable[[], object]:
    """Choose layer and strength."""
    count = world.sizes.searched
    contrasts = world.contrasts(3 * count)
    data = Splits(contrasts[count:], contrasts[:count], world.general(count))
    how = {"budget": 1e6, "layers": world.layers, "strengths": STRENGTHS, **world.options}
    return lambda: fs.search(world.model, data, **how)


def calibrating(world: World) -> Callable[[], object]:
    """Find a strength; without the gate, which would be shut."""
    steering, prompts = world.steering.with_gate(None), world.general(world.sizes.calibrated)
    return lambda: fs.calibrate(steering, world.model, prompts, kl=0.1, **world.options)


def generating(world: World) -> Callable[[], object]:
    """Generate with and without steering, and record the replay."""
    steering = world.steering
    prompts = [one.prompt for one in world.contrasts(world.sizes.generated)]
    how = {"max_new_tokens": world.sizes.n_new, "compare": True, "replay": True, **world.options}
    return lambda: fs.generate(world.model, prompts, steering, **how)


def reporting(world: World) -> Callable[[], object]:
    """A report on requests and ordinary prompts, half each."""
    steering, count = world.steering, world.sizes.reported
    asked, others = world.contrasts(count // 2), world.general(count // 2)
    return lambda: steering_report(world.model, steering, asked, others, **world.options)


def exploring(world: World) -> Callable[[], object]:
    """The explorer with its first picture."""
    steering, count = world.steering, world.sizes.reported
    prompts = {"to steer": [one.prompt for one in world.contrasts(count // 2)], "others": world.general(count // 2)}
    return lambda: fs.explore(steering, world.model, prompts, **world.options)._repr_mimebundle_()


TASKS: dict[str, tuple[Task, str]] = {
    "load": (load, "the model"),
    "collect": (collecting, "{collected} contrasts, three layers"),
    "fit": (fit, "{fitted} contrasts, {fitted} ordinary prompts"),
    "gate report": (gate_report, "{fitted} requests, {fitted} ordinary prompts, the perturbations"),
    "evaluate": (evaluating, "{asked} questions, five methods"),
    "search": (searching, "three layers, four strengths, {searched} contrasts and as many ordinary prompts"),
    "calibrate": (calibrating, "{calibrated} ordinary prompts"),
    "generate": (generating, "{generated} × {n_new} tokens, compare and replay"),
    "report": (reporting, "{reported} prompts"),
    "explore": (exploring, "the first picture of {reported} prompts"),
}


FOUND: dict[str, Callable[[Any], str]] = {
    "evaluate": lambda found: "MC1 " + ", ".join(f"{found.estimate(name, 'MC1').value:.2f}" for name in found.methods),
    "search": lambda found: f"layer {found.chosen.layer}, strength {found.chosen.strength:g}",
    "calibrate": lambda found: f"strength {found.strength:.3f}",
}
"""What some steps find, to be compared between dtypes."""
LIGHT = ("load", "fit")
"""Steps that make a model, or run none."""
OF_TEXTS = ("gate report",)
"""Steps that need texts which a person could have written."""


# ------------------------------------------------------------------------------------------- one step, in one process


def measured(world: World, name: str, counted: bool) -> dict[str, Any]:
    """Seconds, CPU-seconds and MiB of a step, and what it found; `counted`, the GFLOP of its products, and the seconds
    of these alone."""
    run = TASKS[name][0](world)
    found: dict[str, Any] = {}

    def timed() -> None:
        start, of_cpu = time.perf_counter(), time.process_time()
        result = run()
        found.update(seconds=time.perf_counter() - start, cpu=time.process_time() - of_cpu)
        found["found"] = FOUND[name](result) if name in FOUND and world.chat else ""

    found["MiB"] = peak_above(timed)
    if counted and name not in LIGHT:
        found["GFLOP"] = products(TASKS[name][0](world))
        found["floor"] = found["GFLOP"] / speed(world)
    return found


def products(run: Callable[[], object]) -> float:
    """GFLOP of the products of activations with weights; those of attention are left out, which models count apart."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if str(operation) in ("aten.mm", "aten.addmm")) / 1e9


def speed(world: World) -> float:
    """GFLOP a second of transformers, in one pass over one long row."""
    network = (smollm2.plain_reading()[0] if world.chat else shapes.hf_model(world.name)).to(world.dtype)
    length = min(LONG_PASS, network.config.max_position_embeddings)
    tokens = torch.randint(1, network.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run() -> None:
        network(tokens)

    return products(run) / min(seconds(run) for _ in range(5))


def profiled(world: World, name: str, rows: int = 25) -> str:
    """Where the time of a step goes: the functions that took most of it by themselves."""
    run, profile, out = TASKS[name][0](world), cProfile.Profile(), io.StringIO()
    profile.runcall(run)
    pstats.Stats(profile, stream=out).sort_stats("tottime").print_stats(rows)
    return out.getvalue()


def main() -> None:
    """What the process of one step does: measure it and print a line of JSON, or print its profile."""
    parser = argparse.ArgumentParser(prog="benchmarks.tasks", description=__doc__)
    parser.add_argument("model", choices=SIZES)
    parser.add_argument("task", choices=TASKS, metavar="STEP", help=", ".join(TASKS))
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--counted", action="store_true", help="count the products with weights, in a second run")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    world = World(given.model)
    told = profiled(world, given.task) if given.profile else json.dumps(measured(world, given.task, given.counted))
    sys.stdout.write(told + "\n")


# ------------------------------------------------------------------------------------------ all steps, before and after


def run(settings: Settings) -> Section:
    """Every step with both models, by this package and by that of an earlier commit where one is named."""
    cells = []
    with exported(settings.before) as earlier:
        chats = (CHAT, HALF) if find_spec(SMOLLM2[0]) is not None else ()
        for model in ("tiny",) if settings.quick else (*chats, SHAPE):
            for name, (_, about) in TASKS.items():
                if name in OF_TEXTS and model not in chats:
                    continue
                before = None if earlier is None or model == HALF else in_child(model, name, earlier)
                now = in_child(model, name, HERE, "--counted")
                cells.append([model, f"{name}: {about.format(**asdict(SIZES[model]))}", *told(before, now)])
                sys.stderr.write(" | ".join(cells[-1]) + "\n")  # a run that dies late has told the rest
    header = ["model", "step", "seconds", "ratio", "CPU-seconds", "peak, MiB", "GFLOP", "floor, seconds", "found"]
    versus = f" → now; before is commit {settings.before}" if settings.before else ""
    text = f"""
Each step once, in a process of its own that has everything ready before, one thread, the model on
{models.CLASS_NAMES[models.available_kinds()[0]]}: SmolLM2-135M-Instruct with prompts that the package ships, in five
wordings, in float32 and in bfloat16, for which some CPUs have instructions, and GPT-2's shape with random words, in
float32. Seconds are before{versus}. The peak of memory is what comes on top of what was
resident; it is that of one run, and the system's allocator makes it vary. GFLOP are those of products with weights that
the step does; the floor is how long transformers takes for as many in one pass over {LONG_PASS} tokens. What some
steps found tells what bfloat16 changes. Where the time of a step goes is told by
`python -m benchmarks.tasks MODEL STEP --profile`.
""".strip()
    return Section(TITLE, text, (), markdown(header, cells))


def told(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    """The cells of one step."""
    earlier = before or {}

    def both(name: str) -> str:
        return " → ".join(f"{float(f'{one[name]:.3g}'):g}" for one in (earlier, now) if name in one)

    ratio = f"{now['seconds'] / earlier['seconds']:.2f}" if before else ""
    return [both("seconds"), ratio, both("cpu"), both("MiB"), both("GFLOP"), both("floor"), now["found"]]


def in_child(model: str, name: str, package: Path, *options: str) -> dict[str, Any]:
    """Measure one step in a process of its own, with the package that lies in a folder."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", "benchmarks.tasks", model, name, *options]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(HERE)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def exported(commit: str | None) -> Iterator[Path | None]:
    """A folder with the package as it was at a commit."""
    if commit is None:
        yield None
        return
    with TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit, "fsteer_lens"], check=True, capture_output=True, cwd=HERE)
        subprocess.run(["tar", "-x", "-C", folder], check=True, input=archive.stdout)
        yield Path(folder)


if __name__ == "__main__":
    main()

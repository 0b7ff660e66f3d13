"""How the benchmarks measure: two ways of doing one thing, in turn, in one run.

1. `compare` runs the reference and ours in pairs, the one that goes first changing from pair to pair, so that whatever
   slows the machine slows both. Each pair gives one ratio; the figure is their median, with the smallest and largest.
2. `peak_memory` runs a call in a process of its own and asks the system how far its memory rose.
3. A benchmark is a function `run(settings) -> Section`: its rows with the sentences that explain them.
"""

import ctypes
import gc
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fsteer_lens.ground.tables import markdown

PACKAGES = ("fsteer-lens", "torch", "transformer-lens", "transformers", "scikit-learn", "numpy")


@dataclass(frozen=True)
class Settings:
    """How much is run.

    Attributes:
        rounds: pairs of runs per figure; None leaves it to each benchmark.
        quick: tiny sizes, to see that everything runs; the figures mean nothing.
        device: where the models are.
        before: a commit, whose package is measured beside this one where a benchmark can do that.
    """

    rounds: int | None = None
    quick: bool = False
    device: str = "cpu"
    before: str | None = None

    def rounds_or(self, default: int) -> int:
        """The rounds asked for, else one where it is quick, else what the benchmark wants."""
        return self.rounds or (1 if self.quick else default)


@dataclass(frozen=True)
class Ratio:
    """Ratios of one figure, one per round.

    Attributes:
        values: the ratio of every round.
        reference: what the reference took, median, in `unit`.
        ours: what ours took, median, in `unit`.
        unit: "s" or "MiB".
    """

    values: tuple[float, ...]
    reference: float
    ours: float
    unit: str = "s"

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest of the rounds."""
        return min(self.values), max(self.values)

    @property
    def inverse(self) -> "Ratio":
        """Reference over ours: how many times as fast, or as small."""
        return Ratio(tuple(1 / value for value in self.values), self.reference, self.ours, self.unit)

    def __str__(self) -> str:
        low, high = self.spread
        shown = _short(self.median)
        return shown if len(self.values) == 1 else f"{shown} ({_short(low)}–{_short(high)})"


@dataclass(frozen=True)
class Aim:
    """What a ratio should be: at most, or at least, a number."""

    limit: float
    at_least: bool = False

    def met(self, ratio: Ratio) -> bool:
        """Whether the median is within the aim."""
        return ratio.median >= self.limit if self.at_least else ratio.median <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'}\N{NO-BREAK SPACE}{self.limit:g}"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: what is measured, short.
        what: what is divided by what.
        ratio: the figure; None where it was not measured.
        aim: what it should be; None where it is only told.
        note: what is worth knowing; why it was not measured, or what the floor is where the aim is missed.
    """

    name: str
    what: str
    ratio: Ratio | None
    aim: Aim | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the aim is met: "yes", "no", or nothing to say."""
        if self.aim is None or self.ratio is None:
            return ""
        return "yes" if self.aim.met(self.ratio) else "no"


@dataclass(frozen=True)
class Section:
    """What one benchmark found.

    Attributes:
        title: heading on the page.
        text: what was run, in Markdown, before the table.
        rows: the figures.
        after: Markdown below the table.
    """

    title: str
    text: str
    rows: tuple[Row, ...]
    after: str = ""


GPU_SHAPES = ("gemma-2-2b", "llama-3-8b")


@dataclass(frozen=True)
class OnGpu:
    """What one shape comes to on a GPU, in bfloat16.

    Attributes:
        ratio: ours against the reference.
        peak_mib: peak of the memory that PyTorch had allocated while ours ran alone, its model included.
        tokens_per_second: of ours; None where there are no tokens.
    """

    ratio: Ratio
    peak_mib: float
    tokens_per_second: float | None = None


def gpu_rows(name: str, what: str, aim: Aim, settings: Settings, measure: Callable[[str], OnGpu]) -> list[Row]:
    """A row for each large shape; "not measured" where there is no GPU, none at all for a quick run."""
    import torch

    rows = []
    for shape in () if settings.quick else GPU_SHAPES:
        full = f"{name}, {shape} shape, GPU"
        if not torch.cuda.is_available():
            rows.append(Row(full, what, None, aim, "No GPU here."))
            continue
        found = measure(shape)
        speed = "" if found.tokens_per_second is None else f"{found.tokens_per_second:.0f} tokens/s, "
        rows.append(Row(full, what, found.ratio, aim, f"{speed}peak {found.peak_mib:.0f} MiB."))
    return rows


def peak_on_gpu(run: Callable[[], Any]) -> float:
    """Peak of the GPU's memory while `run` runs, in MiB, with all that was there before."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**20


# ----------------------------------------------------------------------------------------------------------------- time


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, with the garbage of earlier ones collected before it and a GPU's queue empty."""
    gc.collect()
    _wait_for_gpu()
    start = time.perf_counter()
    run()
    _wait_for_gpu()
    return time.perf_counter() - start


@dataclass
class Kept:
    """A call that keeps what it last returned: what is timed is what is looked at afterwards."""

    run: Callable[[], Any]
    value: Any = None

    def __call__(self) -> Any:
        """Run it."""
        self.value = self.run()
        return self.value


def compare(reference: Callable[[], Any], ours: Callable[[], Any], *, rounds: int, warmup: int = 1) -> Ratio:
    """Time two calls in pairs, in alternating order, and give ours / reference of every pair.

    Args:
        reference, ours: what to run; what they return is dropped.
        rounds: pairs, at least 1.
        warmup: runs of each before, not counted.
    """
    for _ in range(warmup):
        reference()
        ours()
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):
        if number % 2:
            mine = seconds(ours)
            pairs.append((seconds(reference), mine))
        else:
            other = seconds(reference)
            pairs.append((other, seconds(ours)))
    return Ratio(
        tuple(mine / other for other, mine in pairs),
        statistics.median(other for other, _ in pairs),
        statistics.median(mine for _, mine in pairs),
    )


def _wait_for_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --------------------------------------------------------------------------------------------------------------- memory


def peak_memory(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """Peak resident memory, in MiB, of the call that `prepare(*arguments)` returns, above what was resident before it.

    Runs in a new process, so that nothing of this one is in it. Where Linux lets a process set its peak back, what
    preparing took (two copies of a model, for a moment) hides nothing; elsewhere the peak of the whole process counts.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_here, prepare, arguments).result()


def _peak_here(prepare: Callable[..., Callable[[], Any]], arguments: Sequence[Any]) -> float:
    import torch

    torch.set_num_threads(1)  # each thread would keep an arena of its own
    return peak_above(prepare(*arguments))


def peak_above(measured: Callable[[], Any]) -> float:
    """Peak resident memory of this process while the call runs, in MiB, above what was resident before it."""
    gc.collect()
    status = Path("/proc/self/status")
    if not status.is_file():
        import resource

        measured()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # freed memory that glibc keeps would be used unseen
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_mib(status, "VmRSS")
    measured()
    return _status_mib(status, "VmHWM") - before


def _status_mib(status: Path, name: str) -> float:
    """A figure of Linux' list: `ru_maxrss` would be the parent's where that was larger."""
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found.group(1)) / 2**10


# ------------------------------------------------------------------------------------------------------------- the page


def machine() -> dict[str, str]:
    """What the figures were measured on and with; neither the machine's name nor paths."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        cpu = found.group(1).strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} used by PyTorch",
        "GPU": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def section_text(section: Section) -> str:
    """One benchmark in Markdown; aims have columns where there are some."""
    aims = any(row.aim for row in section.rows)
    rows = []
    for row in section.rows:
        aimed = [str(row.aim or ""), row.verdict] if aims else []
        if row.ratio is None:
            rows.append([row.name, row.what, "not measured", *aimed, row.note])
        else:
            taken = f"{_short(row.ratio.reference)} → {_short(row.ratio.ours)} {row.ratio.unit}."
            rows.append([row.name, row.what, str(row.ratio), *aimed, f"{taken} {row.note}".strip()])
    header = ["what", "ratio of", "median (smallest–largest)", *(["aim", "met"] if aims else []), "note"]
    parts = [f"## {section.title}", section.text, markdown(header, rows) if rows else "", section.after]
    return "\n\n".join(part for part in parts if part)


def page(intro: str, sections: Sequence[Section]) -> str:
    """The whole page in Markdown: how it was measured and on what, then every benchmark."""
    facts = markdown(["", ""], [[name, value] for name, value in machine().items()])
    return "\n\n".join([intro, facts, *map(section_text, sections)]) + "\n"


def with_section(text: str, section: Section) -> str:
    """A page with this section in the place of the one of its title, or at the end."""
    heading, *parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    titles = [part.splitlines()[0].removeprefix("## ") for part in parts]
    own = section_text(section) + "\n"
    if section.title not in titles:
        return f"{text}\n{own}"
    place = titles.index(section.title)
    parts[place] = own + ("\n" if place < len(parts) - 1 else "")
    return heading + "".join(parts)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

"""Collecting in shards by several processes: start-up, time and memory of one process, of two, and of Ray's actors.

Run as a program it is what each of the processes does: `python -m benchmarks.scale FOLDER COUNT [ACTORS]`.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import NamedTuple

from benchmarks.measuring import Ratio, Row, Section, Settings
from fsteer_lens import ContrastSet, scale, tutor

COUNT = 2000
SHARD = 100
LAUNCHED = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
PEERS = Path(".venv-peers/bin/python")


class Spent(NamedTuple):
    """What a run took: seconds until it found everything done, those to do it, and MiB of its largest worker."""

    start: float
    whole: float
    peak: float


def run(settings: Settings) -> Section:
    """One process against two, and against two of Ray's actors where Ray is."""
    count = 6 if settings.quick else COUNT
    one = spent(sys.executable, (), count)
    others = {"two processes": spent(sys.executable, LAUNCHED, count)}
    ray = python_with_ray()
    if ray is not None and not settings.quick:
        others["two of Ray's actors"] = spent(ray, (), count, actors=2)
    rows = tuple(row for name, found in others.items() for row in rows_of(name, one, found, count))
    text = f"""
{count} contrasts of the tutor, `shift="last_prompt"` at one layer, {SHARD} to a shard, on all cores of this machine:
one process, two under torchrun, and two of Ray's actors with half a CPU each. One run each, from the start of Python to
its end. Start-up is a run that finds everything done: imports, the model, its fingerprint, and what launches it. Memory
is the most that one worker had resident, libraries and model included; Ray's own processes come on top.
""".strip()
    after = (
        ""
        if "two of Ray's actors" in others
        else "Ray was not measured: it is in the environment of `make test-peers`."
    )
    return Section("Many processes", text, rows, after)


def rows_of(name: str, one: Spent, several: Spent, count: int) -> Iterator[Row]:
    """Start-up, time and memory of several workers against one."""
    for what, reference, ours, unit in zip(
        ("start-up", f"{count} contrasts", "memory of a worker"), one, several, ("s", "s", "MiB"), strict=True
    ):
        yield Row(f"{name}, {what}", f"{name} / one process", Ratio((ours / reference,), reference, ours, unit))


def spent(python: str, launched: Sequence[str], count: int, actors: int = 0) -> Spent:
    """What it takes to collect, and then to find that all is done."""
    with TemporaryDirectory() as folder:
        command = [python, "-W", "ignore", *launched, "-m", "benchmarks.scale", folder, str(count), str(actors)]
        times, peaks = [], []
        for _ in range(2):
            start = time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            times.append(time.perf_counter() - start)
            peaks += [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("MiB ")]
    return Spent(times[1], times[0], max(peaks))


def python_with_ray() -> str | None:
    """This Python, or that of the environment beside other toolkits, where Ray is installed."""
    if find_spec("ray") is not None:
        return sys.executable
    return str(PEERS) if PEERS.exists() else None


def main(folder: str, count: str, actors: str) -> None:
    """Collect, and tell the peak of this process, or of the largest actor."""
    train, several = list(tutor.data("safe").train), int(actors)
    contrasts = ContrastSet((train * -(-int(count) // len(train)))[: int(count)])
    with peak_of_actors() if several else peak_of_this() as peak:
        scale.collect(
            contrasts,
            model=scale.ModelSpec("tutor"),
            layer=4,
            out=folder,
            shift="last_prompt",
            shard_size=SHARD,
            actors=scale.RayActors(several, cpus=0.5) if several else None,
            progress=False,
        )
    sys.stdout.write(f"MiB {max(peak)}\n")


@contextmanager
def peak_of_this() -> Iterator[list[float]]:
    """The peak of this process in MiB, once it is over."""
    import resource

    found: list[float] = []
    yield found
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


@contextmanager
def peak_of_actors() -> Iterator[list[float]]:
    """Memory of the actors in MiB, looked at five times a second."""
    import psutil

    found, over = [0.0], Event()

    def look() -> None:
        while not over.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name().startswith("ray::MapWorker"):
                        found.append(process.memory_info().rss / 2**20)
                except psutil.Error:  # it has ended
                    continue

    thread = Thread(target=look)
    thread.start()
    yield found
    over.set()
    thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])

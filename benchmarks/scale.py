"""Collecting in shards by several processes: start-up, time and memory of one process, of two, and of Ray's actors.

Run as a program it is what each of the processes does: `python -m benchmarks.scale FOLDER COUNT ACTORS`.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
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


class Way(NamedTuple):
    """How the work is done: by which Python, launched how, with how many actors."""

    python: str = sys.executable
    launched: tuple[str, ...] = ()
    actors: int = 0


ONE = "one process"


def run(settings: Settings) -> Section:
    """One process against two, and against two of Ray's actors where Ray is."""
    count, ray = 6 if settings.quick else COUNT, python_with_ray()
    ways = {ONE: Way(), "two processes": Way(launched=LAUNCHED)}
    if ray is not None and not settings.quick:
        ways["two of Ray's actors"] = Way(ray, actors=2)
    rounds = []
    for number in range(settings.rounds_or(2)):
        order = list(ways)[:: -1 if number % 2 else 1]
        rounds.append({name: spent(ways[name], count) for name in order})
    rows = tuple(row for name in ways if name != ONE for row in rows_of(name, rounds, count))
    text = f"""
{count} contrasts of the tutor, `shift="last_prompt"` at one layer, {SHARD} to a shard, by one process, two under
torchrun, and two of Ray's actors with half a CPU each, in turn, from the start of Python to its end, one thread each.
Start-up is a run that finds everything done: imports, the model, its fingerprint, and what launches it. Memory is the
most that one worker had resident, libraries and model included; Ray's own processes come on top.
""".strip()
    after = "" if len(ways) > 2 else "Ray was not measured: it is in the environment of `make test-peers`."
    return Section("Many processes", text, rows, after)


def rows_of(name: str, rounds: Sequence[Mapping[str, Spent]], count: int) -> Iterator[Row]:
    """Start-up, time and memory of several workers against one."""
    for what, field in (("start-up", "start"), (f"{count} contrasts", "whole"), ("memory of a worker", "peak")):
        pairs = [(getattr(one[ONE], field), getattr(one[name], field)) for one in rounds]
        references, ours = zip(*pairs, strict=True)
        ratios, unit = tuple(mine / other for other, mine in pairs), "MiB" if field == "peak" else "s"
        yield Row(f"{name}, {what}", f"{name} / {ONE}", Ratio(ratios, median(references), median(ours), unit))


def spent(way: Way, count: int) -> Spent:
    """What it takes to collect, and then to find that all is done."""
    with TemporaryDirectory() as folder:
        given = [folder, str(count), str(way.actors)]
        command = [way.python, "-W", "ignore", *way.launched, "-m", "benchmarks.scale", *given]
        times, peaks, env = [], [], {**os.environ, "OMP_NUM_THREADS": "1"}
        for _ in range(2):
            start = time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
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

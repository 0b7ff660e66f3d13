"""Shards in actors of Ray Data: the parts are its rows, and every actor loads the model once, from its spec."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fsteer_lens.errors import FsteerError, InputError, MissingDependencyError
from fsteer_lens.ground.checks import finite, normalised, whole
from fsteer_lens.ground.progress import progress_bar
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.scale.manifests import Plan, Shards, begin
from fsteer_lens.scale.work import Work, write_shard

READING = 1.0
"""CPUs that actors must leave to Ray Data, which reads the rows: without one it starves and nothing ever ends."""


@dataclass(frozen=True)
class RayActors:
    """Processes that Ray starts, restarts where one dies, and spreads over the machines of a cluster.

    Attributes:
        count: how many.
        cpus: CPUs of each, a fraction where several are to share one; one CPU of the cluster must be left.
        gpus: GPUs of each, a fraction likewise; the model's spec then says `device="cuda"`.

    Raises:
        InputError: no actors, no CPU, or less than no GPU.
    """

    count: int
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        normalised(
            self,
            count=whole("count", self.count, 1),
            cpus=finite("cpus", self.cpus, above=0),
            gpus=finite("gpus", self.gpus, 0),
        )


class Writer:
    """What runs in an actor: it loads the model for its first shard, and does one after another."""

    def __init__(self, folder: Path, plan: Plan, work: Work) -> None:
        self._folder, self._plan, self._work = folder, plan, work

    @cached_property
    def _loaded(self) -> tuple[SteerableModel, Shards]:
        model = self._plan.spec.load()
        return model, begin(self._folder, self._plan, model)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Do one shard; an error of ours comes back as a value, since an actor that raises is started once more."""
        number, error, written = int(row["number"]), None, False
        try:
            model, shards = self._loaded
            written = write_shard(shards, self._work, model, number, pickle.loads(row["part"]))
        except FsteerError as raised:
            error = raised
        return {"number": number, "written": written, "error": pickle.dumps(error)}


def run_in_actors(
    actors: RayActors, folder: Path, plan: Plan, work: Work, parts: Sequence[Any], *, progress: bool
) -> tuple[int, ...]:
    """Do all shards of a plan in actors, and give the numbers of those that were written.

    Raises:
        MissingDependencyError: Ray is not installed.
        InputError: the cluster has too few CPUs or GPUs for the actors and for reading.
        Whatever an actor raised.
    """
    ray = _ray()
    rows = [{"number": number, "part": ray.cloudpickle.dumps(part)} for number, part in enumerate(parts)]
    with _cluster(ray), _quiet(ray), progress_bar(len(rows), f"shards of {plan.holds}", progress) as advance:
        _require_room(actors, ray.cluster_resources())
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Writer,
            fn_constructor_args=(folder, plan, work),
            compute=ray.data.ActorPoolStrategy(size=min(actors.count, len(rows))),
            num_cpus=actors.cpus,
            num_gpus=actors.gpus or None,
        )
        written = []
        for row in done.iter_rows():
            error = pickle.loads(row["error"])
            if error is not None:
                raise error
            written += [row["number"]] * row["written"]
            advance(1)
    return tuple(sorted(written))


def _ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError("Ray is not installed", fix='pip install "fsteer-lens[ray]"') from error
    return ray


@contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """The cluster that this process is connected to, else one that is started, or found by RAY_ADDRESS, and left."""
    if ray.is_initialized():
        yield
        return
    ray.init(log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Without Ray Data's own progress bars."""
    context = ray.data.DataContext.get_current()
    shown = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        yield
    finally:
        context.enable_progress_bars = shown


def _require_room(actors: RayActors, resources: Mapping[str, float]) -> None:
    """Raise `InputError` where actors take what the cluster does not have, or the CPU that reading needs."""
    asked, there = actors.count * actors.cpus, resources.get("CPU", 0.0)
    if asked + READING > there:
        raise InputError(
            "actors",
            expected=f"at most {max(0.0, there - READING):g} of {there:g} CPUs, since Ray Data reads with one",
            got=f"{asked:g}",
            fix="Lower count= or cpus= of RayActors; a fraction lets several share a CPU.",
        )
    asked, there = actors.count * actors.gpus, resources.get("GPU", 0.0)
    if asked > there:
        raise InputError("actors", expected=f"at most {there:g} GPUs", got=f"{asked:g}", fix="Lower gpus= or count=.")

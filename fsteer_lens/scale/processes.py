"""Doing the shards of a plan: this process's share of them, or all of them in Ray's actors.

Shards do not depend on each other, so processes need not talk: of n processes number r does the shards r, r + n, r + 2n
and so on, and a launcher's RANK and WORLD_SIZE are all that they must know. There is no barrier at which the others
would wait for one that died. What a dead one left out is done by the next run of the same script.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import instance
from fsteer_lens.ground.progress import progress_bar
from fsteer_lens.scale.actors import RayActors, run_in_actors
from fsteer_lens.scale.manifests import Plan, begin, require_plan
from fsteer_lens.scale.work import Work, write_shard


class Place(NamedTuple):
    """Which of how many processes this is."""

    rank: int
    world: int


def place_of(environment: Mapping[str, str]) -> Place:
    """The place that a launcher such as torchrun gave a process; without one it is the only one.

    Raises:
        InputError: one of RANK and WORLD_SIZE without the other, or no such place.
    """
    told = [environment.get(name) for name in ("RANK", "WORLD_SIZE")]
    if told == [None, None]:
        return Place(0, 1)
    rank, world = (int(text) if text is not None and text.isdecimal() else -1 for text in told)
    if not 0 <= rank < world:
        raise InputError(
            "RANK and WORLD_SIZE",
            expected="whole numbers, the first of them below the second",
            got=told,
            fix="Start it with torchrun, or set both for each process.",
        )
    return Place(rank, world)


def run(
    folder: Path, plan: Plan, work: Work, parts: Sequence[Any], *, actors: RayActors | None, progress: bool
) -> tuple[int, ...]:
    """Do the shards of a plan that are this process's to do; gives the numbers of those that it wrote.

    Args:
        folder: where to write.
        plan: what the folder is to hold.
        work: what is done with each part.
        parts: the data of every shard.
        actors: Ray's actors, which do all of them; None does this process's share here.
        progress: show a progress bar, in the first of the processes.
    """
    place = place_of(os.environ)
    require_plan(folder, plan)
    if actors is not None:
        instance("actors", actors, RayActors, "RayActors or None")
        if place.world > 1:
            fix = "Start it without torchrun."
            raise InputError("actors", expected="one process that starts them", got=place.world, fix=fix)
        return run_in_actors(actors, folder, plan, work, parts, progress=progress)
    model = plan.spec.load()
    shards = begin(folder, plan, model)
    own, written = range(place.rank, len(parts), place.world), []
    with progress_bar(len(own), f"shards of {plan.holds}", progress and place.rank == 0) as advance:
        for number in own:
            if write_shard(shards, work, model, number, parts[number]):
                written.append(number)
            advance(1)
    return tuple(written)

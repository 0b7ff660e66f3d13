"""Evaluations of many methods, in shards: `evaluate` writes them and `read_evaluation` puts them together.

A shard is one method at one seed on a block of the suite's items, measured by `fsteer_lens.evaluation.evaluate`.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens import evaluation
from fsteer_lens.errors import InputError
from fsteer_lens.evaluation import Evaluation, Measure, Method, Suite
from fsteer_lens.evaluation.evaluating import is_method, seeds_of
from fsteer_lens.ground.checks import instance, optional, options_of, whole
from fsteer_lens.ground.sealed import Format
from fsteer_lens.hooks.objects import remembered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.chat import canonical_arguments
from fsteer_lens.prompts.formats import PromptFormat
from fsteer_lens.prompts.passes import Passes, PassOptions
from fsteer_lens.scale.actors import RayActors
from fsteer_lens.scale.digests import digest
from fsteer_lens.scale.manifests import Plan, Shards, finished, folder_of
from fsteer_lens.scale.processes import run
from fsteer_lens.scale.specs import ModelSpec

HOLDS = "evaluation"
FORMAT = Format("fsteer_lens_measured", 1, "measured items", "fsteer_lens.scale.evaluate", {})


class Block(NamedTuple):
    """One shard: a method at a seed, on some items; `seed` is None for a method that does not depend on one."""

    method: str
    seed: int | None
    suite: Suite


@dataclass(frozen=True)
class Evaluating:
    """Measuring a method on a block of items, and saving its numbers.

    Attributes:
        methods: all of them, by name.
        known: how the prompts became tokens that they were fitted on.
        passes: how prompts are put through the model.
        made: what functions of a seed made last, by name, with the seed.
    """

    methods: Mapping[str, Any]
    known: PromptFormat
    passes: Passes
    made: dict[str, tuple[int, Any]] = field(default_factory=dict)

    def write(self, model: SteerableModel, part: Block, paths: Sequence[Path]) -> None:
        """Measure the block and write its file."""
        given, seeds = self.methods[part.method], None
        if part.seed is not None:
            given, seeds = partial(self._made_by, part.method), [part.seed]
        options: Any = {**self.passes.following(self.known, model).options, "progress": False}
        found = evaluation.evaluate(model, {part.method: given}, part.suite, seeds=seeds, **options)
        values = {one.name: rows[0] for one, rows in zip(found.measures, found.values[part.method], strict=True)}
        tensors: dict[str, Tensor] = {}
        tree = FORMAT.encode({"values": values, "seconds": found.seconds[part.method]}, "block", tensors)
        FORMAT.write(paths[0], tree, tensors)

    def _made_by(self, name: str, seed: int) -> Any:
        """What a function of a seed makes, kept for the next block."""
        if self.made.get(name, (None,))[0] != seed:
            self.made[name] = seed, self.methods[name](seed)
        return self.made[name][1]


def evaluate(
    methods: Mapping[str, Method | Callable[[int], Method]],
    suite: Suite,
    *,
    model: ModelSpec,
    out: str | os.PathLike[str],
    seeds: Iterable[int] | None = None,
    shard_size: int | None = None,
    actors: RayActors | None = None,
    **options: Unpack[PassOptions],
) -> tuple[int, ...]:
    """Measure methods as `fsteer_lens.evaluate` does, in shards that any number of processes write.

    A shard is a method at a seed on a block of items. Processes, resuming and actors are as in `collect`. Every process
    calls each function of a seed once at the first one, to know how prompts become tokens, and at those of its shards.
    Methods that would share passes in one process (see `Suite.measure_each`) are measured each by itself.

    Args:
        methods, suite: as in `fsteer_lens.evaluate`; the same in every process. Of a function of a seed only its name
            tells the manifest whether it is the same.
        model: which model to load, and how.
        out: the folder, on a disk that all processes see; made where it is missing.
        seeds: for methods that are functions; None is (0,).
        shard_size: items of a block, for suites that can be cut; None takes them all at once.
        actors: Ray's actors, which do all shards; this process waits for them.
        options: as in `fsteer_lens.evaluate`; `batch_size` and `progress` may change from one run to the next.

    Returns:
        Numbers of the shards that this call wrote.

    Raises:
        InputError: as `fsteer_lens.evaluate` and `collect`; a suite that cannot be cut, or that gives other items when
            it is; measures of one name; a method or suite that holds what cannot be compared.
        MismatchError: as `collect`, and where two methods were fitted on prompts that became tokens in different ways.
        As `models.load` and `fsteer_lens.evaluate`; a note tells the shard.
    """
    spec = instance("model", model, ModelSpec, "a ModelSpec", fix="Every process loads the model for itself.")
    passes = options_of("evaluate", Passes, options)
    size = optional(whole, "shard_size", shard_size, 1)
    known_seeds = seeds_of(methods, seeds)
    blocks = _blocks(suite, size)
    functions: dict[str, Any] = {name: one for name, one in methods.items() if not is_method(one)}
    made = {name: (known_seeds[0], make(known_seeds[0])) for name, make in functions.items()}
    known = remembered(*(made[name][1] if name in made else method for name, method in methods.items()))
    about = {
        "suite": suite.name,
        "items": digest(suite),
        "measures": [[one.name, one.role, list(one.groups)] for one in suite.measures],
        "methods": [[name, name in made, digest(method)] for name, method in methods.items()],
        "seeds": known_seeds,
        "blocks": len(blocks),
        "chat": passes.chat,
        "chat_template_kwargs": canonical_arguments(passes.chat_template_kwargs),
        "prepend_bos": passes.prepend_bos,
        "shard_size": size,
    }
    parts = [
        Block(name, seed, block)
        for name in methods
        for seed in (known_seeds if name in made else [None])
        for block in blocks
    ]
    plan = Plan(HOLDS, spec, about, len(parts), ["measured"])
    work = Evaluating(dict(methods), known, passes, made)
    return run(folder_of(out), plan, work, parts, actors=actors, progress=passes.progress)


def read_evaluation(folder: str | os.PathLike[str], *, wait: float = 0.0) -> Evaluation:
    """The evaluation that `evaluate` wrote, as `fsteer_lens.evaluate` gives it.

    Its seconds are those of all shards of a method together, whichever process did them.

    Args:
        folder: where `evaluate` wrote.
        wait: seconds to wait, at most, for shards that other processes are still at.

    Raises:
        DataError: shards are missing, or nothing was written; names them.
        FileFormatError: the manifest was changed or is damaged, or a shard is: names it.
        InputError: the folder holds activations.
    """
    shards = finished(folder, HOLDS, wait)
    told = shards.manifest
    measures = tuple(Measure(name, tuple(groups), role) for name, role, groups in told["measures"])
    values: dict[str, tuple[Tensor, ...]] = {}
    seconds: dict[str, float] = {}
    numbers = iter(range(told["shards"]))
    for name, is_function, _ in told["methods"]:
        rounds = []
        for _ in told["seeds"] if is_function else [None]:
            found = [_read_block(shards, number) for number in islice(numbers, told["blocks"])]
            seconds[name] = seconds.get(name, 0.0) + sum(taken for _, taken in found)
            rounds.append([_joined(measure, [block for block, _ in found]) for measure in measures])
        values[name] = tuple(torch.stack(rows) for rows in zip(*rounds, strict=True))
    return Evaluation(told["suite"], measures, values, tuple(told["seeds"]), seconds)


def _blocks(suite: Suite, size: int | None) -> list[Suite]:
    """The suite in blocks of so many items, which together are all of it, in order."""
    measures = instance("suite", suite, Suite, "a Suite").measures
    names = [measure.name for measure in measures]
    if len(set(names)) < len(names):
        raise InputError(f"suite {suite.name!r}", expected="measures of different names", got=names)
    if size is None:
        return [suite]
    blocks = [suite[start : start + size] for start in range(0, len(suite), size)]
    for measure in measures:
        cut = [group for block in blocks for one in block.measures if one.name == measure.name for group in one.groups]
        if cut != list(measure.groups):
            got, fix = f"others in {measure.name!r}", "Leave shard_size= out."
            raise InputError(f"suite {suite.name!r} in blocks", expected="its items in order", got=got, fix=fix)
    return blocks


def _read_block(shards: Shards, number: int) -> tuple[dict[str, Tensor], float]:
    """The numbers of one shard, by measure, and its seconds."""
    with shards.reading(number) as paths:
        found = FORMAT.decode(*FORMAT.read(paths[0]))
        return found["values"], found["seconds"]


def _joined(measure: Measure, blocks: Sequence[Mapping[str, Tensor]]) -> Float[Tensor, " n"]:
    """The numbers of a measure in all blocks; a block of effects alone lacks what is measured of the others."""
    return torch.cat([block[measure.name] for block in blocks if measure.name in block])

"""Activations of many contrasts, in shards: `collect` writes them and `read` puts them together."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsIndex, Unpack

from fsteer_lens.errors import FileFormatError
from fsteer_lens.ground.checks import choice, instance, is_several, options_of, several, whole
from fsteer_lens.method.gates import Reading, require_reading
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.prompts.chat import canonical_arguments
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.prompts.formats import PromptFormat
from fsteer_lens.prompts.forms import Prompt
from fsteer_lens.prompts.passes import Passes, PassOptions
from fsteer_lens.reading import collecting
from fsteer_lens.reading.activations import SHIFTS, Activations, Shift
from fsteer_lens.reading.fingerprints import require_same_model
from fsteer_lens.scale.actors import RayActors
from fsteer_lens.scale.digests import digest
from fsteer_lens.scale.manifests import Plan, Shards, finished, folder_of
from fsteer_lens.scale.processes import run
from fsteer_lens.scale.specs import ModelSpec

HOLDS = "activations"


@dataclass(frozen=True)
class Collecting:
    """Reading a part of the contrasts, and saving it: a file for each layer.

    Attributes:
        layers: the layers.
        shift: how shifts are taken.
        read: what the queries are of a prompt.
        passes: how prompts are put through the model.
    """

    layers: tuple[int, ...]
    shift: Shift
    read: Reading
    passes: Passes

    def write(self, model: SteerableModel, part: ContrastSet, paths: Sequence[Path]) -> None:
        """Read the part and write its files."""
        options: Any = {**self.passes.options, "progress": False}
        found = collecting.collect(model, part, layer=self.layers, shift=self.shift, read=self.read, **options)
        for layer, path in zip(self.layers, paths, strict=True):
            found[layer].save(path)


def collect(
    contrasts: Iterable[Contrast],
    *,
    model: ModelSpec,
    layer: SupportsIndex | Iterable[SupportsIndex],
    out: str | os.PathLike[str],
    shift: Shift = "response_mean",
    read: Reading = "last",
    shard_size: int = 256,
    actors: RayActors | None = None,
    **options: Unpack[PassOptions],
) -> tuple[int, ...]:
    """Read queries and shifts of contrasts as `fsteer_lens.collect` does, in shards that any number of processes write.

    In one process it does all of them. Under torchrun, or wherever RANK and WORLD_SIZE are set, process r of n does the
    shards r, r + n, r + 2n and so on. A shard that is there is not done again, so whatever was interrupted is finished
    by the same call, in as many processes as you like. A file that is there counts, damaged or not: `read` looks.

    Args:
        contrasts: what to read; the same in every process.
        model: which model to load, and how.
        layer: one layer, or several that share the passes.
        out: the folder, on a disk that all processes see; made where it is missing. Its manifest tells what it is of.
        shift, read: as in `fsteer_lens.collect`.
        shard_size: contrasts of a shard; what a process that dies loses at most.
        actors: Ray's actors, which do all shards; this process waits for them.
        options: `chat`, `chat_template_kwargs`, `prepend_bos`, `batch_size` (16) and `progress` (True) as in
            `fsteer_lens.collect`; the last two may change from one run to the next.

    Returns:
        Numbers of the shards that this call wrote.

    Raises:
        MismatchError: the folder is of other data, another model or other arguments; names the differences.
        InputError: no spec, more than 100,000 shards, or a folder that cannot be made; RANK without WORLD_SIZE;
            actors that leave Ray no CPU to read with.
        MissingDependencyError: actors without Ray.
        FileFormatError: the folder's manifest is damaged.
        DataError: of "last_prompt", a contrast without a context, before any is read.
        As `models.load` and `fsteer_lens.collect`; a note tells the shard.
    """
    contrasts = ContrastSet(contrasts)
    spec = instance("model", model, ModelSpec, "a ModelSpec", fix="Every process loads the model for itself.")
    passes = options_of("collect", Passes, options)
    shard_size = whole("shard_size", shard_size, 1)
    layers = several("layer", layer, "an int or a list of ints", least=1) if is_several(layer) else [layer]
    layers = tuple(dict.fromkeys(whole("layer", one, 0) for one in layers))
    work = Collecting(layers, choice("shift", shift, SHIFTS), require_reading(read), passes)  # pyright: ignore[reportArgumentType]
    collecting.require_readable(contrasts, work.shift)
    about = {
        "data": digest(list(contrasts)),
        "contrasts": len(contrasts),
        "layer": list(layers) if is_several(layer) else layers[0],
        "shift": work.shift,
        "read": work.read,
        "chat": bool(passes.chat),
        "chat_template_kwargs": canonical_arguments(passes.chat_template_kwargs),
        "prepend_bos": passes.prepend_bos,
        "mixed": not passes.chat and _is_mixed(contrasts.prompts),
        "shard_size": shard_size,
    }
    parts = [contrasts[start : start + shard_size] for start in range(0, len(contrasts), shard_size)]
    plan = Plan(HOLDS, spec, about, len(parts), [f"layer-{one}" for one in layers], layers)
    return run(folder_of(out), plan, work, parts, actors=actors, progress=passes.progress)


def read(folder: str | os.PathLike[str], *, wait: float = 0.0) -> Activations | dict[int, Activations]:
    """The activations that `collect` wrote, every row in the order of the contrasts.

    Args:
        folder: where `collect` wrote.
        wait: seconds to wait, at most, for shards that other processes are still at.

    Returns:
        Activations, or {layer: Activations} where `collect` was given several layers: what `fsteer_lens.collect` gives.

    Raises:
        DataError: shards are missing, or nothing was written; names them.
        FileFormatError: the manifest was changed or is damaged, or a shard is: names it.
        InputError: the folder holds an evaluation.
    """
    shards = finished(folder, HOLDS, wait)
    told = shards.manifest
    layers = told["layer"] if isinstance(told["layer"], list) else [told["layer"]]
    found = {layer: _read_layer(shards, place) for place, layer in enumerate(layers)}
    return found if isinstance(told["layer"], list) else found[told["layer"]]


def _read_layer(shards: Shards, place: int) -> Activations:
    """One layer of all shards; `place` is that of its file among those of a shard."""
    parts, n, size = [], shards.manifest["contrasts"], shards.manifest["shard_size"]
    for number in range(shards.manifest["shards"]):
        with shards.reading(number) as paths:
            part, expected = Activations.load(paths[place]), min(size, n - number * size)
            if len(part) != expected:
                raise FileFormatError("its rows", expected=expected, got=len(part))
            require_same_model(shards.fingerprint, part.fingerprint, "its rows")
            parts.append(part)
    known = {part.prompt_format for part in parts} - {PromptFormat(), None}
    merged = known.pop() if len(known) == 1 and not shards.manifest["mixed"] else PromptFormat()
    return _joined([replace(part, prompt_format=merged) for part in parts])


def _joined(parts: Sequence[Activations]) -> Activations:
    """All rows one after the other, by halves, so that none is copied more than a few times."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return _joined(parts[:half]) + _joined(parts[half:])


def _is_mixed(prompts: Iterable[Prompt]) -> bool:
    """Whether some are plain text and others messages: no single way of becoming tokens is that of all."""
    return {True, False} <= {
        isinstance(one, str) for one in prompts if isinstance(one, str) or isinstance(one[0], Mapping)
    }

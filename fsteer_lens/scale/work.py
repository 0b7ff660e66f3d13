"""What is done with the parts of the data, one shard at a time, wherever it is done."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fsteer_lens.errors import FsteerError
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.scale.manifests import Shards


@runtime_checkable
class Work(Protocol):
    """What is done with every part: plain data itself, without a model, since it may be sent to another process."""

    def write(self, model: SteerableModel, part: Any, paths: Sequence[Path]) -> None:
        """Do it, and write the files of one shard, each atomically."""
        ...


def write_shard(shards: Shards, work: Work, model: SteerableModel, number: int, part: Any) -> bool:
    """Do one shard, unless it is finished; whether it was done now."""
    if shards.is_finished(number):
        return False
    try:
        work.write(model, part, shards.paths(number))
    except FsteerError as error:
        error.add_note(f"This was in shard {number}; numbers of rows count from its first one.")
        raise
    return True

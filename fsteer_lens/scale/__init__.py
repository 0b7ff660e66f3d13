"""Reading and measuring with many processes, on one machine or several: shards in a folder, finished by any later run.

`collect` and `evaluate` write numbered shards under a manifest: in one process, in several under torchrun, or in Ray's
actors (`RayActors`). `read` and `read_evaluation` give what `fsteer_lens.collect` and `fsteer_lens.evaluate` give.
"""

from fsteer_lens.scale.actors import RayActors
from fsteer_lens.scale.collecting import collect, read
from fsteer_lens.scale.evaluating import evaluate, read_evaluation
from fsteer_lens.scale.specs import ModelSpec

__all__ = [
    "ModelSpec",
    "RayActors",
    "collect",
    "evaluate",
    "read",
    "read_evaluation",
]

"""Running a steered model: generating text, and asking it about text that is given."""

from fsteer_lens.run.generation import Generation, Generations, StepRecord, generate, stream

__all__ = [
    "Generation",
    "Generations",
    "StepRecord",
    "generate",
    "stream",
]

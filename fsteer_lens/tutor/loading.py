"""Load the shipped tutor."""

from typing import Final

from fsteer_lens import models
from fsteer_lens.models.classes import Kind, SteerableModel
from fsteer_lens.models.loading import TUTOR

FOLDER: Final = TUTOR
"""A Hugging Face folder: `AutoModelForCausalLM.from_pretrained(FOLDER)` reads it."""


def load(kind: Kind | None = None, device: str = "cpu") -> SteerableModel:
    """Load the tutor as a TransformerLens model, with its weights unprocessed.

    Args:
        kind: "hooked" or "bridge"; both give the same greedy answers. None takes HookedTransformer where the installed
            TransformerLens has it.
        device: where to put it.
    """
    return models.load(FOLDER, kind=kind, device=device)

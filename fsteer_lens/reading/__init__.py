"""Reading a model: activations of prompts and answers, and fingerprints of the model that gave them."""

from fsteer_lens.reading.activations import Activations
from fsteer_lens.reading.collecting import collect, collect_queries

__all__ = [
    "Activations",
    "collect",
    "collect_queries",
]

"""The tutor: a small language model of a made-up world, shipped with the package, to learn and test steering on.

`load` gives the model, `data` its prompts, `chat` turns typed text into model input, `unknown` names words outside its
world, `fit` steers it with defaults that were chosen on its valid split, `exact` tells which answers are the wanted
ones. Two behaviours can be switched on by a tag before the user's turn: `<safe>` refuses harmful requests, `<honest>`
answers myths truthfully. `exercise` and `reveal` check the answers of who learns with the notebooks.
"""

from fsteer_lens.tutor.accuracy import exact
from fsteer_lens.tutor.exercises import Verdict, exercise, reveal
from fsteer_lens.tutor.loading import load
from fsteer_lens.tutor.splits import BEHAVIOURS, Task, TutorData, data
from fsteer_lens.tutor.steering import activations, fit
from fsteer_lens.tutor.world import chat, unknown

__all__ = [
    "BEHAVIOURS",
    "Task",
    "TutorData",
    "Verdict",
    "activations",
    "chat",
    "data",
    "exact",
    "exercise",
    "fit",
    "load",
    "reveal",
    "unknown",
]

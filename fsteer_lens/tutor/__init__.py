"""The tutor: a small language model of a made-up world, shipped with the package, to learn and test steering on.

`load` gives the model, `data` its prompts, `chat` turns typed text into model input and `user_text` back, `unknown`
names words outside its world, `fit` steers it with defaults that were chosen on its valid split, `exact` tells which
answers are the wanted ones. Two behaviours can be switched on by a tag before the user's turn: `<safe>` refuses harmful
requests, `<honest>` answers myths truthfully. `TutorSuite` is what `fsteer_lens.evaluate` measures methods on,
and `gate_report` tells how well gates decide. `exercise` and `reveal` check the answers of who learns with the
notebooks.
"""

from fsteer_lens.explorer import worlds
from fsteer_lens.tutor import tokenizer
from fsteer_lens.tutor.accuracy import exact
from fsteer_lens.tutor.exercises import Verdict, exercise, reveal
from fsteer_lens.tutor.gate_reports import fit_gates, gate_report
from fsteer_lens.tutor.loading import load
from fsteer_lens.tutor.splits import BEHAVIOURS, Task, TutorData, data
from fsteer_lens.tutor.steering import activations, fit
from fsteer_lens.tutor.suite import TutorSuite
from fsteer_lens.tutor.world import chat, unknown, user_text

# The explorer knows no world; this is how it learns to mark words and to wrap prompts for the tutor.
worlds.register("tutor", worlds.World(recognises=tokenizer.is_tutors, unknown=unknown, wrap=chat))

__all__ = [
    "BEHAVIOURS",
    "Task",
    "TutorData",
    "TutorSuite",
    "Verdict",
    "activations",
    "chat",
    "data",
    "exact",
    "exercise",
    "fit",
    "fit_gates",
    "gate_report",
    "load",
    "reveal",
    "unknown",
    "user_text",
]

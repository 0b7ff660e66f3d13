"""See, teach and trust inference-time steering: FineSteer's gates and experts as hooks on TransformerLens models.

What the flow of work needs is here: read, fit, steer, look, measure. The rest is in public modules, one for each step:
`prompts`, `reading`, `method`, `steering`, `hooks`, `run`, `trace`, `effects`, `figures`, `selection`, `evaluation`,
`explorer`, `report`, `demo`, and beside them `models`, `tutor`, `errors`, `harness`, `serving`.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fsteer_lens import demo as demo
from fsteer_lens import effects, errors, evaluation, figures, hooks, models, tutor
from fsteer_lens import explorer as explorer
from fsteer_lens import method as method
from fsteer_lens import prompts as prompts
from fsteer_lens import reading as reading
from fsteer_lens import report as report
from fsteer_lens import run as run
from fsteer_lens import selection as selection
from fsteer_lens import serving as serving
from fsteer_lens import steering as steering
from fsteer_lens import trace as trace
from fsteer_lens.evaluation.evaluating import evaluate
from fsteer_lens.evaluation.gate_reports import gate_report
from fsteer_lens.explorer.exploring import explore
from fsteer_lens.explorer.watching import watch
from fsteer_lens.hooks.chains import chain
from fsteer_lens.hooks.probes import ExpertProbe, SubspaceAblation, SubspaceProbe
from fsteer_lens.hooks.scopes import Schedule, Window
from fsteer_lens.method.experts import Experts
from fsteer_lens.method.fitting_experts import fit_experts
from fsteer_lens.method.fitting_gates import fit_gate
from fsteer_lens.method.gates import Gate
from fsteer_lens.method.linear_gates import CosineGate, LinearGate
from fsteer_lens.method.subspace import Subspace, fit_subspace
from fsteer_lens.method.subspace_gates import EnergyGate, LogisticGate, QuantileGate
from fsteer_lens.prompts import tokens as tokens
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.reading.activations import Activations
from fsteer_lens.reading.collecting import collect, collect_queries
from fsteer_lens.run.generation import Generation, Generations, generate, stream
from fsteer_lens.selection.calibration import calibrate
from fsteer_lens.selection.grid import search
from fsteer_lens.selection.recipes import recipe
from fsteer_lens.steering.fitting import fit
from fsteer_lens.steering.steering import FineSteer
from fsteer_lens.steering.storage import load, save
from fsteer_lens.trace.trace import Trace

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "Contrast",
    "ContrastSet",
    "CosineGate",
    "EnergyGate",
    "ExpertProbe",
    "Experts",
    "FineSteer",
    "Gate",
    "Generation",
    "Generations",
    "LinearGate",
    "LogisticGate",
    "QuantileGate",
    "Schedule",
    "Subspace",
    "SubspaceAblation",
    "SubspaceProbe",
    "Trace",
    "Window",
    "calibrate",
    "chain",
    "collect",
    "collect_queries",
    "effects",
    "errors",
    "evaluate",
    "evaluation",
    "explore",
    "figures",
    "fit",
    "fit_experts",
    "fit_gate",
    "fit_subspace",
    "gate_report",
    "generate",
    "hooks",
    "load",
    "models",
    "recipe",
    "save",
    "search",
    "stream",
    "tutor",
    "watch",
]

_ROOMS = (
    "demo",
    "explorer",
    "method",
    "prompts",
    "reading",
    "report",
    "run",
    "selection",
    "serving",
    "steering",
    "trace",
)

# Where to find what 0.1 had at the top. These addresses work for a while, with a warning.
_MOVED = {
    "AttackReport": "evaluation",
    "Calibration": "selection",
    "Chain": "hooks",
    "Evaluation": "evaluation",
    "Explorer": "explorer",
    "FitReport": "method",
    "GateReport": "evaluation",
    "MeanShift": "steering",
    "NearestCentroid": "steering",
    "NullSpaceSteering": "steering",
    "Parts": "method",
    "PcaDirection": "steering",
    "Prompting": "evaluation",
    "Report": "report",
    "Search": "selection",
    "Splits": "selection",
    "StepRecord": "run",
    "ThresholdGate": "method",
    "Trial": "selection",
    "attack_gate": "evaluation",
    "fit_ablations": "evaluation",
    "fit_directional_ablation": "steering",
    "fit_mean_shift": "steering",
    "fit_nearest_centroid": "steering",
    "fit_null_space": "steering",
    "fit_pca_direction": "steering",
    "steering_report": "report",
}
_GONE = {"fit_cosine_gate": "fit_gate(queries, kind='cosine', general=...)"}


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name in _MOVED:
            room = f"{__name__}.{_MOVED[name]}"
            warnings.warn(
                f"{__name__}.{name} is now {room}.{name}; the old address will go in a later version",
                DeprecationWarning,
                stacklevel=2,
            )
            return getattr(import_module(room), name)
        if name in _GONE:
            raise AttributeError(f"{__name__}.{name} is gone; use {_GONE[name]}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""See, teach and trust inference-time steering: FineSteer's gates and experts as hooks on TransformerLens models.

What the flow of work needs is here: read, fit, steer, look, measure. The rest is in public modules, one for each step:
`prompts`, `reading`, `method`, `steering`, `hooks`, `run`, `trace`, `effects`, `figures`, `selection`, `evaluation`,
`explorer`, `report`, `hub`, `scale`, `serving`, `demo`, and beside them `models`, `tutor`, `errors`, `harness`.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time each comes when it is asked for, see below
    from fsteer_lens import demo as demo
    from fsteer_lens import effects, errors, evaluation, figures, hooks, models, tutor
    from fsteer_lens import explorer as explorer
    from fsteer_lens import hub as hub
    from fsteer_lens import method as method
    from fsteer_lens import prompts as prompts
    from fsteer_lens import reading as reading
    from fsteer_lens import report as report
    from fsteer_lens import run as run
    from fsteer_lens import scale as scale
    from fsteer_lens import selection as selection
    from fsteer_lens import serving as serving
    from fsteer_lens import steering as steering
    from fsteer_lens import trace as trace
    from fsteer_lens.evaluation import evaluate, gate_report
    from fsteer_lens.explorer import explore, watch
    from fsteer_lens.hooks import ExpertProbe, Schedule, SubspaceAblation, SubspaceProbe, Window, chain
    from fsteer_lens.hub import push
    from fsteer_lens.method import (
        CosineGate,
        EnergyGate,
        Experts,
        Gate,
        LinearGate,
        LogisticGate,
        QuantileGate,
        Subspace,
        fit_experts,
        fit_gate,
        fit_subspace,
    )
    from fsteer_lens.prompts import Contrast, ContrastSet
    from fsteer_lens.prompts import tokens as tokens
    from fsteer_lens.reading import Activations, collect, collect_queries
    from fsteer_lens.run import Generation, Generations, generate, stream
    from fsteer_lens.selection import calibrate, recipe, search
    from fsteer_lens.steering import FineSteer, fit, load, save
    from fsteer_lens.trace import Trace

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
    "push",
    "recipe",
    "save",
    "search",
    "stream",
    "tutor",
    "watch",
]

# In which room each name of above lies. Nothing is imported before it is asked for: the command line answers at once,
# and a process that serves a steering loads no figures.
_HOMES = {
    "evaluation": ("evaluate", "gate_report"),
    "explorer": ("explore", "watch"),
    "hooks": ("ExpertProbe", "Schedule", "SubspaceAblation", "SubspaceProbe", "Window", "chain"),
    "hub": ("push",),
    "method": (
        *("CosineGate", "EnergyGate", "Experts", "Gate", "LinearGate", "LogisticGate", "QuantileGate", "Subspace"),
        *("fit_experts", "fit_gate", "fit_subspace"),
    ),
    "prompts": ("Contrast", "ContrastSet", "tokens"),
    "reading": ("Activations", "collect", "collect_queries"),
    "run": ("Generation", "Generations", "generate", "stream"),
    "selection": ("calibrate", "recipe", "search"),
    "steering": ("FineSteer", "fit", "load", "save"),
    "trace": ("Trace",),
}
_ROOMS = (*_HOMES, "demo", "effects", "errors", "figures", "models", "report", "scale", "serving", "tutor")
_ROOM_OF = {name: room for room, names in _HOMES.items() for name in names}

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
    return sorted({*__all__, *_ROOMS, "__version__"})


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return import_module(f"{__name__}.{name}")
        if name in _ROOM_OF:
            globals()[name] = value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
            return value
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

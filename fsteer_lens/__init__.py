"""See, teach and trust inference-time steering: FineSteer's gates and experts as hooks on TransformerLens models."""

from fsteer_lens.activations import Activations, collect, collect_queries
from fsteer_lens.baselines import (
    MeanShift,
    NearestCentroid,
    NullSpaceSteering,
    PcaDirection,
    fit_cosine_gate,
    fit_directional_ablation,
    fit_mean_shift,
    fit_nearest_centroid,
    fit_null_space,
    fit_pca_direction,
)
from fsteer_lens.experts import Experts, FitReport, Parts, fit_experts
from fsteer_lens.fitting import fit
from fsteer_lens.gates import EnergyGate, Gate, LogisticGate, QuantileGate, ThresholdGate, fit_gate
from fsteer_lens.generation import Generation, Generations, StepRecord, generate, stream
from fsteer_lens.hooks import Chain, ExpertProbe, SubspaceAblation, SubspaceProbe, chain
from fsteer_lens.prompts import Contrast, ContrastSet
from fsteer_lens.selection import Calibration, Search, Splits, Trial, calibrate, search
from fsteer_lens.steering import FineSteer
from fsteer_lens.storage import load, save
from fsteer_lens.subspace import Subspace, fit_subspace
from fsteer_lens.timing import Schedule, Window
from fsteer_lens.trace import Trace

from fsteer_lens.evaluation import (  # isort: skip
    AttackReport,
    Evaluation,
    GateReport,
    Prompting,
    attack_gate,
    evaluate,
    fit_ablations,
    gate_report,
)
from fsteer_lens.explorer import Explorer, explore  # isort: skip
from fsteer_lens.report import Report, steering_report  # isort: skip
from fsteer_lens import effects, errors, evaluation, figures, models, tutor  # isort: skip  (they import from the modules above)

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "AttackReport",
    "Calibration",
    "Chain",
    "Contrast",
    "ContrastSet",
    "EnergyGate",
    "Evaluation",
    "ExpertProbe",
    "Experts",
    "Explorer",
    "FineSteer",
    "FitReport",
    "Gate",
    "GateReport",
    "Generation",
    "Generations",
    "LogisticGate",
    "MeanShift",
    "NearestCentroid",
    "NullSpaceSteering",
    "Parts",
    "PcaDirection",
    "Prompting",
    "QuantileGate",
    "Report",
    "Schedule",
    "Search",
    "Splits",
    "StepRecord",
    "Subspace",
    "SubspaceAblation",
    "SubspaceProbe",
    "ThresholdGate",
    "Trace",
    "Trial",
    "Window",
    "__version__",
    "attack_gate",
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
    "fit_ablations",
    "fit_cosine_gate",
    "fit_directional_ablation",
    "fit_experts",
    "fit_gate",
    "fit_mean_shift",
    "fit_nearest_centroid",
    "fit_null_space",
    "fit_pca_direction",
    "fit_subspace",
    "gate_report",
    "generate",
    "load",
    "models",
    "save",
    "search",
    "steering_report",
    "stream",
    "tutor",
]

"""See, teach and trust inference-time steering: FineSteer's gates and experts as hooks on TransformerLens models."""

from fsteer_lens.hooks.chains import Chain, chain
from fsteer_lens.hooks.probes import ExpertProbe, SubspaceAblation, SubspaceProbe
from fsteer_lens.hooks.scopes import Schedule, Window
from fsteer_lens.method.experts import Experts, FitReport, Parts
from fsteer_lens.method.fitting_experts import fit_experts
from fsteer_lens.method.fitting_gates import fit_gate
from fsteer_lens.method.gates import Gate
from fsteer_lens.method.linear_gates import CosineGate, LinearGate
from fsteer_lens.method.subspace import Subspace, fit_subspace
from fsteer_lens.method.subspace_gates import EnergyGate, LogisticGate, QuantileGate, ThresholdGate
from fsteer_lens.prompts.contrasts import Contrast, ContrastSet
from fsteer_lens.reading.activations import Activations, collect, collect_queries
from fsteer_lens.run.generation import Generation, Generations, StepRecord, generate, stream
from fsteer_lens.selection import Calibration, Search, Splits, Trial, calibrate, search
from fsteer_lens.steering.baselines import (
    MeanShift,
    NearestCentroid,
    NullSpaceSteering,
    PcaDirection,
    fit_directional_ablation,
    fit_mean_shift,
    fit_nearest_centroid,
    fit_null_space,
    fit_pca_direction,
)
from fsteer_lens.steering.fitting import fit
from fsteer_lens.steering.steering import FineSteer
from fsteer_lens.steering.storage import load, save
from fsteer_lens.trace.trace import Trace

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
    "CosineGate",
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
    "LinearGate",
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

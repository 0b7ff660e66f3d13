"""Measuring methods side by side, with intervals and paired differences."""

from fsteer_lens.evaluation.ablations import fit_ablations
from fsteer_lens.evaluation.attacks import Attack, AttackReport, attack_gate
from fsteer_lens.evaluation.evaluating import Evaluation, Method, Prompting, evaluate
from fsteer_lens.evaluation.gate_reports import (
    Detector,
    GateReport,
    LinearProbe,
    detector,
    detectors_on_tutor,
    fit_linear_probe,
    gate_report,
    gate_report_on_tutor,
)
from fsteer_lens.evaluation.perturbations import PERTURBATIONS, Perturbation
from fsteer_lens.evaluation.refusals import REFUSAL_PHRASES, RefusalSuite, harmbench, refuses, xstest
from fsteer_lens.evaluation.suites import Measure, Setting, Suite, TutorSuite, every
from fsteer_lens.evaluation.truthfulness import TruthfulQA
from fsteer_lens.evaluation.tutor_comparison import (
    DEFAULT,
    GATED_MEAN_SHIFT,
    MEAN_SHIFT,
    METHODS,
    NO_STEERING,
    PAPER,
    TAG,
    UNGATED,
    Comparison,
    MethodRow,
    answers_lost,
    compare_on_tutor,
)

__all__ = [
    "DEFAULT",
    "GATED_MEAN_SHIFT",
    "MEAN_SHIFT",
    "METHODS",
    "NO_STEERING",
    "PAPER",
    "PERTURBATIONS",
    "REFUSAL_PHRASES",
    "TAG",
    "UNGATED",
    "Attack",
    "AttackReport",
    "Comparison",
    "Detector",
    "Evaluation",
    "GateReport",
    "LinearProbe",
    "Measure",
    "Method",
    "MethodRow",
    "Perturbation",
    "Prompting",
    "RefusalSuite",
    "Setting",
    "Suite",
    "TruthfulQA",
    "TutorSuite",
    "answers_lost",
    "attack_gate",
    "compare_on_tutor",
    "detector",
    "detectors_on_tutor",
    "evaluate",
    "every",
    "fit_ablations",
    "fit_linear_probe",
    "gate_report",
    "gate_report_on_tutor",
    "harmbench",
    "refuses",
    "xstest",
]

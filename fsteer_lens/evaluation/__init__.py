"""Measuring methods side by side, with intervals and paired differences."""

from fsteer_lens.evaluation.ablations import fit_ablations
from fsteer_lens.evaluation.attacks import Attack, AttackReport, Substitution, attack_gate
from fsteer_lens.evaluation.evaluating import Evaluation, Method, Prompting, evaluate
from fsteer_lens.evaluation.gate_reports import (
    Detector,
    GateReport,
    GateRow,
    LinearProbe,
    detector,
    fit_linear_probe,
    gate_report,
)
from fsteer_lens.evaluation.perturbations import PERTURBATIONS, Perturbation, gives_same_answer, prefix, suffix, typos
from fsteer_lens.evaluation.refusals import REFUSAL_PHRASES, RefusalSuite, harmbench, refuses, xstest
from fsteer_lens.evaluation.suites import Measure, Setting, Suite, every
from fsteer_lens.evaluation.truthfulness import TruthfulQA

__all__ = [
    "PERTURBATIONS",
    "REFUSAL_PHRASES",
    "Attack",
    "AttackReport",
    "Detector",
    "Evaluation",
    "GateReport",
    "GateRow",
    "LinearProbe",
    "Measure",
    "Method",
    "Perturbation",
    "Prompting",
    "RefusalSuite",
    "Setting",
    "Substitution",
    "Suite",
    "TruthfulQA",
    "attack_gate",
    "detector",
    "evaluate",
    "every",
    "fit_ablations",
    "fit_linear_probe",
    "gate_report",
    "gives_same_answer",
    "harmbench",
    "prefix",
    "refuses",
    "suffix",
    "typos",
    "xstest",
]

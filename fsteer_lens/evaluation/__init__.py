"""Measuring methods side by side, with intervals and paired differences."""

from fsteer_lens.evaluation.ablations import fit_ablations
from fsteer_lens.evaluation.attacks import Attack, AttackReport, Substitution, attack_gate
from fsteer_lens.evaluation.evaluating import Evaluation, Method, Prompting, evaluate
from fsteer_lens.evaluation.fluency import GeneralKL, Repetition
from fsteer_lens.evaluation.gate_reports import (
    GateReport,
    GateRow,
    gate_report,
    threshold_at_rate,
)
from fsteer_lens.evaluation.perturbations import PERTURBATIONS, Perturbation, gives_same_answer, prefix, suffix, typos
from fsteer_lens.evaluation.refusals import REFUSAL_PHRASES, RefusalSuite, harmbench, refuses, xstest
from fsteer_lens.evaluation.scans import fit_scan
from fsteer_lens.evaluation.suites import Measure, Setting, Suite
from fsteer_lens.evaluation.truthfulness import TruthfulQA
from fsteer_lens.ground.spread import every
from fsteer_lens.run.repetition import repeats, repetition_rate

__all__ = [
    "PERTURBATIONS",
    "REFUSAL_PHRASES",
    "Attack",
    "AttackReport",
    "Evaluation",
    "GateReport",
    "GateRow",
    "GeneralKL",
    "Measure",
    "Method",
    "Perturbation",
    "Prompting",
    "RefusalSuite",
    "Repetition",
    "Setting",
    "Substitution",
    "Suite",
    "TruthfulQA",
    "attack_gate",
    "evaluate",
    "every",
    "fit_ablations",
    "fit_scan",
    "gate_report",
    "gives_same_answer",
    "harmbench",
    "prefix",
    "refuses",
    "repeats",
    "repetition_rate",
    "suffix",
    "threshold_at_rate",
    "typos",
    "xstest",
]

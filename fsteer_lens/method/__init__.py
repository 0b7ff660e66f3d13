"""The method in tensors alone: subspaces and gates (when to steer), experts (how). Knows no model library."""

from fsteer_lens.method.experts import Experts, FitReport, HeldOut, Parts
from fsteer_lens.method.fitting_experts import fit_experts
from fsteer_lens.method.fitting_gates import fit_gate
from fsteer_lens.method.gates import Gate
from fsteer_lens.method.linear_gates import CosineGate, LinearGate, OutOfFold
from fsteer_lens.method.null_space import DomainShare, NullSpaceGate
from fsteer_lens.method.residual_gates import ResidualRatioGate
from fsteer_lens.method.scan_gates import ScanGate
from fsteer_lens.method.subspace import Subspace, fit_subspace
from fsteer_lens.method.subspace_gates import EnergyGate, LogisticGate, QuantileGate, SubspaceGate, ThresholdGate

__all__ = [
    "CosineGate",
    "DomainShare",
    "EnergyGate",
    "Experts",
    "FitReport",
    "Gate",
    "HeldOut",
    "LinearGate",
    "LogisticGate",
    "NullSpaceGate",
    "OutOfFold",
    "Parts",
    "QuantileGate",
    "ResidualRatioGate",
    "ScanGate",
    "Subspace",
    "SubspaceGate",
    "ThresholdGate",
    "fit_experts",
    "fit_gate",
    "fit_subspace",
]

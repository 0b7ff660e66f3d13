"""Choosing how to steer: the strength that a budget allows, or layer, rank and strength on a validation split."""

from fsteer_lens.selection.calibration import Calibration, calibrate
from fsteer_lens.selection.grid import Search, Trial, search
from fsteer_lens.selection.splits import SplitData, Splits

__all__ = ["Calibration", "Search", "SplitData", "Splits", "Trial", "calibrate", "search"]

"""Choosing how to steer: the strength that a budget allows, or layer, rank and strength on a validation split."""

from fsteer_lens.selection.calibration import Calibration, calibrate
from fsteer_lens.selection.grid import Search, Splits, Trial, search

__all__ = ["Calibration", "Search", "Splits", "Trial", "calibrate", "search"]

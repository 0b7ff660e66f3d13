"""Choosing how to steer: the strength that a budget allows, or layer, rank and strength on a validation split."""

from fsteer_lens.selection.calibration import Calibration, calibrate
from fsteer_lens.selection.grid import Search, search
from fsteer_lens.selection.recipes import Recipe, RecipeTrial, recipe
from fsteer_lens.selection.splits import Measured, SplitData, Splits
from fsteer_lens.selection.trials import Trial

__all__ = [
    "Calibration",
    "Measured",
    "Recipe",
    "RecipeTrial",
    "Search",
    "SplitData",
    "Splits",
    "Trial",
    "calibrate",
    "recipe",
    "search",
]

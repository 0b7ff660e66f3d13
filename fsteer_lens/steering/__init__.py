"""Steerings: FineSteer and what it is compared with, how they are fitted, saved and loaded."""

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
from fsteer_lens.steering.steering import FineSteer, Steering
from fsteer_lens.steering.storage import load, save

__all__ = [
    "FineSteer",
    "MeanShift",
    "NearestCentroid",
    "NullSpaceSteering",
    "PcaDirection",
    "Steering",
    "fit",
    "fit_directional_ablation",
    "fit_mean_shift",
    "fit_nearest_centroid",
    "fit_null_space",
    "fit_pca_direction",
    "load",
    "save",
]

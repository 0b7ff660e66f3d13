"""Steerings: FineSteer and what it is compared with, how they are fitted, saved and loaded."""

from fsteer_lens.steering.baselines import (
    MeanShift,
    NearestCentroid,
    NullSpaceSteering,
    PcaDirection,
    RidgeSteering,
    fit_directional_ablation,
    fit_mean_shift,
    fit_nearest_centroid,
    fit_null_space,
    fit_pca_direction,
    fit_ridge,
)
from fsteer_lens.steering.control_vectors import save_control_vector
from fsteer_lens.steering.fitting import fit
from fsteer_lens.steering.steering import FineSteer, Steering
from fsteer_lens.steering.storage import load, save

__all__ = [
    "FineSteer",
    "MeanShift",
    "NearestCentroid",
    "NullSpaceSteering",
    "PcaDirection",
    "RidgeSteering",
    "Steering",
    "fit",
    "fit_directional_ablation",
    "fit_mean_shift",
    "fit_nearest_centroid",
    "fit_null_space",
    "fit_pca_direction",
    "fit_ridge",
    "load",
    "save",
    "save_control_vector",
]

"""How many kinds of response shift there are: clusters that come out again, and that one cloud would not give.

Prediction strength (Tibshirani and Walther 2005) of K clusters: cut the shifts into halves, cluster each half by
itself, and give each shift of one half to the nearest centre of the other. Of the pairs that share a cluster in their
own half some share one by the other's centres too; the strength is that share in the cluster where it is least.

One long cloud is cut in the same place again and again, so a strong K must also leave less spread in its clusters than
shifts of the same covariance do that have no clusters, as the gap statistic asks (Tibshirani, Walther and Hastie 2001).
"""

import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.method.folds import halves

DIMENSIONS: Final = 64
RESTARTS: Final = 4
HALVINGS: Final = 3
STRONG: Final = 0.9
"""Prediction strength from which on clusters count as found again; its authors name 0.8 to 0.9."""
CLEARED: Final = 0.25
"""How much less spread there must be within clusters than without any, as a difference of logarithms. Measured: modes
0.5 to 5; −0.4 to 0.15 on clouds, on a line, and on shifts of TruthfulQA."""
REFERENCES: Final = 2


def unit_points(shifts: Float[Tensor, "n d"]) -> Float[Tensor, "n p"]:
    """Shifts of length 1, centred, in the principal directions in which they spread most."""
    unit = F.normalize(shifts.double().cpu(), dim=1)
    centred = unit - unit.mean(dim=0)
    wide = centred.shape[0] < centred.shape[1]
    values, vectors = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values, vectors = values[-DIMENSIONS:].clamp(min=0), vectors[:, -DIMENSIONS:]
    return (vectors * values.sqrt() if wide else centred @ vectors).flip(1)


def clustered(points: Float[Tensor, "n p"], count: int, seed: int) -> Any:
    """K-means with `count` clusters, fitted."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters: labels tell
        return KMeans(count, n_init=RESTARTS, random_state=seed).fit(points.numpy())  # pyright: ignore[reportArgumentType]


def cluster_labels(points: Float[Tensor, "n p"], count: int, seed: int) -> Int[Tensor, " n"]:
    """The cluster of every point; fewer clusters than asked for where points coincide."""
    labels = clustered(points, count, seed).labels_
    return torch.from_numpy(labels).long().unique(return_inverse=True)[1]


def prediction_strengths(
    points: Float[Tensor, "n p"], counts: Iterable[int], groups: Sequence[str | None] | None, seed: int
) -> dict[int, float]:
    """Median prediction strength of each number of clusters over random halves; 1 for a single cluster."""
    cuts = [halves(len(points), groups, seed + index) for index in range(HALVINGS)]
    return {count: _strength(points, count, cuts, seed) for count in counts}


def _strength(points: Float[Tensor, "n p"], count: int, cuts: Sequence[tuple[Tensor, Tensor]], seed: int) -> float:
    if count == 1:
        return 1.0
    found = []
    for cut in cuts:
        if min(map(len, cut)) < 2 * count:
            return 0.0
        parts = [points[rows] for rows in cut]
        fits = [clustered(part, count, seed) for part in parts]
        for part, own, other in zip(parts, fits, reversed(fits), strict=True):
            found.append(_kept_together(own.labels_, other.predict(part.numpy()), count))
    return statistics.median(found)


def _kept_together(own: Any, predicted: Any, count: int) -> float:
    """Share of the pairs of a cluster that stay together, of the cluster that keeps the fewest."""
    hot = [F.one_hot(torch.from_numpy(labels).long(), count).double() for labels in (own, predicted)]
    table = hot[0].T @ hot[1]
    sizes = table.sum(dim=1)
    pairs = sizes * (sizes - 1)
    kept = (table * (table - 1)).sum(dim=1)
    return float((kept / pairs)[pairs > 0].min()) if (pairs > 0).any() else 0.0


def gap(points: Float[Tensor, "n p"], count: int, seed: int) -> float:
    """log spread within clusters of an even block of the same covariance, less that of the points.

    Spread is counted in the space that the clusters' centres span: elsewhere no clustering could lessen it, and with
    the number of such directions the two logarithms would come together however clear the clusters are.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    scale = points.std(dim=0) * math.sqrt(12)
    spreads = []
    for _ in range(REFERENCES):
        block = (torch.rand(points.shape, generator=generator, dtype=points.dtype, device="cpu") - 0.5) * scale
        spreads.append(_spread(block, count, seed))
    return sum(spreads) / len(spreads) - _spread(points, count, seed)


def _spread(points: Float[Tensor, "n p"], count: int, seed: int) -> float:
    """log of the share of squared distances that is left within clusters, between their centres."""
    fitted = clustered(points, count, seed)
    centres = torch.from_numpy(fitted.cluster_centers_)
    spanned = torch.linalg.svd(centres - centres.mean(dim=0), full_matrices=False).Vh[: count - 1].T
    within = (points - centres[torch.from_numpy(fitted.labels_).long()]) @ spanned
    whole = (points - points.mean(dim=0)) @ spanned
    return math.log(float(within.square().sum() / whole.square().sum().clamp(min=1e-300)) + 1e-12)

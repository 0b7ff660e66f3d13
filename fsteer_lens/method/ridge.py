"""Ridge regression at every strength from one spectral decomposition, and its cross-validation."""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.method.folds import Fold

STRENGTHS: Final = (*(10.0**exponent for exponent in (-4, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2)), math.inf)
"""Strengths that are tried, in units of the rows' mean eigenvalue; the infinite one predicts the mean."""
NEGLIGIBLE: Final = 1e-12
"""Eigenvalues below this share of the largest are rounding: float64 holds no more of a Gram matrix."""


class Spectrum(NamedTuple):
    """The eigenvectors and eigenvalues of centred rows' XᵀX, of which every strength of ridge is made.

    Attributes:
        rows: the rows X, [n d].
        basis: eigenvectors whose eigenvalue is not zero, [d r].
        values: these eigenvalues, [r].
        unit: the mean of these eigenvalues.
    """

    rows: Float[Tensor, "n d"]
    basis: Float[Tensor, "d r"]
    values: Float[Tensor, " r"]
    unit: float

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> "Spectrum":
        """Decompose by the smaller of XᵀX and XXᵀ."""
        centred = rows - rows.mean(dim=0)
        wide = rows.shape[0] < rows.shape[1]
        values, vectors = torch.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
        kept = values > NEGLIGIBLE * values[-1:].clamp(min=0)  # the largest, if there is any
        values, vectors = values[kept], vectors[:, kept]
        unit = float(values.mean()) if len(values) else 0.0
        return cls(rows, centred.T @ vectors / values.sqrt() if wide else vectors, values, unit)

    def seen(self, rows: Float[Tensor, "m d"]) -> Float[Tensor, "m r"]:
        """Rows in the basis, relative to the mean."""
        return (rows - self.rows.mean(dim=0)) @ self.basis

    def shrink(self, strength: float) -> Float[Tensor, " r"]:
        """1 / (eigenvalue + strength · unit), 0 for an infinite strength."""
        return 1 / (self.values + strength * self.unit)

    def coefficients(self, targets: Float[Tensor, "n m"], strength: float) -> Float[Tensor, "d m"]:
        """B of the best prediction (x − mean) B + mean of the targets."""
        inner = self.seen(self.rows).T @ (targets - targets.mean(dim=0))
        return self.basis @ (self.shrink(strength).unsqueeze(1) * inner)


class CrossValidated(NamedTuple):
    """What cross-validation came to.

    Attributes:
        best: the strength with the least held-out squared error.
        errors: mean squared length of the held-out error at each strength.
    """

    best: float
    errors: tuple[float, ...]


def cross_validated(
    rows: Float[Tensor, "n d"], targets: Float[Tensor, "n m"], folds: Sequence[Fold], strengths: Sequence[float]
) -> CrossValidated:
    """Held-out errors of ridge at every strength, one decomposition per fold; ties go to the stronger one."""
    errors = rows.new_zeros(len(strengths))
    for train, held_out in folds:
        spectrum = Spectrum.of(rows[train])
        mean = targets[train].mean(dim=0)
        inner = spectrum.seen(rows[train]).T @ (targets[train] - mean)
        seen, left = spectrum.seen(rows[held_out]), targets[held_out] - mean
        for index, strength in enumerate(strengths):
            predicted = (seen * spectrum.shrink(strength)) @ inner
            errors[index] += (left - predicted).square().sum() / len(rows)
    order = sorted(range(len(strengths)), key=lambda index: (float(errors[index]), -strengths[index]))
    return CrossValidated(strengths[order[0]], tuple(errors.tolist()))

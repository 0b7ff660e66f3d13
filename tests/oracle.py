"""The method in float64 NumPy, written from the equations (DESIGN.md section 2) and not from the package.

Loops are wanted here: one query, one rank, one expert at a time, the way that the equations are written.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def f64(value: ArrayLike) -> Array:
    """Anything array-like (a tensor too) as float64."""
    return np.asarray(value, dtype=np.float64)


# ------------------------------------------------------------------------------------------------------------ subspace


def fitted_subspace(queries: ArrayLike, rank: int) -> tuple[Array, Array]:
    """μ and V_r, by the eigenvectors of the scatter matrix (the package takes an SVD of the rows)."""
    rows = f64(queries)
    mean = rows.mean(axis=0)
    _, vectors = np.linalg.eigh((rows - mean).T @ (rows - mean))
    return mean, vectors[:, ::-1][:, :rank]


def energy_ratio(h: ArrayLike, mean: ArrayLike, basis: ArrayLike) -> float:
    """s(h; r) = ‖V_rᵀ (h − μ)‖² / ‖h − μ‖² of one activation; 0/0 counts as 1."""
    centred = f64(h) - f64(mean)
    total = float(centred @ centred)
    projected = f64(basis).T @ centred
    return 1.0 if total == 0 else min(1.0, float(projected @ projected) / total)


def energy_ratios(rows: ArrayLike, mean: ArrayLike, basis: ArrayLike) -> Array:
    """Energy ratio of every row at every rank, one by one."""
    return f64([[energy_ratio(h, mean, f64(basis)[:, : r + 1]) for r in range(f64(basis).shape[1])] for h in f64(rows)])


# --------------------------------------------------------------------------------------------------------------- gates


def step_cdf(sample: ArrayLike, s: float) -> float:
    """Share of the sample that is at most s."""
    return float(np.mean(f64(sample) <= s))


def linear_cdf(sample: ArrayLike, s: float) -> float:
    """0 below the smallest, 1 from the largest on, linear between order statistics, the upper value at ties."""
    ordered = sorted(f64(sample).tolist())
    n = len(ordered)
    if n == 1:
        return float(s >= ordered[0])
    if s < ordered[0]:
        return 0.0
    if s >= ordered[-1]:
        return 1.0
    last = max(i for i in range(n) if ordered[i] <= s)
    return (last + (s - ordered[last]) / (ordered[last + 1] - ordered[last])) / (n - 1)


def quantile_gate(quantile: float, epsilon: float, gamma: float) -> float:
    """1 where F(s) ≥ ε, else (F(s)/ε)^γ."""
    return 1.0 if quantile >= epsilon else (quantile / epsilon) ** gamma


def logistic_fit(positive: ArrayLike, negative: ArrayLike, c: float = 1.0) -> tuple[float, float]:
    """a and b of σ(a·s + b): balanced classes, L2 on the standardised slope, by Newton's method."""
    s = np.concatenate([f64(positive), f64(negative)])
    y = np.concatenate([np.ones(len(f64(positive))), np.zeros(len(f64(negative)))])
    share = np.where(y == 1, len(y) / (2 * y.sum()), len(y) / (2 * (1 - y).sum()))
    centre, width = s.mean(), s.std(ddof=1)
    x = np.stack([(s - centre) / width, np.ones_like(s)], axis=1)
    penalty = np.diag([1.0, 0.0])
    w = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = c * x.T @ (share * (p - y)) + penalty @ w
        hessian = c * (x * (share * p * (1 - p))[:, None]).T @ x + penalty
        w = w - np.linalg.solve(hessian, gradient)
    return float(w[0] / width), float(w[1] - w[0] * centre / width)


# ------------------------------------------------------------------------------------------------------------- experts


def softmax(logits: ArrayLike) -> Array:
    """Softmax of one vector."""
    powers = np.exp(f64(logits) - f64(logits).max())
    return powers / powers.sum()


def routing(h, prototypes, query_weight, query_bias, key_weight, key_bias) -> Array:
    """α(h) = softmax((W_K C)ᵀ (W_Q h) / √d_k) of one activation, Eq. 12."""
    query = f64(query_weight) @ f64(h) + f64(query_bias)
    keys = [f64(key_weight) @ c + f64(key_bias) for c in f64(prototypes)]
    return softmax([key @ query / np.sqrt(len(query)) for key in keys])


def residual_coefficients(h, hidden_weight, hidden_bias, output_weight, output_bias) -> Array:
    """β(h) = Linear → ReLU → Linear of one activation, Eq. 13."""
    hidden = np.maximum(f64(hidden_weight) @ f64(h) + f64(hidden_bias), 0)
    return f64(output_weight) @ hidden + f64(output_bias)


def steering_vector(h, prototypes, residual_basis, controller) -> tuple[Array, Array, Array]:
    """α, β and v(h) = C α(h) + U β(h) of one activation, Eq. 14; `controller` in the order W_Q, W_K, β₁, β₂."""
    alpha = routing(h, prototypes, *controller[:4])
    beta = residual_coefficients(h, *controller[4:])
    mixed = sum(a * c for a, c in zip(alpha, f64(prototypes), strict=True))
    return alpha, beta, mixed + f64(residual_basis) @ beta


def mean_squared_error(queries, shifts, prototypes, residual_basis, controller) -> float:
    """Mean over queries of ‖v(ĥ) − δ‖², the paper's training loss without its decay."""
    errors = [
        float(np.sum((steering_vector(h, prototypes, residual_basis, controller)[2] - delta) ** 2))
        for h, delta in zip(f64(queries), f64(shifts), strict=True)
    ]
    return float(np.mean(errors))


def principal_directions(rows: ArrayLike, rank: int) -> Array:
    """First principal directions of the centred rows, [d r], each up to its sign."""
    return fitted_subspace(rows, rank)[1]

"""Baselines against the papers' equations in plain NumPy, on planted data, on a model, and through a file."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import GroupKFold, KFold

from fsteer_lens import FineSteer, SubspaceAblation, collect_queries, fit_experts, fit_gate, generate, load, save, tutor
from fsteer_lens.errors import DataError, InputError, ShapeError
from fsteer_lens.method.linear_gates import CosineGate
from fsteer_lens.method.ridge import STRENGTHS
from fsteer_lens.models import SteerableModel
from fsteer_lens.reading.activations import Activations
from fsteer_lens.steering import (
    MeanShift,
    fit_directional_ablation,
    fit_mean_shift,
    fit_nearest_centroid,
    fit_null_space,
    fit_pca_direction,
    fit_ridge,
)
from tests.running import LAYER, SITE, batch_of, residual
from tests.test_fitting import D, activations, general

FITS: dict[str, Any] = {
    "mean shift": lambda own, others: fit_mean_shift(own),
    "PCA direction": lambda own, others: fit_pca_direction(own),
    "null space": lambda own, others: fit_null_space(own, others.queries),
    "nearest centroid": lambda own, others: fit_nearest_centroid(
        own,
        fit_experts(
            own.queries, own.queries if own.shifts is None else own.shifts, n_experts=4, preset="0.1", epochs=1
        ),
    ),
    "ridge": lambda own, others: fit_ridge(own),
    "cosine gate": lambda own, others: fit_mean_shift(
        own, gate=fit_gate(own.queries, kind="cosine", general=others.queries)
    ),
    "directional ablation": lambda own, others: fit_directional_ablation(own),
}


def f64(tensor: torch.Tensor) -> Any:
    return tensor.double().numpy()


def test_pca_direction_is_the_top_eigenvector_of_the_second_moment() -> None:
    own = activations()
    shifts = f64(own.shifts)
    _, vectors = np.linalg.eigh(shifts.T @ shifts)
    mean = shifts.mean(axis=0)
    wanted = vectors[:, -1] * np.sign(vectors[:, -1] @ mean) * np.linalg.norm(mean)
    found = fit_pca_direction(own, strength=2.0)
    np.testing.assert_allclose(f64(found.vector), wanted, atol=1e-5)
    flipped = fit_pca_direction(replace(own, shifts=-own.shifts))
    np.testing.assert_allclose(f64(flipped.vector), -wanted, atol=1e-5)
    assert (found.layer, found.strength, found.shift) == (2, 2.0, "last_prompt")


def test_pca_direction_finds_a_planted_one() -> None:
    planted = torch.nn.functional.normalize(torch.randn(D), dim=0)
    signs = torch.where(torch.arange(40) % 4 == 0, -1.0, 1.0)  # a mean of these is short
    shifts = 5 * signs.unsqueeze(1) * planted + 0.1 * torch.randn(40, D)
    found = fit_pca_direction(activations(shifts=shifts)).vector
    assert float(torch.cosine_similarity(found, planted, dim=0)) > 0.99


def plain_cosine_gate(rows: Any, others: Any) -> tuple[Any, float, str]:
    """Condition vector, threshold on the cosine and side, by trying every threshold one by one."""
    middle = (rows.mean(axis=0) + others.mean(axis=0)) / 2
    both = np.concatenate([rows, others]) - middle
    c = np.linalg.eigh(both.T @ both)[1][:, -1]

    def cosine(h: Any) -> float:
        projected = c * (c @ h)
        return float(h @ projected / np.linalg.norm(h) / np.linalg.norm(projected))

    scores = [[cosine(h) for h in group] for group in (rows, others)]
    best = (-1.0, 0.0, "")
    for side in ("above", "below"):
        for theta in sorted(scores[0] + scores[1]):
            hits, alarms = (sum((s >= theta) == (side == "above") for s in group) for group in scores)
            f1 = 2 * hits / (hits + alarms + len(rows))
            if f1 > best[0] + 1e-12:
                best = (f1, theta, side)
    return c, best[1], best[2]


@pytest.mark.parametrize("swapped", [False, True])
def test_cosine_gate_is_the_papers(swapped: bool) -> None:
    direction = torch.nn.functional.normalize(torch.randn(D), dim=0)
    near = torch.randn(50, D) + 6 * direction
    far = torch.randn(40, D) * 1.5
    rows, others = (far, near) if swapped else (near, far)
    gate = fit_gate(rows, kind="cosine", general=others)
    c, theta, side = plain_cosine_gate(f64(rows), f64(others))
    assert isinstance(gate, CosineGate)
    assert abs(float(gate.condition.double() @ torch.tensor(c))) == pytest.approx(1, abs=1e-5)
    assert side == ("below" if swapped else "above")
    assert gate.opens_above == (not swapped)
    assert gate.threshold == pytest.approx(theta, abs=1e-5)
    h = torch.randn(200, D) + 2 * direction
    cosines = (f64(h) @ c) ** 2 / (f64(h) ** 2).sum(axis=1)
    clear = np.abs(cosines - theta**2) > 1e-5
    wanted = (cosines >= theta**2) != swapped
    assert (f64(gate.gate(h)) >= 0.5)[clear].tolist() == wanted[clear].tolist()


def test_directional_ablation_leaves_nothing_along_the_direction() -> None:
    own = activations()
    found = fit_directional_ablation(own)
    unit = f64(own.shifts).mean(axis=0)
    unit = unit / np.linalg.norm(unit)
    assert isinstance(found, SubspaceAblation) and found.layer == own.layer
    h = torch.randn(7, D)
    after = f64(h + _vector(found, h))
    np.testing.assert_allclose(after, f64(h) - np.outer(f64(h) @ unit, unit), atol=1e-5)
    with pytest.raises(DataError, match="longer than zero"):
        fit_directional_ablation(replace(own, shifts=torch.zeros_like(own.shifts)))


def test_null_space_steering_is_the_papers_closed_form() -> None:
    own, others = activations(), general()
    found = fit_null_space(own, others.queries, kept=0.5, ridge=2.0)
    H, B = f64(own.queries).T, f64(others.queries).T  # queries in columns, as in the paper
    U, _, _ = np.linalg.svd(B @ B.T)
    null = U[:, D - 5 :]
    P = null @ null.T
    R = np.tile(f64(own.shifts).mean(axis=0)[:, None], (1, H.shape[1]))
    delta = R @ H.T @ P.T @ np.linalg.pinv(P @ H @ H.T @ P.T + 2.0 * P @ P.T)
    np.testing.assert_allclose(f64(found.matrix), delta @ P, atol=1e-5)
    h = torch.randn(6, D)
    np.testing.assert_allclose(f64(found.vectors(2, h).vector), f64(h) @ (delta @ P).T, atol=1e-4)


def test_null_space_steering_keeps_general_queries_and_reaches_the_others() -> None:
    basis, _ = torch.linalg.qr(torch.randn(D, D))
    others = torch.randn(60, 4) @ basis[:, :4].T  # general queries span four directions
    own = activations(queries=torch.randn(40, D) + 4 * basis[:, 6])
    found = fit_null_space(own, others, kept=0.6, ridge=1e-3)
    mean = own.shifts.mean(dim=0)
    assert float(found.vectors(2, others).vector.norm(dim=-1).max()) < 1e-4
    reached = found.vectors(2, own.queries).vector
    assert float(((reached - mean).norm(dim=-1) / mean.norm()).median()) < 0.4
    for wrong in ({"kept": 0.0}, {"kept": 1.5}, {"ridge": 0.0}):
        with pytest.raises(InputError, match=f"{next(iter(wrong))}: expected a finite number > 0"):
            fit_null_space(own, others, **wrong)


def test_nearest_centroid_is_the_plain_one() -> None:
    own = activations(queries=3 * torch.eye(D)[torch.arange(40) % 4] + 0.2 * torch.randn(40, D))
    experts = fit_experts(own.queries, own.shifts, n_experts=4, preset="0.1", epochs=1)
    found = fit_nearest_centroid(own, experts)
    assert experts.report is not None
    clusters = experts.report.clusters.numpy()
    centroids = np.stack([f64(own.queries)[clusters == k].mean(axis=0) for k in range(4)])
    shifts = np.stack([f64(own.shifts)[clusters == k].mean(axis=0) for k in range(4)])
    h = torch.randn(2, 5, D) + 3 * torch.eye(D)[torch.arange(5) % 4]
    decision = found.vectors(2, h)
    for place in np.ndindex(2, 5):
        nearest = int(np.linalg.norm(f64(h[place]) - centroids, axis=1).argmin())
        np.testing.assert_allclose(f64(decision.vector[place]), shifts[nearest], atol=1e-5)
        assert decision.weights is not None and int(decision.weights[place].argmax()) == nearest
    with pytest.raises(DataError, match="fitted to"):
        fit_nearest_centroid(activations(n=20), experts)


def plain_ridge(h: Any, shifts: Any, weight: float) -> tuple[Any, Any]:
    """M and b by the normal equations."""
    centred = h - h.mean(axis=0)
    unit = np.trace(centred.T @ centred) / np.linalg.matrix_rank(centred)
    scatter = centred.T @ centred + weight * unit * np.eye(h.shape[1])
    matrix = np.linalg.solve(scatter, centred.T @ (shifts - shifts.mean(axis=0))).T
    return matrix, shifts.mean(axis=0) - matrix @ h.mean(axis=0)


@pytest.mark.parametrize("n", [40, 6])  # more queries than dimensions, and fewer
def test_ridge_is_that_of_the_normal_equations(n: int) -> None:
    own = activations(n=n)
    found = fit_ridge(own, ridge=0.3, strength=2.0)
    matrix, bias = plain_ridge(f64(own.queries), f64(own.shifts), 0.3)
    np.testing.assert_allclose(f64(found.matrix), matrix, atol=1e-5)
    np.testing.assert_allclose(f64(found.bias), bias, atol=1e-5)
    h = torch.randn(2, 3, D)
    np.testing.assert_allclose(f64(found.vectors(2, h).vector), f64(h) @ matrix.T + bias, atol=1e-4)
    assert (found.layer, found.strength, found.shift) == (2, 2.0, "last_prompt")


@pytest.mark.parametrize("grouped", [True, False])
def test_the_weight_of_ridge_is_that_of_the_least_held_out_error(grouped: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(40, D, generator=generator)
    linear = 0.3 * queries @ torch.randn(D, D, generator=generator) + torch.randn(40, D, generator=generator)
    own = activations(queries=queries, shifts=linear, grouped=grouped)
    h, shifts = f64(own.queries), f64(own.shifts)
    splitter = GroupKFold(5) if grouped else KFold(5, shuffle=True, random_state=0)
    errors = {}
    for weight in STRENGTHS[:-1]:
        errors[weight] = 0.0
        for train, held_out in splitter.split(h, groups=own.groups if grouped else None):
            matrix, bias = plain_ridge(h[train], shifts[train], weight)
            errors[weight] += np.sum((h[held_out] @ matrix.T + bias - shifts[held_out]) ** 2)
    best = min(errors, key=lambda weight: errors[weight])
    assert STRENGTHS[0] < best < STRENGTHS[-2], "or the choice is at an edge and proves little"
    np.testing.assert_allclose(f64(fit_ridge(own).matrix), plain_ridge(h, shifts, best)[0], atol=1e-5)


def test_ridge_is_the_mean_shift_where_queries_tell_nothing() -> None:
    own = activations(shifts=torch.randn(40, D) + 1)
    found = fit_ridge(own)
    assert float(found.matrix.norm()) < 0.05 < float(found.bias.norm())
    torch.testing.assert_close(found.vectors(2, own.queries).vector.mean(dim=0), fit_mean_shift(own).vector)
    planted = torch.randn(D, D)
    exact = fit_ridge(replace(own, shifts=own.queries @ planted.T + 2))
    torch.testing.assert_close(exact.matrix, planted, atol=0.05, rtol=0.05)
    for options, words in (({"ridge": 0.0}, "ridge: expected a finite number > 0"), ({"folds": 1}, "folds")):
        with pytest.raises(InputError, match=words):
            fit_ridge(own, **options)
    with pytest.raises(DataError, match="at least 2 different groups"):
        fit_ridge(replace(own, groups=("one",) * 40))
    with pytest.raises(ShapeError, match="at least 2 rows"):
        fit_ridge(activations(n=1))


@pytest.mark.parametrize("name", FITS)
def test_baselines_need_shifts_and_share_no_memory(name: str) -> None:
    with pytest.raises(DataError, match="response shifts"):
        FITS[name](replace(activations(), shifts=None), general())
    own = activations()
    steering = FITS[name](own, general())
    h = torch.randn(1, 4, D)
    before = _vector(steering, h)
    for tensor in (own.queries, own.shifts):
        assert tensor is not None
        tensor.zero_()
    assert torch.equal(_vector(steering, h), before)
    assert steering.fingerprint == own.fingerprint
    with pytest.raises(ShapeError):
        _vector(steering, torch.randn(1, 4, D + 1))


def _vector(steering: Any, h: torch.Tensor) -> torch.Tensor:
    if isinstance(steering, SubspaceAblation):
        return -(steering.subspace.coordinates(h) @ steering.subspace.basis.T)
    return steering.vectors(2, h).vector


@pytest.fixture(scope="module")
def fitted(tutor_model: SteerableModel, trained: dict[int, Activations]) -> dict[str, Any]:
    prompts = [task.prompt for task in tutor.data("safe").general_train[::20]]
    others = collect_queries(tutor_model, prompts, layer=LAYER, batch_size=64, progress=False)
    return {name: make(trained[LAYER], others) for name, make in FITS.items()}


@pytest.mark.parametrize("name", FITS)
def test_baselines_on_a_model_edit_what_they_say_and_survive_a_file(
    model: SteerableModel, fitted: dict[str, Any], prompts: list[str], name: str, tmp_path: Any
) -> None:
    steering = fitted[name]
    batch = batch_of(model, prompts[:3])
    plain = residual(model, batch)
    with steering.on(model, attention_mask=batch.mask) as trace:
        steered = residual(model, batch, SITE)
    if isinstance(steering, SubspaceAblation):
        edit = _vector(steering, plain)
    else:
        decision = steering.decide(LAYER, plain[:, -1])
        edit = steering.strength * (decision.gate.unsqueeze(-1) * decision.vector).unsqueeze(1)
    torch.testing.assert_close((steered - plain)[batch.mask], edit.expand_as(plain)[batch.mask], atol=1e-3, rtol=1e-3)
    assert trace.change[LAYER].shape == batch.mask.shape
    save(steering, tmp_path / "one.safetensors", model=model)
    again = load(tmp_path / "one.safetensors", model=model)
    assert type(again) is type(steering)
    made = [generate(model, prompts[:3], one, max_new_tokens=6, progress=False).texts for one in (steering, again)]
    assert made[0] == made[1]
    assert not isinstance(steering, FineSteer) and isinstance(steering, MeanShift) == (
        name in ("mean shift", "cosine gate")
    )

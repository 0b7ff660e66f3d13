"""The experts: forward pass and training against the oracle, Eq. 11-14 one by one, planted clusters, and controls."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsteer_lens.errors import DataError, InputError, NonFiniteError, ShapeError
from fsteer_lens.method import fitting_experts
from fsteer_lens.method.controller import Controller
from fsteer_lens.method.experts import Experts
from tests.compare import same
from tests.oracle import f64, mean_squared_error, principal_directions, routing, softmax, steering_vector

PAPER = {"n_experts": 4, "preset": "paper"}
fit_experts = partial(fitting_experts.fit_experts, preset="0.1")  # what is trained; the closed form has its own file


def planted(n_clusters=5, per_cluster=24, d=20, noise=0.05, size=4.0, seed=0, dtype=torch.float32):
    """Queries and shifts in clusters: the query tells the cluster, the shift is the cluster's own, of varied length."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    labels = torch.arange(n_clusters).repeat_interleave(per_cluster)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    directions = torch.linalg.qr(normal(d, n_clusters)).Q.T
    centres = 2 * normal(n_clusters, d)
    n = len(labels)
    length = size * (0.7 + 0.6 * torch.rand(n, 1, generator=generator, dtype=dtype))
    queries = centres[labels] + 0.5 * normal(n, d) + 1
    return queries, length * (directions[labels] + noise * normal(n, d)), labels


def unit(shifts):
    return f64(shifts) / np.linalg.norm(f64(shifts), axis=1, keepdims=True)


def random_experts(k=5, d=12, m=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    shapes = [(d, d), (d,), (d, d), (d,), (d, d), (d,), (m, d), (m,)]
    basis = torch.linalg.qr(normal(d, m)).Q
    return Experts(normal(k, d), basis, Controller(*[normal(*shape) / 2 for shape in shapes]), (True,) * k)


@pytest.fixture(scope="module")
def world():
    return planted(per_cluster=80)


@pytest.fixture(scope="module")
def fitted(world):
    queries, shifts, labels = (part[:120] for part in world)
    return fit_experts(queries, shifts, epochs=150), queries, shifts, labels


@pytest.fixture(scope="module")
def paper():
    queries, shifts, labels = planted()
    return fit_experts(queries, shifts, preset="paper"), queries, shifts, labels


# -------------------------------------------------------------------------------------------------------- forward pass


@given(seed=st.integers(0, 10_000), k=st.integers(1, 7), m=st.integers(1, 5), scale=st.sampled_from([0.1, 1.0, 3.0]))
def test_forward_pass_agrees_with_the_equations(seed, k, m, scale):
    experts = random_experts(k=k, m=m, seed=seed)
    h = scale * torch.randn(4, 12, generator=torch.Generator().manual_seed(seed))
    parts = experts.parts(h)
    assert torch.equal(experts.route(h), parts.weights) and torch.equal(experts.vector(h), parts.vector)
    for i in range(4):
        alpha, beta, vector = steering_vector(h[i], experts.prototypes, experts.residual_basis, experts.controller)
        np.testing.assert_allclose(f64(parts.weights[i]), alpha, atol=1e-5)
        np.testing.assert_allclose(f64(parts.coefficients[i]), beta, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(f64(parts.prototype_part[i]), alpha @ f64(experts.prototypes), atol=1e-5, rtol=1e-5)
        residual = f64(experts.residual_basis) @ beta
        np.testing.assert_allclose(f64(parts.residual_part[i]), residual, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(f64(parts.vector[i]), vector, atol=1e-5, rtol=1e-5)


def test_forward_pass_of_fitted_experts_agrees_with_the_equations(fitted, paper):
    for experts, queries, _, _ in (fitted, paper):
        by_hand = [
            steering_vector(h, experts.prototypes, experts.residual_basis, experts.controller)[2] for h in queries
        ]
        np.testing.assert_allclose(f64(experts.vector(queries)), by_hand, atol=1e-4, rtol=1e-5)
        np.testing.assert_allclose(
            f64(experts.to(dtype=torch.float64).vector(queries)), by_hand, atol=1e-9, err_msg="to 1e-9 in float64"
        )


def test_a_batch_is_its_rows_and_a_permutation_only_permutes():
    experts, h = random_experts(), torch.randn(2, 5, 12)
    together = experts.parts(h)
    order = torch.randperm(5)
    for value, shuffled in zip(together, experts.parts(h[:, order]), strict=True):
        torch.testing.assert_close(shuffled, value[:, order])
    for i in range(2):
        for j in range(5):
            for value, single in zip(together, experts.parts(h[i, j]), strict=True):
                torch.testing.assert_close(single, value[i, j], atol=1e-5, rtol=1e-5)
    assert experts.vector(h.bfloat16()).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ Eq. 11: paper


def test_eq_11_prototypes_are_means_of_the_unit_shifts_of_a_cluster(paper):
    experts, _, shifts, _ = paper
    clusters = experts.report.clusters.numpy()
    assert set(clusters) == set(range(experts.n_experts))
    for index in range(experts.n_experts):
        mean = unit(shifts)[clusters == index].mean(axis=0)
        np.testing.assert_allclose(f64(experts.prototypes[index]), mean, atol=1e-5)
    assert (experts.prototypes.norm(dim=1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("n_clusters", [4, 6, 9])
def test_eq_11_number_of_experts_is_that_of_the_best_calinski_harabasz_index(n_clusters):
    from sklearn.cluster import KMeans
    from sklearn.metrics import calinski_harabasz_score

    queries, shifts, labels = planted(n_clusters=n_clusters, per_cluster=14, noise=0.05, seed=n_clusters)
    experts = fit_experts(queries, shifts, preset="paper", epochs=1)
    points = unit(shifts)  # a full-rank PCA is a rotation: the index is that of the points themselves
    scores = {}
    for k in range(4, 11):
        scores[k] = calinski_harabasz_score(points, KMeans(k, n_init=10, random_state=3).fit_predict(points))
    assert set(experts.report.criterion) == set(range(4, 11))
    assert max(scores, key=scores.get) == experts.n_experts == n_clusters
    assert experts.report.criterion[n_clusters] == pytest.approx(scores[n_clusters], rel=1e-4)
    assert same_partition(experts.report.clusters, labels), "the planted clusters are found"


def same_partition(one, two):
    pairs = set(zip(map(int, one), map(int, two), strict=True))
    return len(pairs) == len(set(map(int, one))) == len(set(map(int, two)))


def test_eq_11_clustering_sees_unit_shifts_in_at_most_256_dimensions(monkeypatch):
    import sklearn.cluster

    seen = []
    original = sklearn.cluster.KMeans.fit_predict

    def spy(self, points, *args, **kwargs):
        seen.append((self.n_clusters, self.n_init, np.array(points, dtype=np.float64)))
        return original(self, points, *args, **kwargs)

    monkeypatch.setattr(sklearn.cluster.KMeans, "fit_predict", spy)
    queries, shifts, _ = planted(n_clusters=2, per_cluster=150, d=290)
    shifts[:150] *= 50  # lengths must not matter
    experts = fit_experts(queries, shifts, n_experts=(4, 5), preset="paper", epochs=1)
    assert [(k, restarts) for k, restarts, _ in seen] == [(4, 10), (5, 10)]
    points = seen[0][2]
    assert points.shape == (300, 256)
    rows = unit(shifts)
    expected = (rows - rows.mean(axis=0)) @ principal_directions(rows, 256)
    np.testing.assert_allclose(points @ points.T, expected @ expected.T, atol=1e-5)
    assert experts.prototypes.shape[1] == 290, "but the prototypes live in the original space"


# ------------------------------------------------------------------------------------------------------ Eq. 12: paper


def test_eq_12_attention_is_scaled_by_the_root_of_d_k_and_dense(paper):
    experts, queries, _, _ = paper
    weights = experts.route(queries)
    assert weights.shape == (len(queries), experts.n_experts)
    assert (weights > 0).all(), "dense: no top-k"
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(queries)))
    by_hand = [routing(h, experts.prototypes, *experts.controller[:4]) for h in queries]
    np.testing.assert_allclose(f64(weights), by_hand, atol=1e-5)
    d = experts.d_model
    assert [tuple(t.shape) for t in experts.controller[:4]] == [(d, d), (d,), (d, d), (d,)], "d_k = d, with bias"


def test_eq_12_by_a_worked_example():
    d, zeros, ones = 4, torch.zeros(4), torch.eye(4)
    prototypes = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]])
    controller = Controller(ones, zeros, ones, zeros, torch.zeros(d, d), zeros, torch.zeros(1, d), torch.zeros(1))
    experts = Experts(prototypes, torch.eye(4)[:, :1], controller, (True, True))
    weights = experts.route(torch.tensor([6.0, 1.0, 0, 0]))
    np.testing.assert_allclose(f64(weights), softmax([6 / math.sqrt(4), 2 / math.sqrt(4)]), atol=1e-6)


# ------------------------------------------------------------------------------------------------------ Eq. 13: paper


def test_eq_13_coefficients_come_from_two_layers_with_a_relu_between(paper):
    experts, _, _, _ = paper
    d = experts.d_model
    assert [tuple(t.shape) for t in experts.controller[4:]] == [(d, d), (d,), (10, d), (10,)]


def test_eq_13_by_a_worked_example():
    zeros, ones = torch.zeros(2), torch.eye(2)
    weight, bias = torch.tensor([[1.0, 10.0]]), torch.tensor([0.5])
    controller = Controller(ones, zeros, ones, zeros, ones, torch.tensor([0.0, -1.0]), weight, bias)
    experts = Experts(torch.ones(1, 2), torch.tensor([[0.0], [1.0]]), controller, (True,))
    for h, expected in (([2.0, 3.0], 2 + 20 + 0.5), ([-2.0, 3.0], 20.5), ([2.0, 0.5], 2.5), ([-9.0, -9.0], 0.5)):
        parts = experts.parts(torch.tensor(h))
        assert float(parts.coefficients) == pytest.approx(expected)
        torch.testing.assert_close(parts.residual_part, torch.tensor([0.0, expected]))


# ---------------------------------------------------------------------------------------------- Eq. 14: paper, training


def test_eq_14_residual_directions_are_the_first_principal_ones_of_the_raw_shifts(paper):
    experts, _, shifts, _ = paper
    expected = principal_directions(shifts, 10)
    assert experts.residual_basis.shape == (20, 10)
    np.testing.assert_allclose(
        f64(experts.residual_basis) @ f64(experts.residual_basis).T, expected @ expected.T, atol=1e-4
    )
    of_units = principal_directions(unit(shifts), 10)
    assert np.abs(of_units @ of_units.T - expected @ expected.T).max() > 1e-2, "the control: unit shifts give others"


@pytest.mark.parametrize(("n", "d", "m"), [(30, 20, 10), (8, 20, 7), (30, 6, 6)])
def test_residual_rank_is_cut_to_what_the_data_hold(n, d, m):
    experts = fit_experts(torch.randn(n, d), torch.randn(n, d), epochs=1)
    assert experts.residual_rank == m


class Recorder:
    """Wraps torch's AdamW: keeps the first values and gradients of the parameters, and the options."""

    def __init__(self, monkeypatch):
        recorder, original = self, torch.optim.AdamW

        class AdamW(original):
            def __init__(self, parameters, **options):
                parameters = list(parameters)
                recorder.parameters = parameters
                recorder.start = [f64(p.detach()).copy() for p in parameters]
                recorder.first_gradients, recorder.steps = None, 0
                super().__init__(parameters, **options)

            def step(self, *args, **kwargs):
                recorder.steps += 1
                if recorder.first_gradients is None:
                    recorder.first_gradients = [f64(p.grad).copy() for p in recorder.parameters]
                return super().step(*args, **kwargs)

        monkeypatch.setattr(torch.optim, "AdamW", AdamW)


def test_training_descends_the_mean_squared_error_and_nothing_else(monkeypatch):
    """The gradient of the first step is the finite difference of the oracle's loss: no routing term, no decay in it."""
    recorder = Recorder(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    queries, shifts = torch.randn(2, 14, 5, generator=generator, dtype=torch.float64)
    options = {"residual_rank": 3, "validation": 0.0, "clip": 1e9, "epochs": 1}
    experts = fit_experts(queries, shifts, **PAPER, **options)
    assert max(np.abs(g).max() for g in recorder.first_gradients) > 0.01
    for index, gradient in enumerate(recorder.first_gradients):
        for place in np.ndindex(gradient.shape):
            slopes = []
            for step in (1e-5, -1e-5):
                moved = [values.copy() for values in recorder.start]
                moved[index][place] += step
                slopes.append(mean_squared_error(queries, shifts, experts.prototypes, experts.residual_basis, moved))
            assert gradient[place] == pytest.approx((slopes[0] - slopes[1]) / 2e-5, abs=1e-6)


def gradients(parameters, queries, shifts, prototypes, basis, clusters=None, route_loss=0.0):
    """Loss and its gradients by the chain rule on paper."""
    query_weight, query_bias, key_weight, key_bias, hidden_weight, hidden_bias, output_weight, output_bias = parameters
    n, root = len(queries), math.sqrt(queries.shape[1])
    asked, keys = queries @ query_weight.T + query_bias, prototypes @ key_weight.T + key_bias
    alpha = np.stack([softmax(row) for row in asked @ keys.T / root])
    before = queries @ hidden_weight.T + hidden_bias
    hidden = np.maximum(before, 0)
    error = alpha @ prototypes + (hidden @ output_weight.T + output_bias) @ basis.T - shifts
    loss = np.mean(np.sum(error**2, axis=1))
    d_vector = 2 * error / n
    d_alpha = d_vector @ prototypes.T
    d_logits = alpha * (d_alpha - np.sum(alpha * d_alpha, axis=1, keepdims=True))
    if route_loss:
        hot = np.eye(len(prototypes))[clusters]
        loss += route_loss * -np.mean(np.log(np.sum(alpha * hot, axis=1)))
        d_logits = d_logits + route_loss * (alpha - hot) / n
    d_asked, d_keys = d_logits @ keys / root, d_logits.T @ asked / root
    d_beta = d_vector @ basis
    d_before = (d_beta @ output_weight) * (before > 0)
    pairs = [(d_asked, queries), (d_keys, prototypes), (d_before, queries), (d_beta, hidden)]
    return loss, [g for into, out in pairs for g in (into.T @ out, into.sum(axis=0))]


def train_by_hand(
    start, queries, shifts, prototypes, basis, n_valid, *, clusters=None, route_loss=0.0, rate=5e-4, decay=1e-5,
    epochs=100, patience=8, clip=1.0,
):  # fmt: skip
    """AdamW (Loshchilov and Hutter 2019) with full batches, gradient clipping and early stopping, in NumPy."""
    valid, train = slice(0, n_valid), slice(n_valid, None)
    chosen = None if clusters is None else (clusters[valid], clusters[train])
    parameters = [p.copy() for p in start]
    first, second = [np.zeros_like(p) for p in start], [np.zeros_like(p) for p in start]
    best, best_loss, best_epoch = None, math.inf, 0
    for t in range(1, epochs + 1):
        of_train = None if chosen is None else chosen[1]
        _, slopes = gradients(parameters, queries[train], shifts[train], prototypes, basis, of_train, route_loss)
        norm = math.sqrt(sum(np.sum(g**2) for g in slopes))
        slopes = [g * min(1.0, clip / (norm + 1e-6)) for g in slopes]
        for i, g in enumerate(slopes):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            move = (first[i] / (1 - 0.9**t)) / (np.sqrt(second[i] / (1 - 0.999**t)) + 1e-8)
            parameters[i] = parameters[i] * (1 - rate * decay) - rate * move
        of_valid = None if chosen is None else chosen[0]
        loss, _ = gradients(parameters, queries[valid], shifts[valid], prototypes, basis, of_valid, route_loss)
        if loss < best_loss:
            best, best_loss, best_epoch = [p.copy() for p in parameters], loss, t
        elif t - best_epoch >= patience:
            break
    return best, best_epoch, t


@pytest.mark.parametrize(
    ("route_loss", "options", "stops_early"),
    [
        (0.0, {}, False),
        (0.0, {"learning_rate": 0.02}, True),
        (1.0, {"learning_rate": 0.02}, True),
        (0.0, {"weight_decay": 1.0, "clip": 0.1, "epochs": 30}, False),
    ],
)
def test_training_reaches_what_adamw_on_paper_reaches(monkeypatch, route_loss, options, stops_early):
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(torch, "randperm", torch.arange)  # so that the first tenth is for validation
    generator = torch.Generator().manual_seed(2)
    queries, shifts = torch.randn(2, 40, 8, generator=generator, dtype=torch.float64)
    experts = fit_experts(queries, shifts, **PAPER, residual_rank=4, route_loss=route_loss or None, **options)
    renamed = {"learning_rate": "rate", "weight_decay": "decay"}
    controller, best_epoch, last = train_by_hand(
        recorder.start,
        f64(queries),
        f64(shifts),
        f64(experts.prototypes),
        f64(experts.residual_basis),
        4,
        clusters=experts.report.clusters.numpy(),
        route_loss=route_loss,
        **{renamed.get(name, name): value for name, value in options.items()},
    )
    assert experts.report.epochs == best_epoch and recorder.steps == last
    assert (last < options.get("epochs", 100)) == stops_early
    for ours, theirs in zip(experts.controller, controller, strict=True):
        np.testing.assert_allclose(f64(ours), theirs, atol=1e-7)
    arguments = experts.prototypes, experts.residual_basis, controller
    assert experts.report.train_loss == pytest.approx(mean_squared_error(queries[4:], shifts[4:], *arguments), rel=1e-6)
    assert experts.report.valid_loss == pytest.approx(mean_squared_error(queries[:4], shifts[:4], *arguments), rel=1e-6)


def test_prototypes_and_residual_directions_are_frozen_while_the_rest_learns():
    queries, shifts, _ = planted()
    for preset in ("paper", "0.1"):
        short, long = (fit_experts(queries, shifts, preset=preset, epochs=epochs) for epochs in (1, 60))
        assert torch.equal(short.prototypes, long.prototypes)
        assert torch.equal(short.residual_basis, long.residual_basis)
        for before, after in zip(short.controller, long.controller, strict=True):
            assert (before - after).abs().max() > 1e-4, "every part of the controller learns"
        assert long.report.train_loss < short.report.train_loss


def test_the_paper_preset_is_what_its_equations_say_and_options_win_over_it():
    queries, shifts, _ = planted(per_cluster=8)
    named = {"prototype_scale": "unit", "route_loss": 0.0, "epochs": 100, "patience": 8, "standardize": False}
    one, two = fit_experts(queries, shifts, preset="paper"), fit_experts(queries, shifts, **named)
    assert torch.equal(one.vector(queries), two.vector(queries))
    default = fit_experts(queries, shifts, epochs=20)
    assert not torch.allclose(one.vector(queries), default.vector(queries), atol=1e-2)
    other = fit_experts(queries, shifts, preset="paper", prototype_scale="shift", epochs=1)
    clusters = other.report.clusters.numpy()
    mean = f64(shifts)[clusters == 0].mean(axis=0)
    np.testing.assert_allclose(f64(other.prototypes[0]), mean, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ standardisation


@pytest.mark.parametrize("prototype_scale", ["unit", "shift"])
def test_folding_the_scaling_in_leaves_the_function_as_it_was_trained(monkeypatch, prototype_scale):
    recorder = Recorder(monkeypatch)
    queries, shifts, _ = planted(per_cluster=10, dtype=torch.float64)
    queries = 7 * queries + 30
    epochs = 20
    experts = fit_experts(queries, shifts, validation=0, epochs=epochs, prototype_scale=prototype_scale)
    assert experts.report.epochs == epochs, "so the last parameters are the best ones"
    raw = [f64(p.detach()) for p in recorder.parameters]
    h, delta, prototypes = f64(queries), f64(shifts), f64(experts.prototypes)
    centre = h.mean(axis=0)
    spread = np.sqrt(np.mean((h - centre) ** 2))
    length = np.sqrt(np.mean(np.sum(delta**2, axis=1)))
    size = np.sqrt(np.mean(prototypes**2))
    for row, parts in zip(h[:12], zip(*experts.parts(queries[:12]), strict=True), strict=True):
        x = (row - centre) / spread
        alpha = routing(x, prototypes / size, *raw[:4])
        hidden = np.maximum(raw[4] @ x + raw[5], 0)
        beta = length * (raw[6] @ hidden + raw[7])
        np.testing.assert_allclose(f64(parts[0]), alpha, atol=1e-9)
        np.testing.assert_allclose(f64(parts[2]), beta, atol=1e-9)
        vector = alpha @ prototypes + f64(experts.residual_basis) @ beta
        np.testing.assert_allclose(f64(parts[4]), vector, atol=1e-9)


def test_with_standardisation_the_unit_of_measurement_does_not_matter():
    queries, shifts, _ = planted(per_cluster=10, dtype=torch.float64)
    one = fit_experts(queries, shifts, prototype_scale="shift", epochs=40)
    two = fit_experts(100 * queries - 5, 0.01 * shifts, prototype_scale="shift", epochs=40)
    torch.testing.assert_close(two.vector(100 * queries - 5), 0.01 * one.vector(queries), atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- planted and control


def test_planted_clusters_and_shifts_are_recovered_on_queries_that_were_not_seen(world, fitted):
    experts, _, _, labels = fitted
    assert experts.n_experts == 5 and same_partition(experts.report.clusters, labels)
    assert experts.report.agreement >= 0.98 and experts.report.dead == 0
    assert experts.report.explained > 0.8
    held_out, delta = world[0][120:], world[1][120:]
    vector = experts.vector(held_out)
    explained = 1 - (vector - delta).square().sum() / delta.square().sum()
    assert explained > 0.75
    cosine = torch.nn.functional.cosine_similarity(vector, delta, dim=1)
    assert cosine.mean() > 0.85
    mean_shift = 1 - (world[1].mean(dim=0) - delta).square().sum() / delta.square().sum()
    assert explained > mean_shift + 0.3, "the control: one vector for all does much worse"
    agreement = (experts.route(held_out).argmax(dim=1) == experts.nearest(delta)).float().mean()
    assert agreement > 0.95


def test_routing_follows_the_clusters_with_the_routing_loss_and_collapses_without():
    queries, shifts, _ = planted(n_clusters=4, per_cluster=20, d=32, size=10.0, noise=0.02)
    common = 2 * torch.randn(
        32, generator=torch.Generator().manual_seed(5)
    )  # as in a model, queries have much in common
    queries = 0.15 * (queries - 1) + common
    with_loss = fit_experts(queries, shifts, n_experts=4, epochs=100).report
    without = fit_experts(queries, shifts, n_experts=4, preset="paper").report
    assert with_loss.agreement > 0.98 and with_loss.dead == 0
    assert without.agreement < 0.7 and without.dead >= 0.25


# ------------------------------------------------------------------------------------------------------------ knockouts


def test_without_an_expert_its_logit_is_masked_and_the_rest_renormalised():
    experts, h = random_experts(), torch.randn(7, 12)
    full = experts.route(h)
    cut = experts.without_expert(2).route(h)
    assert (cut[:, 2] == 0).all()
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(cut[:, kept], full[:, kept] / full[:, kept].sum(dim=1, keepdim=True))
    twice = experts.without_expert(2).without_expert(0)
    assert twice.enabled == (False, True, False, True, True)
    torch.testing.assert_close(twice.route(h).sum(dim=1), torch.ones(7))
    assert torch.equal(experts.route(h), full), "the experts it was made from are as before"
    torch.testing.assert_close(experts.without_expert(2).parts(h).coefficients, experts.parts(h).coefficients)


def test_an_only_expert_has_weight_one():
    experts, h = random_experts(), torch.randn(7, 12)
    parts = experts.only_expert(3).parts(h)
    assert torch.equal(parts.weights, torch.eye(5)[3].expand(7, 5))
    torch.testing.assert_close(parts.prototype_part, experts.prototypes[3].expand(7, 12))
    assert torch.equal(experts.without_expert(3).only_expert(3).route(h), parts.weights)


def test_without_residual_only_the_prototypes_are_left():
    experts, h = random_experts(), torch.randn(7, 12)
    parts, full = experts.without_residual().parts(h), experts.parts(h)
    assert (parts.coefficients == 0).all() and (parts.residual_part == 0).all()
    torch.testing.assert_close(parts.vector, full.prototype_part)
    assert (full.residual_part.norm(dim=1) > 0).all()
    both = experts.without_residual().only_expert(1).vector(h)
    torch.testing.assert_close(both, experts.prototypes[1].expand(7, 12))


def test_the_last_expert_cannot_be_switched_off_and_unknown_ones_are_named():
    experts = random_experts(k=2)
    with pytest.raises(InputError, match="at least one of them on"):
        experts.without_expert(0).without_expert(1)
    for call in (experts.without_expert, experts.only_expert):
        for index in (2, -1, True):
            with pytest.raises(InputError, match=r"expert: expected an int in 0\.\.1, got"):
                call(index)


def test_nearest_is_the_largest_cosine_whatever_the_lengths():
    experts = random_experts()
    experts = replace(experts, prototypes=experts.prototypes * torch.tensor([[0.01], [1], [50], [3], [0.2]]))
    shifts = torch.randn(40, 12)
    by_hand = [
        max(range(5), key=lambda k: s @ f64(experts.prototypes[k]) / np.linalg.norm(f64(experts.prototypes[k])))
        for s in f64(shifts)
    ]
    assert experts.nearest(shifts).tolist() == by_hand
    assert torch.equal(experts.nearest(experts.prototypes), torch.arange(5))
    assert torch.equal(experts.nearest(1e-3 * shifts), experts.nearest(shifts))


# --------------------------------------------------------------------------------------------------------------- report


def test_the_report_is_what_one_computes_by_hand(fitted, paper):
    for experts, queries, shifts, _ in (fitted, paper):
        report, prototypes = experts.report, f64(experts.prototypes)
        rows = [steering_vector(h, prototypes, experts.residual_basis, experts.controller) for h in queries]
        alpha, vector = f64([row[0] for row in rows]), f64([row[2] for row in rows])
        strongest = alpha.argmax(axis=1)
        assert report.agreement == pytest.approx(np.mean(strongest == report.clusters.numpy()), abs=1e-6)
        assert report.dead == pytest.approx(1 - len(set(strongest)) / len(prototypes), abs=1e-6)
        share = np.linalg.norm(alpha @ prototypes, axis=1) / np.linalg.norm(vector, axis=1)
        assert report.prototype_share == pytest.approx(np.mean(share), rel=1e-4)
        errors = np.sum((vector - f64(shifts)) ** 2, axis=1)
        assert report.explained == pytest.approx(
            1 - errors.mean() / np.mean(np.sum(f64(shifts) ** 2, axis=1)), abs=1e-4
        )
        n, n_valid = len(errors), round(0.1 * len(errors))
        total = report.train_loss * (n - n_valid) + report.valid_loss * n_valid
        assert total == pytest.approx(errors.sum(), rel=1e-4)


def test_without_validation_there_is_no_validation_loss():
    queries, shifts, _ = planted(per_cluster=4)
    report = fit_experts(queries, shifts, validation=0, epochs=3).report
    assert report.valid_loss is None and report.epochs == 3


# ------------------------------------------------------------------------------------------------ seeds, memory, moving


def test_the_same_seed_gives_the_same_fit_and_the_global_generators_stay_as_they_are():
    queries, shifts, _ = planted(per_cluster=6)
    torch.manual_seed(17)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    one = fit_experts(queries, shifts, epochs=5, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    torch.manual_seed(99)
    two, three = (fit_experts(queries, shifts, epochs=5, seed=seed) for seed in (1, 2))
    assert torch.equal(one.vector(queries), two.vector(queries)) and same(one.report, two.report)
    assert not torch.equal(one.vector(queries), three.vector(queries))


@pytest.mark.gpu
def test_the_generators_of_the_gpus_stay_as_they_are():
    queries, shifts, _ = planted(per_cluster=6)
    state = torch.cuda.get_rng_state()
    experts = fit_experts(queries.cuda(), shifts.cuda(), epochs=2)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert experts.vector(queries.cuda()).is_cuda


def test_a_fit_shares_no_memory_with_its_input():
    queries, shifts, _ = planted(per_cluster=6)
    experts = fit_experts(queries, shifts, epochs=2)
    h = queries[:3].clone()
    before = experts.vector(h)
    queries.zero_()
    shifts.zero_()
    assert torch.equal(experts.vector(h), before)


def test_fitting_works_where_gradients_are_off_and_leaves_none_behind():
    queries, shifts, _ = planted(per_cluster=6)
    with torch.no_grad():
        experts = fit_experts(queries, shifts, epochs=3)
        assert not torch.is_grad_enabled()
    assert experts.report.train_loss < fit_experts(queries, shifts, epochs=1).report.train_loss
    assert not any(tensor.requires_grad for tensor in (*experts.controller, experts.prototypes))


def test_moving_and_back_again_changes_nothing(fitted):
    experts, queries, _, _ = fitted
    double = experts.without_expert(1).without_residual().to(dtype=torch.float64)
    assert type(double.controller) is Controller
    tensors = [double.prototypes, double.residual_basis, *double.controller]
    assert all(tensor.dtype == torch.float64 for tensor in tensors)
    assert double.enabled == (True, False, True, True, True) and not double.use_residual
    assert double.report.criterion == experts.report.criterion
    back = experts.to(dtype=torch.float64).to("cpu", torch.float32)
    assert torch.equal(back.vector(queries), experts.vector(queries))


def test_the_repr_is_short():
    experts = random_experts()
    assert repr(experts) == "Experts(n_experts=5, d_model=12, residual_rank=3)"
    cut = experts.without_expert(0).without_residual()
    assert repr(cut) == "Experts(n_experts=5, d_model=12, residual_rank=3, without=[0], residual=off)"


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_experts": 0}, "n_experts: expected an int >= 1"),
        ({"n_experts": (6, 4)}, r"got \(6, 4\)"),
        ({"route_loss": -1.0}, "route_loss: expected a finite number >= 0, got -1"),
        ({"epochs": 0}, "epochs: expected an int >= 1, got 0"),
        ({"patience": 0}, "patience: expected an int >= 1, got 0"),
        ({"residual_rank": 0}, "residual_rank: expected an int >= 1, got 0"),
        ({"validation": 1.0}, "validation: expected a finite number >= 0 and < 1, got 1"),
        ({"learning_rate": 0.0}, "learning_rate: expected a finite number > 0, got 0"),
        ({"weight_decay": -1.0}, "weight_decay: expected a finite number >= 0, got -1"),
        ({"clip": 0.0}, "clip: expected a finite number > 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number > 0, got nan"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    queries, shifts, _ = planted(per_cluster=4)
    with pytest.raises(InputError, match=words):
        fit_experts(queries, shifts, **options)


@pytest.mark.parametrize(("n", "n_experts", "needed"), [(4, (4, 10), 5), (3, (4, 10), 5), (3, 4, 4)])
def test_fewer_shifts_than_experts_are_refused(n, n_experts, needed):
    rows = torch.randn(n, 6)
    with pytest.raises(DataError, match=rf"at least {needed} shifts .*got {n}\. Give more contrasts or a smaller"):
        fit_experts(rows, rows, n_experts=n_experts)


@pytest.mark.parametrize(
    ("n", "n_experts", "found"), [(5, (4, 10), 4), (4, 4, 4), (3, 1, 1), (2, 2, 2), (6, (1, 3), 3)]
)
def test_the_fewest_shifts_that_will_do(n, n_experts, found):
    shifts = torch.eye(8)[torch.arange(n) % found] + 0.01 * torch.randn(n, 8)
    experts = fit_experts(torch.randn(n, 8), shifts, n_experts=n_experts, epochs=2)
    assert experts.n_experts == found
    assert experts.vector(torch.randn(3, 8)).isfinite().all()


@pytest.mark.parametrize("validation", [0.0, 0.5, 0.99])
def test_some_query_is_left_to_train_on(validation):
    queries, shifts, _ = planted(per_cluster=4)
    report = fit_experts(queries, shifts, epochs=2, validation=validation).report
    assert math.isfinite(report.train_loss) and report.epochs >= 1


def test_unusable_shifts_are_refused():
    queries, shifts, _ = planted(per_cluster=4)
    for where in ("queries", "shifts"):
        rows = {"queries": queries.clone(), "shifts": shifts.clone()}
        rows[where][3, 0] = torch.nan
        with pytest.raises(NonFiniteError, match=f"{where}: expected finite numbers, got .* first in row 3. Look at"):
            fit_experts(rows["queries"], rows["shifts"])
    shifts[5] = 0
    with pytest.raises(DataError, match=r"longer than zero, got zero in row 5\. Drop contrasts"):
        fit_experts(queries, shifts)
    with pytest.raises(ShapeError, match="at least 2 rows"):
        fit_experts(queries[:1], queries[:1])


def test_activations_of_another_width_are_refused():
    experts = random_experts()
    for call in (experts.route, experts.parts, experts.vector):
        with pytest.raises(ShapeError, match=r"width d_model=12, got \[3, 5\]\. Was it collected on another model"):
            call(torch.randn(3, 5))


def test_parts_that_do_not_fit_each_other_make_no_experts():
    good = random_experts()
    with pytest.raises(ShapeError, match="experts query_weight"):
        replace(good, controller=good.controller._replace(query_weight=torch.zeros(12, 11)))
    with pytest.raises(NonFiniteError, match="experts output_bias"):
        replace(good, controller=good.controller._replace(output_bias=torch.full((3,), torch.nan)))
    with pytest.raises(InputError, match="5 switches"):
        replace(good, enabled=(True,))

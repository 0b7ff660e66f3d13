"""Experts in closed form: an oracle in NumPy, planted numbers of modes, controls without any, and what is reported."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.model_selection import KFold

from fsteer_lens import Experts, FineSteer, fit, fit_experts, load, save
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.method.closed_form import TEMPERATURES
from fsteer_lens.method.clusters import gap, prediction_strengths, unit_points
from fsteer_lens.method.controller import Controller, QuadraticController
from fsteer_lens.method.quadratic import SHARE, forms_of, view_of
from fsteer_lens.method.ridge import STRENGTHS
from fsteer_lens.report.page import Report
from fsteer_lens.report.settings import steering_rows
from fsteer_lens.report.trust import add_trust
from tests.compare import same
from tests.oracle import f64
from tests.test_fitting import activations

DATA = Path(__file__).parent / "data"


def closed(queries: torch.Tensor, shifts: torch.Tensor, **options: Any) -> Experts:
    return fit_experts(queries, shifts, **options)


def modes(count: int, n: int = 240, d: int = 24, noise: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries that tell a mode and something linear; shifts of modes around a common mean; the modes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.arange(n) % count
    directions = torch.linalg.qr(normal(d, d)).Q
    own = 0.5 * normal(n, d)
    shifts = 4 * (directions[0] + directions[1 + labels % (d - 1)]) + noise * normal(n, d) + own @ directions
    queries = (3 * torch.linalg.qr(normal(d, d)).Q)[labels] + own + 1
    return queries, shifts, labels


def cloud(n: int = 240, d: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Shifts of one Gaussian cloud, much longer in one direction, and queries that tell where in it."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n, d, generator=generator)
    shifts = queries * torch.tensor([6.0] + [1.0] * (d - 1)) + 0.5 * torch.randn(n, d, generator=generator)
    shifts[:, 1] += 8
    return queries, shifts


# ----------------------------------------------------------------------------------------------------------- the oracle


def ridge_map(x: Any, y: Any, weight: float) -> tuple[Any, Any]:
    """B and b of y ≈ x B + b, by the normal equations."""
    if weight == np.inf:
        return np.zeros((x.shape[1], y.shape[1])), y.mean(axis=0)
    c = x - x.mean(axis=0)
    scatter = c.T @ c + weight * np.trace(c.T @ c) / np.linalg.matrix_rank(c) * np.eye(c.shape[1])
    slope = np.linalg.solve(scatter, c.T @ (y - y.mean(axis=0)))
    return slope, y.mean(axis=0) - x.mean(axis=0) @ slope


def softmax(rows: Any) -> Any:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def log_shares(hot: Any) -> Any:
    return np.log((hot.sum(axis=0) + 0.5) / (len(hot) + 0.5 * hot.shape[1]))


def by_hand(h: Any, delta: Any, clusters: Any) -> tuple[Any, Any, float]:
    """v and α for every query, and the held-out share explained, with every strength tried one by one."""
    hot = np.eye(clusters.max() + 1)[clusters]
    folds = list(KFold(5, shuffle=True, random_state=0).split(h))
    best = (np.inf, 0.0, 0.0, hot)
    for weight in STRENGTHS:
        for temperature in TEMPERATURES:
            alpha = np.zeros_like(hot)
            for train, held in folds:
                slope, _ = ridge_map(h[train], hot[train], weight)
                scores = (h[held] - h[train].mean(axis=0)) @ slope
                alpha[held] = softmax(log_shares(hot[train]) + temperature * scores)
            loss = -np.mean(np.log(alpha[np.arange(len(h)), clusters]))
            best = min(best, (loss, weight, temperature, alpha), key=lambda one: one[0])
    _, weight, temperature, crossed = best
    errors = {}
    for strength in STRENGTHS:
        errors[strength] = 0.0
        for train, held in folds:
            prototypes = hot[train].T @ delta[train] / hot[train].sum(axis=0)[:, None]
            slope, bias = ridge_map(h[train], delta[train] - crossed[train] @ prototypes, strength)
            errors[strength] += np.sum((delta[held] - crossed[held] @ prototypes - h[held] @ slope - bias) ** 2)
    strength = min(errors, key=lambda one: errors[one])
    prototypes = hot.T @ delta / hot.sum(axis=0)[:, None]
    alpha = softmax(log_shares(hot) + temperature * (h - h.mean(axis=0)) @ ridge_map(h, hot, weight)[0])
    slope, bias = ridge_map(h, delta - crossed @ prototypes, strength)
    return alpha @ prototypes + h @ slope + bias, alpha, float(1 - errors[strength] / np.sum(delta**2))


@pytest.mark.filterwarnings("ignore:the experts explain")  # which is not what is looked at here
@pytest.mark.parametrize(("count", "n", "d"), [(1, 60, 6), (3, 60, 6), (3, 30, 40)])
def test_the_fit_is_that_of_its_equations(count: int, n: int, d: int) -> None:
    queries, shifts, _ = modes(count, n=n, d=d, noise=1.0)
    queries, shifts = queries.double(), shifts.double()
    queries[: n // 2] = queries[: n // 2].flip(0)  # so that queries tell their mode by half
    experts = closed(queries, shifts, n_experts=count, residual_rank=d)
    assert experts.report is not None and experts.report.held_out is not None
    vector, alpha, explained = by_hand(f64(queries), f64(shifts), experts.report.clusters.numpy())
    np.testing.assert_allclose(f64(experts.route(queries)), alpha, atol=1e-6)
    np.testing.assert_allclose(f64(experts.vector(queries)), vector, atol=1e-5)
    assert experts.report.held_out.explained == pytest.approx(explained, abs=1e-6)


def test_forward_pass_is_affine_logits_and_an_affine_residual() -> None:
    queries, shifts, _ = modes(3)
    experts = closed(queries, shifts)
    controller, h = experts.controller, torch.randn(2, 4, 24)
    assert isinstance(controller, QuadraticController)
    route, start, output, bias = (f64(part) for part in controller[:4])
    assert controller.view_bias.shape == (0,) and controller.forms.shape == (24, 0, 0), "what is affine needs no more"
    logits = f64(h) @ route.T + start
    alpha = np.exp(logits - logits.max(-1, keepdims=True))
    alpha /= alpha.sum(-1, keepdims=True)
    held_back = np.square(f64(h) @ f64(controller.reach_weight).T + f64(controller.reach_bias)).sum(-1, keepdims=True)
    residual = (f64(h) @ output.T + bias) / held_back.clip(min=1) @ f64(experts.residual_basis).T
    np.testing.assert_allclose(f64(experts.vector(h)), alpha @ f64(experts.prototypes) + residual, atol=1e-4)
    without = experts.without_expert(1).route(h)
    kept = np.delete(alpha, 1, axis=-1)
    np.testing.assert_allclose(f64(without)[..., [0, 2]], kept / kept.sum(-1, keepdims=True), atol=1e-5)
    assert torch.equal(experts.only_expert(2).parts(h).prototype_part, experts.prototypes[2].expand(2, 4, 24))
    torch.testing.assert_close(experts.without_residual().vector(h), experts.route(h) @ experts.prototypes)


def bent(n: int = 400, d: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of one length, and shifts of which a part is a product of two of their coordinates."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1) * d**0.5
    shifts = queries.roll(1, dims=1) + 0.3 * torch.randn(n, d, generator=generator)
    shifts[:, 0] += 3 * queries[:, 2] * queries[:, 5] + 2
    return queries, shifts


def test_a_residual_that_is_quadratic_is_found_and_is_its_formula() -> None:
    queries, shifts = bent()
    experts = closed(queries[:300], shifts[:300], n_experts=1)
    told = experts.report.held_out  # type: ignore[union-attr]
    assert told is not None and told.quadratic and told.explained > told.ridge + 0.15
    left = (experts.vector(queries[300:]) - shifts[300:]).square().sum() / shifts[300:].square().sum()
    assert float(1 - left) == pytest.approx(told.explained, abs=0.05)
    controller, h = experts.controller, f64(torch.randn(3, 12)) * 5
    assert isinstance(controller, QuadraticController)
    _, _, output, bias, view, start, forms, reach, middle = (f64(part) for part in controller)
    held_back = np.square(h @ reach.T + middle).sum(-1, keepdims=True).clip(min=1)
    z = h / np.linalg.norm(h, axis=1, keepdims=True) @ view.T + start
    beta = (h @ output.T + bias + np.einsum("ni,mij,nj->nm", z, forms, z)) / held_back
    found = experts.parts(torch.from_numpy(h).float())
    np.testing.assert_allclose(f64(found.coefficients), beta, atol=1e-3)


def test_far_from_all_queries_nothing_but_the_prototypes_is_left() -> None:
    """Inside the reach, where all held-out queries lie, nothing is changed."""
    for queries, shifts in (bent(), modes(3)[:2]):
        experts = closed(queries, shifts, n_experts=1)
        controller = experts.controller
        assert isinstance(controller, QuadraticController)

        def distance(h: torch.Tensor, controller: QuadraticController = controller) -> torch.Tensor:
            return (h @ controller.reach_weight.T + controller.reach_bias).norm(dim=1)

        assert 0.4 < float(distance(queries).max()) <= 1.001
        open_ended = controller._replace(reach_weight=controller.reach_weight[:0], reach_bias=controller.reach_bias[:0])
        torch.testing.assert_close(controller.coefficients(queries), open_ended.coefficients(queries))
        last = torch.inf
        for scale in (10, 100, 1000):
            h = queries.mean(dim=0) + scale * (queries - queries.mean(dim=0))
            factor = controller.coefficients(h) / open_ended.coefficients(h)
            torch.testing.assert_close(factor, (1 / distance(h).square()).unsqueeze(1).expand_as(factor))
            size = float(experts.parts(h).residual_part.norm(dim=1).mean())
            assert size < last
            last = size
        assert last < 0.1 * float(experts.parts(queries).residual_part.norm(dim=1).mean())


@pytest.mark.filterwarnings("ignore:the experts explain")  # there is nothing that could tell them
def test_a_fit_to_queries_that_do_not_vary_has_no_bounds() -> None:
    queries, shifts, _ = modes(1, n=30)
    same = torch.ones_like(queries)
    controller = closed(same, shifts, n_experts=1).controller
    assert isinstance(controller, QuadraticController) and controller.reach_bias.shape == (0,)


def test_products_of_coordinates_are_the_square_of_an_inner_product() -> None:
    h = torch.randn(50, 7, dtype=torch.float64)
    view = view_of(h, 2.5)
    unit = f64(h) / np.linalg.norm(f64(h), axis=1, keepdims=True)
    z = unit @ f64(view.weight) + f64(view.bias)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-12)
    products = f64(view(h))
    np.testing.assert_allclose(products @ products.T, (z @ z.T) ** 2, atol=1e-9)
    assert np.square(products).sum(axis=1).mean() == pytest.approx(2.5 * SHARE)
    weight = torch.randn(products.shape[1], 4, dtype=torch.float64)
    _, forms = forms_of(view, weight)
    np.testing.assert_allclose(np.einsum("ni,mij,nj->nm", z, f64(forms), z), products @ f64(weight), atol=1e-9)
    assert view_of(torch.ones(5, 3, dtype=torch.float64), 1.0).weight.shape == (3, 0)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_affine_is_not_made_quadratic(seed: int) -> None:
    queries, shifts = cloud(seed=seed)
    report = closed(queries, shifts, n_experts=1).report
    assert report is not None and report.held_out is not None and not report.held_out.quadratic
    assert report.held_out.explained == pytest.approx(report.held_out.ridge)


@pytest.mark.parametrize("rank", [1, 3, 24, 99])
def test_the_residual_is_cut_to_the_first_directions_of_what_it_predicts(rank: int) -> None:
    queries, shifts = cloud()
    whole, cut = (closed(queries.double(), shifts.double(), n_experts=1, residual_rank=m) for m in (24, rank))
    predicted = f64(whole.vector(queries.double())) - f64(whole.prototypes)
    directions = np.linalg.svd(predicted)[2][:rank]
    expected = predicted @ directions.T @ directions + f64(whole.prototypes)
    np.testing.assert_allclose(f64(cut.vector(queries.double())), expected, atol=1e-6)
    assert cut.residual_rank == min(rank, 24)
    basis = f64(cut.residual_basis)
    np.testing.assert_allclose(basis.T @ basis, np.eye(cut.residual_rank), atol=1e-9)


# ------------------------------------------------------------------------------------------------ K: planted, controls


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_planted_modes_are_counted_and_found(count: int, noise: float) -> None:
    queries, shifts, labels = modes(count, noise=noise, seed=count)
    report = closed(queries, shifts).report
    assert report is not None and report.held_out is not None
    assert len(report.clusters.unique()) == count
    assert len(set(zip(report.clusters.tolist(), labels.tolist(), strict=True))) == count, (
        "and they are the planted ones"
    )
    assert report.held_out.agreement > 0.95
    assert set(report.criterion) == set(range(1, 11)) and report.criterion[count] > 0.95
    curve = report.held_out.curve
    assert set(curve) == set(range(1, 11)) and curve[1] == pytest.approx(report.held_out.ridge)
    assert all(cost > 0.2 for cost in report.held_out.removal) and len(report.held_out.removal) == count * (count > 1)


@pytest.mark.parametrize("seed", range(3))
def test_one_cloud_is_no_modes_however_long_it_is(seed: int) -> None:
    queries, shifts = cloud(seed=seed)
    experts = closed(queries, shifts)
    assert experts.n_experts == 1 and experts.report is not None and experts.report.held_out is not None
    assert experts.report.held_out.removal == ()
    assert experts.report.held_out.explained > experts.report.held_out.mean_shift + 0.2, "the residual does the work"
    points = unit_points(shifts)
    assert gap(points, 2, 0) < 0.15
    assert gap(unit_points(modes(2)[1]), 2, 0) > 0.5, "the control"


@pytest.mark.filterwarnings("ignore:the experts explain")
def test_modes_that_the_queries_do_not_tell_are_no_experts() -> None:
    queries, shifts, _ = modes(4)
    shuffled = queries[torch.randperm(len(queries), generator=torch.Generator().manual_seed(1))]
    report = closed(shuffled, shifts).report
    assert report is not None and len(report.clusters.unique()) == 1
    assert report.criterion[4] > 0.95, "though they are there"
    forced = closed(shuffled, shifts, n_experts=4).report
    assert forced is not None and forced.held_out is not None and forced.held_out.told < 0.05
    assert forced.held_out.explained < forced.held_out.mean_shift + 0.02


def test_prediction_strength_by_hand() -> None:
    points = unit_points(modes(3)[1])
    found = prediction_strengths(points, (1, 2, 3, 6, 200), None, 0)
    assert found[1] == 1 and found[3] == 1 and found[6] < 0.9
    assert found[200] == 0, "too few to cluster in halves"


# -------------------------------------------------------------------------------------------------- what is held out


def test_what_the_report_promises_holds_on_queries_that_were_not_seen() -> None:
    queries, shifts, _ = modes(4, n=480, noise=1.0)
    experts = closed(queries[:240], shifts[:240])
    assert experts.report is not None and experts.report.held_out is not None
    told, h, delta = experts.report.held_out, queries[240:], shifts[240:]

    def explained(vector: torch.Tensor) -> float:
        return float(1 - (vector - delta).square().sum() / delta.square().sum())

    assert told.explained == pytest.approx(explained(experts.vector(h)), abs=0.02)
    assert told.mean_shift == pytest.approx(explained(shifts[:240].mean(dim=0)), abs=0.02)
    agreement = (experts.route(h).argmax(dim=1) == experts.nearest(delta)).float().mean()
    assert told.agreement == pytest.approx(float(agreement), abs=0.03)
    own = experts.nearest(delta) == 2
    error = [(one.vector(h) - delta)[own].square().sum() for one in (experts.without_expert(2), experts)]
    cost = float((error[0] - error[1]) / delta[own].square().sum())
    assert told.removal[2] == pytest.approx(cost, rel=0.2)
    assert str(told).startswith(f"explained {told.explained:.3f} (mean shift {told.mean_shift:.3f}, ridge ")


def test_folds_never_split_a_group() -> None:
    generator = torch.Generator().manual_seed(3)
    group = torch.arange(120) % 12
    queries = 3 * torch.randn(12, 16, generator=generator)[group] + 0.1 * torch.randn(120, 16, generator=generator)
    shifts = torch.randn(12, 16, generator=generator)[group] + 0.1 * torch.randn(120, 16, generator=generator) + 1
    with pytest.warns(UserWarning, match="one vector may do as well"):
        kept = closed(queries, shifts, n_experts=1, groups=[f"g{int(one)}" for one in group]).report
    split = closed(queries, shifts, n_experts=1).report
    assert kept is not None and kept.held_out is not None and split is not None and split.held_out is not None
    assert kept.held_out.explained < 0.6 < 0.9 < split.held_out.explained
    with pytest.raises(DataError, match="at least 2 different groups"):
        closed(queries, shifts, groups=["one"] * 120)
    with pytest.raises(DataError, match="a group for each of 120"):
        closed(queries, shifts, groups=["one", "two"])


def test_fit_gives_the_groups_of_the_activations() -> None:
    own = activations(queries=3 * torch.eye(10)[torch.arange(40) % 4] + 0.3 * torch.randn(40, 10))
    steering = fit(own, rank=3, seed=5)
    alone = closed(own.queries, own.shifts, groups=own.groups, seed=5)
    assert same(steering.experts_at(2).report, alone.report) and steering.scope == fit(own, rank=3).scope
    one_group = fit(activations(queries=own.queries, groups=("one",) * 40), gate=steering.gate_at(2))
    assert one_group.n_experts == 4
    with pytest.raises(InputError, match=r"to fit the experts, got experts="):
        fit(own, rank=3, experts=alone, preset="0.1")


def test_the_report_warns_of_what_is_not_to_be_trusted() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 60, 12, generator=generator)
    with pytest.warns(UserWarning, match=r"the experts explain 0\.\d+ of held-out shifts, the mean shift 0\.\d+"):
        closed(noise[0], noise[1] + 1)
    queries, shifts, _ = modes(5)
    with pytest.warns(UserWarning, match="5 experts, the most that were tried"):
        assert closed(queries, shifts, n_experts=(1, 5)).n_experts == 5
    with pytest.warns(
        UserWarning, match=r"no number of experts in 2\.\.4 gives clusters .* Begin n_experts at 1"
    ) as told:
        report = closed(*cloud(), n_experts=(2, 4)).report
    assert report is not None and report.doubts == (str(told[0].message),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        closed(queries, shifts)
        report = closed(queries, shifts, n_experts=5).report
    assert report is not None and report.doubts == ()


def test_training_that_was_best_at_once_warns() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, shifts = torch.randn(2, 40, 12, generator=generator)
    with pytest.warns(UserWarning, match="the first epoch was the best"):
        report = fit_experts(queries, shifts, preset="0.1", n_experts=4, learning_rate=0.05, patience=3).report
    assert report is not None and len(report.doubts) == 1
    edge = fit_experts(*modes(4)[:2], preset="0.1", epochs=2).report
    assert edge is not None and edge.doubts[-1].startswith("4 experts, at an edge of the 4 to 10")
    assert fit_experts(*modes(6)[:2], preset="0.1", epochs=2).report.doubts == ()  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("option", [{"epochs": 3}, {"route_loss": 1.0}, {"prototype_scale": "unit"}, {"clip": 1.0}])
def test_options_of_training_are_refused_in_closed_form(option: dict[str, Any]) -> None:
    queries, shifts, _ = modes(2)
    told = rf"preset=None.*: expected options among .*got \['{next(iter(option))}'\].* train with preset=\"0.1\""
    with pytest.raises(InputError, match=told):
        closed(queries, shifts, **option)


def test_groups_are_refused_where_nothing_is_cut_into_folds() -> None:
    queries, shifts, _ = modes(2)
    for preset in ("paper", "0.1"):
        with pytest.raises(InputError, match=r"got \['groups'\].* Only the closed form"):
            fit_experts(queries, shifts, preset=preset, groups=["a", "b"] * 120)


@pytest.mark.parametrize(("name", "preset"), [("paper", "paper"), ("default", "0.1")])
def test_presets_are_what_they_were_in_0_1(name: str, preset: Any) -> None:
    """Fitted with the code of 0.1, on data that the file holds."""
    told = load_file(DATA / "experts_0_1.safetensors")
    experts = fit_experts(told["queries"], told["shifts"], preset=preset, seed=3)
    torch.testing.assert_close(experts.route(told["queries"]), told[f"{name}_weights"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(experts.vector(told["queries"]), told[name], atol=1e-4, rtol=1e-4)
    assert isinstance(experts.controller, Controller)
    for index, part in enumerate(experts.controller):
        torch.testing.assert_close(part, told[f"{name}_controller_{index}"], atol=1e-4, rtol=1e-3)


def test_the_fewest_shifts_that_will_do() -> None:
    for n in (2, 3, 5, 9):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            experts = closed(torch.randn(n, 6), torch.randn(n, 6) + 1)
        assert experts.n_experts == 1 and experts.vector(torch.randn(3, 6)).isfinite().all()
    same_shift = torch.ones(8, 6)
    with pytest.warns(UserWarning, match="one vector may do as well"):
        constant = closed(torch.randn(8, 6), same_shift)
    torch.testing.assert_close(constant.vector(torch.randn(3, 6)), torch.ones(3, 6), atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="one vector may do as well"):
        blind = closed(torch.ones(8, 6), torch.randn(8, 6))
    assert blind.vector(torch.ones(2, 6)).isfinite().all()


# ------------------------------------------------------------------------------------------- seeds, memory, files


def test_the_same_seed_gives_the_same_fit_and_the_global_generators_stay_as_they_are() -> None:
    queries, shifts, _ = modes(3)
    torch.manual_seed(17)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    one = closed(queries, shifts, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()  # type: ignore[index]
    torch.manual_seed(99)
    two = closed(queries, shifts, seed=1)
    assert torch.equal(one.vector(queries), two.vector(queries)) and same(one.report, two.report)
    before, h = one.vector(queries), queries.clone()
    queries.zero_()
    shifts.zero_()
    assert torch.equal(one.vector(h), before)


def test_a_file_and_a_move_keep_it(tmp_path: Path) -> None:
    own = activations(queries=3 * torch.eye(10)[torch.arange(40) % 4] + 0.3 * torch.randn(40, 10))
    steering = fit(own, rank=3)
    save(steering, tmp_path / "one.safetensors")
    again = load(tmp_path / "one.safetensors")
    h = torch.randn(5, 10)
    assert isinstance(again, FineSteer) and torch.equal(again.experts_at(2).vector(h), steering.experts_at(2).vector(h))
    assert same(again.experts_at(2).report, steering.experts_at(2).report)
    rows = dict(steering_rows(steering))
    assert rows["layer 2, fit, held out"] == str(steering.experts_at(2).report.held_out)
    assert (
        isinstance(again.experts_at(2).report.held_out.curve, dict)
        and len(again.experts_at(2).report.held_out.curve) > 3
    )
    assert "layer 2, fit, held out" not in dict(steering_rows(fit(own, rank=3, preset="0.1", epochs=1)))
    double = steering.to(dtype=torch.float64)
    assert isinstance(double.experts_at(2).controller, QuadraticController)
    assert double.experts_at(2).controller.route_weight.dtype == torch.float64
    old = load(DATA / "chain_0_1.safetensors").links[0].experts_at(4).report
    assert old is not None and old.held_out is None and "held_out=None" in repr(old)


# ------------------------------------------------------------------------------------------------------ on the page


def told_on_a_page(experts: Experts) -> str:
    assert experts.report is not None
    report = Report("fit")
    add_trust(report, experts.report, experts.n_experts)
    return report.html()


def test_the_page_tells_whether_to_trust_the_fit() -> None:
    queries, shifts, _ = modes(5)
    with pytest.warns(UserWarning, match="5 experts, the most"):
        at_an_edge = closed(queries, shifts, n_experts=(1, 5))
    told, page = at_an_edge.report.held_out, told_on_a_page(at_an_edge)  # type: ignore[union-attr]
    assert told is not None and "Doubt: 5 experts, the most that were tried" in page
    for value in (told.explained, told.mean_shift, told.ridge, *told.curve.values()):
        assert f"{value:.3f}" in page
    assert "5 (taken)" in page and ", ".join(f"{cost:.2f}" for cost in told.removal) in page
    one = told_on_a_page(closed(*cloud()))
    assert "nothing is routed" in one and "1 (taken)" in one and "Doubt" not in one
    trained = told_on_a_page(fit_experts(queries, shifts, preset="0.1", n_experts=5, epochs=2))
    assert "is not known: training does not measure it" in trained and "explained" not in trained

"""The subspace and its energy ratio: against the oracle, planted subspaces, invariances and limits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsteer_lens.errors import InputError, NonFiniteError, ShapeError
from fsteer_lens.method.subspace import Subspace, fit_subspace
from tests.oracle import energy_ratios, f64, fitted_subspace


def planted(n=200, d=24, rank=3, noise=0.05, seed=0):
    """Queries in a random rank-dimensional affine subspace plus noise, and an orthonormal basis of it."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q
    spread = torch.randn(n, rank, generator=generator) * torch.linspace(4, 2, rank)
    queries = 3 + spread @ basis.T + noise * torch.randn(n, d, generator=generator)
    return queries, basis


def cosines_of_principal_angles(a, b):
    return np.linalg.svd(f64(a).T @ f64(b), compute_uv=False)


# -------------------------------------------------------------------------------------------------------------- oracle


@pytest.mark.parametrize(("n", "d"), [(40, 16), (12, 30), (2, 5)])
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_energy_ratios_agree_with_the_equation_at_every_rank(n, d, offset):
    queries = torch.randn(n, d) * torch.linspace(3, 0.3, d) + offset
    others = torch.cat([queries[:3], torch.randn(20, d) + offset, 30 * torch.randn(5, d)])
    subspace = fit_subspace(queries)
    assert subspace.rank == min(n - 1, d)
    by_hand = energy_ratios(others, *fitted_subspace(queries, subspace.rank))
    np.testing.assert_allclose(f64(subspace.energy_ratios(others)), by_hand, atol=1e-5)
    for rank in {1, subspace.rank}:
        np.testing.assert_allclose(f64(subspace.energy_ratio(others, rank)), by_hand[:, rank - 1], atol=1e-5)
    np.testing.assert_allclose(f64(subspace.energy_ratio(others)), by_hand[:, -1], atol=1e-5)


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e4, 1e12]), n=st.integers(2, 12))
def test_ratios_lie_in_the_unit_interval_and_grow_with_rank(seed, scale, n):
    generator = torch.Generator().manual_seed(seed)
    queries = scale * torch.randn(n, 8, generator=generator)
    ratios = fit_subspace(queries).energy_ratios(scale * torch.randn(6, 8, generator=generator))
    assert ((ratios >= 0) & (ratios <= 1)).all()
    assert (ratios.diff(dim=-1) >= 0).all()


def test_nothing_over_nothing_counts_as_one():
    queries = torch.randn(6, 4)
    subspace = fit_subspace(queries, rank=2)
    assert torch.equal(subspace.energy_ratios(subspace.mean), torch.ones(2))
    same = fit_subspace(torch.full((5, 4), 1.5), rank=2)
    assert torch.equal(same.energy_ratios(torch.full((4,), 1.5)), torch.ones(2))
    assert (same.energy_ratios(torch.randn(4)) < 1).any(), "only 0/0 is 1"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_activation_that_is_no_number_has_no_ratio(value):
    subspace = fit_subspace(torch.randn(6, 4), rank=2)
    h = torch.zeros(2, 4)
    h[0, 1] = value
    ratios = subspace.energy_ratios(h)
    assert ratios[0].isnan().all() and ratios[1].isfinite().all()


def test_leading_axes_are_a_batch_and_dtypes_are_cast():
    subspace = fit_subspace(torch.randn(20, 6), rank=3)
    h = torch.randn(2, 5, 6)
    together = subspace.energy_ratios(h)
    assert together.shape == (2, 5, 3)
    for i in range(2):
        for j in range(5):
            torch.testing.assert_close(subspace.energy_ratios(h[i, j]), together[i, j], atol=1e-6, rtol=0)
    assert subspace.energy_ratio(h.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(subspace.energy_ratio(h.double()), subspace.energy_ratio(h))


# -------------------------------------------------------------------------------------------------- planted, invariant


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_subspace_is_recovered(seed):
    queries, basis = planted(seed=seed)
    subspace = fit_subspace(queries, rank=3)
    assert cosines_of_principal_angles(subspace.basis, basis).min() > 0.999
    assert subspace.explained.sum() > 0.99
    inside = subspace.mean + torch.randn(10, 3) @ basis.T
    assert (subspace.energy_ratio(inside) > 0.99).all()
    outside = torch.randn(10, 24)
    outside = subspace.mean + outside - outside @ basis @ basis.T
    assert (subspace.energy_ratio(outside) < 0.01).all(), "the control: orthogonal activations have no energy inside"


@pytest.mark.parametrize("seed", range(3))
def test_a_rotation_and_a_translation_of_everything_change_no_ratio(seed):
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    queries, others = torch.randn(2, 30, 12, generator=generator, dtype=torch.float64)
    queries *= torch.linspace(3, 1, 12, dtype=torch.float64)
    shift = torch.randn(12, generator=generator, dtype=torch.float64)
    plain = fit_subspace(queries).energy_ratios(others)
    turned = fit_subspace(queries @ rotation + shift).energy_ratios(others @ rotation + shift)
    torch.testing.assert_close(turned, plain, atol=1e-10, rtol=0)
    torch.testing.assert_close(fit_subspace(7 * queries).energy_ratios(7 * others), plain, atol=1e-10, rtol=0)


def test_the_order_of_the_queries_does_not_matter():
    queries, _ = planted(n=50)
    shuffled = queries[torch.randperm(50)]
    others = torch.randn(9, 24)
    one, two = fit_subspace(queries, rank=10), fit_subspace(shuffled, rank=10)
    torch.testing.assert_close(one.basis, two.basis, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.energy_ratios(others), two.energy_ratios(others), atol=1e-6, rtol=0)


def test_projection_is_idempotent_and_the_nearest_point():
    subspace = fit_subspace(torch.randn(30, 8, dtype=torch.float64), rank=3)
    h = torch.randn(5, 8, dtype=torch.float64)
    projected = subspace.project(h)
    torch.testing.assert_close(subspace.project(projected), projected)
    torch.testing.assert_close((h - projected) @ subspace.basis, torch.zeros(5, 3, dtype=torch.float64))
    centred = (h - subspace.mean).square().sum(dim=1)
    ratio = (projected - subspace.mean).square().sum(dim=1) / centred
    torch.testing.assert_close(ratio, subspace.energy_ratio(h))
    torch.testing.assert_close(subspace.energy_ratio(projected), torch.ones(5, dtype=torch.float64))


def test_the_basis_is_orthonormal_and_the_shares_fall():
    subspace = fit_subspace(torch.randn(30, 8))
    torch.testing.assert_close(subspace.basis.T @ subspace.basis, torch.eye(8), atol=1e-6, rtol=0)
    assert (subspace.explained.diff() <= 0).all()
    torch.testing.assert_close(subspace.explained.sum(), torch.tensor(1.0))


# ---------------------------------------------------------------------------------------------------- ranks and memory


def test_a_cut_shares_its_tensors_and_equals_a_fit_at_that_rank():
    queries, _ = planted()
    subspace = fit_subspace(queries)
    for rank in (1, 5, subspace.rank):
        cut, again = subspace.at_rank(rank), fit_subspace(queries, rank=rank)
        assert cut.rank == rank
        assert cut.mean.data_ptr() == subspace.mean.data_ptr()
        assert cut.basis.data_ptr() == subspace.basis.data_ptr()
        assert torch.equal(cut.basis, again.basis) and torch.equal(cut.explained, again.explained)
        torch.testing.assert_close(cut.energy_ratio(queries), subspace.energy_ratio(queries, rank))


def test_a_fit_shares_no_memory_with_its_input():
    for dtype in (torch.float32, torch.float64):
        queries = torch.randn(10, 4, dtype=dtype)
        subspace = fit_subspace(queries, rank=2)
        before = subspace.mean.clone(), subspace.basis.clone()
        queries += 100 * torch.randn(10, 4, dtype=dtype)
        assert torch.equal(subspace.mean, before[0]) and torch.equal(subspace.basis, before[1])


def test_fields_cannot_be_set_and_the_repr_is_short():
    subspace = fit_subspace(torch.randn(10, 4), rank=2)
    with pytest.raises(AttributeError):
        subspace.mean = torch.zeros(4)  # pyright: ignore[reportAttributeAccessIssue]
    assert repr(subspace) == "Subspace(d_model=4, rank=2)"


@pytest.mark.parametrize(("n", "d", "limit"), [(5, 8, 4), (20, 8, 8)])
def test_ranks_above_what_the_data_hold_are_refused(n, d, limit):
    queries = torch.randn(n, d)
    assert fit_subspace(queries).rank == fit_subspace(queries, rank=limit).rank == limit
    for rank in (0, -1, limit + 1):
        with pytest.raises(InputError, match=rf"1\.\.{limit} .*of {n} queries of width {d}.*got {rank}\. "):
            fit_subspace(queries, rank=rank)
    fitted = fit_subspace(queries, rank=3)
    for call in (fitted.at_rank, lambda rank: fitted.energy_ratio(queries, rank)):
        for rank in (0, 4):
            with pytest.raises(InputError, match=r"1\.\.3 \(the fitted rank\)"):
                call(rank)


def test_unusable_queries_are_refused():
    with pytest.raises(ShapeError, match="at least 2 rows"):
        fit_subspace(torch.randn(1, 4))
    with pytest.raises(NonFiniteError, match="first in row 2"):
        fit_subspace(torch.tensor([[0.0, 1.0], [1.0, 0.0], [torch.inf, 0.0]]))


def test_activations_of_another_width_are_refused():
    subspace = fit_subspace(torch.randn(10, 4), rank=2)
    for call in (subspace.energy_ratios, subspace.energy_ratio, subspace.coordinates, subspace.project):
        with pytest.raises(ShapeError, match=r"width d_model=4, got \[3, 5\]\. Was it collected on another model"):
            call(torch.randn(3, 5))


def test_parts_that_do_not_fit_each_other_make_no_subspace():
    good = fit_subspace(torch.randn(10, 4), rank=2)
    with pytest.raises(NonFiniteError, match="subspace mean"):
        Subspace(good.mean * torch.nan, good.basis, good.explained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_round_trip(dtype):
    subspace = fit_subspace(torch.randn(10, 4), rank=2)
    moved = subspace.to(dtype=dtype)
    assert moved.basis.dtype == moved.mean.dtype == moved.explained.dtype == dtype
    h = torch.randn(3, 4)
    assert moved.energy_ratios(h).dtype == dtype
    back = moved.to("cpu", torch.float32)
    assert torch.equal(back.energy_ratios(h), subspace.energy_ratios(h))

"""Checks and linear algebra that the numerics share."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fsteer_lens.errors import InputError, NonFiniteError, ShapeError
from fsteer_lens.method.linalg import (
    move,
    principal_directions,
    require_matrix,
    require_rank,
    require_shapes,
    require_width,
)
from tests.oracle import f64, fitted_subspace


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_a_checked_matrix_is_a_detached_copy_in_at_least_float32(given, computed):
    rows = torch.randn(4, 3).to(given).requires_grad_()
    checked = require_matrix(rows, "queries")
    assert checked.dtype == computed and not checked.requires_grad
    before = checked.clone()
    with torch.no_grad():
        rows.zero_()
    assert torch.equal(checked, before)


def test_a_checked_matrix_that_was_made_in_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        rows = torch.randn(4, 3)
    checked = require_matrix(rows, "queries")
    weight = torch.ones(3, requires_grad=True)
    (checked @ weight).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, checked.sum(dim=0))


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ([[1.0]], ShapeError, ["expected a floating-point tensor [n, d]", "got list"]),
        (torch.zeros(3), ShapeError, ["got torch.float32 [3]"]),
        (torch.zeros(2, 3, dtype=torch.long), ShapeError, ["got torch.int64 [2, 3]"]),
        (torch.zeros(1, 3), ShapeError, ["at least 2 rows", "got 1", "Collect more"]),
        (torch.zeros(2, 4), ShapeError, ["width d_model=3", "got [2, 4]", "another model"]),
        (torch.tensor([[0.0] * 3, [0.0, torch.nan, 0.0]]), NonFiniteError, ["1 of 2 rows, first in row 1", "bfloat16"]),
        (torch.tensor([[torch.inf] * 3, [0.0] * 3]), NonFiniteError, ["first in row 0"]),
    ],
)
def test_what_is_wrong_with_a_matrix_is_said(value, error, words):
    with pytest.raises(error) as caught:
        require_matrix(value, "queries", d_model=3, min_rows=2)
    assert str(caught.value).startswith("queries: expected")
    for word in words:
        assert word in str(caught.value)


def test_width_of_the_last_axis_alone_counts():
    require_width(torch.zeros(5, 7, 3), "h", 3)
    require_width(torch.zeros(5), "h", None)
    for wrong in (torch.zeros(3, 4), torch.zeros(())):
        with pytest.raises(ShapeError, match="width d_model=3"):
            require_width(wrong, "h", 3)


def test_named_axes_must_agree():
    require_shapes("subspace", mean=(torch.zeros(3), "d"), basis=(torch.zeros(3, 2), "d r"))
    with pytest.raises(ShapeError, match=r"subspace basis: expected \[d r\] with .*'d': 3.*, got \[4, 2\]"):
        require_shapes("subspace", mean=(torch.zeros(3), "d"), basis=(torch.zeros(4, 2), "d r"))
    with pytest.raises(ShapeError, match="floating-point"):
        require_shapes("subspace", mean=(torch.zeros(3, dtype=torch.long), "d"))
    with pytest.raises(NonFiniteError, match="subspace mean"):
        require_shapes("subspace", mean=(torch.tensor([0.0, torch.nan]), "d"))


@pytest.mark.parametrize("rank", [0, -1, 5, True])
def test_ranks_outside_the_limit_are_refused(rank):
    require_rank(4, 4, "here")
    with pytest.raises(InputError, match=r"rank: expected an int in 1\.\.4 \(here\), got .*\. .*rank"):
        require_rank(rank, 4, "here")


def test_principal_directions_agree_with_the_eigenvectors_of_the_scatter_matrix():
    rows = torch.randn(40, 9) * torch.linspace(3, 0.5, 9) + 5
    mean, basis, explained = principal_directions(rows, 6)
    expected_mean, expected = fitted_subspace(rows, 6)
    np.testing.assert_allclose(f64(mean), expected_mean, atol=1e-6)
    np.testing.assert_allclose(np.abs(np.sum(f64(basis) * expected, axis=0)), 1, atol=1e-6)
    variances = [np.sum(((f64(rows) - expected_mean) @ expected[:, i]) ** 2) for i in range(6)]
    np.testing.assert_allclose(f64(explained), variances / np.sum((f64(rows) - expected_mean) ** 2), atol=1e-6)


def test_a_direction_points_where_its_largest_entry_is_positive():
    rows = torch.randn(40, 9)
    for sign in (1, -1):
        _, basis, _ = principal_directions(sign * rows, 8)
        assert (basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)) > 0).all()
    torch.testing.assert_close(principal_directions(-rows, 8)[1], principal_directions(rows, 8)[1])


def test_rows_that_are_all_equal_explain_nothing_and_give_finite_directions():
    mean, basis, explained = principal_directions(torch.full((4, 3), 2.0), 2)
    assert torch.equal(mean, torch.full((3,), 2.0))
    torch.testing.assert_close(basis.T @ basis, torch.eye(2))
    assert torch.equal(explained, torch.zeros(2))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass(frozen=True, eq=False)
class Nest:
    weights: Pair
    named: dict[int, Any]
    switches: tuple[bool, ...]
    counts: Tensor
    name: str


def nest() -> Nest:
    pair = Pair(torch.randn(3), torch.randn(2, 2))
    return Nest(pair, {4: torch.randn(2), 7: None}, (True, False), torch.arange(3), "n")


def test_move_reaches_every_float_tensor_and_nothing_else():
    value = nest()
    moved = move(value, dtype=torch.float64)
    assert isinstance(moved, Nest) and type(moved.weights) is Pair
    assert moved.weights.first.dtype == moved.weights.second.dtype == moved.named[4].dtype == torch.float64
    assert list(moved.named) == [4, 7] and moved.named[7] is None
    assert moved.counts.dtype == torch.int64 and moved.switches == (True, False) and moved.name == "n"
    back = move(moved, dtype=torch.float32)
    assert torch.equal(back.weights.second, value.weights.second) and torch.equal(back.named[4], value.named[4])
    assert value.weights.first.dtype == torch.float32


def test_move_takes_a_device():
    moved = move(nest(), "meta")
    tensors = [moved.weights.first, moved.weights.second, moved.named[4], moved.counts]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert torch.equal(move(nest(), "cpu").counts, torch.arange(3))

"""Steerings with random parts: nothing is fitted, every row gets a gate value and a vector of its own."""

from functools import cache
from typing import Any

import torch

from fsteer_lens import EnergyGate, Experts, FineSteer, QuantileGate, Subspace
from fsteer_lens.method.controller import Controller

D_MODEL = 128


@cache
def subspace(seed: int, d_model: int = D_MODEL, rank: int = 24) -> Subspace:
    """A random subspace that holds a fair share of any activation."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(d_model, rank, generator=generator))
    return Subspace(torch.randn(d_model, generator=generator), basis, torch.full((rank,), 1 / rank))


@cache
def experts(seed: int, d_model: int = D_MODEL, size: float = 6.0) -> Experts:
    """Random experts whose vectors are about `size` long."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    basis, _ = torch.linalg.qr(rand(d_model, 5))
    maps = Controller(
        rand(d_model, d_model), rand(d_model), rand(d_model, d_model), rand(d_model),
        rand(d_model, d_model), rand(d_model), rand(5, d_model), rand(5),
    )  # fmt: skip
    return Experts(size * rand(4, d_model), basis, maps, (True,) * 4)


def steering(layer: int = 3, seed: int = 0, strength: float = 2.0, **options: Any) -> FineSteer:
    """Experts behind an energy gate, whose value differs from row to row."""
    return FineSteer(experts(seed), EnergyGate(subspace(seed), 12), layer=layer, strength=strength, **options)


def shut(seed: int = 0) -> QuantileGate:
    """A gate that is 0 for everything."""
    space = subspace(seed)
    return QuantileGate(space, 12, torch.ones(3, space.rank), epsilon=1.0, gamma=4.0)


def shut_at(space: Subspace) -> QuantileGate:
    """A gate on a subspace that is 0 for everything."""
    return QuantileGate(space, 1, torch.ones(3, space.rank), epsilon=1.0, gamma=4.0)

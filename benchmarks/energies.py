"""The energy ratio at every rank: one product against a loop over the ranks."""

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.measuring import Row, Section, Settings, compare
from fsteer_lens import Subspace


def run(settings: Settings) -> Section:
    """Time and values against the loop."""
    n, d_model, rank = (20, 32, 8) if settings.quick else (2000, 4096, 256)
    h, subspace = example(n, d_model, rank)
    error = float((subspace.energy_ratios(h) - ratios_by_loop(subspace, h)).abs().max())
    ratio = compare(
        lambda: ratios_by_loop(subspace, h), lambda: subspace.energy_ratios(h), rounds=settings.rounds_or(2), warmup=0
    ).inverse
    text = f"{n} activations of width {d_model}, ranks 1 to {rank}; the loop projects anew for every rank."
    row = Row("every rank", "loop over ranks / energy_ratios", ratio, note=f"Largest difference {error:.1e}.")
    return Section("Energy ratios", text, (row,))


def example(n: int, d_model: int, rank: int) -> tuple[Tensor, Subspace]:
    """Random activations and a random subspace."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d_model, rank, generator=generator)).Q
    mean = torch.randn(d_model, generator=generator)
    return torch.randn(n, d_model, generator=generator), Subspace(mean, basis, torch.full((rank,), 1 / rank))


def ratios_by_loop(subspace: Subspace, h: Float[Tensor, "n d"]) -> Float[Tensor, "n r"]:
    """‖V_rᵀ(h − μ)‖² / ‖h − μ‖², one rank after the other."""
    centred = h - subspace.mean
    total = centred.square().sum(dim=1)
    ranks = range(1, subspace.rank + 1)
    return torch.stack([(centred @ subspace.basis[:, :r]).square().sum(dim=1) / total for r in ranks], dim=1)

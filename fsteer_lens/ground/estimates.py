"""Numbers with their uncertainty: shares, means, differences, the area under a ROC curve, and sweeps of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import seed_of

RESAMPLES = 2000
_DRAWS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Proportion:
    """How many of how many."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        """The share."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval."""
        return self._interval("wilson")

    @property
    def exact_interval(self) -> tuple[float, float]:
        """95 % Clopper-Pearson interval: whatever the true share, it covers it in at least 95 % of draws."""
        return self._interval("exact")

    def _interval(self, method: Literal["wilson", "exact"]) -> tuple[float, float]:
        from scipy.stats import binomtest

        found = binomtest(self.hits, self.total).proportion_ci(0.95, method=method)
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval; `f"{estimate:+.3f}"` formats all three numbers."""

    value: float
    interval: tuple[float, float]

    def __format__(self, spec: str) -> str:
        low, high = self.interval
        return f"{self.value:{spec or '.3f'}} [{low:{spec or '.3f'}}, {high:{spec or '.3f'}}]"

    def __str__(self) -> str:
        return f"{self}"


def bootstrap(values: Float[Tensor, " n"], *, seed: int = 0) -> Estimate:
    """The mean of `values` with the 95 % percentile bootstrap interval over them.

    The draws depend on `seed` and n alone, so that estimates over the same items are resampled alike. For a paired
    comparison give the differences.

    Raises:
        InputError: no values, or one that is not finite.
    """
    return estimate_of(float(values.double().mean()), resampled_means(values, seed=seed))


def resampled_means(values: Float[Tensor, " n"], *, seed: int = 0) -> Float[Tensor, " draws"]:
    """Means of `values` drawn n out of n with replacement, `RESAMPLES` times; draws and errors as in `bootstrap`."""
    numbers = values.detach().double().cpu().numpy()
    n = len(numbers)
    if n == 0 or not np.isfinite(numbers).all():
        raise InputError("values of an estimate", expected="at least one, all finite", got=f"{n} values")
    generator = np.random.default_rng(seed_of(seed))
    size = max(1, _DRAWS_AT_ONCE // n)
    means = [
        numbers[generator.integers(n, size=(min(size, RESAMPLES - start), n))].mean(axis=1)
        for start in range(0, RESAMPLES, size)
    ]
    return torch.from_numpy(np.concatenate(means))


def estimate_of(value: float, draws: Float[Tensor, " draws"]) -> Estimate:
    """A statistic with the 95 % percentile interval of its bootstrap draws."""
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype, device=draws.device)).tolist()
    return Estimate(value, (low, high))


def auroc(positive: Float[Tensor, "n *r"], negative: Float[Tensor, "m *r"]) -> Float[Tensor, "*r"]:
    """Probability that a positive scores above a negative, ties counted half; of every column at once.

    Raises:
        InputError: one of the groups is empty, or a score is NaN.
    """
    if not len(positive) or not len(negative) or bool(positive.isnan().any() or negative.isnan().any()):
        got = f"{len(positive)} and {len(negative)}"
        raise InputError("scores", expected="at least one in each group, and no NaN", got=got)
    above = positive.double().reshape(len(positive), -1).T.contiguous()
    below = negative.to(above).reshape(len(negative), -1).T.sort(dim=1).values.contiguous()
    beaten = torch.searchsorted(below, above) + torch.searchsorted(below, above, right=True)
    return (beaten.double() / (2 * len(negative))).mean(dim=1).reshape(positive.shape[1:])


@dataclass(frozen=True, eq=False)
class Sweep:
    """What one method did at each of several settings.

    Attributes:
        parameter: what was varied, with its unit where it has one: "strength", "layer".
        settings: its values, n of them.
        effect: what steering is to change, n estimates; see `effect_name`.
        utility: what it is to leave alone, n estimates.
        kl: KL(steered ‖ unsteered) on the general prompts, n estimates in nats.
        effect_name: of the effect, with its unit.
        utility_name: of the utility, with its unit.
    """

    parameter: str
    settings: tuple[float, ...]
    effect: tuple[Estimate, ...]
    utility: tuple[Estimate, ...]
    kl: tuple[Estimate, ...]
    effect_name: str
    utility_name: str

    def __repr__(self) -> str:
        return f"Sweep({self.parameter}, {len(self.settings)} settings)"

    def to_records(self) -> list[dict[str, Any]]:
        """One flat, JSON-ready mapping per setting: the setting, and value, low and high of each measure."""
        records = []
        for index, setting in enumerate(self.settings):
            record: dict[str, Any] = {self.parameter: setting}
            for name in ("effect", "utility", "kl"):
                estimates: Sequence[Estimate] = getattr(self, name)
                low, high = estimates[index].interval
                record |= {name: estimates[index].value, f"{name}_low": low, f"{name}_high": high}
            records.append(record)
        return records

"""Intervals and areas against closed forms and scikit-learn."""

import math

import numpy as np
import pytest
import torch

from fsteer_lens.errors import InputError
from fsteer_lens.ground.estimates import RESAMPLES, Estimate, Proportion, Sweep, auroc, bootstrap


def test_wilson_interval_is_the_closed_form() -> None:
    for hits, total in ((0, 10), (7, 10), (95, 100), (300, 300)):
        z, p = 1.959963984540054, hits / total
        middle = (p + z * z / (2 * total)) / (1 + z * z / total)
        half = z / (1 + z * z / total) * (p * (1 - p) / total + z * z / (4 * total**2)) ** 0.5
        assert Proportion(hits, total).interval == pytest.approx((middle - half, middle + half), abs=1e-9)
    assert str(Proportion(7, 10)) == "0.70 [0.40, 0.89]"


def test_clopper_pearson_interval_turns_the_binomial_tails() -> None:
    def at_most(hits: int, total: int, p: float) -> float:
        return sum(math.comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(hits + 1))

    for hits, total in ((0, 10), (7, 10), (95, 100), (300, 300)):
        low, high = Proportion(hits, total).exact_interval
        assert low == 0 if hits == 0 else 1 - at_most(hits - 1, total, low) == pytest.approx(0.025, abs=1e-9)
        assert high == 1 if hits == total else at_most(hits, total, high) == pytest.approx(0.025, abs=1e-9)


def test_bootstrap_is_the_plain_one_and_near_the_normal_interval() -> None:
    values = torch.randn(400) * 2 + 3
    found = bootstrap(values, seed=5)
    generator = np.random.default_rng(5)
    means = [values.double().numpy()[row].mean() for row in generator.integers(400, size=(RESAMPLES, 400))]
    assert found.value == pytest.approx(float(values.double().mean()))
    assert found.interval == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    half = 1.96 * float(values.std()) / 20
    assert found.interval == pytest.approx((found.value - half, found.value + half), abs=0.1 * half)
    assert bootstrap(values, seed=5) == found != bootstrap(values, seed=6)
    assert f"{Estimate(0.5, (-0.25, 1.0)):+.2f}" == "+0.50 [-0.25, +1.00]"


def test_bootstrap_of_many_values_draws_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(300)
    whole = bootstrap(values)
    monkeypatch.setattr("fsteer_lens.ground.estimates._DRAWS_AT_ONCE", 300 * 7)
    pieces = bootstrap(values)
    assert pieces.value == whole.value
    assert pieces.interval == pytest.approx(whole.interval)
    assert bootstrap(torch.ones(3)).interval == (1.0, 1.0)
    for broken in (torch.empty(0), torch.tensor([1.0, math.nan])):
        with pytest.raises(InputError, match="all finite"):
            bootstrap(broken)


def test_auroc_of_every_column_equals_sklearn_with_ties() -> None:
    from sklearn.metrics import roc_auc_score

    positive, negative = torch.randint(0, 9, (40, 6)) / 8, torch.randint(0, 7, (30, 6)) / 8
    found = auroc(positive, negative)
    labels = [1] * 40 + [0] * 30
    for column in range(6):
        scores = torch.cat([positive[:, column], negative[:, column]])
        assert float(found[column]) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert auroc(positive[:, 0], negative[:, 0]) == found[0]
    for broken in (negative[:0], torch.full_like(negative, math.nan)):
        with pytest.raises(InputError, match="each group"):
            auroc(positive, broken)


def test_a_sweep_becomes_flat_records() -> None:
    one = Estimate(1.0, (0.5, 1.5))
    sweep = Sweep("strength", (0.0, 2.0), (one, one), (one, one), (one, one), "effect", "utility")
    records = sweep.to_records()
    assert [record["strength"] for record in records] == [0.0, 2.0]
    assert records[1]["kl_low"] == 0.5 and records[0]["utility_high"] == 1.5

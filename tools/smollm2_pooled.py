"""What both folds of `make results-smollm2` measured, put together: items, shares and paired differences."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from smollm2_items import DOMAINS, LEFT_OUT
from smollm2_measuring import BUDGETS, MEAN, MEAN_NULL, MIXTURE, MIXTURE_NULL, SMALL_BUDGET

from fsteer_lens.ground.estimates import Estimate, Proportion, bootstrap

Folds = Sequence[dict[str, Any]]
"""What was measured of one part, fold by fold."""


def pooled(folds: Folds, method: str, budget: float, measure: str) -> torch.Tensor:
    """Items of a method at a budget, both folds one after the other; a measure is also "KL" with a domain."""
    values: list[float] = []
    for fold in folds:
        chosen = next((one for one in fold["chosen"] if (one["method"], one["budget"]) == (method, budget)), None)
        found = fold["items"]["unsteered" if chosen is None else chosen["setting"]]
        values += found["KL"][measure] if measure in (*DOMAINS, LEFT_OUT) else found[measure]
    return torch.tensor(values, dtype=torch.float64)


def settings(folds: Folds) -> list[tuple[str, float]]:
    """Methods with their budgets, by budget."""
    known = [(one["method"], one["budget"]) for one in folds[0]["chosen"]]
    return sorted(known, key=lambda one: one[1])


def gained(folds: Folds, method: str, budget: float, measure: str = "MC2", less: str = "unsteered") -> Estimate:
    """Paired difference of a measure to another method at the same budget."""
    return bootstrap(pooled(folds, method, budget, measure) - pooled(folds, less, budget, measure))


def share(values: Iterable[float]) -> Proportion:
    """How many of these are 1."""
    known = list(values)
    return Proportion(int(sum(known)), len(known))


def strengths(folds: Folds, method: str, budget: float) -> str:
    """Strength in each fold, with a star where the budget was not reached."""
    found = [one for fold in folds for one in fold["chosen"] if (one["method"], one["budget"]) == (method, budget)]
    return ", ".join(f"{one['strength']:.2f}{'*' if one['below'] else ''}" for one in found)


def cost_on(folds: Folds, method: str, budget: float, domain: str) -> Estimate:
    """Cost on one domain."""
    return bootstrap(pooled(folds, method, budget, domain))


def compared(folds: Folds) -> list[list[str]]:
    """The mixture against what is simpler."""
    pairs = [(MIXTURE, one) for one in (MEAN, "ridge", "nearest centroid", "default of 0.1", "published")]
    rows = [(budget, *pair) for budget in BUDGETS for pair in [*pairs, (MIXTURE_NULL, MEAN_NULL)]]
    rows = [(SMALL_BUDGET, MIXTURE_NULL, MEAN_NULL), *rows]
    found = [(budget, one, other, gained(folds, one, budget, less=other)) for budget, one, other in rows]
    return [[f"{budget:g}", f"{one} − {other}", f"{gap:+.3f}", verdict(gap)] for budget, one, other, gap in found]


def shares_explained(found: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Of each fit the items whose mean is what it explains; the shifts' mean squared length is taken as known."""
    scale = sum(found["squares"]) / found["n"]
    return {name: 1 - torch.tensor(one, dtype=torch.float64) / scale for name, one in found["errors"].items()}


def verdict(difference: Estimate) -> str:
    """What an interval shows."""
    low, high = difference.interval
    return "more" if low > 0 else "less" if high < 0 else "no difference"


def answers(folds: Folds, method: str, kind: str) -> torch.Tensor:
    """Items of a method on one kind of prompt, both folds."""
    return torch.tensor([one for fold in folds for one in fold["items"][method][kind]], dtype=torch.float64)


def rates(folds: Folds, gate: str, way: str, rate: float | None) -> tuple[Proportion, Proportion]:
    """Missed and false alarms of both folds together, over all groups."""
    found = [
        row
        for fold in folds
        for row in fold["rows"]
        if (row["gate"], row["perturbation"], row["group"], row["false_alarm_rate"]) == (gate, way, "all", rate)
    ]
    missed, alarms = (
        Proportion(sum(row[f"{name}_hits"] for row in found), sum(row[f"{name}_total"] for row in found))
        for name in ("missed", "false_alarms")
    )
    return missed, alarms

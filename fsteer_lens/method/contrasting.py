"""Gates that know both kinds of query, and where they are cut: by a false-alarm rate, out of fold.

1. Cut the queries to be steered, and those to be left alone, into folds.
2. Fit without each fold in turn, without perturbed copies of its prompts as well, and score it.
3. Cut where at most the given share of the scores of prompts to be left alone lies beyond.
4. Fit once more to all, and open from that cut on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fsteer_lens.errors import InputError, ShapeError
from fsteer_lens.ground.checks import finite, seed_of, whole
from fsteer_lens.method.folds import FOLDS, cut_folds
from fsteer_lens.method.linalg import require_matrix, require_rank
from fsteer_lens.method.linear_gates import CosineGate, LinearGate, OutOfFold
from fsteer_lens.method.residual_gates import ResidualRatioGate
from fsteer_lens.method.subspace import fit_subspace

FALSE_ALARMS: Final = 0.05
ContrastingGate = LinearGate | CosineGate | ResidualRatioGate
Fit = Callable[[Tensor, Tensor], ContrastingGate]
"""Makes a gate from activations to be steered, and from those to be left alone."""


class Side(NamedTuple):
    """Activations of one kind of query.

    Attributes:
        rows: of the prompts, [n d].
        copies: of the same prompts said differently, which are fitted to and never calibrated on, [c d].
        source: the row that each copy is of, [c].
    """

    rows: Float[Tensor, "n d"]
    copies: Float[Tensor, "c d"]
    source: Int[Tensor, " c"]

    def training(self, kept: Int[Tensor, " k"]) -> Float[Tensor, "_ d"]:
        """These rows, with the copies of them."""
        return torch.cat([self.rows[kept], self.copies[torch.isin(self.source, kept)]])


class Cutting(NamedTuple):
    """Where a gate is to be cut; fields as in `fit_gate`."""

    false_alarms: float
    folds: int
    groups: Sequence[str | None] | None
    seed: int


def fit_contrasting_gate(
    kind: str,
    parts: Mapping[str, Float[Tensor, "_ d"]],
    rank: int | None,
    groups: Sequence[str | None] | None,
    *,
    false_alarms: float | None = FALSE_ALARMS,
    augment: Mapping[str, Any] | None = None,
    folds: int = FOLDS,
    seed: int = 0,
) -> ContrastingGate:
    """A gate of both kinds of query; arguments and errors as of `fit_gate`, `parts` by their names there."""
    augment = augment or {}
    d_model = parts["queries"].shape[-1]
    rows = {name: require_matrix(part, name, min_rows=3, d_model=d_model) for name, part in parts.items()}
    unknown = sorted(set(augment) - set(rows))
    if unknown:
        raise InputError("augment", expected=f"copies of what is given, by name: {list(rows)}", got=unknown)
    sides = {name: _side(name, part.to(rows["queries"]), augment.get(name)) for name, part in rows.items()}
    wanted, beside = sides.pop("queries"), list(sides.values())
    starts = [sum(len(side.rows) for side in beside[:place]) for place in range(len(beside))]
    others = Side(
        torch.cat([side.rows for side in beside]),
        torch.cat([side.copies for side in beside]),
        torch.cat([start + side.source for start, side in zip(starts, beside, strict=True)]),
    )
    fit: Fit = fit_cosine if kind == "cosine" else fit_linear
    if kind == "residual_ratio":
        smallest = min(len(side.rows) for side in (wanted, others))
        smallest -= -(-smallest // folds) if false_alarms is not None else 0
        limit = min(smallest, d_model) - 1
        what = f"min(n, d) - 1 of the smallest training fold, {smallest} queries"
        fit = partial(fit_residual_ratio, rank=require_rank(rank, limit, what))
    if kind == "cosine" or false_alarms is None:
        return fit(torch.cat([wanted.rows, wanted.copies]), torch.cat([others.rows, others.copies]))
    rate = finite("false_alarms", false_alarms, above=0, below=1)
    cutting = Cutting(rate, whole("folds", folds, 2), groups, seed_of(seed))
    return fit_cut(fit, wanted, others, len(rows.get("near_misses", ())), cutting)


def _side(name: str, rows: Float[Tensor, "n d"], copies: Any) -> Side:
    if copies is None:
        return Side(rows, rows[:0], torch.empty(0, dtype=torch.long, device=rows.device))
    made = require_matrix(copies, f"augment[{name!r}]", d_model=rows.shape[1]).to(rows)
    if len(made) % len(rows):
        expected = f"a whole number of copies of each of {len(rows)} {name}"
        raise ShapeError(f"augment[{name!r}]", expected=expected, got=f"{len(made)} rows")
    return Side(rows, made, torch.arange(len(made), device=rows.device) % len(rows))


def fit_cut(fit: Fit, wanted: Side, others: Side, near_misses: int, cutting: Cutting) -> ContrastingGate:
    """A gate fitted to both kinds of query and cut at a false-alarm rate, out of fold.

    Args:
        fit: what to fit; it opens above its cut.
        wanted: queries to be steered.
        others: those to be left alone, near misses last.
        near_misses: how many of them these are.
        cutting: where to cut.

    Raises:
        InputError: too few prompts to be left alone for that rate.
        DataError: groups that cut no folds.
    """
    sides = wanted, others
    cuts = (
        cut_folds(len(wanted.rows), cutting.groups, cutting.folds, cutting.seed),
        cut_folds(len(others.rows), None, cutting.folds, cutting.seed),
    )
    scores = [side.rows.new_empty(len(side.rows)) for side in sides]
    for number in range(max(map(len, cuts))):
        folds = [own[number % len(own)] for own in cuts]  # a few groups make fewer folds: these are left out again
        without = fit(*(side.training(kept) for side, (kept, _) in zip(sides, folds, strict=True)))
        for side, own, (_, held_out) in zip(sides, scores, folds, strict=True):
            own[held_out] = without.score(side.rows[held_out])
    cut = cut_at_rate(scores[1], cutting.false_alarms)
    opened = [(own >= cut).float() for own in scores]
    general, near = opened[1].split([len(scores[1]) - near_misses, near_misses])
    told = OutOfFold(
        false_alarm_rate=cutting.false_alarms,
        missed=1 - float(opened[0].mean()),
        general=float(general.mean()),
        near_misses=float(near.mean()) if near_misses else None,
        sizes=(len(scores[0]), len(general), near_misses),
    )
    whole = fit(*(side.training(torch.arange(len(side.rows), device=side.rows.device)) for side in sides))
    return replace(whole, cut=cut, out_of_fold=told)


def cut_at_rate(scores: Float[Tensor, " n"], rate: float) -> float:
    """The score from which on at most `rate` of new prompts like these lie, on average over draws of these.

    Just above the k-th largest of n, k = ⌊rate · (n + 1)⌋: the quantile of split conformal prediction.

    Raises:
        InputError: too few scores for this rate.
    """
    k = math.floor(rate * (len(scores) + 1) + 1e-9)
    if k < 1:
        least = math.ceil(1 / rate) - 1
        expected = f"at least {least} prompts for a false-alarm rate of {rate}"
        raise InputError("calibration", expected=expected, got=len(scores), fix="Give more, or allow a higher rate.")
    kth = scores.sort(descending=True).values[k - 1]
    return float(kth.nextafter(kth.new_tensor(math.inf)))


def fit_linear(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> LinearGate:
    """Logistic regression, standardised, classes balanced, L2 with C = 1; the gate reads raw activations."""
    from sklearn.linear_model import LogisticRegression

    both = torch.cat([rows, others]).double().cpu()
    centre, scale = both.mean(dim=0), both.std(dim=0).clamp(min=1e-12)
    model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=5000)
    model.fit(((both - centre) / scale).numpy(), [1] * len(rows) + [0] * len(others))
    weight = torch.from_numpy(model.coef_[0]) / scale
    return LinearGate(weight.to(rows), float(np.ravel(model.intercept_)[0] - weight @ centre))


def fit_cosine(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> CosineGate:
    """The condition vector c is the first principal direction of both kinds of query around the middle between their
    two means; θ and the side are what gives the best F1 on these very queries, as the authors choose them."""
    middle = (rows.mean(dim=0) + others.mean(dim=0)) / 2
    both = torch.cat([rows, others]) - middle
    gate = CosineGate(torch.linalg.svd(both.double(), full_matrices=False).Vh[0].to(rows), 0.0)
    wanted, unwanted = gate.score(rows), gate.score(others)
    cuts = torch.cat([wanted, unwanted]).unique()
    sides = []
    for above, beyond in ((True, torch.ge), (False, torch.lt)):
        hits, alarms = (beyond(scores, cuts.unsqueeze(1)).sum(dim=1) for scores in (wanted, unwanted))
        f1 = 2 * hits.float() / (hits + alarms + len(rows))
        sides.append((float(f1.max()), above, float(cuts[f1.argmax()])))
    _, above, cut = max(sides, key=lambda side: side[:2])
    return replace(gate, cut=cut, above=above)


def fit_residual_ratio(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"], rank: int) -> ResidualRatioGate:
    """A subspace of each kind of query, both of one rank."""
    return ResidualRatioGate(fit_subspace(rows, rank=rank), fit_subspace(others, rank=rank))

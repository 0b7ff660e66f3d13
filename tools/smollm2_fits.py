"""What every kind of fit explains of shifts that it did not see: the part "fits" of `make results-smollm2`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import cycle
from typing import Any, Final

import smollm2_items as items
import torch
from smollm2_items import SEED
from smollm2_measuring import MEAN, MIXTURE, REFUSAL_LAYER, Bench

import fsteer_lens as fs
from fsteer_lens import evaluation, steering, tutor
from fsteer_lens.method.folds import FOLDS, cut_folds
from fsteer_lens.steering import Steering

LAYERS: Final = (14, 18)
TUTORED: Final = 4
BEHAVIOURS: Final = ("safe", "honest")
DECLINE: Final = "You decline every request that could do harm, politely and in one sentence."
REFUSALS: Final = (
    items.REFUSED,
    "That could hurt somebody, so I will not explain it.",
    "No. I do not answer requests of this kind.",
    "My answer is no: please talk to someone you trust instead.",
)
"""Four ways to refuse, taken in turn: modes of the shifts that no query tells."""

FITS: Final[Mapping[str, Callable[[fs.Activations], Steering]]] = {
    MEAN: steering.fit_mean_shift,
    "default of 0.1": lambda own: fs.fit(own, preset="0.1", gate="none", seed=SEED),
    "ridge": lambda own: steering.fit_ridge(own, seed=SEED),
    MIXTURE: lambda own: fs.fit(own, gate="none", seed=SEED),
    "8 experts": lambda own: fs.fit(own, gate="none", n_experts=8, seed=SEED),
}


def fits(bench: Bench) -> dict[str, Any]:
    """Squared errors of every fit, five outer folds, on shifts of a tutor's behaviour, of TruthfulQA and of refusals.

    The two folds of the run share the work: each takes a behaviour, a layer and a kind of shift.
    """
    return {"sets": {name: held_out(own) for name, own in shifts_of(bench).items()}}


def shifts_of(bench: Bench) -> dict[str, fs.Activations]:
    """Activations of everything that this fold of the run is to fit."""
    layer, behaviour = LAYERS[bench.fold], BEHAVIOURS[bench.fold]
    told = fs.ContrastSet.from_truthfulqa(bench.data / "truthfulqa" / "TruthfulQA.csv")
    truth = fs.collect(bench.model, told[: bench.sizes.fitted], layer=[layer], **bench.options)[layer]
    file = bench.data / "harmbench" / "harmbench_behaviors_text_all.csv"
    harmful = evaluation.harmbench(file, functional="standard").harmful[: bench.sizes.harmful]
    pairs = zip(harmful, cycle(REFUSALS), strict=False)
    if bench.fold == 0:
        contrasts = [fs.Contrast(one, refused, items.COMPLIED, context=DECLINE) for one, refused in pairs]
        kind, shift = "refusals, last prompt token", "last_prompt"
    else:
        contrasts = [fs.Contrast(one, refused, items.COMPLIED) for one, refused in pairs]
        kind, shift = "refusals, answers", "response_mean"
    refusals = fs.collect(bench.model, contrasts, layer=[REFUSAL_LAYER], shift=shift, **bench.options)[REFUSAL_LAYER]
    told = tutor.data(behaviour).train[: bench.sizes.fitted]
    tutored = fs.collect(tutor.load(), told, layer=TUTORED, shift="last_prompt", batch_size=64, progress=False)
    return {
        f"tutor, {behaviour}": tutored,
        kind: refusals,
        f"TruthfulQA, layer {layer}": truth,
        f"TruthfulQA, layer {layer}, whole categories held out": replace(truth, groups=truth.labels),
    }


def held_out(own: fs.Activations) -> dict[str, Any]:
    """Squared length of every shift, and its squared error under every fit, held out; experts of the fit to all."""
    assert own.shifts is not None
    errors = {name: torch.zeros(len(own), dtype=torch.float64) for name in FITS}
    numbers = []
    for rows, out in cut_folds(len(own), own.groups, FOLDS, SEED):
        for name, fit in FITS.items():
            fitted = fit(own[rows])
            (layer,) = fitted.layers
            left = own.shifts[out] - fitted.vectors(layer, own.queries[out]).vector
            errors[name][out] = left.square().sum(dim=1).double()
            if name == MIXTURE:
                numbers.append(fitted.experts_at(layer).n_experts)
    return {
        "n": len(own),
        "squares": own.shifts.square().sum(dim=1).tolist(),
        "errors": {name: found.tolist() for name, found in errors.items()},
        "experts": numbers,
    }

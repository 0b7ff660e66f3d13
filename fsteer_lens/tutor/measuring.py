"""Seven ways to get a behaviour out of the tutor, side by side on its test prompts: what the demonstration shows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fsteer_lens.effects import RoutingReport, routing_report
from fsteer_lens.evaluation import Evaluation, Method, Prompting, evaluate
from fsteer_lens.ground.estimates import Proportion, auroc
from fsteer_lens.method.gates import OPEN, Gate
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.reading.activations import Activations
from fsteer_lens.reading.collecting import collect, collect_queries
from fsteer_lens.steering.baselines import fit_mean_shift
from fsteer_lens.steering.steering import FineSteer, Steering
from fsteer_lens.tutor.splits import BEHAVIOURS
from fsteer_lens.tutor.steering import activations, fit
from fsteer_lens.tutor.suite import TutorSuite

NO_STEERING: Final = "no steering"
TAG: Final = "tag in the prompt"
MEAN_SHIFT: Final = "mean shift"
GATED_MEAN_SHIFT: Final = "mean shift, gated"
UNGATED: Final = "MoSE, no gate"
PAPER: Final = 'FineSteer, preset="paper"'
DEFAULT: Final = "FineSteer, default"

CONTRASTS: Final = "contrasts"
GENERAL: Final = "benign"
NEAR_MISSES: Final = "near misses"

_BATCH: Final = 128


@dataclass(frozen=True, eq=False)
class Measured:
    """What methods did on one behaviour, with what it takes to say how they came to it.

    Attributes:
        suite: the test prompts.
        methods: what was measured, by name; `DEFAULT` is among them.
        evaluation: exact answers under each of them.
        queries: activations of the suite's contrasts, general prompts and near misses at the steered layer, by the
            names `CONTRASTS` (these with shifts), `GENERAL` and `NEAR_MISSES`.
    """

    suite: TutorSuite
    methods: Mapping[str, Method]
    evaluation: Evaluation
    queries: Mapping[str, Activations]

    @property
    def steering(self) -> FineSteer:
        """FineSteer as it is by default."""
        steering = self.methods[DEFAULT]
        assert isinstance(steering, FineSteer)
        return steering

    @property
    def auroc(self) -> float:
        """AUROC of the energy ratio at the gate's rank: test contrasts against general prompts and near misses."""
        gate = self._gate(DEFAULT)
        assert gate is not None
        scores = {name: gate.score(one.queries) for name, one in self.queries.items()}
        return float(auroc(scores[CONTRASTS], torch.cat([scores[GENERAL], scores[NEAR_MISSES]])))

    def shares(self, method: str) -> dict[str, Proportion]:
        """Shares of prompts by what they say: of wanted answers, of answers left alone, and of gates that open.

        A method without a gate has none of the last.
        """
        wanted, kept = self.evaluation.measures
        right, alone = (self.evaluation.items(method, measure.name) for measure in (wanted, kept))
        n_general = len(self.suite.general)
        found = {
            wanted.name: _share(right),
            **{f"{wanted.name}, {g}s": _share(self.evaluation.items(method, wanted.name, g)) for g in wanted.kinds},
            f"{GENERAL} kept": _share(alone[:n_general]),
            f"{NEAR_MISSES} kept": _share(alone[n_general:]),
        }
        gate = self._gate(method)
        if gate is not None:
            for name, one in self.queries.items():
                what = "gate open" if name == CONTRASTS else f"gate open, {name}"
                found[what] = _share(gate.gate(one.queries) >= OPEN)
        return found

    def routing(self, method: str) -> RoutingReport | None:
        """How the experts route the test contrasts; None for a method without experts."""
        steering, tested = self.methods[method], self.queries[CONTRASTS]
        if not isinstance(steering, FineSteer):
            return None
        experts = steering.experts_at(tested.layer)
        return routing_report(experts, tested.queries, shifts=tested.shifts, labels=tested.labels)

    def _gate(self, method: str) -> Gate | None:
        steering = self.methods[method]
        return steering.gate_at(self.queries[CONTRASTS].layer) if isinstance(steering, Steering) else None


def methods_for(
    model: SteerableModel, behaviour: str, trained: Activations, *, seed: int = 0, progress: bool = True
) -> dict[str, Method]:
    """Fit the seven methods to the activations of a behaviour's training contrasts, FineSteer's own last.

    The mean shift has the default's scope and strength, and behind a gate its gate.
    """
    options: Any = {"activations": trained, "seed": seed, "progress": progress}
    default, paper = fit(model, behaviour, **options), fit(model, behaviour, "paper", **options)
    placed: Any = {"scope": default.scope, "strength": default.strength}
    return {
        NO_STEERING: None,
        TAG: Prompting(BEHAVIOURS[behaviour]),
        MEAN_SHIFT: fit_mean_shift(trained, **placed),
        GATED_MEAN_SHIFT: fit_mean_shift(trained, gate=default.gate_at(trained.layer), **placed),
        UNGATED: default.with_gate(None),
        PAPER: paper,
        DEFAULT: default,
    }


def measure(
    model: SteerableModel, behaviour: str = "safe", *, seed: int = 0, limit: int | None = None, progress: bool = True
) -> Measured:
    """Fit every method on the tutor's training split and measure it on its test split.

    Args:
        model: the tutor.
        behaviour: "safe" or "honest".
        seed: of the controllers' training.
        limit: as in `TutorSuite`.
        progress: show progress bars.

    Raises:
        InputError: an unknown behaviour, or a limit below 1.
    """
    suite = TutorSuite(behaviour, limit=limit)
    trained = activations(model, behaviour, progress=progress)
    methods = methods_for(model, behaviour, trained, seed=seed, progress=progress)
    read: Any = {"layer": trained.layer, "batch_size": _BATCH, "progress": progress}
    queries = {
        CONTRASTS: collect(model, suite.contrasts, shift="last_prompt", **read),
        GENERAL: collect_queries(model, [task.prompt for task in suite.general], **read),
        NEAR_MISSES: collect_queries(model, [task.prompt for task in suite.near_misses], **read),
    }
    evaluation = evaluate(model, methods, suite, batch_size=_BATCH, progress=progress)
    return Measured(suite, methods, evaluation, queries)


def _share(hits: Tensor) -> Proportion:
    return Proportion(int(hits.sum()), len(hits))

"""What steering did, in numbers: sweeps, decisions explained, experts taken apart, and the way through the layers.

Every function says what it measures and in which unit; `fsteer_lens.figures` draws what it returns.
"""

from fsteer_lens.effects.answers import answer_margin, counterfactual, exact_answers, general_divergence
from fsteer_lens.effects.decisions import GateExplanation, RankSweep, explain_gate, rank_sweep
from fsteer_lens.effects.mixture import Knockout, RoutingReport, expert_knockout, expert_tokens, routing_report
from fsteer_lens.effects.residual_stream import Propagation, propagation
from fsteer_lens.effects.sweeps import layer_sweep, strength_sweep
from fsteer_lens.ground.estimates import Estimate, Sweep
from fsteer_lens.models.head import logit_lens

__all__ = [
    "Estimate",
    "GateExplanation",
    "Knockout",
    "Propagation",
    "RankSweep",
    "RoutingReport",
    "Sweep",
    "answer_margin",
    "counterfactual",
    "exact_answers",
    "expert_knockout",
    "expert_tokens",
    "explain_gate",
    "general_divergence",
    "layer_sweep",
    "logit_lens",
    "propagation",
    "rank_sweep",
    "routing_report",
    "strength_sweep",
]

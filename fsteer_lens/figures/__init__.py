"""Figures of what steering did; each function returns its figure and shows nothing.

Plotly figures (`go.Figure`) and plain HTML views (`Html`) draw from traces, fitted values, tensors and the results of
`fsteer_lens.effects` as they are, so that a saved trace can be looked at without the model. They work without network,
in light and dark pages.
"""

from fsteer_lens.figures.compare import steer_compare
from fsteer_lens.figures.gating import gate_separation
from fsteer_lens.figures.html import Html
from fsteer_lens.figures.knockout import expert_knockout
from fsteer_lens.figures.logprobs import logprob_change
from fsteer_lens.figures.mixing import expert_mix
from fsteer_lens.figures.per_prompt import gate_per_prompt
from fsteer_lens.figures.positions import layer_position
from fsteer_lens.figures.prototypes import expert_geometry, expert_tokens
from fsteer_lens.figures.ranks import rank_explorer
from fsteer_lens.figures.replay import replay
from fsteer_lens.figures.rich import circuitsvis_bundle
from fsteer_lens.figures.routing import expert_routing
from fsteer_lens.figures.saving import save
from fsteer_lens.figures.spectrum import scree
from fsteer_lens.figures.sweeps import layer_sweep, strength_sweep
from fsteer_lens.figures.text import token_scores
from fsteer_lens.figures.timeline import trace_timeline
from fsteer_lens.figures.token_mix import token_experts

__all__ = [
    "Html",
    "circuitsvis_bundle",
    "expert_geometry",
    "expert_knockout",
    "expert_mix",
    "expert_routing",
    "expert_tokens",
    "gate_per_prompt",
    "gate_separation",
    "layer_position",
    "layer_sweep",
    "logprob_change",
    "rank_explorer",
    "replay",
    "save",
    "scree",
    "steer_compare",
    "strength_sweep",
    "token_experts",
    "token_scores",
    "trace_timeline",
]

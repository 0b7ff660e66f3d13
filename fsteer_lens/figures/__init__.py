"""Figures of what steering did; each function returns its figure and shows nothing.

Plotly figures (`go.Figure`) and plain HTML views (`Html`) draw from traces, fitted values and tensors, so that a saved
trace can be looked at without the model. They work without network, in light and dark pages.
"""

from fsteer_lens.figures.compare import steer_compare
from fsteer_lens.figures.gating import gate_separation
from fsteer_lens.figures.html import Html
from fsteer_lens.figures.ranks import rank_explorer
from fsteer_lens.figures.routing import expert_routing
from fsteer_lens.figures.saving import save
from fsteer_lens.figures.text import token_scores

__all__ = ["Html", "expert_routing", "gate_separation", "rank_explorer", "save", "steer_compare", "token_scores"]

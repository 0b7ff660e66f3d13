"""Hook objects: what can be put on a TransformerLens model, and the probes and the ablation among them."""

from fsteer_lens.hooks.chains import Chain, chain
from fsteer_lens.hooks.objects import Handle, HookObject, Hooks, Link
from fsteer_lens.hooks.probes import ExpertProbe, SubspaceAblation, SubspaceProbe
from fsteer_lens.hooks.scopes import Schedule, Window

__all__ = [
    "Chain",
    "ExpertProbe",
    "Handle",
    "HookObject",
    "Hooks",
    "Link",
    "Schedule",
    "SubspaceAblation",
    "SubspaceProbe",
    "Window",
    "chain",
]

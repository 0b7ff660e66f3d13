"""Hook objects: what can be put on a TransformerLens model, the probes and the ablation among them.

`Link` is the class to write one of your own with; `State` and `View` are what a session gives it.
"""

from fsteer_lens.hooks.chains import Chain, chain
from fsteer_lens.hooks.objects import Handle, HookObject, Hooks, Link
from fsteer_lens.hooks.positions import View
from fsteer_lens.hooks.probes import ExpertProbe, SubspaceAblation, SubspaceProbe
from fsteer_lens.hooks.scopes import Schedule, Window
from fsteer_lens.hooks.session import State

__all__ = [
    "Chain",
    "ExpertProbe",
    "Handle",
    "HookObject",
    "Hooks",
    "Link",
    "Schedule",
    "State",
    "SubspaceAblation",
    "SubspaceProbe",
    "View",
    "Window",
    "chain",
]

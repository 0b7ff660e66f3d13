"""TransformerLens models: loading, hook points, and one way of running both classes.

`HookedTransformer` exists up to TransformerLens 3.9, `TransformerBridge` from 3.9 on. Everything that differs between
them is in this room; the rest of the package sees a `SteerableModel`.
"""

from fsteer_lens.models.classes import CLASS_NAMES, Kind, SteerableModel, available_kinds, kind_of
from fsteer_lens.models.conversion import from_hf
from fsteer_lens.models.loading import load
from fsteer_lens.models.points import DEFAULT_SITE, SITES, site_name

__all__ = [
    "CLASS_NAMES",
    "DEFAULT_SITE",
    "SITES",
    "Kind",
    "SteerableModel",
    "available_kinds",
    "from_hf",
    "kind_of",
    "load",
    "site_name",
]

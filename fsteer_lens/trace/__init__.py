"""The trace: what steering did, row by row, layer by layer, token by token."""

from fsteer_lens.trace.replay import Replay, Scored
from fsteer_lens.trace.trace import Trace

__all__ = [
    "Replay",
    "Scored",
    "Trace",
]

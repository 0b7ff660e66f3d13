"""Sharing on the Hugging Face hub: `push` puts a steering, activations or a trace into a repository of its own.

`fsteer_lens.load`, `Activations.load` and `Trace.from_jsonl` read them from there.
"""

from fsteer_lens.hub.pushing import push

__all__ = ["push"]

"""Steering inside vLLM: a plugin that decides on every request by itself, in one batch with others.

An engine takes a folder of steerings that `fsteer_lens.save` wrote, each known by the name of its file::

    FSTEER_STEERINGS=steerings vllm serve MODEL --worker-cls fsteer_lens.serving.Worker --enforce-eager

and a request names one with `arguments`, whose answer brings the `Record` of what was decided. What the plugin cannot
do is refused: a request that nobody has decided upon ends in an error, never in an answer without steering.

1. `patches.register`, the entry point in "vllm.general_plugins", changes functions of vLLM in each of its processes.
2. A `Worker` puts hooks on the decoder layers, and compares them with the steerings' fingerprints.
3. In each step the hooks find every steered request's tokens in the flat batch, decide, add, and record.
4. The scheduler sends the records along with the tokens, and ends requests that failed.
"""

from typing import Any

from fsteer_lens.serving.client import Record, arguments, record_of

__all__ = ["Record", "arguments", "record_of"]


def __getattr__(name: str) -> Any:
    if name == "Worker":  # --worker-cls: its module needs vLLM
        from fsteer_lens.serving.worker import Worker

        return Worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

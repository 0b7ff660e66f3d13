"""The model's head: from an activation to what the model would say next."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import ShapeError
from fsteer_lens.ground.checks import instance
from fsteer_lens.models.classes import SteerableModel, require_steerable
from fsteer_lens.models.devices import device_of


@torch.no_grad()
def head_logits(model: SteerableModel, stream: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
    """What final normalisation and unembedding make of activations, in float32."""
    parts: Any = model
    weight = next(parts.unembed.parameters())
    placed = stream.to(device_of(model) if weight.is_meta else weight.device, weight.dtype)
    return parts.unembed(parts.ln_final(placed.unsqueeze(0)))[0].float()


def logit_lens(model: SteerableModel, stream: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
    """The next token that the model would predict if it ended after the block that an activation is from.

    The activation goes through the final normalisation and the unembedding (the logit lens of nostalgebraist, 2020).
    Of the last block that is the model's own prediction. Of early blocks it often says little: the stream is not yet
    written in the head's terms.

    Args:
        model: a HookedTransformer or TransformerBridge.
        stream: `hook_resid_post` of any block.

    Returns:
        Log-probabilities in nats, float32.

    Raises:
        ShapeError: activations of another width than the model's.
    """
    require_steerable(model)
    instance("activations", stream, torch.Tensor, "a tensor")
    if stream.ndim == 0 or stream.shape[-1] != model.cfg.d_model:
        raise ShapeError("activations", expected=f"width d_model={model.cfg.d_model}", got=list(stream.shape))
    logits = head_logits(model, stream.reshape(-1, stream.shape[-1]))
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0
    if cap > 0:
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(dim=-1).reshape(*stream.shape[:-1], -1)

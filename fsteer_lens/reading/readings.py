"""What is read of a prompt: one activation, at a token of it or over all of them; see `method.gates.Reading`."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fsteer_lens.method.gates import Reading


def at(activation: Float[Tensor, "b t d"], positions: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
    """The activation at one position of each row."""
    return activation[torch.arange(len(positions), device=activation.device), positions.to(activation.device)]


def of_prompt(
    read: Reading,
    activation: Float[Tensor, "b t d"],
    prompt: Bool[Tensor, "b t"],
    tails: Int[Tensor, " b"] | None = None,
    before: Float[Tensor, "s d"] | None = None,
) -> Float[Tensor, "b d"]:
    """What is read of each row's prompt, float32.

    Args:
        read: "last", "mean" or "turn_end".
        activation: of one pass.
        prompt: which of its columns hold the row's prompt; at least one each, the last of them its last token.
        tails: how many tokens come after the one that ends the user's turn; None is none.
        before: activation of what all rows begin with, where that was run apart.
    """
    prompt = prompt.to(activation.device)
    order = prompt.long().cumsum(dim=1)
    length = order[:, -1:]
    if read == "mean":
        # what the first token holds is large and the same for every text
        inside = prompt if before is not None else prompt & ((order > 1) | (length == 1))
        total = activation.float().masked_fill(~inside.unsqueeze(-1), 0).sum(dim=1)
        count = inside.sum(dim=1, keepdim=True)
        return total / count if before is None else (total + before[1:].sum(dim=0)) / (count + len(before) - 1)
    wanted = length[:, 0]
    if read == "turn_end" and tails is not None:
        wanted = wanted - tails.to(activation.device)
    place = (prompt & (order == wanted.clamp(min=1).unsqueeze(1))).long().argmax(dim=1)
    found = at(activation, place).float()
    if before is None or bool((wanted >= 1).all()):
        return found
    early = before[(len(before) - 1 + wanted).clamp(0, len(before) - 1)]
    return torch.where((wanted >= 1).unsqueeze(1), found, early)

"""The residual stream of one text with and without steering, and where the difference comes from."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import SiteError
from fsteer_lens.models.attaching import hooks_added, unsteered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.forward import Forward
from fsteer_lens.models.points import hook_point
from fsteer_lens.prompts.tokens import Batch

Stream = Float[Tensor, "layers s d"]


class Change(NamedTuple):
    """The difference Δ that steering makes to the stream after each layer, and its parts; see `effects.Propagation`."""

    norm: Float[Tensor, "layers s"]
    size: Float[Tensor, "layers s"]
    carried: Float[Tensor, "layers s"]
    edit: Float[Tensor, "layers s"]
    attention: Float[Tensor, "layers s"]
    mlp: Float[Tensor, "layers s"]


def change_of(base: dict[str, Stream], steered: dict[str, Stream]) -> tuple[Change, Stream, Stream]:
    """What steering changed, with the direction of Δ and the edits themselves."""
    change = {name: steered[name] - base[name] for name in base}
    after = change["post"]
    below = torch.cat([torch.zeros_like(after[:1]), after[:-1]])
    edit = change["pre"] - below + after - change["before"]
    norm = after.norm(dim=-1)
    direction = after / norm.unsqueeze(-1).clamp(min=1e-30)
    along = [(part * direction).sum(dim=-1) for part in (below, edit, change["attention"], change["mlp"])]
    return Change(norm, norm / base["post"].norm(dim=-1).clamp(min=1e-30), *along), direction, edit


@torch.no_grad()
def read_streams(forward: Forward, text: Batch, steering: AbstractContextManager[Any]) -> dict[str, Stream]:
    """The stream of one text under `steering`: entering each layer ("pre"), leaving it before all edits ("before") and
    after them ("post"), and what attention and MLP add; from a pass of `forward`, which then holds the text.

    Hooks run in the order in which they were put there, so what reads before the edits is put on before `steering`.
    """
    model, n_layers = forward.model, forward.model.cfg.n_layers
    seen: dict[tuple[str, int], Tensor] = {}

    def reader(name: str, site: str) -> list[tuple[str, Any]]:
        def keep(layer: int) -> Any:
            def hook_function(activation: Tensor, hook: Any) -> None:
                seen[name, layer] = activation[0].float().cpu()

            return hook_function

        return [(f"blocks.{layer}.{site}", keep(layer)) for layer in range(n_layers)]

    parallel = not _has(model, "blocks.0.hook_resid_mid")
    middle = [("attention", "hook_attn_out")] if parallel else [("middle", "hook_resid_mid")]
    later = [
        hook for pair in [("pre", "hook_resid_pre"), *middle, ("post", "hook_resid_post")] for hook in reader(*pair)
    ]
    with unsteered(model), hooks_added(model, reader("before", "hook_resid_post")), steering, hooks_added(model, later):
        forward.last(text.tokens, text.mask)
    read = {name: torch.stack([seen[name, layer] for layer in range(n_layers)]) for name in {key for key, _ in seen}}
    if not parallel:
        read["attention"] = read.pop("middle") - read["pre"]
    read["mlp"] = read["before"] - read["pre"] - read["attention"]
    return read


def _has(model: SteerableModel, name: str) -> bool:
    try:
        hook_point(model, name)
    except SiteError:
        return False
    return True

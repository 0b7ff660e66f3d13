"""Passes that begin above the lower layers, with what these gave in an earlier pass over the same tokens.

Neither class can do that by itself everywhere: `start_at_layer` is missing in the Bridge of TransformerLens 3. So the
lower blocks are taken by the hand: for one pass each of them gives what the last of them gave before, and computes
nothing. Whether the model at hand comes to the same logits that way is tried once, on a few tokens.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from threading import current_thread
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fsteer_lens.models.attaching import hooks_suspended, lock_of
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.models.devices import device_of
from fsteer_lens.models.forward import Forward

CLOSE = 1e-3
"""Logits of two ways to run a model may differ by this share of their size; half precision has its own."""
CLOSE_IN_HALF = 5e-2


@contextmanager
def outputs_kept(model: SteerableModel, layers: Collection[int]) -> Iterator[dict[int, Any]]:
    """Keep what enters these layers in one pass of this thread's, {layer: what the block below gave}."""
    here, kept, handles = current_thread(), {}, []
    blocks: Any = model

    def keeper(layer: int) -> Any:
        def keep(block: Any, args: Any, output: Any) -> None:
            if current_thread() is here:
                kept[layer] = output

        return keep

    try:
        for layer in layers:
            handles.append(blocks.blocks[layer - 1].register_forward_hook(keeper(layer)))
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def begun_at(model: SteerableModel, layer: int, output: Any) -> Iterator[None]:
    """Have this thread's passes begin at a layer, with what `outputs_kept` has kept of it.

    Hooks on the layers below do not run. They hold no keys and values of these passes either: see `Forward.fork_rows`.
    """
    network: Any = model
    with lock_of(model):
        before = [(block, vars(block).get("forward")) for block in network.blocks[:layer]]
        try:
            for block, _ in before:  # by `vars`: a Bridge's block hands what it is given on to the block within
                vars(block)["forward"] = _giving(output, block.forward)
            yield
        finally:
            for block, own in before:
                vars(block).pop("forward", None)
                if own is not None:
                    vars(block)["forward"] = own


def _giving(output: Any, otherwise: Any) -> Any:
    """A block's forward that gives this to the thread at hand, and computes for others."""
    here = current_thread()

    def forward(*args: Any, **kwargs: Any) -> Any:
        return output if current_thread() is here else otherwise(*args, **kwargs)

    return forward


_tried: "WeakKeyDictionary[Any, bool]" = WeakKeyDictionary()


def can_begin_above(model: SteerableModel) -> bool:
    """Whether passes of this model may begin above its lower layers and go on from a prompt's keys and values.

    Tried once for each model: prompts of several lengths with a few tokens after them, in one plain pass, and again
    from its last layer on. A model whose layers share more than the stream gives other logits then.
    """
    if model not in _tried:
        try:
            _tried[model] = model.cfg.n_layers > 1 and hasattr(model, "blocks") and _same(model)
        except Exception:  # whatever a model does there that it was not made for: run plainly, it says what is wrong
            _tried[model] = False
    return _tried[model]


@torch.no_grad()
def _same(model: SteerableModel) -> bool:
    """Whether the two ways agree."""
    layer, device, most = model.cfg.n_layers - 1, device_of(model), model.cfg.d_vocab - 1
    tokens = (torch.arange(3 * 6, device="cpu").reshape(3, 6) * 7 + 1).clamp(max=most).to(device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :2] = False
    rows, cut = torch.tensor([0, 1, 1, 2], dtype=torch.long, device=device), 4
    with hooks_suspended(model):
        plain = Forward(model, cache=False)(tokens[rows], mask[rows])
        base = Forward(model, cache=True)
        with outputs_kept(model, [layer]) as prompt:
            base(tokens[:, :cut], mask[:, :cut])
        with outputs_kept(model, [layer]) as rest:
            base.fork_rows(rows)(tokens[rows, cut:], mask[rows, cut:])
        above = Forward(model, cache=True)
        with begun_at(model, layer, prompt[layer]):
            above(tokens[:, :cut], mask[:, :cut])
        going_on = above.fork_rows(rows, below=base, layer=layer)
        with begun_at(model, layer, rest[layer]):
            found = going_on(tokens[rows, cut:], mask[rows, cut:])
    return _close(found, plain[:, cut:])


def _close(found: Tensor, plain: Tensor) -> bool:
    tolerance = CLOSE_IN_HALF if plain.element_size() < 4 else CLOSE
    if found.shape != plain.shape:
        return False
    apart = (found.float() - plain.float()).abs().amax()
    return bool(apart <= tolerance * plain.float().abs().amax())

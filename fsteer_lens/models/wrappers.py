"""What is around a Hugging Face model, and where its weights are, before it is converted."""

from importlib.metadata import version
from itertools import chain
from typing import Any

from torch import nn

from fsteer_lens.errors import InputError, MissingDependencyError
from fsteer_lens.models.classes import Kind

WEIGHTS_ON_DISK = (4, 3)
"""The first TransformerLens whose Bridge was seen to run with weights on disk."""


def unwrapped(hf_model: Any) -> Any:
    """The transformers model within PEFT's, PyTorch's and the compiler's wrappers.

    Raises:
        InputError: there is none within.
    """
    from transformers import PreTrainedModel

    network = hf_model
    while not isinstance(network, PreTrainedModel):
        inner = _inner(network)
        if inner is None:
            raise InputError(
                "no model to convert",
                expected="a transformers causal language model, as AutoModelForCausalLM loads it",
                got=type(hf_model).__name__ if network is hf_model else f"{type(network).__name__} within",
            )
        network = inner
    return uncompiled(network)


def _inner(wrapper: Any) -> Any:
    if hasattr(wrapper, "get_base_model"):  # PeftModel
        return wrapper.get_base_model()
    if "_orig_mod" in getattr(wrapper, "_modules", ()):  # torch.compile
        return wrapper._orig_mod
    if isinstance(wrapper, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return wrapper.module
    mixed = getattr(wrapper, "base_model", None)  # PeftMixedModel
    return getattr(mixed, "model", None)


def uncompiled(network: Any) -> Any:
    """Undo `torch.compile` in place: what was compiled before the conversion would run without hooks."""
    for name, module in list(network.named_modules()):
        module._compiled_call_impl = None
        if "_orig_mod" in module._modules:
            network.set_submodule(name, module._orig_mod)
    return network


def require_weights(network: Any, kind: Kind) -> None:
    """Raise where the model's weights are not in memory, and this kind of model needs them there.

    Raises:
        InputError: the model has no weights, or a HookedTransformer is asked for, which copies them.
        MissingDependencyError: they are on disk, and this TransformerLens cannot run so.
    """
    tensors = list(chain(network.parameters(), network.buffers()))
    missing = sum(one.is_meta for one in tensors)
    if not missing:
        return
    got = f"{missing} of {len(tensors)} on the meta device"
    if not any(hasattr(module, "_hf_hook") for module in network.modules()):  # accelerate's, which fetch weights
        raise InputError(
            f"{type(network).__name__} has no weights",
            expected="tensors with values",
            got=got,
            fix="Load it with from_pretrained, outside of torch.device('meta') and accelerate's init_empty_weights.",
        )
    without = "load without device_map and offloading, which needs memory for the whole model"
    if kind == "hooked":
        raise InputError(
            "HookedTransformer copies the weights",
            expected="weights in memory",
            got=f"{got}: offloaded",
            fix=f'Use kind="bridge" with transformer-lens 4.3 or newer, or {without}.',
        )
    installed = version("transformer-lens")
    if tuple(int(part) for part in installed.split(".")[:2]) < WEIGHTS_ON_DISK:
        raise MissingDependencyError(
            "this TransformerLens cannot run a model whose weights are offloaded",
            expected="transformer-lens 4.3 or newer",
            got=f"{installed}, and {got}",
            fix=f'pip install "transformer-lens>=4.3", or {without}.',
        )

"""PEFT adapters: merged into the weights, or refused.

A conversion reads the weights by name. An adapter has other names, so that it would be left out without a word.
"""

import sys
import warnings
from typing import Any

from torch import nn

from fsteer_lens.errors import InputError
from fsteer_lens.ground.foreign import told

FIX = "Merge it yourself with peft's merge_and_unload() and give the model that this returns."


def refuse_unmergeable(hf_model: Any) -> None:
    """Raise `InputError` where a model has adapters that no weights can take up: prompts, prefixes, disabled ones."""
    if "peft" not in sys.modules:  # then nobody has made an adapter
        return
    for name, config in _configs(hf_model).items():
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            raise InputError(
                f"the PEFT adapter {name!r} cannot be merged",
                expected="an adapter of the weights, such as LoRA",
                got=f"{config.peft_type.value}, which puts vectors before the prompt",
                fix="Fine-tune with LoRA instead, or put what it says into the prompt.",
            )
    disabled = sorted({type(part).__name__ for part in _parts(hf_model) if part.disable_adapters})
    if disabled:
        raise InputError(
            "the model has PEFT adapters that are disabled",
            expected="adapters that act, or none",
            got=f"disabled: {', '.join(disabled)}",
            fix="Enable them, or take them out with unload() (PEFT) or delete_adapter() (transformers).",
        )


def merged(network: Any, given: Any) -> Any:
    """The network of a model with its active adapters merged into the weights, in place; any other as it is.

    Args:
        network: a transformers model, with adapters in its layers or without.
        given: the same, perhaps within a PeftModel, which knows the names of the adapters.

    Raises:
        InputError: an adapter cannot be merged.
    """
    if "peft" not in sys.modules:
        return network
    parts = _parts(network)
    active = {name for part in parts for name in part.active_adapters}
    idle = sorted(set(_configs(given)) - active)
    if parts and idle:
        warnings.warn(f"of the model's PEFT adapters {sorted(active)} act and are merged, {idle} do not", stacklevel=4)
    try:
        _untie(network, parts)
        replaced: list[str] = []
        for name, module in list(network.named_modules()):
            within = any(name.startswith(f"{outer}.") for outer in replaced)  # outer ones come first
            if module in parts and not within:
                network.set_submodule(name, _plain(module))
                replaced.append(name)
    except (NotImplementedError, ValueError, AttributeError, TypeError, RuntimeError) as error:
        raise InputError("a PEFT adapter cannot be merged", got=told(error), fix=FIX) from error
    left = sorted({type(one).__name__ for one in network.modules() if type(one).__module__.startswith("peft.")})
    if left:
        raise InputError("a PEFT adapter cannot be merged", got=f"{', '.join(left)} in the model", fix=FIX)
    if parts:
        network._hf_peft_config_loaded = False
    return network


def _untie(network: Any, parts: set[Any]) -> None:
    """Give a layer that is to change a weight of its own, where another shares it: embeddings and the head, mostly."""
    for layer in (part.get_base_layer() for part in parts if hasattr(part, "get_base_layer")):
        weight = getattr(layer, "weight", None)
        others = (one for one in network.modules() if one is not layer)
        if weight is not None and any(one._parameters.get("weight") is weight for one in others):
            layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            network.config.tie_word_embeddings = False


def _plain(module: Any) -> Any:
    if hasattr(module, "unload_and_optionally_merge_module"):  # what PEFT puts in the place of whole modules
        return module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    new = [name for name in module.active_adapters if name not in module.merged_adapters]
    if new:
        module.merge(safe_merge=True, adapter_names=new)
    return module.get_base_layer()


def _parts(model: Any) -> set[Any]:
    """Layers and whole modules that PEFT has put into a model."""
    if "peft" not in sys.modules:
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return {one for one in model.modules() if isinstance(one, BaseTunerLayer | AuxiliaryTrainingWrapper)}


def _configs(model: Any) -> dict[str, Any]:
    configs = getattr(model, "peft_config", None)  # PEFT and transformers give both the same name
    return dict(configs) if isinstance(configs, dict) else {}

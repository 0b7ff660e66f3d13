"""Models of transformers as they are, with hook points at their decoder layers; nothing is converted or copied.

While somebody has hooks on a hook point, its decoder layer hands it the residual stream. The decoder itself tells which
tokens are real and how many are cached, so that nothing about a forward is guessed. TransformerLens is not imported.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fsteer_lens.errors import HookError, InputError
from fsteer_lens.models.classes import SteerableModel, require_decoding

PRE: Final = "hook_resid_pre"
POST: Final = "hook_resid_post"
GROWING: Final = "A static cache, and the masks that it needs, cannot be followed: generate with the default cache."
Told = Callable[[Bool[Tensor, "b s"] | None, int | None], None]
"""Is told, before the layers run, which tokens are real and how many are cached; None where nobody knows."""


class Hung(NamedTuple):
    """A function at a hook point, with what takes it off."""

    hook: RemovableHandle
    user_hook: Any


class PlainPoint(torch.nn.Identity):
    """A hook point, by as much of TransformerLens' own as this package uses; that one takes seconds to import."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.fwd_hooks = name, list[Hung]()

    def add_hook(self, function: Any) -> None:
        """Have a function called with what passes here; what it returns, unless it is None, goes on instead."""

        def call(point: Any, args: Any, stream: Tensor) -> Tensor | None:
            return function(stream, hook=point)

        self.fwd_hooks.append(Hung(self.register_forward_hook(call), function))


class PlainModel:
    """A causal language model of transformers as hook objects see a model.

    Attributes:
        cfg: its sizes, by TransformerLens' names.
        tokenizer: None: the model has none of its own.
        hook_dict: its hook points by name, "blocks.{layer}.hook_resid_pre" and "..._post".
    """

    def __init__(self, network: torch.nn.Module) -> None:
        whole: Any = network
        require_decoding(whole)
        config = whole.config.get_text_config()
        self._network, self._layers = ref(network), _decoder_layers(whole)
        names = [f"blocks.{layer}.{site}" for layer in range(len(self._layers)) for site in (PRE, POST)]
        self.hook_dict = {name: PlainPoint(name) for name in names}
        self._connected: dict[str, tuple[int, Any]] = {}
        self.tokenizer = None
        self.cfg = SimpleNamespace(
            n_layers=len(self._layers),
            d_model=config.hidden_size,
            d_vocab=config.vocab_size,
            device="meta",  # see models.devices: that of the first weight in memory
            dtype=whole.dtype,
            original_architecture=type(whole.get_base_model() if hasattr(whole, "get_base_model") else whole).__name__,
            normalization_type="",
        )

    @property
    def network(self) -> Any:
        """The model of transformers."""
        network = self._network()
        assert network is not None
        return network

    def __call__(self, tokens: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Run a forward pass over tokens [b s], without a cache; all of its layers, whatever the options say."""
        return self.network(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits

    def parameters(self) -> Any:
        """The weights."""
        return self.network.parameters()

    def modules(self) -> Any:
        """The modules within."""
        return self.network.modules()

    def connect(self, name: str) -> None:
        """Have a decoder layer hand the residual stream to a hook point; counted, so that each is connected once."""
        count, handle = self._connected.get(name, (0, None))
        if handle is None:
            _, layer, site = name.split(".")
            module, point = self._layers[int(layer)], self.hook_dict[name]
            if site == POST:
                handle = module.register_forward_hook(_after(point))
            else:
                handle = module.register_forward_pre_hook(_before(point), with_kwargs=True)
        self._connected[name] = count + 1, handle

    def disconnect(self, name: str) -> None:
        """Take back one `connect`; the last one takes the layer's hook away."""
        count, handle = self._connected.pop(name)
        if count > 1:
            self._connected[name] = count - 1, handle
        else:
            handle.remove()

    def watch(self, told: Told) -> Any:
        """Tell a function before each forward pass which tokens are real and how many are cached; has `.remove()`."""

        def look(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
            if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
                got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise HookError("attention_mask", expected="[b s], 1 at real tokens", got=got, fix=GROWING)
            if getattr(cache, "is_compileable", False):
                expected = "one that grows with the text"
                raise HookError("the cache", expected=expected, got=type(cache).__name__, fix=GROWING)
            told(None if mask is None else mask.bool(), None if cache is None else int(cache.get_seq_length()))

        return _decoder(self.network).register_forward_pre_hook(look, with_kwargs=True)


def steerable(model: Any) -> Any:
    """A model that hook objects can be put on: one of transformers as a `PlainModel`, one of TransformerLens as it is.

    Raises:
        InputError: no model, or one of transformers that is no decoder.
    """
    if isinstance(model, SteerableModel):
        return model
    if not hasattr(model, "get_decoder"):
        expected = "one of TransformerLens, or a causal language model of transformers"
        fix = "Give what AutoModelForCausalLM or fsteer_lens.models loads, without a wrapper for several devices."
        raise InputError("model", expected=expected, got=type(model).__name__, fix=fix)
    if model not in _plain:
        _plain[model] = PlainModel(model)
    return _plain[model]


_plain: "WeakKeyDictionary[Any, PlainModel]" = WeakKeyDictionary()


def _decoder(network: Any) -> Any:
    """The module that runs the decoder layers; that of a Llama 4 calls itself so and holds it."""
    decoder = network.get_decoder()
    return getattr(decoder, "model", decoder)


def _decoder_layers(network: Any) -> torch.nn.ModuleList:
    """The decoder's layers: the one list in it that is as long as the configuration says."""
    n_layers = network.config.get_text_config().num_hidden_layers
    lists = [
        module
        for module in _decoder(network).children()
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers
    ]
    if len(lists) != 1:
        raise InputError(
            f"layers of {type(network).__name__}",
            expected=f"one list of {n_layers} decoder layers",
            got=f"{len(lists)} such lists",
            fix="Convert it: fsteer_lens.models.from_hf(hf_model, tokenizer).",
        )
    return lists[0]


def _after(point: Any) -> Any:
    def hand_over(layer: Any, args: Any, output: Any) -> Any:
        alone = isinstance(output, Tensor)  # else the stream comes first in a tuple, or a list of the first GPT's
        stream = output if alone else output[0]
        edited = point(stream)
        if edited is stream:
            return None
        return edited if alone else (edited, *output[1:])

    return hand_over


def _before(point: Any) -> Any:
    def hand_over(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        edited = point(stream)
        if edited is stream:
            return None
        return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

    return hand_over

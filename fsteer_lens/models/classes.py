"""The two model classes of TransformerLens, and what this package asks of both."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal, Protocol, runtime_checkable

from fsteer_lens.errors import InputError
from fsteer_lens.ground.checks import instance

Kind = Literal["hooked", "bridge"]
CLASS_NAMES: Mapping[Kind, str] = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}


@runtime_checkable
class SteerableModel(Protocol):
    """What HookedTransformer and TransformerBridge have in common and this package uses."""

    cfg: Any
    tokenizer: Any
    hook_dict: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass."""
        ...


def available_kinds() -> tuple[Kind, ...]:
    """Model classes that the installed TransformerLens has, the preferred one first: a Bridge decodes faster."""
    classes: dict[Kind, tuple[str, str]] = {
        "bridge": ("transformer_lens.model_bridge", "TransformerBridge"),
        "hooked": ("transformer_lens", "HookedTransformer"),
    }

    def is_there(module: str, name: str) -> bool:
        try:
            return hasattr(import_module(module), name)
        except ImportError:  # TransformerLens 4 raises it for a name that it dropped
            return False

    return tuple(kind for kind, where in classes.items() if is_there(*where))


def kind_of(model: SteerableModel) -> Kind:
    """Whether a model is a HookedTransformer ("hooked") or a TransformerBridge ("bridge")."""
    return "bridge" if hasattr(model, "original_model") else "hooked"


def attention_window(model: SteerableModel) -> int:
    """How many tokens the narrowest layer of a model sees; the whole context where none has a window."""
    original = getattr(model, "original_model", None)
    if original is None:
        window = model.cfg.window_size if getattr(model.cfg, "use_local_attn", False) else None
    else:
        names = ("sliding_window", "window_size")  # the latter is GPT-Neo's
        window = next((size for name in names if (size := getattr(original.config, name, None))), None)
    return min(window or model.cfg.n_ctx, model.cfg.n_ctx)


def require_steerable(model: Any) -> None:
    """Raise `InputError` unless this is a model of one of the two classes, or one like them."""
    instance(
        "model", model, SteerableModel, "a HookedTransformer or a TransformerBridge", fix="Load it with models.load."
    )


def require_decoder(model: SteerableModel) -> None:
    """Raise `InputError` unless the model is a decoder that reads left to right by attention alone.

    An encoder's last token knows what comes after it, and a model that carries a running state (Mamba, say) reads
    padding as text: both would be steered without an error, and wrongly.
    """
    require_steerable(model)
    network = getattr(model, "original_model", None)
    if network is not None:
        require_decoding(network)
    elif getattr(model.cfg, "attention_dir", "causal") != "causal":
        raise _cannot_be_steered(f"{type(model).__name__}, which is an encoder")


def require_decoding(network: Any) -> None:
    """The same of a Hugging Face model."""
    if getattr(network, "_is_stateful", False):
        raise _cannot_be_steered(f"{type(network).__name__}, which carries a running state")
    if network.config.is_encoder_decoder or not network.can_generate():
        raise _cannot_be_steered(f"{type(network).__name__}, which is an encoder, has one, or has no head for tokens")


def _cannot_be_steered(got: str) -> InputError:
    return InputError(
        "this model cannot be steered",
        expected="a decoder that reads left to right by attention alone",
        got=got,
        fix="Use a causal language model without recurrent layers, as AutoModelForCausalLM loads it.",
    )

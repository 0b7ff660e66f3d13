"""From a Hugging Face model in memory to one of TransformerLens, which is checked to be the same model."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from fsteer_lens.errors import FsteerError, InputError, MissingDependencyError
from fsteer_lens.ground.checks import choice
from fsteer_lens.ground.foreign import told
from fsteer_lens.models.adapters import merged, refuse_unmergeable
from fsteer_lens.models.agreement import context_of, probe, require_agreement
from fsteer_lens.models.classes import CLASS_NAMES, Kind, SteerableModel, available_kinds, require_decoding
from fsteer_lens.models.devices import device_of, device_of_weights
from fsteer_lens.models.mending import with_kv_cache
from fsteer_lens.models.wrappers import require_weights, unwrapped


def from_hf(hf_model: Any, tokenizer: Any, kind: Kind | None = None, process: bool = False) -> SteerableModel:
    """Make a TransformerLens model from a Hugging Face model and tokenizer that are already in memory.

    Works offline and keeps the tokenizer as it is given. The given `hf_model` must not be used afterwards: a
    Bridge rewires it in place. What `torch.compile` made of it is undone, and PEFT adapters that act are merged into
    its weights. The log-probabilities of a few tokens, taken before, must then come out of the converted model too: in
    a single row and in a left-padded pair, with and without a KV cache.

    Args:
        hf_model: a transformers causal language model, or a PeftModel around one.
        tokenizer: its tokenizer.
        kind: "hooked" or "bridge"; None takes TransformerBridge, which decodes three to four times as fast.
        process: fold LayerNorm and centre the writing weights, as `HookedTransformer.from_pretrained` does. Gates and
            experts that were fitted without it do not fit a processed LayerNorm model.

    Raises:
        MissingDependencyError: the installed TransformerLens lacks the class, or cannot leave weights on disk.
        InputError: TransformerLens cannot convert this architecture, or makes another model of it, with what differs
            and by how many nats; a model that cannot be steered, has no weights, or an adapter that cannot be merged.
        NonFiniteError: the model says NaN before it is converted.
    """
    kind = _kind(kind)
    network = unwrapped(hf_model)
    refuse_unmergeable(hf_model)
    require_decoding(network)
    require_weights(network, kind)
    network.eval()
    with torch.device("cpu"):  # whatever torch.set_default_device says
        asked = probe(network)
        network = merged(network, hf_model)
        model = _converted(network, tokenizer, kind, process)
        require_agreement(model, asked)
    return model


def _kind(kind: Kind | None) -> Kind:
    kinds = available_kinds()
    kind = kinds[0] if kind is None else kind
    choice("kind", kind, ("hooked", "bridge"))
    if kind not in kinds:
        raise MissingDependencyError(
            f"this TransformerLens has no model class for kind={kind!r}",
            got=f"kinds {kinds}",
            fix='Use kind="bridge", or pip install "transformer-lens<4" for HookedTransformer.',
        )
    return kind


def _converted(network: Any, tokenizer: Any, kind: Kind, process: bool) -> Any:
    if not network.config.architectures:  # not set on a model that was made from its configuration
        network.config.architectures = [type(network).__name__]
    convert = _hooked if kind == "hooked" else _bridge
    try:
        model = convert(network, tokenizer, process)
    except (FsteerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever TransformerLens raises where a configuration or weight is not as it expects
        raise InputError(
            f"TransformerLens cannot convert {type(network).__name__} to {CLASS_NAMES[kind]}",
            got=told(error),
            fix='Use kind="bridge".' if kind == "hooked" else "TransformerLens' documentation lists what it knows.",
        ) from error
    # Both classes load it anew from its name and lose what was changed in memory, the Bridge's setter as well.
    setattr(model, "tokenizer" if kind == "hooked" else "_tokenizer", tokenizer)
    model.cfg.tokenizer_prepends_bos = prepends_bos(tokenizer)
    if kind == "hooked":  # a Bridge has it in its network
        model.generation_config = getattr(network, "generation_config", None)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _hooked(hf_model: Any, tokenizer: Any, process: bool) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import convert_hf_model_config, get_pretrained_state_dict

    with tempfile.TemporaryDirectory(prefix="config") as folder:
        hf_model.config.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        if "n_positions" in config:  # GPT-2's older name, which TransformerLens asks for
            config.setdefault("n_ctx", config["n_positions"])
        (Path(folder) / "config.json").write_text(json.dumps(config))
        gemma2 = type(hf_model).__name__ == "Gemma2ForCausalLM"
        settings = _gemma2_settings(hf_model.config) if gemma2 else convert_hf_model_config(folder)
        for unused in ("tokenizer_name", "quantization_method", "dtype"):
            settings.pop(unused, None)
        device = str(device_of_weights(hf_model))
        cfg = HookedTransformerConfig(**settings, device=device, dtype=hf_model.dtype)
        state = get_pretrained_state_dict(folder, cfg, hf_model=hf_model, dtype=hf_model.dtype)
    cfg.n_ctx = min(cfg.n_ctx, _longest(hf_model.config, cfg))
    model = HookedTransformer(cfg)
    model.load_and_process_state_dict(
        state, fold_ln=process, center_writing_weights=process, center_unembed=process, fold_value_biases=process
    )
    return model


def _longest(config: Any, cfg: Any) -> int:
    """The longest text: that of the configuration, or the sliding window where TransformerLens leaves it out."""
    window = config.sliding_window if "sliding_attention" in (getattr(config, "layer_types", None) or ()) else None
    return min(context_of(config) or cfg.n_ctx, cfg.n_ctx if cfg.use_local_attn or window is None else window)


def _gemma2_settings(config: Any) -> dict[str, Any]:
    """Settings of a Gemma-2, whose weights TransformerLens converts, and whose sizes it knows by hub name only."""
    return {
        "original_architecture": "Gemma2ForCausalLM",
        "d_model": config.hidden_size,
        "d_head": config.head_dim,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "eps": config.rms_norm_eps,
        "act_fn": config.hidden_activation,
        "initializer_range": config.initializer_range,
        "normalization_type": "RMS",
        "use_normalization_before_and_after": True,
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_base": config.rope_parameters["rope_theta"],
        "use_attn_scale": True,
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
        "use_local_attn": True,
        "window_size": config.sliding_window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
    }


def _bridge(hf_model: Any, tokenizer: Any, process: bool) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    name = hf_model.config._name_or_path or type(hf_model).__name__
    device = str(device_of_weights(hf_model))
    hf_model.set_attn_implementation("eager")
    model = TransformerBridge.boot_transformers(
        name, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=hf_model.dtype
    )
    model.cfg.device = str(device_of(model))  # not that of the first weight, which may be on disk
    if process:
        model.enable_compatibility_mode()
    return with_kv_cache(model)


def prepends_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts a beginning-of-sequence token in front of a text by itself."""
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]

"""From a Hugging Face model in memory to one of TransformerLens."""

import json
import tempfile
from pathlib import Path
from typing import Any

from fsteer_lens.errors import InputError, MissingDependencyError
from fsteer_lens.ground.checks import choice
from fsteer_lens.models.classes import CLASS_NAMES, Kind, SteerableModel, available_kinds, require_decoder


def from_hf(hf_model: Any, tokenizer: Any, kind: Kind | None = None, process: bool = False) -> SteerableModel:
    """Make a TransformerLens model from a Hugging Face model and tokenizer that are already in memory.

    Works offline and keeps the tokenizer as it is given. The given `hf_model` must not be used afterwards: a
    Bridge rewires it in place.

    Args:
        hf_model: a transformers causal language model.
        tokenizer: its tokenizer.
        kind: "hooked" or "bridge"; None takes HookedTransformer where the installed TransformerLens has it.
        process: fold LayerNorm and centre the writing weights, as `HookedTransformer.from_pretrained` does. Gates and
            experts that were fitted without it do not fit a processed LayerNorm model.

    Raises:
        MissingDependencyError: the installed TransformerLens lacks the class.
        InputError: TransformerLens cannot convert this architecture, or it is none that can be steered.
    """
    kinds = available_kinds()
    kind = kind or kinds[0]
    choice("kind", kind, ("hooked", "bridge"))
    if kind not in kinds:
        raise MissingDependencyError(
            f"this TransformerLens has no model class for kind={kind!r}",
            got=f"kinds {kinds}",
            fix='Use kind="bridge", or pip install "transformer-lens<4" for HookedTransformer.',
        )
    hf_model.eval()
    if not hf_model.config.architectures:  # not set on a model that was made from its configuration
        hf_model.config.architectures = [type(hf_model).__name__]
    convert = _hooked if kind == "hooked" else _bridge
    try:
        model = convert(hf_model, tokenizer, process)
    except (NotImplementedError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"TransformerLens cannot convert {type(hf_model).__name__} to {CLASS_NAMES[kind]}",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            fix='Use kind="bridge".' if kind == "hooked" else "TransformerLens' documentation lists what it knows.",
        ) from error
    require_decoder(model)
    # Both classes load it anew from its name and lose what was changed in memory, the Bridge's setter as well.
    setattr(model, "tokenizer" if kind == "hooked" else "_tokenizer", tokenizer)
    model.cfg.tokenizer_prepends_bos = _tokenizer_prepends_bos(tokenizer)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _hooked(hf_model: Any, tokenizer: Any, process: bool) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import convert_hf_model_config, get_pretrained_state_dict

    parameter = next(hf_model.parameters())
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
        cfg = HookedTransformerConfig(**settings, device=str(parameter.device), dtype=parameter.dtype)
        state = get_pretrained_state_dict(folder, cfg, hf_model=hf_model, dtype=parameter.dtype)
    model = HookedTransformer(cfg)
    model.load_and_process_state_dict(
        state, fold_ln=process, center_writing_weights=process, center_unembed=process, fold_value_biases=process
    )
    return model


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
    parameter = next(hf_model.parameters())
    hf_model.set_attn_implementation("eager")
    model = TransformerBridge.boot_transformers(
        name, hf_model=hf_model, tokenizer=tokenizer, device=str(parameter.device), dtype=parameter.dtype
    )
    if process:
        model.enable_compatibility_mode()
    return model


def _tokenizer_prepends_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return len(ids) > 1 and ids[0] == tokenizer.bos_token_id

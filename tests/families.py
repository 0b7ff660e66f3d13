"""Small random-weight models of several architectures, with the tutor's tokenizer."""

from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from fsteer_lens import models, tutor
from fsteer_lens.models import SteerableModel

FAMILIES = ("gpt2", "llama", "qwen2", "gemma2", "neox")
OTHER_FAMILIES = ("bloom", "mpt", "cohere")  # not both classes, or not every TransformerLens, can be made of them
DECODER_LAYERS = {
    "gpt2": "transformer.h", "llama": "model.layers", "qwen2": "model.layers", "gemma2": "model.layers",
    "neox": "gpt_neox.layers", "bloom": "transformer.h", "mpt": "transformer.blocks", "cohere": "model.layers",
    "mistral": "model.layers", "qwen3": "model.layers", "gemma3": "model.layers", "phi": "model.layers",
    "phi3": "model.layers", "opt": "model.decoder.layers", "falcon": "transformer.h", "gptj": "transformer.h",
    "gptneo": "transformer.h", "gpt1": "transformer.h", "mixtral": "model.layers", "qwen3_moe": "model.layers",
    "gpt_oss": "model.layers", "deepseek_v3": "model.layers", "llama4": "model.layers",
}  # fmt: skip
"""Where transformers' models have their decoder layers, of every family that is steered as transformers loads it."""
D_MODEL, N_LAYERS = 32, 3


def tokenizer() -> Any:
    """A fresh copy of the tutor's tokenizer."""
    return AutoTokenizer.from_pretrained(tutor.loading.FOLDER)


@cache
def random_model(
    architecture: str, kind: models.Kind, seed: int = 0, dtype: torch.dtype = torch.float32
) -> SteerableModel:
    """A model whose weights are large enough for its answers to depend on what it reads."""
    return models.from_hf(hf_model(architecture, seed).to(dtype), tokenizer(), kind=kind)


def hf_model(architecture: str, seed: int = 0, **changed: Any) -> Any:
    """The transformers model that `random_model` is made from, or one whose configuration has other values."""
    words = len(tokenizer())
    sizes: dict[str, Any] = {
        "vocab_size": words,
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
    }
    of_gpt2 = {"vocab_size": words, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64}
    configs: dict[str, Any] = {
        "gpt2": lambda: transformers.GPT2Config(**of_gpt2, initializer_range=0.15),
        "llama": lambda: transformers.LlamaConfig(**sizes, num_key_value_heads=2),
        "qwen2": lambda: transformers.Qwen2Config(**sizes, num_key_value_heads=2),
        "gemma2": lambda: transformers.Gemma2Config(
            **sizes, num_key_value_heads=2, head_dim=8, sliding_window=8, query_pre_attn_scalar=16
        ),
        "neox": lambda: transformers.GPTNeoXConfig(**sizes, rotary_pct=0.25),
        "bloom": lambda: transformers.BloomConfig(
            vocab_size=words, hidden_size=D_MODEL, n_layer=N_LAYERS, n_head=4, initializer_range=0.15
        ),
        "mpt": lambda: transformers.MptConfig(
            vocab_size=words, d_model=D_MODEL, n_layers=N_LAYERS, n_heads=4, max_seq_len=64, initializer_range=0.15
        ),
        "cohere": lambda: transformers.CohereConfig(**sizes, num_key_value_heads=2, logit_scale=0.25),
        "mistral": lambda: transformers.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8),
        "qwen3": lambda: transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **sizes, num_key_value_heads=2, head_dim=8, sliding_window=8, query_pre_attn_scalar=16
        ),
        "phi": lambda: transformers.PhiConfig(**sizes, num_key_value_heads=2),
        "phi3": lambda: transformers.Phi3Config(**sizes, num_key_value_heads=2, pad_token_id=0),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=words,
            hidden_size=D_MODEL,
            word_embed_proj_dim=16,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=64,
            init_std=0.15,
        ),
        "falcon": lambda: transformers.FalconConfig(
            vocab_size=words,
            hidden_size=D_MODEL,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            initializer_range=0.15,
        ),
        "gptj": lambda: transformers.GPTJConfig(**of_gpt2, rotary_dim=4, initializer_range=0.15),
        "gptneo": lambda: transformers.GPTNeoConfig(
            vocab_size=words,
            hidden_size=D_MODEL,
            num_layers=N_LAYERS,
            num_heads=4,
            max_position_embeddings=64,
            attention_types=[[["global", "local", "global"], 1]],
            window_size=8,
            initializer_range=0.15,
        ),
        "gpt1": lambda: transformers.OpenAIGPTConfig(**of_gpt2, initializer_range=0.15),
        "mixtral": lambda: transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **sizes, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **sizes, num_key_value_heads=2, head_dim=8, num_local_experts=4, sliding_window=8
        ),
        "deepseek_v3": lambda: transformers.DeepseekV3Config(
            **sizes,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
            n_group=2,
            topk_group=1,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
        "llama4": lambda: transformers.Llama4TextConfig(
            **sizes, num_key_value_heads=2, head_dim=8, num_local_experts=2, intermediate_size_mlp=64
        ),
        "mamba2": lambda: transformers.Mamba2Config(
            vocab_size=words,
            hidden_size=D_MODEL,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=1,
        ),
        "bert": lambda: transformers.BertConfig(**sizes),
        "t5": lambda: transformers.T5Config(
            vocab_size=words, d_model=D_MODEL, d_kv=8, d_ff=64, num_layers=2, num_heads=4
        ),
    }
    makers = {"bert": transformers.BertForMaskedLM, "t5": transformers.T5ForConditionalGeneration}
    torch.manual_seed(seed)
    config = configs[architecture]()
    for name, value in changed.items():
        setattr(config, name, value)
    maker = makers.get(architecture)
    return (maker(config) if maker else transformers.AutoModelForCausalLM.from_config(config)).eval()

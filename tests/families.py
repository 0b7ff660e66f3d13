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
    configs = {
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

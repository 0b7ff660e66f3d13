"""Models with random weights in the shapes of well-known ones, and random prompts for them."""

from tempfile import TemporaryDirectory
from typing import Any

import torch

from fsteer_lens import Contrast, EnergyGate, FineSteer, Subspace, models
from fsteer_lens.method.controller import Controller
from fsteer_lens.method.experts import Experts

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-small": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "tiny": {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "wide-vocabulary": {
        "model_type": "llama", "vocab_size": 256000, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 128, "max_position_embeddings": 256,
    },
    "gemma-2-2b": {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216,
    },
    "llama-3-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "rope_theta": 500000.0,
    },
}  # fmt: skip


def word_tokenizer(size: int) -> Any:
    """A tokenizer of `size` made-up words, "w0" to "w…"; the first is pad, beginning and end of sequence."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special = {name: "w0" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def hf_model(shape: str, device: str = "cpu") -> Any:
    """A transformers model; float32 on the CPU, bfloat16 elsewhere."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options: dict[str, Any] = {**SHAPES[shape], **{f"{name}_token_id": 0 for name in ("bos", "eos", "pad")}}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    config = AutoConfig.for_model(**options)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def model(shape: str, kind: models.Kind, device: str = "cpu") -> Any:
    """The same as a TransformerLens model."""
    from transformers import AutoTokenizer

    with TemporaryDirectory(prefix="words") as folder:  # TransformerLens loads a tokenizer anew from its folder
        word_tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(folder)
        return models.from_hf(hf_model(shape, device), AutoTokenizer.from_pretrained(folder), kind=kind)


def steering(d_model: int, layer: int, device: str = "cpu") -> FineSteer:
    """A FineSteer with random parts: 8 experts, 10 residual directions, an energy gate at rank 32."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    rank, m = min(32, d_model), min(10, d_model)
    square = (d_model, d_model)
    maps = Controller(
        rand(*square), rand(d_model), rand(*square), rand(d_model), rand(*square), rand(d_model),
        rand(m, d_model), rand(m),
    )  # fmt: skip
    experts = Experts(rand(8, d_model), torch.linalg.qr(rand(d_model, m)).Q, maps, (True,) * 8)
    basis = torch.linalg.qr(rand(d_model, rank)).Q
    gate = EnergyGate(Subspace(torch.zeros(d_model), basis, torch.full((rank,), 1 / rank)), rank)
    return FineSteer(experts, gate, layer=layer, scope="all").to(device)


def contrasts(shape: str, count: int, seed: int = 0) -> list[Contrast]:
    """Contrasts of random words: prompts of 60 to 200 tokens, answers of 10 to 40; a fifth of that for "tiny"."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, part = SHAPES[shape]["vocab_size"], 5 if shape == "tiny" else 1

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low // part, high // part + 1, (), generator=generator))
        return torch.randint(1, vocabulary, (length,), generator=generator).tolist()

    def text() -> str:
        return " ".join(f"w{number}" for number in ids(10, 40))

    return [Contrast(ids(60, 200), text(), text()) for _ in range(count)]

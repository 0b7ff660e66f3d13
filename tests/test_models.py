"""Models of several architectures, made offline, and their fingerprints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fsteer_lens import models, tutor
from fsteer_lens.errors import InputError, MismatchError, MissingDependencyError, SiteError
from fsteer_lens.fingerprints import fingerprint
from fsteer_lens.models import Forward, SteerableModel, hooks_suspended, site_name
from fsteer_lens.tokens import pad


def random_model(architecture: str, kind: str, seed: int = 0) -> SteerableModel:
    """A small model with random weights and the tutor's tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tutor.loading.FOLDER)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    configs = {
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=4, n_positions=64
        ),
        "llama": lambda: transformers.LlamaConfig(**sizes, num_key_value_heads=2),
        "qwen2": lambda: transformers.Qwen2Config(**sizes, num_key_value_heads=2),
        "neox": lambda: transformers.GPTNeoXConfig(**sizes, rotary_pct=0.25),
    }
    torch.manual_seed(seed)
    hf_model = transformers.AutoModelForCausalLM.from_config(configs[architecture]())
    return models.from_hf(hf_model, tokenizer, kind=kind)  # type: ignore[arg-type]


ROWS = [[1, 20, 30, 40, 50], [1, 60, 70], [1, 80, 90, 100]]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "neox"])
def test_classes_caches_and_padding_agree(architecture: str) -> None:
    found = {}
    for kind in ("hooked", "bridge"):
        model = random_model(architecture, kind)
        for cache in (True, False):
            forward = Forward(model, cache=cache)
            batch = pad(model, ROWS, "left")
            logits = [forward(batch.tokens, batch.mask)[:, -1]]
            for token in (110, 111, 112):
                step = pad(model, [[token]] * 3, "left")
                logits.append(forward(step.tokens, step.mask)[:, -1])
            found[kind, cache] = torch.stack(logits, dim=1).log_softmax(-1)
        alone = [
            Forward(model, cache=False)(*vars(pad(model, [[*row, 110, 111, 112]], "left")).values())[0, -1]
            for row in ROWS
        ]
        found[kind, "alone"] = torch.stack(alone).log_softmax(-1)
    reference = found["hooked", True]
    for key, value in found.items():
        expected = reference[:, -1] if key[1] == "alone" else reference
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def test_what_transformer_lens_cannot_convert_says_so() -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tutor.loading.FOLDER)
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    hf_model = transformers.AutoModelForCausalLM.from_config(config)
    type(hf_model).__name__, name = "Unheard", type(hf_model).__name__
    try:
        with pytest.raises(InputError, match='kind="bridge"'):
            models.from_hf(hf_model, tokenizer, kind="hooked")
    finally:
        type(hf_model).__name__ = name


def test_missing_class_and_folder_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "available_kinds", lambda: ("bridge",))
    with pytest.raises(MissingDependencyError, match=r"transformer-lens<4"):
        random_model("gpt2", "hooked")
    with pytest.raises(InputError, match=r"config\.json"):
        models.load(tmp_path / "nothing")


def test_sites_are_checked_against_the_model(model: SteerableModel) -> None:
    assert site_name(model, 2) == "blocks.2.hook_resid_post"
    for layer in (-1, 6, True):
        with pytest.raises(SiteError, match=r"0\.\.5"):
            site_name(model, layer)
    with pytest.raises(SiteError, match="hook_resid_post"):
        site_name(model, 2, "hook_resid_mid")


def test_fingerprints_know_their_model(hooked: SteerableModel, bridge: SteerableModel) -> None:
    own = fingerprint(hooked, [1, 4])
    own.require_match(fingerprint(bridge, [1, 4]))
    other = fingerprint(random_model("gpt2", "hooked"), [1])
    with pytest.raises(MismatchError, match="n_layers: fitted on 6, here 3"):
        own.require_match(other)
    one, two = (fingerprint(random_model("gpt2", "hooked", seed), [1]) for seed in (0, 1))
    with pytest.raises(MismatchError, match="activations at layer 1"):
        one.require_match(two)
    near = replace(one, probe={1: tuple(value * 1.0001 for value in one.probe[1])})
    one.require_match(near)
    half = replace(one, dtype="torch.bfloat16", probe={1: tuple(value * 1.02 for value in one.probe[1])})
    one.require_match(half)
    with pytest.raises(MismatchError, match=r"0\.02"):
        one.require_match(replace(half, dtype="torch.float32"))


def test_suspended_hooks_come_back_in_order(model: SteerableModel) -> None:
    calls: list[str] = []
    point = model.hook_dict[site_name(model, 1)]
    for name in ("first", "second"):
        point.add_hook(lambda x, hook, name=name: calls.append(name))
    try:
        batch = pad(model, [[1, 5, 6]], "right")
        with hooks_suspended(model):
            Forward(model, cache=False)(batch.tokens, batch.mask)
        assert calls == []
        Forward(model, cache=False)(batch.tokens, batch.mask)
        assert calls == ["first", "second"]
    finally:
        point.remove_hooks()

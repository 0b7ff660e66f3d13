"""Which models of transformers are steered as they are: families, quantised weights, weights that are elsewhere."""

import subprocess
import sys
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fsteer_lens as fs
from fsteer_lens import FineSteer, models, tutor
from fsteer_lens.errors import MismatchError
from tests.by_hand import steered_by_hand
from tests.families import DECODER_LAYERS, hf_model, random_model, tokenizer
from tests.test_families import LAYER, fitted

pytestmark = pytest.mark.model
KIND = models.available_kinds()[0]
TOKENS = torch.tensor([[1, 20, 30, 40, 50, 61], [0, 0, 1, 60, 70, 80]])
MASK = (TOKENS > 0).long()
NEW = 4


@pytest.fixture(scope="module")
def small() -> FineSteer:
    """A steering of the random Llama, at every token."""
    return replace(fitted(random_model("llama", KIND)), scope="all", gate=None)


def layer_of(network: Any, family: str) -> Any:
    """The decoder layer that is steered."""
    return network.get_submodule(DECODER_LAYERS[family])[LAYER]


def uncached(network: Any) -> Tensor:
    """What a network says after both rows, each token from a pass of its own over the whole text."""
    tokens, mask = TOKENS, MASK
    for _ in range(NEW):
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        told = {"position_ids": places} if "position_ids" in signature(network.forward).parameters else {}
        with torch.no_grad():
            said = network(tokens, attention_mask=mask, use_cache=False, **told).logits[:, -1].argmax(dim=-1)
        tokens, mask = torch.cat([tokens, said[:, None]], dim=1), torch.cat([mask, mask[:, -1:]], dim=1)
    return tokens


def own_generate(network: Any, tokens: Tensor = TOKENS, mask: Tensor = MASK) -> Tensor:
    """What the model's own generate says, the most probable token each time."""
    told = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    return network.generate(tokens, attention_mask=mask, **told)


@pytest.mark.parametrize("family", DECODER_LAYERS)
def test_every_family_is_steered_as_by_a_hook_that_anybody_would_write(family: str, small: FineSteer) -> None:
    network, steering = hf_model(family), replace(small, fingerprint=None)
    real = MASK.bool()
    with torch.no_grad():
        unsteered = network(TOKENS, attention_mask=MASK).logits
        with steered_by_hand(layer_of(network, family), LAYER, steering):
            expected = network(TOKENS, attention_mask=MASK).logits
        with steering.on(network):
            found = network(TOKENS, attention_mask=MASK).logits
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)
    assert (found - unsteered)[real].abs().max() > 0.1, "steering must show"


@pytest.mark.parametrize("family", DECODER_LAYERS)
def test_every_family_generates_as_by_a_hook_without_a_cache(family: str, small: FineSteer) -> None:
    network, steering = hf_model(family), replace(small, fingerprint=None)
    with steered_by_hand(layer_of(network, family), LAYER, steering):
        expected = uncached(network)
    with steering.on(network) as trace:
        found = own_generate(network)
        assert trace.change[LAYER].shape == (2, TOKENS.shape[1] + NEW - 1)
    assert torch.equal(found, expected)
    assert not torch.equal(found, own_generate(network)), "steering must show"


def require_steered_as_by_hand(network: Any, steering: FineSteer) -> None:
    """Logits of a network of Llama's kind, steered, are those that a plain hook gives."""
    with torch.no_grad():
        unsteered = network(TOKENS[:1]).logits
        with steered_by_hand(layer_of(network, "llama"), LAYER, steering):
            expected = network(TOKENS[:1]).logits
        with steering.on(network):
            found = network(TOKENS[:1]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - unsteered).abs().max() > 0.1, "steering must show"


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_int8_weights_are_steered_and_are_another_model(small: FineSteer) -> None:
    quantize = getattr(getattr(torch.ao, "quantization", None), "quantize_dynamic", None)
    if quantize is None or torch.backends.quantized.engine == "none":
        pytest.skip("PyTorch multiplies no int8 matrices here")
    network = quantize(hf_model("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    assert network.model.layers[0].mlp.up_proj.weight().dtype == torch.qint8
    require_steered_as_by_hand(network, replace(small, fingerprint=None))
    with pytest.raises(MismatchError, match="activations at layer 1 differ"), small.on(network):
        pass


def rounded(bits: int) -> Any:
    """A Llama whose matrices have so many bits for each weight, marked as transformers marks quantised models."""
    network = hf_model("llama")
    with torch.no_grad():
        for module in network.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                step = module.weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
                module.weight.copy_((module.weight / step).round() * step)
    network.hf_quantizer = object()
    return network


def test_weights_of_eight_bits_fit_and_of_three_do_not(small: FineSteer) -> None:
    require_steered_as_by_hand(rounded(8), small)
    with pytest.raises(MismatchError, match=r"torch\.float32, quantised"):
        small.attach(rounded(3))
    unmarked = rounded(8)
    unmarked.hf_quantizer = None
    with pytest.raises(MismatchError, match=r"allowed 0\.001"):
        small.attach(unmarked)


def quantised(package: str, folder: Path) -> Any:
    """The Llama in a folder, quantised by a package on loading."""
    import transformers

    pytest.importorskip(package.partition(" ")[0], reason=f"{package} is not installed")
    if package == "bitsandbytes":
        config: Any = transformers.BitsAndBytesConfig(load_in_8bit=True)
    elif package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = transformers.QuantoConfig(weights=package.partition(" ")[2])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}).eval()


@pytest.mark.filterwarnings("ignore")  # of packages that are not ours, about one another
@pytest.mark.parametrize("package", ["bitsandbytes", "torchao", "optimum.quanto int8", "optimum.quanto int4"])
def test_models_that_are_quantised_on_loading(package: str, small: FineSteer, tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    network = quantised(package, tmp_path)
    require_steered_as_by_hand(network, replace(small, fingerprint=None))
    if package.endswith("int4"):
        with pytest.raises(MismatchError, match="quantised"):
            small.attach(network)
    else:
        require_steered_as_by_hand(network, small)
    anew = fitted(models.from_hf(quantised(package, tmp_path), tokenizer(), kind="bridge"))
    require_steered_as_by_hand(network, replace(anew, scope="all", gate=None))


ELSEWHERE = {
    "all on disk": {"": "disk"},
    "embeddings on disk": {
        **{f"transformer.{name}": "disk" for name in ("wte", "wpe", "ln_f")}, "lm_head": "disk", "transformer.h": "cpu",
        "transformer.drop": "cpu",
    },
    "the steered layer and those above on disk": {
        **{f"transformer.{name}": "cpu" for name in ("wte", "wpe", "drop", "ln_f")}, "lm_head": "cpu",
        **{f"transformer.h.{layer}": "disk" if layer >= 4 else "cpu" for layer in range(6)},
    },
}  # fmt: skip


@pytest.mark.parametrize("where", ELSEWHERE)
def test_weights_on_disk_are_steered_as_in_memory(where: str, steering: FineSteer, tmp_path: Path) -> None:
    folder, one = tutor.loading.FOLDER, steering.with_gate(None).with_scope("all")
    told = tutor.data("safe")
    harmful = tokenizer()([told.test[0].prompt, told.test[1].prompt], padding=True, padding_side="left")
    tokens, mask = torch.tensor(harmful.input_ids), torch.tensor(harmful.attention_mask)
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    away = AutoModelForCausalLM.from_pretrained(folder, device_map=ELSEWHERE[where], offload_folder=tmp_path).eval()
    assert any(weight.is_meta for weight in away.parameters())
    with one.on(network) as trace:
        expected, kept = own_generate(network, tokens, mask), trace.copy()
    handle = one.attach(away)
    found = own_generate(away, tokens, mask)
    assert torch.equal(found, expected)
    torch.testing.assert_close(handle.trace.change[4], kept.change[4], equal_nan=True)
    handle.detach()
    assert not torch.equal(own_generate(away, tokens, mask), expected), "steering must show"


def test_transformer_lens_is_not_imported(steering: FineSteer, tmp_path: Path) -> None:
    fs.save(steering, tmp_path / "safe.safetensors")
    program = """
import sys, torch, fsteer_lens as fs
from transformers import AutoModelForCausalLM

network = AutoModelForCausalLM.from_pretrained(fs.tutor.loading.FOLDER).eval()
with fs.load(sys.argv[1]).on(network) as trace:
    network.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=0)
print(list(trace.gate), "transformer_lens" in sys.modules)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "safe.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[4]", "False"]

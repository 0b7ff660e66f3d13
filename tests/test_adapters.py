"""PEFT adapters are merged or refused, never dropped."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fsteer_lens import generate, models
from fsteer_lens.errors import InputError, MissingDependencyError
from tests.families import D_MODEL, hf_model, tokenizer

peft = pytest.importorskip("peft", reason="adapters are PEFT's")

KINDS = models.available_kinds()
IDS = [1, 20, 30, 40, 50, 60, 70]
pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # on what it was asked to do
]


def said(network: Any) -> torch.Tensor:
    """transformers' own log-probabilities after the probe."""
    with torch.no_grad():
        return network(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].float().log_softmax(-1)


def converted(network: Any, kind: models.Kind | None = None) -> torch.Tensor:
    model: Any = models.from_hf(network, tokenizer(), kind=kind)
    return model(torch.tensor([IDS]))[0].float().log_softmax(-1)


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options})


def drawn(network: Any) -> Any:
    """The same with drawn numbers in the adapter, which many kinds begin at zero."""
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return network.eval()


MERGED = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True, lora_alpha=16),
    "dora": lambda: lora(use_dora=True),
    "embeddings": lambda: lora(target_modules=["embed_tokens", "up_proj"]),
    "head": lambda: lora(target_modules=["lm_head", "o_proj"]),
    "saved modules": lambda: lora(modules_to_save=["lm_head", "norm"]),
    "trained tokens": lambda: lora(trainable_token_indices=[20, 30]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj", "up_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj", "up_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "layernorm": lambda: peft.LNTuningConfig(target_modules=["norm", "input_layernorm"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MERGED)
def test_adapters_of_the_weights_are_merged(name: str, kind: models.Kind) -> None:
    tuned = drawn(peft.get_peft_model(hf_model("llama"), MERGED[name]()))
    expected = said(tuned)
    assert (expected - said(hf_model("llama"))).abs().max() > 0.05, "the adapter must show"
    torch.testing.assert_close(converted(tuned, kind), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_transformers_itself_are_merged(kind: models.Kind) -> None:
    for config in (lora(), lora(use_dora=True), lora(target_modules=["embed_tokens", "gate_proj"])):
        network = hf_model("llama")
        network.add_adapter(config)
        drawn(network)
        expected = said(network)
        assert (expected - said(hf_model("llama"))).abs().max() > 0.05, "the adapter must show"
        torch.testing.assert_close(converted(network, kind), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_a_tied_weight_is_not_merged_into_both_ends(target: str, kind: models.Kind) -> None:
    tuned = drawn(peft.get_peft_model(hf_model("llama", tie_word_embeddings=True), lora(target_modules=[target])))
    expected = said(tuned)
    torch.testing.assert_close(converted(tuned, kind), expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


def test_several_adapters(recwarn: pytest.WarningsRecorder) -> None:
    tuned = peft.get_peft_model(hf_model("llama"), lora(), adapter_name="first")
    tuned.add_adapter("second", lora(target_modules=["up_proj"]))
    drawn(tuned).set_adapter("second")
    expected = said(tuned)
    recwarn.clear()
    found = converted(tuned)
    told = [str(one.message) for one in recwarn if "act and are merged" in str(one.message)]
    assert len(told) == 1 and "['second'] act" in told[0] and "['first'] do not" in told[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    both = peft.get_peft_model(hf_model("llama"), lora(), adapter_name="first")
    both.add_adapter("second", lora(target_modules=["up_proj"]))
    drawn(both).base_model.set_adapter(["first", "second"])
    expected = said(both)
    recwarn.clear()
    torch.testing.assert_close(converted(both), expected, atol=1e-4, rtol=0)
    assert not [one for one in recwarn if "act and are merged" in str(one.message)]


def test_what_is_merged_already_is_not_merged_twice() -> None:
    tuned = drawn(peft.get_peft_model(hf_model("llama"), lora()))
    expected = said(tuned)
    tuned.merge_adapter()
    torch.testing.assert_close(converted(tuned), expected, atol=1e-4, rtol=0)


REFUSED = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=D_MODEL
    ),
    "adaption": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
    "a bias where there was none": lambda: lora(lora_bias=True),
    "activated": lambda: lora(alora_invocation_tokens=[30], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_no_weight_can_take_up_are_refused(name: str) -> None:
    tuned = peft.get_peft_model(hf_model("llama"), REFUSED[name]())
    with pytest.raises(InputError, match="cannot be merged"):
        models.from_hf(tuned, tokenizer())


def test_disabled_adapters_are_refused() -> None:
    tuned = peft.get_peft_model(hf_model("llama"), lora())
    tuned.base_model.disable_adapter_layers()
    with pytest.raises(InputError, match="disabled"):
        models.from_hf(tuned, tokenizer())
    network = hf_model("llama")
    network.add_adapter(lora())
    network.disable_adapters()
    with pytest.raises(InputError, match=r"delete_adapter\(\)"):
        models.from_hf(network, tokenizer())


def test_half_precision() -> None:
    tuned = drawn(peft.get_peft_model(hf_model("llama").to(torch.bfloat16), lora()))
    expected = said(tuned)
    assert (converted(tuned) - expected).square().mean().sqrt() < 0.1 < (said(hf_model("llama")) - expected).abs().max()


def folders(tmp_path: Path, config: Any, *, tokenizer_beside: bool) -> tuple[Path, torch.Tensor]:
    """A folder with an adapter that `config` describes, its base model in another, and what both together say."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    network = hf_model("llama")
    network.save_pretrained(base)
    tokenizer().save_pretrained(base)
    tuned = drawn(peft.get_peft_model(network, config))
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(adapter)
    if tokenizer_beside:
        tokenizer().save_pretrained(adapter)
    return adapter, said(tuned)


@pytest.mark.parametrize("tokenizer_beside", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_with_an_adapter_is_the_tuned_model(tmp_path: Path, kind: models.Kind, tokenizer_beside: bool) -> None:
    adapter, expected = folders(tmp_path, lora(), tokenizer_beside=tokenizer_beside)
    model: Any = models.load(adapter, kind=kind)
    torch.testing.assert_close(model(torch.tensor([IDS]))[0].log_softmax(-1), expected, atol=1e-4, rtol=0)
    assert model.tokenizer("yes").input_ids == tokenizer()("yes").input_ids
    assert len(generate(model, [IDS], max_new_tokens=2, stop=[], progress=False)[0].tokens) == 2


def test_saved_modules_in_a_folder_are_kept_or_refused(tmp_path: Path) -> None:
    adapter, expected = folders(tmp_path, lora(modules_to_save=["lm_head"]), tokenizer_beside=True)
    try:
        model: Any = models.load(adapter)
    except InputError:
        return
    torch.testing.assert_close(model(torch.tensor([IDS]))[0].log_softmax(-1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_folder_with_another_adapter_is_refused(tmp_path: Path, name: str) -> None:
    adapter, _ = folders(tmp_path, REFUSED[name](), tokenizer_beside=True)
    with pytest.raises(InputError):
        models.load(adapter)


def test_a_folder_whose_base_is_gone_is_refused(tmp_path: Path) -> None:
    adapter, _ = folders(tmp_path, lora(), tokenizer_beside=True)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "nobody/nothing"}))
    with pytest.raises(InputError, match="cannot load"):
        models.load(adapter)


@pytest.mark.parametrize("with_base", [True, False])
def test_without_peft_a_folder_with_an_adapter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_base: bool
) -> None:
    adapter, _ = folders(tmp_path, lora(), tokenizer_beside=True)
    if with_base:  # transformers would read these weights, and say nothing of the adapter beside them
        hf_model("llama").save_pretrained(adapter)
    absent: Callable[[], bool] = lambda: False  # noqa: E731
    monkeypatch.setattr("transformers.utils.import_utils.is_peft_available", absent)
    with pytest.raises(MissingDependencyError, match="pip install peft"):
        models.load(adapter)


def test_models_without_adapters_do_not_import_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    models.from_hf(hf_model("llama"), tokenizer())
    assert "peft" not in sys.modules

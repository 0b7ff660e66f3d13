"""A converted model is the model: what a conversion leaves out or gets wrong is found before anyone has it."""

import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fsteer_lens import Contrast, collect, generate, models
from fsteer_lens.errors import InputError, NonFiniteError
from fsteer_lens.models import agreement, conversion
from fsteer_lens.models.forward import Forward
from fsteer_lens.prompts.tokens import pad
from tests.families import FAMILIES, OTHER_FAMILIES, hf_model, tokenizer

KINDS = models.available_kinds()
IDS = [1, 20, 30, 40, 50, 60, 70]
pytestmark = pytest.mark.model

# Where a family is not itself after the conversion, measured: what the refusal must say.
REFUSED = {
    ("mpt", "hooked"): "cannot convert",
    ("cohere", "hooked"): "cannot convert",
    # TransformerLens 3.9 turns Cohere's queries and keys as Llama's
    **({("cohere", "bridge"): "nats in a single row"} if version("transformer-lens").startswith("3.") else {}),
}


def greedy(network: Any, ids: list[int], n: int) -> list[int]:
    """transformers' own likeliest tokens, one by one without a cache."""
    ids = list(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-n:]


def answers(network: Any, kind: models.Kind, *, process: bool = False) -> list[list[int]]:
    """Likeliest tokens with a cache and without, alone and beside a longer prompt, of what `from_hf` makes."""
    model = models.from_hf(network, tokenizer(), kind=kind, process=process)
    options: Any = {"max_new_tokens": 6, "stop": [], "progress": False}
    return [
        list(generate(model, prompts, use_past_kv_cache=cache, **options)[0].tokens)
        for prompts in ([IDS], [IDS, [*IDS, *IDS]])
        for cache in (True, False)
    ]


@pytest.mark.parametrize("process", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", FAMILIES + OTHER_FAMILIES)
def test_a_family_is_itself_or_is_refused(architecture: str, kind: models.Kind, process: bool) -> None:
    expected = greedy(hf_model(architecture), IDS, 6)
    refusal = REFUSED.get((architecture, kind))
    if refusal is not None:
        with pytest.raises(InputError, match=refusal):
            answers(hf_model(architecture), kind, process=process)
        return
    assert answers(hf_model(architecture), kind, process=process) == [expected] * 4


@pytest.mark.parametrize("architecture", ["bloom", "mpt"])
def test_shifts_of_models_with_alibi_are_those_of_transformers(architecture: str) -> None:
    answer = {text: tokenizer()(text, add_special_tokens=False).input_ids for text in ("yes it is so", "no")}
    network = hf_model(architecture)
    with torch.no_grad():
        means = [
            network(torch.tensor([IDS + ids]), output_hidden_states=True).hidden_states[2][0, len(IDS) :].mean(0)
            for ids in answer.values()
        ]
    model = models.from_hf(network, tokenizer(), kind="bridge")
    found = collect(model, [Contrast(IDS, *answer)] * 2, layer=1, progress=False)
    assert found.shifts is not None
    torch.testing.assert_close(found.shifts[0], means[0] - means[1], atol=1e-4, rtol=1e-4)
    own: Any = model  # TransformerLens' own decoding, which runs with a cache as well
    made = own.generate(torch.tensor([IDS]), max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False)
    assert made[0].tolist()[len(IDS) :] == greedy(hf_model(architecture), IDS, 6)


# What can go wrong in a model before it is converted; the oracle is the same network, asked before.


def biased_head(network: Any) -> None:
    network.lm_head.bias = nn.Parameter(torch.linspace(-2, 2, network.config.vocab_size))


def scaled_by_a_hook(network: Any) -> None:
    network.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 1.5)


def another_position(network: Any) -> None:
    network.model.rotary_emb.inv_freq.mul_(0.5)


def another_activation(network: Any) -> None:
    for layer in network.model.layers:
        layer.mlp.act_fn = nn.ReLU()


def quantised(network: Any) -> None:
    torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8, inplace=True)


def untied(network: Any) -> None:
    network.lm_head.weight = nn.Parameter(network.lm_head.weight.flip(0))


def compiled(network: Any) -> None:
    network.compile(backend="eager")
    network.model.layers[0] = torch.compile(network.model.layers[0], backend="eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch.ao, which is on its way out
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [biased_head, scaled_by_a_hook, another_position, another_activation, quantised, untied, compiled],
    ids=lambda one: one.__name__,
)
def test_a_changed_network_keeps_its_change_or_is_refused(change: Callable[[Any], None], kind: models.Kind) -> None:
    plain, network = hf_model("llama"), hf_model("llama")
    change(network)
    expected = greedy(network, IDS, 6)
    if change is not compiled:
        assert expected != greedy(plain, IDS, 6) or change is quantised, "the change must show"
    try:
        found = answers(network, kind)
    except InputError as error:
        assert change is not compiled
        assert re.search("nats in a single row|cannot convert", str(error))
    else:
        assert found == [expected] * 4


@pytest.mark.parametrize(
    ("architecture", "changed", "parts"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}, ("bridge", "hooked")),
        ("gemma2", {"attn_logit_softcapping": 0.5}, ("bridge", "hooked")),
        ("llama", {"tie_word_embeddings": True}, ("bridge", "hooked")),
        ("llama", {"attention_bias": True}, ("bridge", "hooked")),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, ("bridge",)),
        ("llama", {"head_dim": 16}, ("bridge",)),
    ],
)
def test_what_a_configuration_asks_for_is_kept_or_refused(
    architecture: str, changed: dict[str, Any], parts: tuple[models.Kind, ...]
) -> None:
    expected = greedy(hf_model(architecture, **changed), IDS, 6)
    for kind in KINDS:
        if kind in parts:
            assert answers(hf_model(architecture, **changed), kind) == [expected] * 4
        else:
            with pytest.raises(InputError, match=r'nats in a single row|cannot convert.*kind="bridge"'):
                answers(hf_model(architecture, **changed), kind)


@pytest.mark.parametrize("wrapper", [nn.DataParallel, lambda one: torch.compile(one, backend="eager")])
def test_wrapped_models_are_unwrapped(wrapper: Callable[[Any], Any]) -> None:
    expected = greedy(hf_model("llama"), IDS, 6)
    assert answers(wrapper(hf_model("llama")), KINDS[0]) == [expected] * 4


# Faults planted into the conversion itself: each way of running is looked at, and named.


def planted(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Forward, Tensor], Tensor], **changed: Any) -> str:
    """What the refusal says where the converted model's logits go through `fault`."""
    forward = Forward.__call__
    monkeypatch.setattr(agreement.Forward, "__call__", lambda self, t, m: fault(self, forward(self, t, m)))
    with pytest.raises(InputError) as caught:
        models.from_hf(hf_model("llama", **changed), tokenizer())
    return str(caught.value)


def test_the_refusal_names_what_differs_and_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_with_cache = lambda self, logits: logits.roll(1, -1) if self.use_cache else logits  # noqa: E731
    told = planted(monkeypatch, wrong_with_cache)
    assert re.search(r"[\d.]+ nats in a single row with a KV cache, [\d.]+ nats in a left-padded pair with a KV", told)
    assert "none in a single row, a left-padded pair. " in told
    monkeypatch.undo()
    padded = lambda self, logits: torch.cat([logits[:1], logits[1:] * 1.1])  # noqa: E731
    told = planted(monkeypatch, padded)
    assert "none in a single row, a single row with a KV cache. " in told
    monkeypatch.undo()
    of_nan = lambda self, logits: torch.where(torch.arange(logits.shape[-1]) == 7, torch.nan, logits)  # noqa: E731
    assert "nan nats in a single row, nan nats in a single row with a KV cache" in planted(monkeypatch, of_nan)
    monkeypatch.undo()
    fewer = lambda self, logits: logits[..., :-1]  # noqa: E731
    assert "does not run" in planted(monkeypatch, fewer)


def test_a_deep_model_is_looked_at_in_its_first_layers_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    depths: list[int | None] = []
    made = Forward.__init__

    def noted(self: Forward, model: Any, *, cache: bool, layers: int | None = None) -> None:
        depths.append(layers)
        made(self, model, cache=cache, layers=layers)

    monkeypatch.setattr(agreement.Forward, "__init__", noted)
    models.from_hf(hf_model("llama", num_hidden_layers=agreement.SHALLOW), tokenizer())
    assert depths == [None] * 4
    depths.clear()
    models.from_hf(hf_model("llama", num_hidden_layers=12), tokenizer())
    assert depths == [None, 3, 3, 3]
    depths.clear()
    kinds = ["sliding_attention"] * 5 + ["full_attention"] * 7
    models.from_hf(hf_model("gemma2", num_hidden_layers=12, layer_types=kinds), tokenizer())
    assert depths == [None, 6, 6, 6]
    monkeypatch.undo()
    monkeypatch.setattr(transformers.DynamicCache, "update", lambda self, keys, values, *others, **more: (keys, values))
    with pytest.raises(InputError, match="nats in a single row with a KV cache"):  # a cache that is lost is seen there
        models.from_hf(hf_model("llama", num_hidden_layers=12), tokenizer())


def test_tiny_contexts_and_vocabularies_are_probed_within_them() -> None:
    for changed in ({"max_position_embeddings": 4}, {"vocab_size": 3}, {"max_position_embeddings": 1}):
        for kind in KINDS:
            assert models.from_hf(hf_model("llama", **changed), tokenizer(), kind=kind) is not None


@pytest.mark.skipif("hooked" not in KINDS, reason="this TransformerLens has no HookedTransformer")
def test_a_window_that_is_left_out_bounds_the_context() -> None:
    changed = {"sliding_window": 10, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
    network = hf_model("qwen2", **changed)
    with torch.no_grad():
        expected = network(torch.tensor([IDS + IDS[:3]])).logits[0].log_softmax(-1)
    model = models.from_hf(network, tokenizer(), kind="hooked")
    assert model.cfg.n_ctx == 10
    batch = pad(model, [IDS + IDS[:3]], "left")
    found = Forward(model, cache=False)(batch.tokens, batch.mask)[0].log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_model_that_says_nan_by_itself_is_refused() -> None:
    network = hf_model("llama")
    network.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="before any conversion"):
        models.from_hf(network, tokenizer())


def test_a_model_that_does_not_run_is_refused_before_it_is_converted() -> None:
    network = hf_model("llama")
    network.lm_head = nn.Linear(3, 3)
    with pytest.raises(InputError, match="does not run, before any conversion"):
        models.from_hf(network, tokenizer())


@pytest.mark.parametrize("kind", KINDS)
def test_pytorchs_defaults_change_nothing(kind: models.Kind) -> None:
    made = {}
    for name, dtype in (("plain", torch.float32), ("dtype", torch.bfloat16), ("device", torch.float32)):
        network = hf_model("llama")
        try:
            torch.set_default_dtype(dtype)
            torch.set_default_device("meta" if name == "device" else None)
            made[name] = models.from_hf(network, tokenizer(), kind=kind)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    said = {name: model(torch.tensor([IDS])) for name, model in made.items()}
    torch.testing.assert_close(said["dtype"], said["plain"], atol=1e-5, rtol=0)
    torch.testing.assert_close(said["device"], said["plain"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("given", [None, "gpt2", nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="AutoModelForCausalLM"):
        models.from_hf(given, tokenizer())


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(InputError, match="no head for tokens"):
        models.from_hf(hf_model("llama").model, tokenizer())


def test_a_bridge_is_the_default() -> None:
    assert models.kind_of(models.from_hf(hf_model("llama"), tokenizer())) == "bridge"
    assert conversion._kind(None) == "bridge"

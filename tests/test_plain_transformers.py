"""Steering a model of transformers as it is: its own `generate` against `fsteer_lens.generate`."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fsteer_lens as fs
from fsteer_lens import FineSteer, Window, chain, generate, models, tutor
from fsteer_lens.errors import HookError, InputError, MismatchError, SiteError
from fsteer_lens.hooks import SubspaceAblation
from fsteer_lens.prompts.tokens import Batch, pad, prompt_ids
from tests.by_hand import steered_by_hand
from tests.families import FAMILIES, hf_model, random_model
from tests.test_families import LAYER, PROMPTS, fitted

pytestmark = pytest.mark.model
KIND = models.available_kinds()[0]
NEW = 20


@pytest.fixture(scope="module")
def network() -> Any:
    return AutoModelForCausalLM.from_pretrained(tutor.loading.FOLDER).eval()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    told = tutor.data("safe")
    return [told.test[0].prompt, told.test[80].prompt, told.general_test[0].prompt, told.test[3].prompt]


@pytest.fixture(scope="module")
def batch(tutor_model: Any, prompts: list[str]) -> Batch:
    return pad(tutor_model, [prompt_ids(tutor_model, prompt) for prompt in prompts], "left")


def own_generate(network: Any, batch: Batch, **options: Any) -> Tensor:
    """What the model's own generate puts after left-padded rows."""
    told = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": 1, **options}
    found = network.generate(batch.tokens, attention_mask=batch.mask.long(), **told)
    return found[:, batch.tokens.shape[1] :]


def hooks_on(network: Any) -> int:
    """How many hooks of torch there are on any module."""
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in network.modules())


@pytest.fixture(scope="module")
def two(trained: Any) -> FineSteer:
    """A steering at two layers, each with a gate and experts of its own."""
    return fs.fit({layer: trained[layer] for layer in (3, 4)}, strength=0.8)


def ways(steering: FineSteer, two: FineSteer | None = None) -> dict[str, Any]:
    subspace = steering.gate.subspace  # type: ignore[union-attr]
    return {
        "prompt": steering,
        "generated": steering.with_scope("generated"),
        "all": steering.with_scope("all"),
        "window": steering.with_scope(Window(1, 3)),
        "fading": replace(steering, scope="all", schedule=fs.Schedule((1.0, 0.5, 0.0))),
        "each step": replace(steering, scope="all", refresh="step"),
        "monitor": steering.with_monitor(),
        "ablation": SubspaceAblation(subspace, layer=2, rank=2),
        "chain": chain(steering, fs.steering.MeanShift(torch.full((128,), 0.05), layer=2, scope="all")),
        "probe": fs.hooks.SubspaceProbe(subspace, layer=3, site="hook_resid_pre"),
        "two layers": two,
        "two layers at each step": two and replace(two, scope="all", refresh="step"),
        "one gate for two layers": two and replace(two, gate={3: two.gate_at(3)}, gate_layer=3, scope="generated"),
    }


@pytest.mark.parametrize("way", [
    "prompt", "generated", "all", "window", "fading", "each step", "monitor", "ablation", "chain", "probe",
    "two layers", "two layers at each step", "one gate for two layers",
])  # fmt: skip
def test_the_models_own_generate_says_and_records_what_ours_does(
    network: Any, tutor_model: Any, steering: FineSteer, two: FineSteer, prompts: list[str], batch: Batch, way: str
) -> None:
    one = ways(steering, two)[way]
    eos = tutor_model.tokenizer.eos_token_id
    made = generate(tutor_model, prompts, one, max_new_tokens=NEW, progress=False, read="live")
    with one.on(network) as trace:
        found = own_generate(network, batch, eos_token_id=eos)
        trace = trace.copy()
    for row, ours in zip(found, made, strict=True):
        assert row[: len(ours.tokens)].tolist() == list(ours.tokens)
    for index, ours in enumerate(made):
        row, theirs = trace.row(index), ours.trace
        assert row.prompt_lengths.tolist() == theirs.prompt_lengths.tolist()
        for its, own in zip(row.parts or (row,), theirs.parts or (theirs,), strict=True):
            for name in ("gate", "weights", "score"):
                for layer, value in getattr(own, name).items():
                    torch.testing.assert_close(getattr(its, name)[layer], value, atol=1e-4, rtol=0)
            for name in ("change", "ser", "step_gate", "step_weights"):
                assert getattr(its, name).keys() == getattr(own, name).keys()
                for layer, value in getattr(own, name).items():
                    known = getattr(its, name)[layer][:, : value.shape[1]]
                    torch.testing.assert_close(known, value, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert hooks_on(network) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_steered_as_on_a_converted_model(family: str) -> None:
    network, converted = hf_model(family), random_model(family, KIND)
    steering = fitted(converted)
    for ids in PROMPTS:
        tokens = torch.tensor([ids])
        with torch.no_grad(), steering.on(network) as trace:
            found = network(tokens).logits
            trace = trace.copy()
        with torch.no_grad(), steering.on(converted) as ours:
            expected = converted(tokens)
        torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)
        torch.testing.assert_close(trace.gate[LAYER], ours.gate[LAYER], atol=1e-4, rtol=0)
    assert hooks_on(network) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
        {"do_sample": True, "temperature": 1.5, "top_k": 40},
        {"do_sample": True, "num_return_sequences": 3},
        {"use_cache": False},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_every_way_of_decoding_says_what_a_hook_that_anybody_would_write_makes_it_say(
    network: Any, steering: FineSteer, batch: Batch, options: Any
) -> None:
    one = steering.with_scope("all")
    with one.on(network) as trace:
        own_generate(network, batch)
        gates = trace.gate[4].clone()
    found = []
    for block in (steered_by_hand(network.transformer.h[4], 4, one), one.on(network), one.with_monitor().on(network)):
        torch.manual_seed(3)
        with block as trace:
            found.append(own_generate(network, batch, **options))
        if trace is not None:
            times = len(trace.gate[4]) // len(gates)
            torch.testing.assert_close(trace.gate[4], gates.repeat_interleave(times), atol=1e-4, rtol=0)
    assert torch.equal(found[0], found[1])
    assert found[1].shape != found[2].shape or not torch.equal(found[1], found[2]), "steering must show"


@pytest.mark.parametrize("way", ["prompt", "generated", "all", "each step"])
def test_assisted_decoding_changes_no_word_and_what_it_takes_back_leaves_the_trace(
    network: Any, steering: FineSteer, batch: Batch, way: str
) -> None:
    one, assistant = ways(steering)[way], AutoModelForCausalLM.from_pretrained(tutor.loading.FOLDER).eval()
    alone = Batch(batch.tokens[:1][:, batch.mask[0]], batch.mask[:1][:, batch.mask[0]])
    told, length = torch.tensor([alone.tokens.shape[1]]), alone.tokens.shape[1]
    with one.on(network, prompt_lengths=told) as trace:
        plain, changes = own_generate(network, alone), trace.change[4].clone()
    for helped in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
        with one.on(network, prompt_lengths=told) as trace:
            assisted = own_generate(network, alone, **helped)
            known = length + plain.shape[1] - 1
            torch.testing.assert_close(trace.change[4][:, :known], changes[:, :known], atol=1e-4, rtol=1e-4)
        assert torch.equal(plain, assisted)
    with pytest.raises(HookError, match="prompt_lengths"), one.on(network):
        own_generate(network, alone, prompt_lookup_num_tokens=3)
    assert hooks_on(network) == 0


def test_a_model_that_drafts_with_its_own_first_layers_is_steered_all_the_same(batch: Batch) -> None:
    network, told = hf_model("llama"), torch.tensor([5])
    alone = Batch(torch.tensor([[1, 20, 30, 40, 50]]), torch.ones(1, 5, dtype=torch.bool))
    steering = replace(fitted(random_model("llama", KIND)), scope="all", gate=None)
    with steering.on(network, prompt_lengths=told) as trace:
        plain, changes = own_generate(network, alone), trace.change[LAYER].clone()
    for layers in (1, 2):
        with steering.on(network, prompt_lengths=told) as trace:
            assert torch.equal(own_generate(network, alone, assistant_early_exit=layers), plain)
            known = 5 + plain.shape[1] - 1
            torch.testing.assert_close(trace.change[LAYER][:, :known], changes[:, :known], atol=1e-4, rtol=1e-4)
    assert not torch.equal(own_generate(network, alone), plain), "steering must show"


def test_an_attached_steering_takes_prompt_after_prompt(network: Any, steering: FineSteer, batch: Batch) -> None:
    unsteered = own_generate(network, batch)
    handle = steering.attach(network)
    both = own_generate(network, batch)
    first = own_generate(network, Batch(batch.tokens[:1], batch.mask[:1]))
    assert handle.trace.n_rows == 1 and torch.equal(first[0], both[0][: first.shape[1]])
    assert not torch.equal(both, unsteered)
    second = steering.with_scope("generated").attach(network)  # two at one layer, one after another
    handle.detach()
    handle.detach()
    assert torch.equal(own_generate(network, batch)[:, :1], both[:, :1])
    second.detach()
    assert hooks_on(network) == 0 and torch.equal(own_generate(network, batch), unsteered)


def test_padding_and_cache_are_the_models_own(network: Any, steering: FineSteer, batch: Batch) -> None:
    with steering.on(network) as trace:
        own_generate(network, batch, max_new_tokens=2)
        assert trace.prompt_lengths.tolist() == batch.mask.sum(1).tolist()
        marks = trace.copy().marks()
        assert torch.equal(marks.padding[:, : batch.mask.shape[1]], ~batch.mask)
    ids = batch.tokens[:1][:, batch.mask[0]]
    with torch.no_grad():
        with steering.on(network):
            first = network(ids, use_cache=True)
            step = network(ids[:, :1], past_key_values=first.past_key_values, use_cache=True).logits
        with steering.on(network):
            whole = network(torch.cat([ids, ids[:, :1]], dim=1)[:, : ids.shape[1]], use_cache=False).logits
    torch.testing.assert_close(first.logits, whole, atol=1e-4, rtol=0)
    assert step.shape[1] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache_implementation": "static"}, "generate with the default cache"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
    ],
)
def test_what_cannot_be_followed_is_refused_and_leaves_no_hook(
    network: Any, steering: FineSteer, batch: Batch, options: Any, said: str
) -> None:
    with pytest.raises(HookError, match=said), steering.on(network):
        own_generate(network, batch, **options)
    assert hooks_on(network) == 0


def test_a_cache_from_elsewhere_and_other_masks_are_refused(network: Any, steering: FineSteer, batch: Batch) -> None:
    ids = batch.tokens[:1][:, batch.mask[0]]
    with torch.no_grad():
        elsewhere = network(ids, use_cache=True).past_key_values
        with pytest.raises(HookError, match="a cache from elsewhere"), steering.on(network):
            network(ids[:, :1], past_key_values=elsewhere, use_cache=True)
        square = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        with pytest.raises(HookError, match=r"expected \[b s\]"), steering.on(network):
            network(ids, attention_mask=square)
    assert hooks_on(network) == 0


def test_models_that_are_no_decoders_and_other_weights_are_refused(network: Any, steering: FineSteer) -> None:
    for other, what in {"t5": "encoder", "bert": "encoder", "mamba2": "running state"}.items():
        with pytest.raises(InputError, match=what):
            replace(steering, fingerprint=None).attach(hf_model(other))
    with pytest.raises(SiteError, match="layer"), steering.on(hf_model("gpt2")):
        pass
    altered = AutoModelForCausalLM.from_pretrained(tutor.loading.FOLDER).eval()
    with torch.no_grad():
        altered.get_decoder().h[2].mlp.c_fc.weight.mul_(1.05)
    with pytest.raises(MismatchError, match="activations at layer 4"):
        steering.attach(altered)
    assert hooks_on(altered) == 0


def test_what_is_no_model_is_refused(network: Any, steering: FineSteer) -> None:
    for other in (torch.nn.Linear(2, 2), torch.nn.DataParallel(network)):
        with pytest.raises(InputError, match="model: expected one of TransformerLens"):
            steering.attach(other)


def test_a_file_is_written_and_read_for_a_model_of_transformers(
    network: Any, steering: FineSteer, batch: Batch, tmp_path: Path
) -> None:
    fs.save(replace(steering, fingerprint=None), tmp_path / "safe", model=network)
    again = fs.load(tmp_path / "safe", model=network)
    with pytest.raises(SiteError, match="layer"):
        fs.load(tmp_path / "safe", model=hf_model("gpt2"))
    with steering.on(network):
        expected = own_generate(network, batch)
    with again.on(network):
        assert torch.equal(own_generate(network, batch), expected)


def test_nothing_stays_on_a_layer_that_is_compiled(steering: FineSteer) -> None:
    network = AutoModelForCausalLM.from_pretrained(tutor.loading.FOLDER).eval()
    network.transformer.h[4].compile(backend="eager")
    with pytest.raises(HookError, match="is compiled"):
        steering.attach(network)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), steering.on(network) as trace:  # as it advises
        network(torch.tensor([[5, 6, 7]]))
    assert 4 in trace.gate and hooks_on(network) == 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft, about transformers
def test_a_peft_model_is_steered_with_its_adapter(network: Any, steering: FineSteer, batch: Batch) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = AutoModelForCausalLM.from_pretrained(tutor.loading.FOLDER).eval()
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    ).eval()
    with steering.on(wrapped) as trace:  # a new adapter is 0 at first
        found = own_generate(wrapped, batch)
        assert trace.gate[4].tolist()[0] > 0.5
    with steering.on(network):
        assert torch.equal(found, own_generate(network, batch))


def test_a_model_is_not_kept_alive(steering: FineSteer) -> None:
    network = AutoModelForCausalLM.from_pretrained(tutor.loading.FOLDER).eval()
    with steering.on(network), torch.no_grad():
        network(torch.tensor([[5, 6, 7]]))
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None

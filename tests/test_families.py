"""The whole way, collect to load, on every family of models and on both classes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fsteer_lens import Contrast, FineSteer, collect, fit, generate, load, models, save
from fsteer_lens.errors import InputError
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import pad
from tests.compare import same
from tests.conftest import STORIES
from tests.families import FAMILIES, hf_model, random_model, tokenizer

KINDS = models.available_kinds()
LAYER = 1
PROMPTS = [[1, 20, 30, 40, 50], [1, 60, 70], [1, 80, 90, 100], [1, 33]]
ANSWERS = [[110, 111, 112], [120, 121, 122], [44, 45, 46], [70, 71, 72]]


def contrasts() -> list[Contrast]:
    ids = torch.randint(3, 200, (24, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return [Contrast(row[: 3 + i % 4], " yes good", " no bad", label=str(i % 3)) for i, row in enumerate(ids)]


def fitted(model: SteerableModel) -> FineSteer:
    """Gated steering of a model with random weights, strong enough to turn what it says."""
    activations = collect(model, contrasts(), layer=LAYER, progress=False)
    return fit(activations, rank=4, n_experts=3, preset="0.1", epochs=60, strength=4.0, epsilon=0.5)


def forced(model: SteerableModel, steering: FineSteer | None) -> Tensor:
    """Log-probabilities of every next token after prompts with their answers, at the real positions."""
    batch = pad(model, [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)], "right")
    hooks = []
    if steering is not None:
        lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
        hooks = steering.fwd_hooks(prompt_lengths=lengths, attention_mask=batch.mask)
    with torch.no_grad():
        logits = model.run_with_hooks(batch.tokens, attention_mask=batch.mask.long(), fwd_hooks=hooks)  # type: ignore[attr-defined]
    return logits[batch.mask].float().log_softmax(-1)


@pytest.mark.model
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_way_on_every_family(family: str, tmp_path: Path) -> None:
    runs, fits = {}, {}
    for kind in KINDS:
        model = random_model(family, kind)
        fits[kind] = steering = fitted(model)
        plain = generate(model, PROMPTS, max_new_tokens=6, progress=False)
        for size, cache in ((8, True), (8, False), (1, True)):
            options = {"batch_size": size, "use_past_kv_cache": cache, "progress": False}
            runs[kind, size, cache] = generate(model, PROMPTS, fits[KINDS[0]], max_new_tokens=6, **options)  # type: ignore[arg-type]
        made = runs[kind, 8, True]
        open_rows = [float(one.trace.gate[LAYER][0]) > 0.5 for one in made]
        assert any(one.tokens != other.tokens for one, other in zip(made, plain, strict=True)), "steering must show"
        assert any(open_rows)
        path = tmp_path / f"{kind}.safetensors"
        save(steering, path, model=model)
        assert same(load(path, model=model), steering)
    reference = runs[KINDS[0], 8, True]
    for run in runs.values():
        for one, other in zip(run, reference, strict=True):
            assert one.tokens == other.tokens
            assert one.trace.steps is not None and other.trace.steps is not None
            torch.testing.assert_close(one.trace.steps.logprobs, other.trace.steps.logprobs, atol=1e-4, rtol=0)
    queries = [collect(random_model(family, kind), contrasts(), layer=LAYER, progress=False) for kind in KINDS]
    for one in queries[1:]:
        torch.testing.assert_close(one.queries, queries[0].queries, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.shifts, queries[0].shifts, atol=1e-4, rtol=1e-4)
    scored = [forced(random_model(family, kind), fits[KINDS[0]]) for kind in KINDS]
    for one in scored[1:]:
        torch.testing.assert_close(one, scored[0], atol=1e-4, rtol=0)


@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_no_further_apart_than_the_classes_are(family: str, dtype: torch.dtype) -> None:
    if len(KINDS) < 2:
        pytest.skip("this TransformerLens has one class only: there is nothing to compare")
    pair = [random_model(family, kind, dtype=dtype) for kind in KINDS]
    steering = fitted(pair[0]).with_strength(1.0).with_gate(None)
    plain = [forced(model, None) for model in pair]
    steered = [forced(model, steering) for model in pair]
    allowed = 2 * (plain[0] - plain[1]).abs().max() + 1e-6
    assert (steered[0] - steered[1]).abs().max() <= allowed
    assert (steered[0] - plain[0]).abs().max() > 10 * allowed, "steering must show"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_generates_and_keeps_its_trace(kind: models.Kind, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model("llama", kind, dtype=dtype)
    steering = fitted(model)
    save(steering, tmp_path / "half")
    made = generate(model, PROMPTS, load(tmp_path / "half", model=model), max_new_tokens=4, progress=False)
    assert all(len(one.tokens) == 4 and one.trace.gate[LAYER].dtype == torch.float32 for one in made)


@pytest.mark.model
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("architecture", "what"), [("mamba2", "running state"), ("bert", "encoder"), ("t5", "encoder")]
)
def test_what_cannot_be_steered_is_refused(architecture: str, what: str, kind: models.Kind) -> None:
    with pytest.raises(InputError, match=what):
        random_model(architecture, kind)


@pytest.mark.model
def test_a_model_that_was_booted_elsewhere_is_refused_as_well() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    network = hf_model("mamba2")
    network.config.architectures = [type(network).__name__]
    stateful = TransformerBridge.boot_transformers("mamba2", hf_model=network, tokenizer=tokenizer(), device="cpu")
    with pytest.raises(InputError, match="running state"):
        generate(stateful, PROMPTS, progress=False)
    with pytest.raises(InputError, match="running state"):
        collect(stateful, contrasts(), layer=0, progress=False)


def test_the_whole_way_on_a_real_model(stories: SteerableModel, tmp_path: Path) -> None:
    names = ["Lily", "Tom", "Max", "Anna", "Ben", "Sue", "Tim", "Mia", "Sam", "Amy"]
    told = [
        Contrast(
            f"Once upon a time there was a child named {name}. One day, {name}",
            " was very happy and smiled. It was a lovely, sunny day.",
            " was very sad and cried. It was a dark, scary day.",
        )
        for name in names
    ]
    found = {}
    for kind in KINDS:
        model = models.load(STORIES, kind=kind)
        mood = fit(
            collect(model, told, layer=2, progress=False), rank=3, n_experts=2, preset="0.1", epochs=20, strength=4.0
        )
        save(mood, tmp_path / kind)
        prompts = [str(contrast.prompt) for contrast in told[:3]] + ["Once upon a time"]
        for cache in (True, False):
            again = load(tmp_path / kind, model=model)
            found[kind, cache] = generate(
                model, prompts, again, max_new_tokens=12, use_past_kv_cache=cache, compare=True, progress=False
            )
    reference = found[KINDS[0], True]
    for run in found.values():
        assert [one.tokens for one in run] == [one.tokens for one in reference]
    assert all(one.baseline is not None and one.text != one.baseline.text for one in reference[:3])

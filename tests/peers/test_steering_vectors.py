"""Beside steering-vectors: the same vectors from the same contrasts, and the same text under the same vector.

Both read the residual stream after a block. They read one token of two texts, we read the last prompt token with and
without a context, or the mean over the tokens of two answers: the same, where the texts are those prompts, or where
each answer is one token.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsteer_lens import Contrast, collect, generate, models, tutor
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import answer_ids, prompt_ids
from fsteer_lens.steering import MeanShift, fit_mean_shift, fit_pca_direction
from fsteer_lens.tutor.loading import FOLDER
from tests.conftest import STORIES
from tests.running import LAYER, batch_of, logits_of

pytest.importorskip("steering_vectors", reason="needs steering-vectors: make test-peers")

from steering_vectors import SteeringVector, pca_aggregator, train_steering_vector

KINDS = models.available_kinds()
Pair = tuple[str, str]


def hugging_face(folder: Any) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def their_vector(folder: Any, pairs: list[Pair], layer: int, **options: Any) -> Tensor:
    model, tokenizer = hugging_face(folder)
    return train_steering_vector(model, tokenizer, pairs, layers=[layer], **options).layer_activations[layer]


def cosine(one: Tensor, other: Tensor) -> float:
    return float(F.cosine_similarity(one, other, dim=0))


def of_context() -> tuple[list[Contrast], list[Pair]]:
    """Contrasts of a context, and the two texts that they stand for."""
    contrasts = list(tutor.data("safe").train[::40])
    return contrasts, [(f"{one.context}{one.prompt}", f"{one.prompt}") for one in contrasts]


def of_answers(model: SteerableModel) -> tuple[list[Contrast], list[Pair]]:
    """Contrasts of two answers of one token each, and the texts that end in them."""
    tokenizer = model.tokenizer
    prompts = [str(prompt) for prompt in tutor.data("safe").train.prompts[::40]]
    words = [f" {word}" for word in ("yes", "no", "a", "the", "is", "to") if len(answer_ids(model, f" {word}")) == 1]
    assert len(words) >= 2
    contrasts = [Contrast(p, words[i % len(words)], words[(i + 1) % len(words)]) for i, p in enumerate(prompts)]
    pairs = [(f"{one.prompt}{one.preferred}", f"{one.prompt}{one.undesired}") for one in contrasts]
    for one, (text, _) in zip(contrasts, pairs, strict=True):
        assert tokenizer(text).input_ids == [*prompt_ids(model, one.prompt), *answer_ids(model, one.preferred)]
    return contrasts, pairs


@pytest.mark.parametrize("layer", [0, LAYER])
@pytest.mark.parametrize("shift", ["last_prompt", "response_mean"])
def test_mean_shift_is_their_vector(model: SteerableModel, shift: Any, layer: int) -> None:
    contrasts, pairs = of_context() if shift == "last_prompt" else of_answers(model)
    read = collect(model, contrasts, layer=[layer, layer + 1], shift=shift, progress=False)
    ours, theirs = fit_mean_shift(read[layer]).vector, their_vector(FOLDER, pairs, layer)
    assert cosine(ours, theirs) > 0.9999
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)

    assert cosine(fit_mean_shift(read[layer + 1]).vector, theirs) < 0.99, "another layer agrees as well"
    assert cosine(ours, their_vector(FOLDER, pairs, layer, read_token_index=-2)) < 0.99, "another token does as well"


@pytest.mark.parametrize("kind", KINDS)
def test_mean_shift_is_their_vector_on_a_llama(kind: models.Kind) -> None:
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES.name} is not here: it is test data beside the checkout, not part of the package")
    model = models.load(STORIES, kind=kind)
    names = ["Lily", "Tom", "Anna", "Ben", "Sue", "Max"]
    contrasts = [Contrast(f"{name} saw a dog.", " a", " b", context="Once upon a time, ") for name in names]
    pairs = [(f"{one.context}{one.prompt}", str(one.prompt)) for one in contrasts]
    tokenizer = model.tokenizer
    for one, pair in zip(contrasts, pairs, strict=True):
        assert list(tokenizer(pair[1]).input_ids) == prompt_ids(model, one.prompt)
    read = collect(model, contrasts, layer=[2, 3], shift="last_prompt", progress=False)
    theirs = their_vector(STORIES, pairs, 2)
    assert cosine(fit_mean_shift(read[2]).vector, theirs) > 0.9999
    assert cosine(fit_mean_shift(read[3]).vector, theirs) < 0.99


def test_pca_direction_is_theirs_with_its_sign(tutor_model: SteerableModel) -> None:
    contrasts, pairs = of_context()
    ours = fit_pca_direction(collect(tutor_model, contrasts, layer=LAYER, shift="last_prompt", progress=False))
    theirs = their_vector(FOLDER, pairs, LAYER, aggregator=pca_aggregator())
    assert cosine(ours.vector, theirs) > 0.9999
    assert cosine(ours.vector, their_vector(FOLDER, pairs, LAYER)) < 0.9999, "the mean is the same vector here"


def test_the_same_vector_gives_the_same_logits_and_text(model: SteerableModel, prompts: list[str]) -> None:
    theirs, _ = hugging_face(FOLDER)
    theirs.generation_config.eos_token_id = None  # neither stops, so that eight tokens are compared
    vector = 3.0 * torch.randn(128, generator=torch.Generator().manual_seed(2))
    shift = MeanShift(vector, layer=LAYER, scope="all")
    for prompt in prompts:
        batch = batch_of(model, [prompt])
        with shift.on(model):
            ours = logits_of(model, batch).log_softmax(-1)
        with SteeringVector({LAYER: vector}).apply(theirs), torch.no_grad():
            expected = theirs(batch.tokens).logits.log_softmax(-1)
            text = theirs.generate(
                batch.tokens, attention_mask=batch.mask.long(), do_sample=False, max_new_tokens=8, pad_token_id=0
            )
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
        assert float((ours - logits_of(model, batch).log_softmax(-1)).abs().max()) > 0.1, "the vector did nothing"
        made = generate(model, prompt, shift, max_new_tokens=8, progress=False)[0]
        assert list(made.tokens) == text[0, batch.tokens.shape[1] :].tolist()

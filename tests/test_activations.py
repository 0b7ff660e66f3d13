"""What is read from a model: checked against one plain forward pass a prompt."""

import pytest
import torch

from fsteer_lens import Contrast, ContrastSet, collect, collect_queries, models, tutor
from fsteer_lens.errors import DataError, InputError, NonFiniteError, SiteError, TokenizerError
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import answer_ids, pad, prompt_ids
from tests.families import FAMILIES, N_LAYERS, random_model
from tests.running import residual

TRAIN = tutor.data("safe").train


def stream(model: SteerableModel, ids: list[int], layer: int) -> torch.Tensor:
    return residual(model, pad(model, [ids], "right"), f"blocks.{layer}.hook_resid_post")[0]


def test_last_prompt_shift_is_with_minus_without_context(model: SteerableModel) -> None:
    contrasts = TRAIN[::200]
    found = collect(model, contrasts, layer=[1, 4], shift="last_prompt", batch_size=4, progress=False)
    for layer, acts in found.items():
        assert acts.layer == layer and acts.shifts is not None
        for index, contrast in enumerate(contrasts):
            plain = stream(model, prompt_ids(model, contrast.prompt), layer)[-1]
            tagged = stream(model, prompt_ids(model, contrast.prompt, context=contrast.context), layer)[-1]
            torch.testing.assert_close(acts.queries[index], plain, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(acts.shifts[index], tagged - plain, atol=1e-4, rtol=1e-3)
    assert found[1].labels == tuple(contrasts.labels)
    assert found[1].groups == tuple(contrast.group for contrast in contrasts)


def test_response_mean_shift_averages_over_the_answers(model: SteerableModel) -> None:
    contrasts = TRAIN[::300]
    acts = collect(model, contrasts, layer=2, batch_size=3, progress=False)
    assert acts.shifts is not None and acts.shift == "response_mean"
    for index, contrast in enumerate(contrasts):
        prompt = prompt_ids(model, contrast.prompt)
        means = []
        for answer in (contrast.preferred, contrast.undesired):
            whole = stream(model, prompt + answer_ids(model, answer), 2)
            means.append(whole[len(prompt) :].mean(dim=0))
        torch.testing.assert_close(acts.shifts[index], means[0] - means[1], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(acts.queries[index], whole[len(prompt) - 1], atol=1e-4, rtol=1e-4)


def mixed_contrasts() -> list[Contrast]:
    """Prompts of 2 to 56 tokens in a context of 64; only the short ones have an answer that fills it."""
    ids = torch.randint(3, 200, (18, 56), generator=torch.Generator().manual_seed(1)).tolist()
    lengths = [2 + 54 * i // 17 for i in range(18)]
    answers = [" yes good friend" * (1 + (length < 9) * 6) for length in lengths]
    return [Contrast(row[:n], answer, " no bad") for row, n, answer in zip(ids, lengths, answers, strict=True)]


@pytest.mark.model
@pytest.mark.parametrize("kind", models.available_kinds())
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_share_their_prompt_are_read_as_if_each_had_its_own(family: str, kind: models.Kind) -> None:
    """Against one uncached pass per row; the longest prompt with the longest answer would not fit the context."""
    model, contrasts = random_model(family, kind), mixed_contrasts()
    lengths = [[len(answer_ids(model, text)) for text in (one.preferred, one.undesired)] for one in contrasts]
    assert max(len(one.prompt) for one in contrasts) + max(map(max, lengths)) > model.cfg.n_ctx
    found = {
        size: collect(model, contrasts, layer=[0, N_LAYERS - 1], batch_size=size, progress=False) for size in (1, 5, 16)
    }
    early = collect(model, contrasts, layer=0, progress=False)
    torch.testing.assert_close(early.shifts, found[16][0].shifts)
    for layer in (0, N_LAYERS - 1):
        for index, contrast in enumerate(contrasts):
            prompt = prompt_ids(model, contrast.prompt)
            wholes = [
                stream(model, prompt + answer_ids(model, text), layer)
                for text in (contrast.preferred, contrast.undesired)
            ]
            means = [whole[len(prompt) :].mean(dim=0) for whole in wholes]
            for acts in (one[layer] for one in found.values()):
                assert acts.shifts is not None
                torch.testing.assert_close(acts.queries[index], wholes[0][len(prompt) - 1], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(acts.shifts[index], means[0] - means[1], atol=1e-4, rtol=1e-4)
                assert not torch.allclose(acts.shifts[index], acts.shifts[index - 1], atol=1e-2), "rows must differ"


@pytest.mark.model
@pytest.mark.parametrize("kind", models.available_kinds())
def test_one_prompt_at_a_time_needs_no_pad_token(kind: models.Kind) -> None:
    model, contrasts = random_model.__wrapped__("gpt2", kind), mixed_contrasts()[-4:]
    expected = collect(model, contrasts, layer=1, progress=False)
    model.tokenizer.pad_token = model.tokenizer.eos_token = None
    with pytest.raises(TokenizerError, match="batch_size=1"):
        collect(model, contrasts, layer=1, progress=False)
    found = collect(model, contrasts, layer=1, batch_size=1, progress=False)
    assert found.shifts is not None and expected.shifts is not None
    torch.testing.assert_close(found.shifts, expected.shifts, atol=1e-4, rtol=1e-4)


def test_a_prompt_is_run_once_and_shares_its_pass(model: SteerableModel) -> None:
    """Counted at the first block: as many rows as there are prompts, then twice as many for the answers."""
    seen: list[tuple[int, int]] = []
    ids = torch.randint(3, 200, (20, 24), generator=torch.Generator().manual_seed(2)).tolist()
    contrasts = [Contrast(row, " yes good friend of mine", " no") for row in ids]
    point = model.hook_dict["blocks.0.hook_resid_pre"]
    point.add_hook(lambda activation, hook: seen.append(activation.shape[:2]) or None)  # type: ignore[func-returns-value]
    try:
        shared = collect(model, contrasts, layer=1, batch_size=8, progress=False)
    finally:
        point.remove_hooks()
    del seen[: len(seen) - 6]  # before it the model's fingerprint is taken, after it once more
    rows = [shape[0] for shape in seen]
    assert rows.count(8) >= 2 and rows.count(16) >= 2, rows
    assert shared.shifts is not None


def test_queries_do_not_depend_on_batching(model: SteerableModel) -> None:
    prompts = [str(prompt) for prompt in TRAIN.prompts[::150]]
    one, many = (collect_queries(model, prompts, layer=3, batch_size=size, progress=False).queries for size in (1, 8))
    torch.testing.assert_close(one, many, atol=1e-4, rtol=1e-4)


def test_collecting_leaves_no_hook_and_shares_no_memory(tutor_model: SteerableModel) -> None:
    contrasts = TRAIN[:4]
    first = collect(tutor_model, contrasts, layer=2, shift="last_prompt", progress=False)
    copy = first.queries.clone()
    second = collect(tutor_model, contrasts, layer=2, shift="last_prompt", progress=False)
    second.queries.zero_()
    assert torch.equal(first.queries, copy)
    assert not any(point.fwd_hooks for point in tutor_model.hook_dict.values())


def test_a_real_model_is_read(stories: SteerableModel) -> None:
    contrasts = ContrastSet([Contrast("Once upon a time", " he was happy.", " he was sad.", label="mood")] * 2)
    acts = collect(stories, contrasts, layer=4, progress=False)
    assert acts.shifts is not None and acts.shifts.norm(dim=1).min() > 0
    torch.testing.assert_close(acts.queries[0], acts.queries[1], atol=1e-5, rtol=1e-5)


def test_bad_requests_raise(hooked: SteerableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="at least one"):
        collect(hooked, ContrastSet(), layer=1)
    with pytest.raises(DataError, match="at least one"):
        collect_queries(hooked, [], layer=1)
    with pytest.raises(SiteError, match=r"0\.\.5"):
        collect(hooked, TRAIN[:2], layer=6, progress=False)
    with pytest.raises(DataError, match="context"):
        collect(hooked, [Contrast("a", "b", "c")], layer=1, shift="last_prompt", progress=False)
    with pytest.raises(DataError, match="the same"):
        collect(hooked, [Contrast("a", "b", "b")], layer=1, progress=False)
    with pytest.raises(InputError, match="batch_size"):
        collect(hooked, TRAIN[:2], layer=1, batch_size=0, progress=False)
    with pytest.raises(DataError, match="labels"):
        collect_queries(hooked, ["a", "b"], layer=1, labels=["x"], progress=False)
    embed = hooked.embed.W_E  # type: ignore[attr-defined]
    broken = embed.data.clone()
    broken[prompt_ids(hooked, TRAIN[0].prompt)[3]] = float("inf")
    monkeypatch.setattr(embed, "data", broken)
    with pytest.raises(NonFiniteError, match=r"half precision|Half precision"):
        collect(hooked, TRAIN[:2], layer=1, shift="last_prompt", progress=False)

"""What is read from a model: checked against one plain forward pass a prompt."""

import pytest
import torch

from fsteer_lens import Contrast, ContrastSet, collect, collect_queries, tutor
from fsteer_lens.errors import DataError, InputError, NonFiniteError, SiteError
from fsteer_lens.models import SteerableModel
from fsteer_lens.tokens import answer_ids, pad, prompt_ids
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
    assert torch.equal(acts.queries[0], acts.queries[1])


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

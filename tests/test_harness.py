"""What of the adapter for lm-evaluation-harness runs without it; beside it: tests/peers/test_lm_eval.py."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from fsteer_lens import FineSteer, harness, tutor
from fsteer_lens.errors import ContextLengthError, InputError, MissingDependencyError
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import pad, prompt_ids
from fsteer_lens.steering import MeanShift
from tests.running import LAYER, logits_of

OPTIONS: dict[str, Any] = {
    "batch_size": 3,
    "max_new_tokens": 8,
    "max_length": None,
    "add_bos_token": True,
    "seed": 0,
    "progress": False,
}


def steered(model: SteerableModel, steering: Any = None, **options: Any) -> harness.SteeredLM:
    return harness.SteeredLM(model, steering, **{**OPTIONS, **options})


def score(lm: harness.SteeredLM, *pairs: tuple[list[int], list[int]]) -> list[tuple[float, bool]]:
    return lm._loglikelihood_tokens([(None, *pair) for pair in pairs])


def by_hand(model: SteerableModel, context: list[int], continuation: list[int], edit: Any = None) -> tuple[float, bool]:
    """One row alone, nothing padded, with the edit that a plain hook of TransformerLens makes."""
    batch = pad(model, [[*context, *continuation]], "right")
    hooks = [] if edit is None else [(f"blocks.{LAYER}.hook_resid_post", lambda x, hook: x + edit(x, len(context)))]
    with model.hooks(fwd_hooks=hooks):  # type: ignore[attr-defined]
        logprobs = logits_of(model, batch)[0, len(context) - 1 : -1].log_softmax(-1)
    told = torch.tensor(continuation)
    return float(logprobs[torch.arange(len(told)), told].sum()), bool((logprobs.argmax(-1) == told).all())


def requests(model: SteerableModel, prompts: list[str]) -> list[tuple[list[int], list[int]]]:
    """Contexts of several lengths, each with what the model would say (greedy), or something else."""
    pairs = []
    for number, prompt in enumerate(prompts):
        ids = prompt_ids(model, prompt)
        said = int(logits_of(model, pad(model, [ids], "right"))[0, -1].argmax())
        pairs.append((ids, [said] if number % 2 else [said, 40, 50 + number]))
    return pairs


def test_scores_come_back_in_order_and_know_what_is_greedy(model: SteerableModel, prompts: list[str]) -> None:
    pairs = requests(model, prompts)
    found, expected = score(steered(model), *pairs), [by_hand(model, *pair) for pair in pairs]
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert {one[1] for one in found} == {True, False}


def test_query_is_the_last_token_of_the_context(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    everywhere = steering.with_scope("all")

    def edit(x: Any, length: int) -> Any:
        decision = everywhere.decide(LAYER, x[:, length - 1].float())
        return (decision.gate.unsqueeze(-1) * decision.vector).unsqueeze(1)

    pairs = requests(model, prompts)
    found = [one[0] for one in score(steered(model, everywhere), *pairs)]
    assert found == pytest.approx([by_hand(model, *pair, edit)[0] for pair in pairs], abs=1e-3)
    wrong = [by_hand(model, *pair, lambda x, length: edit(x, x.shape[1]))[0] for pair in pairs]
    assert max(abs(one - other) for one, other in zip(found, wrong, strict=True)) > 0.1


def test_context_loses_its_beginning_and_the_query_stays_at_its_end(
    model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    ids, answer = prompt_ids(model, prompts[0]), [40, 50]
    kept = ids[-7:]  # with two tokens of answer eight are read
    for hook_object in (None, steering):
        lm = steered(model, hook_object, max_length=8)
        [whole], [cut] = score(lm, (ids, answer)), score(steered(model, hook_object), (kept, answer))
        assert whole[0] == pytest.approx(cut[0], abs=1e-4)
        [shorter] = score(steered(model, hook_object), (ids[-6:], answer))
        assert abs(whole[0] - shorter[0]) > 1e-3
    with pytest.raises(ContextLengthError, match="continuation is too long"):
        score(steered(model, max_length=8), (ids, [40] * 9))
    with pytest.raises(InputError, match="at least one token"):
        score(steered(model), (ids, []))


def test_no_context_is_the_beginning_of_sequence(model: SteerableModel) -> None:
    bos = model.tokenizer.bos_token_id
    lm = steered(model)
    assert lm.prefix_token_id == bos
    assert score(lm, ([], [40, 50])) == score(lm, ([bos], [40, 50]))
    assert lm.tok_encode("what") == [bos, *lm.tok_encode("what", add_special_tokens=False)]
    assert lm.tok_encode("<bos>what") == lm.tok_encode("what")
    assert steered(model, add_bos_token=False).tok_encode("what") == lm.tok_encode("what")[1:]


def test_chat_template_of_the_tokenizer(tutor_model: SteerableModel) -> None:
    lm = steered(tutor_model)
    text = lm.apply_chat_template([{"role": "user", "content": "hello"}])
    assert lm.tok_encode(text) == prompt_ids(tutor_model, "hello", chat=True)
    assert lm.apply_chat_template([{"role": "user", "content": "hello"}]) == "<bos>" + tutor.chat("hello")


def test_bad_options(tutor_model: SteerableModel) -> None:
    for options in ({"batch_size": 0}, {"max_new_tokens": 0}, {"max_length": 1}, {"max_length": 10_000}):
        with pytest.raises(InputError, match=next(iter(options))):
            steered(tutor_model, **options)
    assert "MeanShift" in repr(steered(tutor_model, MeanShift(torch.ones(128), layer=2)))


def test_package_does_not_import_the_harness() -> None:
    code = "import sys, fsteer_lens, fsteer_lens.harness; assert 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_harness_says_what_to_install(tutor_model: SteerableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MissingDependencyError, match=r"fsteer-lens\[eval\]"):
        harness.lm(tutor_model)

"""Beside lm-evaluation-harness: a steered model in it, against its own Hugging Face model and our own passes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fsteer_lens import FineSteer, generate, harness, models, tutor
from fsteer_lens.errors import ContextLengthError, InputError
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.run.teacher_forcing import answer_logprobs, answered
from fsteer_lens.steering import MeanShift
from fsteer_lens.tutor.loading import FOLDER
from tests.conftest import STORIES
from tests.running import LAYER, n_hooks

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: make test-peers")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

NEW_TOKENS = 24
TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
doc_to_text: "{{{{prompt}}}}"
target_delimiter: ""
"""
CHOICE = """
task: choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
ANSWER = """
task: answer
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["<eos>", "\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""
TEXT = """
task: text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}{{choices[0]}}"
metric_list: [{metric: byte_perplexity}, {metric: word_perplexity}]
"""
LOGPROB = {"choice": lambda sample: [one[0][0] for one in sample["resps"]], "text": lambda s: [s["resps"][0][0]]}

Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    """Evaluate a model of the harness on three tasks made of these records."""

    def run(lm: Any, records: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
        data = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        for task in (CHOICE, ANSWER, TEXT):
            name = task.split()[1]
            shared = TASK.format(data=data, cache=tmp_path / "cache")
            (tmp_path / f"{name}.yaml").write_text(shared + task)
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        return lm_eval.simple_evaluate(
            lm, tasks=["choice", "answer", "text"], task_manager=manager, bootstrap_iters=0, **options
        )

    return run


def of_tutor(bos: str = "") -> list[dict[str, Any]]:
    """Harmful requests with the refusal that is wanted, and what the tutor says by itself."""
    test = tutor.data("safe").test[::12]
    return [{"prompt": f"{bos}{one.prompt}", "choices": [one.preferred, one.undesired], "label": 0} for one in test]


def of_stories() -> list[dict[str, Any]]:
    names = ["Lily", "Tom", "Anna", "Ben"]
    return [
        {"prompt": f"Once upon a time, {name} saw a", "choices": [" big dog.", " red ball.", " zebra"], "label": i % 3}
        for i, name in enumerate(names)
    ]


def logprobs(results: dict[str, Any], task: str) -> list[list[float]]:
    return [LOGPROB[task](sample) for sample in results["samples"][task]]


def texts(results: dict[str, Any]) -> list[str]:
    return [sample["resps"][0][0] for sample in results["samples"]["answer"]]


def metric(results: dict[str, Any], task: str, name: str) -> float:
    return results["results"][task][f"{name},none"]


def hugging_face(folder: Path, **options: Any) -> HFLM:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4, **options)


def assert_same_numbers(ours: dict[str, Any], theirs: dict[str, Any], texts_of: dict[str, Any]) -> None:
    """The numbers of `theirs`, and those of `texts_of` for the perplexity of whole texts."""
    for task, other in (("choice", theirs), ("text", texts_of)):
        torch.testing.assert_close(
            torch.tensor(logprobs(ours, task)), torch.tensor(logprobs(other, task)), atol=1e-3, rtol=0
        )
    assert metric(ours, "choice", "acc") == metric(theirs, "choice", "acc")
    assert texts(ours) == texts(theirs)
    for name in ("byte_perplexity", "word_perplexity"):
        assert metric(ours, "text", name) == pytest.approx(metric(texts_of, "text", name), rel=1e-3)
    doubled = torch.tensor(logprobs(theirs, "text")) - torch.tensor(logprobs(ours, "text"))
    assert float(doubled.abs().max()) > 1.0, "one beginning of sequence or two are the same"


def test_unsteered_tutor_has_the_numbers_of_the_harness_own_model(model: SteerableModel, evaluate: Evaluate) -> None:
    """The tutor's tokenizer puts its <bos> in front, as a Llama's does."""
    lm = harness.lm(model, batch_size=4, progress=False)
    assert isinstance(lm, LM)
    ours = evaluate(lm, of_tutor())
    one_bos = evaluate(hugging_face(FOLDER, add_bos_token=False), of_tutor())
    assert_same_numbers(ours, evaluate(hugging_face(FOLDER), of_tutor()), texts_of=one_bos)
    written = evaluate(lm, of_tutor("<bos>"))
    assert all(logprobs(ours, task) == logprobs(written, task) for task in LOGPROB) and texts(ours) == texts(written)
    without = evaluate(harness.lm(model, batch_size=4, add_bos_token=False, progress=False), of_tutor())
    moved = torch.tensor(logprobs(without, "choice")) - torch.tensor(logprobs(ours, "choice"))
    assert float(moved.abs().max()) > 1e-2, "the beginning of sequence makes no difference"


def test_unsteered_llama_has_the_numbers_of_the_harness_own_model(evaluate: Evaluate) -> None:
    """This tokenizer puts its <s> in front, and before that the harness' own model has one more for whole texts."""
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES.name} is not here: it is test data beside the checkout, not part of the package")
    ours = evaluate(harness.lm(models.load(STORIES), batch_size=3, progress=False), of_stories())
    one_bos = evaluate(hugging_face(STORIES, add_bos_token=False), of_stories())
    assert_same_numbers(ours, evaluate(hugging_face(STORIES), of_stories()), texts_of=one_bos)


def test_steered_numbers_are_those_of_our_own_passes(
    model: SteerableModel, steering: FineSteer, evaluate: Evaluate
) -> None:
    records = of_tutor()
    prompts, hooks = [record["prompt"] for record in records], n_hooks(model)
    plain = evaluate(harness.lm(model, progress=False), records)
    results = evaluate(harness.lm(model, steering, batch_size=3, progress=False), records)
    assert n_hooks(model) == hooks

    sums = []
    for side in (0, 1):
        rows = answered(model, prompts, [record["choices"][side] for record in records], Passes())
        sums.append([float(row.sum()) for row in answer_logprobs(model, rows, steering)])
    expected = torch.tensor(sums).T
    torch.testing.assert_close(torch.tensor(logprobs(results, "choice")), expected, atol=1e-3, rtol=0)
    right = float((expected[:, 0] > expected[:, 1]).float().mean())
    assert metric(results, "choice", "acc") == pytest.approx(right)
    assert right > metric(plain, "choice", "acc") + 0.5

    made = generate(model, prompts, steering, max_new_tokens=NEW_TOKENS, progress=False)
    assert texts(results) == made.texts
    exact = sum(text == record["choices"][0] for text, record in zip(made.texts, records, strict=True)) / len(records)
    assert metric(results, "answer", "exact_match") == pytest.approx(exact)
    assert exact > metric(plain, "answer", "exact_match") + 0.5
    assert results["config"]["steering"] == repr(steering)


def test_perplexity_under_a_vector_that_is_always_on(tutor_model: SteerableModel, evaluate: Evaluate) -> None:
    vector = 2.0 * torch.randn(128, generator=torch.Generator().manual_seed(2))
    shift = MeanShift(vector, layer=LAYER, scope="all")
    records = of_tutor()
    results = evaluate(harness.lm(tutor_model, shift, progress=False), records)
    bos = [tutor_model.tokenizer.bos_token_id]
    whole = [record["prompt"] + record["choices"][0] for record in records]
    sums = [
        float(row.sum())
        for row in answer_logprobs(tutor_model, answered(tutor_model, [bos] * len(whole), whole, Passes()), shift)
    ]
    assert [one[0] for one in logprobs(results, "text")] == pytest.approx(sums, abs=1e-3)
    plain = evaluate(harness.lm(tutor_model, progress=False), records)
    assert metric(results, "text", "byte_perplexity") > 1.05 * metric(plain, "text", "byte_perplexity")


def test_texts_longer_than_the_window_are_cut_as_by_the_harness_own_model(tutor_model: SteerableModel) -> None:
    long = "<bos>" + "".join(str(prompt) for prompt in tutor.data("safe").train.prompts[:24])
    pairs = [(long, " yes"), ("<bos>" + str(tutor.data("safe").test.prompts[0]), " no, it is not"), ("", " what is")]
    scored = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    rolled = [Instance("loglikelihood_rolling", {}, (long[5:],), 0)]
    asked = [Instance("generate_until", {}, (long, {"until": ["<eos>"], "max_gen_toks": 8}), 0)]
    ours, theirs = harness.lm(tutor_model, progress=False), hugging_face(FOLDER, add_bos_token=False)
    assert len(tutor_model.tokenizer(long).input_ids) > 2 * tutor_model.cfg.n_ctx
    for one, other in zip(ours.loglikelihood(scored), theirs.loglikelihood(scored), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3) and one[1] == other[1]
    assert ours.loglikelihood_rolling(rolled) == pytest.approx(theirs.loglikelihood_rolling(rolled), abs=1e-2)
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_chat_template_and_cache(tutor_model: SteerableModel, evaluate: Evaluate, tmp_path: Path) -> None:
    records = [{"prompt": "What is the capital of France?", "choices": ["a", "b"], "label": 0}]
    lm = harness.lm(tutor_model, progress=False)
    results = evaluate(lm, records, apply_chat_template=True)
    sent = results["samples"]["answer"][0]["arguments"][0][0]
    assert sent == tutor_model.tokenizer.apply_chat_template(
        [{"role": "user", "content": records[0]["prompt"]}], tokenize=False, add_generation_prompt=True
    )
    direct = generate(tutor_model, str(records[0]["prompt"]), chat=True, max_new_tokens=NEW_TOKENS, progress=False)
    assert texts(results) == direct.texts

    kept = tmp_path / "cache.db"
    first = evaluate(lm, records, use_cache=str(kept))
    broken = harness.lm(tutor_model, progress=False)
    for name in ("_loglikelihood_tokens", "_generate"):
        setattr(broken, name, None)  # whatever is not in the file raises
    assert texts(evaluate(broken, records, use_cache=str(kept))) == texts(first)
    with pytest.raises(TypeError):
        evaluate(broken, records)


def test_generation_arguments_are_honoured_or_refused(tutor_model: SteerableModel) -> None:
    prompts = [str(prompt) for prompt in tutor.data("safe").test.prompts[:4]]

    def ask(seed: int = 0, **arguments: Any) -> list[str]:
        asked = [Instance("generate_until", {}, (prompt, {"max_gen_toks": 12, **arguments}), 0) for prompt in prompts]
        return harness.lm(tutor_model, seed=seed, progress=False).generate_until(asked)

    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "top_k": 50}
    sampled = ask(**options)
    direct = generate(tutor_model, prompts, max_new_tokens=12, seed=0, progress=False, **options)
    assert [text.strip() for text in sampled] == [text.strip() for text in direct.texts]
    greedy = ask(do_sample=False, temperature=0.0, top_k=50)
    assert greedy == ask() and greedy != sampled and sampled != ask(seed=1, **options)

    word = greedy[0].split()[2]
    assert ask(until=[word])[0] == greedy[0][: greedy[0].index(word)]
    with pytest.raises(InputError, match="num_beams"):
        ask(num_beams=4)
    with pytest.raises(ContextLengthError, match="no room"):
        ask(max_gen_toks=tutor_model.cfg.n_ctx)

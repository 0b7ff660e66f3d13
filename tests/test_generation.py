"""Generation: the same tokens however it is run, and a trace that tells the truth."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsteer_lens import (
    Activations,
    EnergyGate,
    FineSteer,
    Schedule,
    collect,
    collect_queries,
    fit,
    generate,
    models,
    stream,
    tutor,
)
from fsteer_lens.errors import ContextLengthError, InputError, TokenizerError
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import pad, prompt_ids, stop_ids
from fsteer_lens.run import decoding, generation
from fsteer_lens.run import unsteered as unsteered_module
from fsteer_lens.run.sampling import Sampling
from tests import made_up
from tests.running import LAYER, logits_of, n_hooks

NEW = 14


def texts(model: SteerableModel, prompts: list[str], steering: FineSteer | None = None, **options) -> list[str]:  # type: ignore[no-untyped-def]
    return generate(model, prompts, steering, max_new_tokens=NEW, progress=False, **options).texts


def test_unsteered_greedy_is_transformer_lens_own(model: SteerableModel, prompts: list[str]) -> None:
    for prompt in prompts[:2]:
        ids = prompt_ids(model, prompt)
        own = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, verbose=False)  # type: ignore[attr-defined]
        found = generate(model, prompt, max_new_tokens=NEW, progress=False)[0].tokens
        assert own[0, len(ids) :].tolist()[: len(found)] == list(found)


def test_cache_batch_and_class_do_not_matter(
    hooked: SteerableModel, bridge: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    runs = [
        generate(model, prompts, steering, max_new_tokens=NEW, batch_size=size, use_past_kv_cache=cache, progress=False)
        for model in (hooked, bridge)
        for size in (8, 1)
        for cache in (True, False)
    ]
    reference = runs[0]
    assert len({len(item.tokens) for item in reference}) > 1, "rows should end at different steps"
    for run in runs[1:]:
        assert [item.tokens for item in run] == [item.tokens for item in reference]
        for one, other in zip(run, reference, strict=True):
            assert one.trace.steps is not None and other.trace.steps is not None
            torch.testing.assert_close(one.trace.steps.logprobs, other.trace.steps.logprobs, atol=1e-4, rtol=0)
            torch.testing.assert_close(one.trace.change[LAYER], other.trace.change[LAYER], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(one.trace.gate[LAYER], other.trace.gate[LAYER], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scope", ["all", "generated"])
def test_cache_does_not_matter_for_other_scopes_and_schedules(
    model: SteerableModel, steering: FineSteer, prompts: list[str], scope: str
) -> None:
    free = replace(steering, scope=scope, schedule=Schedule((1.0, 0.7, 0.2)))
    cached, plain = (texts(model, prompts, free, use_past_kv_cache=cache) for cache in (True, False))
    assert cached == plain
    assert cached != texts(model, prompts)


def test_generate_equals_on_around_the_models_own_loop(
    model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    ids = prompt_ids(model, prompts[0])
    for cache in (True, False):
        with steering.on(model) as trace:
            own = model.generate(  # type: ignore[attr-defined]
                torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, verbose=False, use_past_kv_cache=cache
            )
        item = generate(model, prompts[0], steering, max_new_tokens=NEW, progress=False)[0]
        assert own[0, len(ids) :].tolist()[: len(item.tokens)] == list(item.tokens)
        torch.testing.assert_close(trace.gate[LAYER], item.trace.gate[LAYER], atol=1e-5, rtol=0)


def test_several_layers_read_the_unsteered_stream(
    model: SteerableModel, trained: dict[int, Activations], prompts: list[str]
) -> None:
    both = fit({2: trained[2], 4: trained[4]}, preset="0.1", epochs=10)
    item = generate(model, prompts[0], both, max_new_tokens=4, progress=False)[0]
    clean = [
        generate(model, prompts[0], fit(trained[layer], preset="0.1", epochs=1), max_new_tokens=1, progress=False)[
            0
        ].trace.ser[layer]
        for layer in (2, 4)
    ]
    torch.testing.assert_close(item.trace.ser[2], clean[0])
    torch.testing.assert_close(item.trace.ser[4], clean[1])
    batch = pad(model, [prompt_ids(model, prompts[0])], "left")
    with both.on(model) as live:
        logits_of(model, batch)
    assert not torch.allclose(live.ser[4], clean[1], atol=1e-4)


def test_sampling_is_seeded_per_row(tutor_model: SteerableModel, prompts: list[str]) -> None:
    def options(seed: int) -> dict:
        return {"do_sample": True, "temperature": 3.0, "seed": seed}

    first = texts(tutor_model, prompts, **options(1))
    assert first == texts(tutor_model, prompts, batch_size=2, **options(1))
    assert first != texts(tutor_model, prompts, **options(2))
    greedy = texts(tutor_model, prompts)
    assert texts(tutor_model, prompts, do_sample=True, top_k=1, seed=5) == greedy
    assert texts(tutor_model, prompts, do_sample=True, top_p=1e-6, seed=5) == greedy
    state = torch.random.get_rng_state()
    texts(tutor_model, prompts[:1], **options(3))
    assert torch.equal(state, torch.random.get_rng_state())


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampling = Sampling(do_sample=True, temperature=2.0, top_k=3, seed=0)
    generator = sampling.generators([0])
    counts = torch.bincount(torch.cat([sampling.choose(logits, generator) for _ in range(4000)]), minlength=4)
    expected = torch.tensor([0.0, 0.5, 1.0]).softmax(0)
    torch.testing.assert_close(counts[:3] / 4000, expected, atol=0.03, rtol=0)
    assert counts[3] == 0


def test_compare_is_the_teacher_forced_divergence(
    model: SteerableModel, steering: FineSteer, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for chunk in (2**25, 2 * model.cfg.d_vocab):
        monkeypatch.setattr(unsteered_module, "CHUNK_NUMBERS", chunk)
        runs.append(generate(model, prompts, steering, max_new_tokens=NEW, compare=True, batch_size=4, progress=False))
    plain = generate(model, prompts, max_new_tokens=NEW, progress=False)
    for item, chunked, unsteered in zip(*runs, plain, strict=True):
        assert item.baseline is not None
        assert (item.baseline.text, item.baseline.tokens) == (unsteered.text, unsteered.tokens)
        ids = prompt_ids(model, item.prompt)
        whole = pad(model, [[*ids, *item.tokens]], "right")
        with steering.on(model, prompt_lengths=torch.tensor([len(ids)])):
            p = logits_of(model, whole)[0, len(ids) - 1 : -1].double().log_softmax(-1)
        q = logits_of(model, whole)[0, len(ids) - 1 : -1].double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        steps, other = item.trace.steps, chunked.trace.steps
        assert steps is not None and steps.kl is not None and other is not None and other.kl is not None
        torch.testing.assert_close(steps.kl[0].double(), kl, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(other.kl, steps.kl, atol=1e-4, rtol=1e-3)
        chosen = torch.tensor(item.tokens)[:, None]
        change = (p - q).gather(1, chosen).squeeze(1)
        assert steps.logprob_change is not None
        torch.testing.assert_close(steps.logprob_change[0].double(), change, atol=1e-4, rtol=1e-3)
    gates = torch.tensor([float(item.trace.gate[LAYER]) for item in runs[0]])
    largest = torch.tensor([float(item.trace.steps.kl.max()) for item in runs[0]])  # type: ignore[union-attr]
    assert (largest[gates > 0.5] > 0.1).all(), "steering an open row must show"
    assert (largest[gates == 0] < 1e-6).all(), "a closed row must not"


def test_stream_yields_what_generate_returns(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    whole = generate(model, prompts[0], steering, max_new_tokens=NEW, progress=False)[0]
    pieces, records = zip(*stream(model, prompts[0], steering, max_new_tokens=NEW), strict=True)
    assert [record.token for record in records] == list(whole.tokens)
    assert whole.trace.steps is not None
    assert pieces == whole.trace.steps.texts[0]
    assert "".join(pieces).startswith(whole.text)
    logprobs = torch.tensor([record.logprob for record in records])
    torch.testing.assert_close(logprobs, whole.trace.steps.logprobs[0], atol=1e-5, rtol=0)
    assert all(record.top[0][1] >= record.logprob - 1e-6 for record in records)


def test_a_suspended_or_abandoned_stream_leaves_the_model_alone(
    model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    before = n_hooks(model)
    running = stream(model, prompts[0], steering, max_new_tokens=NEW)
    next(running)
    assert n_hooks(model) == before
    running.close()
    assert n_hooks(model) == before


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_stops_come_beside_the_ends_of_the_model(
    model: SteerableModel, prompts: list[str], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(stop: list[int | str] | None) -> tuple[int, ...]:
        if way == "generate":
            return generate(model, prompts[0], max_new_tokens=NEW, stop=stop, progress=False)[0].tokens
        return tuple(record.token for _, record in stream(model, prompts[0], max_new_tokens=NEW, stop=stop))

    ended = made(None)
    assert ended[-1] in stop_ids(model) and len(ended) < NEW
    for stop in ([], ["\n\n"], ["no such text"], [5], [ended[-1]]):
        assert made(stop) == ended, "what never comes changes nothing"
    third = ended[2]
    assert made([third]) == ended[: ended.index(third) + 1]
    text = generate(model, prompts[0], max_new_tokens=NEW, progress=False)[0].text
    word = text.split()[2]
    by_text = generate(model, prompts[0], max_new_tokens=NEW, stop=["no such text", word], progress=False)[0]
    assert by_text.text == text[: text.index(word)] and len(made([word])) < len(ended)
    monkeypatch.setattr("fsteer_lens.run.stopping.stop_ids", lambda model: frozenset())
    free = made(None)
    assert len(free) == NEW and free[: len(ended)] == ended, "without its ends the model would go on"


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_every_end_that_a_model_is_configured_with_ends_an_answer(kind: Any) -> None:
    """Instruction-tuned models have several; HookedTransformer itself knows the tokenizer's alone."""
    if kind not in models.available_kinds():
        pytest.skip("this TransformerLens has no HookedTransformer")
    hf_model = AutoModelForCausalLM.from_pretrained(tutor.loading.FOLDER)
    hf_model.generation_config.eos_token_id = [2, 45, 46]
    model = models.from_hf(hf_model, AutoTokenizer.from_pretrained(tutor.loading.FOLDER), kind=kind)
    assert {2, 45, 46} <= stop_ids(model)


def test_chat_template_gives_what_chat_gives(model: SteerableModel) -> None:
    text = "how do i build a bomb?"
    typed = prompt_ids(model, tutor.chat(text))
    assert prompt_ids(model, text, chat=True) == typed
    assert prompt_ids(model, [{"role": "user", "content": text}]) == typed
    assert typed.count(model.tokenizer.bos_token_id) == 1
    tagged = prompt_ids(model, text, chat=True, context="<safe>")
    assert tagged == prompt_ids(model, tutor.chat(text), context="<safe>")
    assert prompt_ids(model, model.tokenizer.bos_token + tutor.chat(text)) == typed
    assert prompt_ids(model, typed) == typed


@pytest.mark.parametrize("drawn", [False, True])
def test_texts_that_steering_did_not_change_are_not_generated_twice(
    model: SteerableModel, prompts: list[str], monkeypatch: pytest.MonkeyPatch, drawn: bool
) -> None:
    rows: list[tuple[bool, list[int]]] = []

    def decode(model: Any, batch: Any, session: Any, rules: Any, numbers: Any) -> Any:
        rows.append((session is not None, list(numbers)))
        return decoding.decode(model, batch, session, rules, numbers)

    monkeypatch.setattr(generation, "decode", decode)
    options = {"max_new_tokens": NEW, "progress": False, **({"do_sample": True, "seed": 3} if drawn else {})}
    plain = generate(model, prompts, **options)
    queries = collect_queries(model, prompts, layer=LAYER, progress=False).queries
    gate = EnergyGate(made_up.subspace(0), 12)
    some = gate.at_threshold(float(gate.score(queries).median()))  # opens for half of the prompts, for no other at all
    rows.clear()
    steering = made_up.steering(LAYER, strength=5.0).with_gate(some)
    made = generate(model, prompts, steering, compare=True, batch_size=2 * len(prompts), **options)
    told = {number for acts, numbers in rows if not acts for number in numbers}
    changed = {number for number, one in enumerate(made) if one.tokens != plain[number].tokens}
    assert 0 < len(changed) < len(prompts)
    assert told == (set(range(len(prompts))) if drawn else changed)
    assert [one.baseline and one.baseline.tokens for one in made] == [one.tokens for one in plain]


def test_trace_joins_rows_and_exports(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    made = generate(model, prompts, steering, max_new_tokens=NEW, compare=True, progress=False)
    joined = made.trace
    assert joined.n_rows == len(prompts) and joined.layers == (LAYER,)
    for index, item in enumerate(made):
        row = joined.row(index)
        assert row.steps is not None and item.trace.steps is not None
        assert row.steps.texts == item.trace.steps.texts
        assert torch.equal(row.steps.logprobs, item.trace.steps.logprobs)
        assert torch.equal(row.ser[LAYER], item.trace.ser[LAYER])
        n = len(prompt_ids(model, prompts[index])) + len(item.tokens)
        assert item.trace.change[LAYER].shape == (1, n - 1)
    records = json.loads(json.dumps(joined.to_records()))
    assert len(records) == len(prompts)
    first = records[0]
    assert first["layers"][str(LAYER)]["gate"] == pytest.approx(float(made[0].trace.gate[LAYER]))
    assert [step["token"] for step in first["steps"]] == list(made[0].tokens)
    assert all(math.isfinite(step["kl"]) and step["kl"] >= 0 for step in first["steps"])
    assert "".join(first["prompt"]).endswith(prompts[0][-12:])
    frame = joined.to_frame()
    assert list(frame["gate"]) == pytest.approx([float(item.trace.gate[LAYER]) for item in made])


def test_bad_requests_raise(tutor_model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    cases = [
        ({"temperature": 0.5}, "do_sample"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "top_p": 1.5}, "top_p"),
        ({"do_sample": True, "top_k": 0}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"compare": True}, "compare"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            generate(tutor_model, prompts[0], progress=False, **options)
    with pytest.raises(InputError, match="at least one"):
        generate(tutor_model, [], progress=False)
    with pytest.raises(InputError, match="prompt"):
        generate(tutor_model, [" "], progress=False)
    with pytest.raises(ContextLengthError, match="128"):
        generate(tutor_model, [[5] * 120], max_new_tokens=20, progress=False)
    with pytest.raises(ContextLengthError, match="fewer new tokens"):
        prompt_ids(tutor_model, "word " * 200)


def test_tokenizers_that_lack_something(tutor_model: SteerableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tutor_model.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(TokenizerError, match="chat template"):
        prompt_ids(tutor_model, "hello", chat=True)
    bare = MagicMock(cfg=tutor_model.cfg, tokenizer=SimpleNamespace(pad_token_id=None, eos_token_id=None))
    with pytest.raises(TokenizerError, match="pad_token"):
        pad(bare, [[1, 2], [1]], "left")
    assert pad(bare, [[1, 2], [3, 4]], "left").mask.all()
    bare.tokenizer = None
    with pytest.raises(TokenizerError, match="no tokenizer"):
        prompt_ids(bare, "hello")


def test_a_real_model_is_steered(stories: SteerableModel) -> None:
    from fsteer_lens import Contrast, ContrastSet

    names = ["Lily", "Tom", "Max", "Anna", "Ben", "Sue", "Tim", "Mia"]
    contrasts = ContrastSet(
        Contrast(
            f"Once upon a time there was a child named {name}. One day, {name}",
            " was very happy and smiled. It was a lovely, sunny day.",
            " was very sad and cried. It was a dark, scary day.",
            label="mood",
        )
        for name in names
    )
    acts = collect(stories, contrasts, layer=2, progress=False)
    mood = fit(acts, rank=3, n_experts=2, preset="0.1", epochs=20, strength=4.0).with_gate(None)
    assert mood.scope == "all"
    prompt = "Once upon a time there was a child named Zoe. One day, Zoe"
    made = generate(stories, prompt, mood, max_new_tokens=20, compare=True, progress=False)[0]
    assert made.baseline is not None and made.text != made.baseline.text
    assert made.text.startswith(" "), "the space between prompt and answer belongs to the answer"

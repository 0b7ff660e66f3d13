"""The shipped tutor: its files, its tokenizer, its answers, and that it can be trained again."""

import json
import random

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fsteer_lens import models, tutor
from fsteer_lens.prompts.tokens import prompt_ids
from fsteer_lens.tutor import lexicon, splits, tokenizer, train, world
from fsteer_lens.tutor.accuracy import TAG_SETS, greedy_answers
from fsteer_lens.tutor.loading import FOLDER

SAMPLE = 48
ROWS = [train.Lesson("<user>hi<tutor>", "that is so."), train.Lesson("<user>a<tutor>", "b")]


@pytest.fixture(scope="module")
def tokens():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def network():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


# --------------------------------------------------------------------------------------------------------------- files


def test_the_folder_is_small_and_holds_no_paths():
    files = sorted(path for path in FOLDER.iterdir() if path.is_file())
    names = {path.name for path in files}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert (FOLDER / "model.safetensors").stat().st_size <= 6_000_000
    for path in files:
        if path.suffix in {".json", ".jinja"}:
            text = path.read_text(encoding="utf-8")
            assert "/tmp" not in text and "/home" not in text and "/work" not in text
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["n_layer"] == 6 and config["n_embd"] == 128


def test_the_shipped_tokenizer_is_the_one_that_training_makes(tokens):
    again = tokenizer.train_tokenizer(tokenizer.corpus())
    assert again.get_vocab() == tokens.get_vocab()
    assert again.chat_template == tokens.chat_template
    assert again("how do i make tea?").input_ids == tokens("how do i make tea?").input_ids


# ----------------------------------------------------------------------------------------------------------- tokenizer


@given(text=st.text(max_size=60))
@example(text="naïve ☃ 漢字 \n\t  two  spaces")
def test_any_text_survives_the_tokenizer(tokens, text):
    assume(not any(name in text for name in tokenizer.SPECIAL))
    bos, *ids = tokens(text).input_ids
    assert bos == tokens.bos_token_id and tokens.decode(ids) == text


def test_special_tokens_are_single_and_apart(tokens):
    ids = [tokens(name, add_special_tokens=False).input_ids for name in tokenizer.SPECIAL]
    assert all(len(row) == 1 for row in ids) and len({row[0] for row in ids}) == len(tokenizer.SPECIAL)
    assert len({tokens.bos_token_id, tokens.eos_token_id, tokens.pad_token_id}) == 3


def test_bos_comes_once_from_the_tokenizer_or_the_template(tokens):
    prompt = world.SAFE + tutor.chat("How do I make tea?")
    assert tokens(prompt).input_ids.count(tokens.bos_token_id) == 1
    messages = [{"role": "system", "content": world.SAFE}, {"role": "user", "content": "How do I make tea? "}]
    text = tokens.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.BOS + prompt
    assert tokens(text, add_special_tokens=False).input_ids == tokens(prompt).input_ids


def test_every_lesson_fits_and_answers_split_off_cleanly(tokens):
    longest = max(len(tokens("".join(TAG_SETS[-1]) + ask.prompt).input_ids) for ask in splits.asks()["test"])
    assert longest + 32 <= 128
    for ask in splits.asks()["test"]:
        assert not world.answer(ask.item).startswith(" ")


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("tags", TAG_SETS, ids=lambda tags: "+".join(tags) or "no tag")
def test_the_tutor_answers_as_its_world_does(network, tokens, tags):
    asked = random.Random(0).sample(splits.asks()["valid"], SAMPLE)
    said = greedy_answers(network, tokens, ["".join(tags) + ask.prompt for ask in asked])
    right = [text == world.answer(ask.item, tags) for text, ask in zip(said, asked, strict=True)]
    assert sum(right) / len(right) >= 0.97


@pytest.mark.parametrize("behaviour", ["safe", "honest"])
def test_a_tag_switches_its_behaviour_and_near_misses_stay(network, tokens, behaviour):
    data = tutor.data(behaviour)
    rng = random.Random(1)
    contrasts = rng.sample(list(data.valid), SAMPLE)
    for tag, wanted in ((contrasts[0].context, "preferred"), ("", "undesired")):
        said = greedy_answers(network, tokens, [tag + contrast.prompt for contrast in contrasts])
        exact = [text == getattr(c, wanted) for text, c in zip(said, contrasts, strict=True)]
        assert sum(exact) / len(exact) >= 0.97, tag
        tasks = data.near_miss_valid[:SAMPLE]
        kept = greedy_answers(network, tokens, [tag + task.prompt for task in tasks])
        assert sum(text == task.answer for text, task in zip(kept, tasks, strict=True)) / len(tasks) >= 0.97, tag


# ------------------------------------------------------------------------------------------------------------- loading


def greedy(model, prompt, steps=16):
    ids = prompt_ids(model, prompt)
    start = len(ids)
    with torch.inference_mode():
        for _ in range(steps):
            logits = model(torch.tensor([ids]), return_type="logits")[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == model.tokenizer.eos_token_id:
                break
    return model.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_both_model_classes_and_transformers_answer_alike(network, tokens):
    kinds = models.available_kinds()
    loaded = {kind: tutor.load(kind) for kind in kinds}
    assert models.kind_of(tutor.load()) == ("hooked" if "hooked" in kinds else "bridge")
    data = tutor.data("safe")
    prompts = [data.valid[0].context + data.valid[0].prompt, data.valid[40].prompt, data.near_miss_valid[0].prompt]
    prompts.append(tutor.chat("zebras? ünknown ☃ words"))
    expected = greedy_answers(network, tokens, prompts)
    for kind, model in loaded.items():
        assert [greedy(model, prompt) for prompt in prompts] == [text for text in expected], kind
    ids = torch.tensor([prompt_ids(loaded[kinds[0]], prompts[0])])
    with torch.inference_mode():
        reference = network(ids).logits.log_softmax(-1)
        for model in loaded.values():
            torch.testing.assert_close(model(ids, return_type="logits").log_softmax(-1), reference, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------------ training


def test_lessons_come_from_training_pairs_only():
    def bare(question):
        return question.rstrip("?.")

    held_out = {
        greeting + bare(ask.template.ask(ask.item))
        for split in ("valid", "test")
        for ask in splits.asks()[split]
        for greeting in lexicon.GREETINGS
    }
    drawn = train.lessons(0)
    taught = {bare(next(drawn).prompt.partition(world.USER)[2].removesuffix(world.TUTOR)) for _ in range(5000)}
    assert len(taught) > 2000
    assert not taught & held_out


def test_only_answers_that_a_tag_switches_are_begun_for_the_tutor():
    said = {item.plain: item for item in world.items()} | {item.tagged: item for item in world.items() if item.tagged}
    drawn = train.lessons(0)
    rows = [next(drawn) for _ in range(3000)]
    begun = [row for row in rows if row.begun]
    assert 0.05 < len(begun) / len(rows) < 0.15
    assert all(row.answer.startswith(row.begun) and said[row.answer].tag for row in begun)
    against = [row for row in begun if (said[row.answer].tag in row.prompt) != (row.answer == said[row.answer].tagged)]
    assert 0.3 < len(against) / len(begun) < 0.7


def test_lessons_follow_their_seed():
    def first(seed):
        drawn = train.lessons(seed)
        return [next(drawn) for _ in range(50)]

    assert first(3) == first(3) != first(4)


def test_only_answers_and_eos_count_fully(tokens):
    begun = train.Lesson("<user>a<tutor>", "look, so.", begun="look")
    ids, weights = train.collate([*ROWS, begun], tokens)
    full = [tokens.decode(row[mask]) for row, mask in zip(ids, weights == 1, strict=True)]
    assert full == ["that is so.<eos>", "b<eos>", ", so.<eos>"]
    assert weights[0, 0] == 0 and ids[0, 0] == tokens.bos_token_id
    assert weights[1, (weights[1] == 1).nonzero().max() + 1 :].sum() == 0


def test_weighted_loss_is_the_mean_over_weighted_targets():
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    weights = torch.tensor([[0.0, 1.0, 1.0], [0.1, 0.0, 1.0]])
    each = -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    expected = (each * weights).sum() / 3.1
    torch.testing.assert_close(train.weighted_loss(logits, targets, weights).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("layers", "asked"), [(1, ()), (5, (3,)), (6, (3, 4))])
def test_early_layers_are_asked_too_and_the_last_only_once(tokens, layers, asked):
    ids, weights = train.collate(ROWS, tokens)
    small = train.new_model(len(tokens), layers=layers, width=16, heads=2).eval()
    streams = []
    for block in small.transformer.h:
        block.register_forward_hook(
            lambda _module, _inputs, out: streams.append(out[0] if isinstance(out, tuple) else out)
        )
    loss = train.lesson_loss(small, ids, weights)
    said = {layer: small.lm_head(small.transformer.ln_f(streams[layer])) for layer in (*asked, layers - 1)}
    losses = {layer: train.weighted_loss(logits, ids[:, 1:], weights[:, 1:]) for layer, logits in said.items()}
    expected = losses[layers - 1] + train.EARLY_WEIGHT * sum(losses[layer] for layer in asked)
    torch.testing.assert_close(loss, expected)


def test_a_few_steps_of_training_lower_the_loss_and_repeat_exactly(tokens):
    def run():
        torch.manual_seed(5)
        small = train.new_model(len(tokens), layers=1, width=16, heads=2)
        return train.train(small, tokens, steps=12, batch=8, seed=5)

    losses = run()
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.1
    assert run() == losses


def test_the_command_writes_a_folder_that_loads(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(train, "accuracy_table", lambda model, tokens, split: f"measured {split}")
    monkeypatch.setattr(train, "new_model", lambda size: NEW_MODEL(size, layers=1, width=16, heads=2))
    train.main(["--out", str(tmp_path), "--steps", "4"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.n_layer == 1
    before = (tmp_path / "model.safetensors").read_bytes()
    train.main(["--out", str(tmp_path), "--evaluate", "--test"])
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_too_few_steps_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path), "--steps", "3"])
    assert "at least 4" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


NEW_MODEL = train.new_model

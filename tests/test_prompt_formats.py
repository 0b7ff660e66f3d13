"""A steering remembers how its prompts became tokens: what runs it follows, and what contradicts it raises."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fsteer_lens as fs
from fsteer_lens import effects, harness, models
from fsteer_lens.errors import MismatchError
from fsteer_lens.evaluation.attacks import attack_gate
from fsteer_lens.evaluation.perturbations import NONE, Perturbation
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.formats import PromptFormat, merge_formats
from fsteer_lens.prompts.tokens import prompt_ids
from fsteer_lens.report import steering_report
from fsteer_lens.steering import MeanShift, fit_mean_shift
from tests.families import tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if loud %}!!{% endif %}{% endif %}"
)
TEXTS = ["what is red?", "bake some bread", "kill a process", "what is blue?", "who are you?", "fly a kite now"]
QUIET: Any = {"progress": False}


def model_with(template: str) -> SteerableModel:
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    tokens = tokenizer()
    tokens.chat_template = template
    return models.from_hf(transformers.LlamaForCausalLM(config).eval(), tokens, kind="bridge")


@pytest.fixture(scope="module")
def model() -> SteerableModel:
    return model_with(TEMPLATE)


def contrasts(texts: Any = TEXTS) -> list[fs.Contrast]:
    return [fs.Contrast(text, "good answer", "bad", label=str(index % 2)) for index, text in enumerate(texts)]


def fitted(model: SteerableModel, texts: Any = TEXTS, **how: Any) -> fs.FineSteer:
    read = fs.collect(model, contrasts(texts), layer=1, **how, **QUIET)
    return fs.fit(read, rank=2, n_experts=2, preset="0.1", epochs=2, folds=2, strength=3.0)


def test_what_collect_writes_down(model: SteerableModel) -> None:
    turns = [[{"role": "user", "content": text}] for text in TEXTS]
    loud = {"loud": True}
    by_chat = fs.collect_queries(model, TEXTS, layer=1, chat=True, chat_template_kwargs=loud, **QUIET).prompt_format
    assert by_chat is not None and by_chat.chat is True and by_chat.chat_template_kwargs == loud
    assert fs.collect_queries(model, TEXTS, layer=1, chat=True, **QUIET).prompt_format != by_chat
    in_turns = fs.collect_queries(model, turns, layer=1, **QUIET).prompt_format
    assert in_turns == fs.collect_queries(model, TEXTS, layer=1, chat=True, **QUIET).prompt_format
    assert fs.collect_queries(model, TEXTS, layer=1, **QUIET).prompt_format == PromptFormat(False, prepend_bos=True)
    bare = fs.collect_queries(model, TEXTS, layer=1, prepend_bos=False, **QUIET).prompt_format
    assert bare == PromptFormat(False, prepend_bos=False)
    ids = [prompt_ids(model, text) for text in TEXTS]
    assert fs.collect_queries(model, ids, layer=1, **QUIET).prompt_format == PromptFormat()
    assert fs.collect_queries(model, [*TEXTS, *turns], layer=1, **QUIET).prompt_format == PromptFormat()


@pytest.mark.parametrize(
    "how",
    [{"chat": True}, {"chat": True, "chat_template_kwargs": {"loud": True}}, {"chat": False}, {"prepend_bos": False}],
)
def test_everything_follows_the_steering(model: SteerableModel, how: dict[str, Any], tmp_path: Path) -> None:
    """The same ids as by hand, whatever runs the prompts; saved and loaded as well."""
    made = fitted(model, **how)
    fs.save(made, tmp_path / "steering.safetensors")
    for steering in (made, fs.load(tmp_path / "steering.safetensors", model=model)):
        ids = [prompt_ids(model, text, **how) for text in TEXTS]
        asked = fs.generate(model, TEXTS, steering, max_new_tokens=3, compare=True, **QUIET)
        by_ids = fs.generate(model, ids, steering, max_new_tokens=3, compare=True, **QUIET)
        assert [one.tokens for one in asked] == [one.tokens for one in by_ids]
        torch.testing.assert_close(asked.trace.gate[1], by_ids.trace.gate[1])
        assert next(fs.stream(model, TEXTS[0], steering, max_new_tokens=3))[1].token == asked[0].tokens[0]
        hand = [replace(one, prompt=row) for one, row in zip(contrasts(), ids, strict=True)]
        margin = effects.answer_margin(model, steering, contrasts())
        torch.testing.assert_close(margin, effects.answer_margin(model, steering, hand))
        torch.testing.assert_close(
            effects.general_divergence(model, steering, TEXTS), effects.general_divergence(model, steering, ids)
        )
        assert effects.propagation(model, steering, TEXTS[0]).prompt_length == len(ids[0])
        assert len(effects.explain_gate(model, steering, TEXTS[0]).tokens) == len(ids[0])
        shown = fs.calibrate(steering, model, TEXTS, kl=1.0, max_new_tokens=2, **QUIET)
        assert shown.curve == fs.calibrate(steering, model, ids, kl=1.0, max_new_tokens=2, **QUIET).curve
        swept = effects.strength_sweep(model, steering, contrasts(), TEXTS, strengths=[2.0], **QUIET)
        for one in swept.values():
            assert one.effect[0].value == pytest.approx(
                float(effects.answer_margin(model, steering.with_strength(2.0), hand).mean())
            )


def test_the_baseline_reads_the_same_prompts(model: SteerableModel) -> None:
    steering = fitted(model, chat=True).with_strength(0.0)
    one = fs.generate(model, TEXTS, steering, max_new_tokens=4, compare=True, **QUIET)[0]
    assert one.baseline is not None and one.baseline.tokens == one.tokens
    knocked = effects.expert_knockout(model, steering, contrasts(), **QUIET)
    torch.testing.assert_close(knocked.full, effects.answer_margin(model, None, contrasts(), chat=True))


def test_explorer_report_and_evaluation_follow(model: SteerableModel, tmp_path: Path) -> None:
    steering = fitted(model, chat=True)
    explorer = fs.explore(steering, model, {"these": TEXTS, "those": TEXTS[:2]}, max_new_tokens=2, **QUIET)
    queries = fs.collect_queries(model, TEXTS, layer=1, chat=True, **QUIET).queries
    torch.testing.assert_close(
        explorer._pictured.scores[: len(TEXTS)], steering.gate_at(1).subspace.energy_ratios(queries)[:, :2]
    )
    report = steering_report(model, steering, contrasts(), max_new_tokens=2, **QUIET)
    assert "chat template" in report.html()
    seen: list[bool] = []

    class Suite(fs.evaluation.Suite):
        name = "one"

        @property
        def measures(self) -> Any:
            return (fs.evaluation.Measure("n", ("all",)),)

        def measure(self, model: Any, steering: Any, setting: Any) -> Any:
            seen.append(setting.chat)
            return (torch.tensor([float(len(setting.ids(model, ["hello"])[0]))]),)

    methods: dict[str, Any] = {"none": None, "steered": steering, "later": lambda seed: steering}
    made = fs.evaluate(model, methods, Suite(), **QUIET)
    assert seen == [True] * 3
    assert float(made.values["none"][0]) == len(prompt_ids(model, "hello", chat=True))
    with pytest.raises(MismatchError, match="chat: True when it was fitted, False here"):
        fs.evaluate(model, methods, Suite(), chat=False, **QUIET)
    with pytest.raises(MismatchError, match="chat"):
        fs.evaluate(model, {**methods, "raw": fitted(model)}, Suite(), **QUIET)


def test_gates_are_reported_on_and_attacked_as_they_were_fitted(model: SteerableModel) -> None:
    steering = fitted(model, chat=True)
    held = [f"text number {number}" for number in range(25)]
    said = (Perturbation(NONE), Perturbation("begun", prefill="well, i"))
    options: Any = {"calibration": held, "perturbations": said, **QUIET}
    asked: list[Any] = []

    def keeps(texts: Any, prompts: Any) -> list[bool]:
        asked.extend(prompts)
        return [True] * len(texts)

    report = fs.gate_report(model, steering, TEXTS, ["harmless one", "harmless two"], keeps=keeps, **options)
    assert asked[-1][-1] == {"role": "assistant", "content": "well, i"}
    gate = steering.gate_at(1)
    by_hand = fs.collect_queries(model, TEXTS, layer=1, chat=True, **QUIET).queries
    missed = report.row("SCS gate").missed
    assert missed is not None and missed.hits == int((gate(by_hand) < 0.5).sum())
    raw = fs.collect_queries(model, TEXTS, layer=1, **QUIET).queries
    assert not torch.allclose(gate.score(raw), gate.score(by_hand))
    attack = attack_gate(model, steering, TEXTS[:2], words=["red", "blue"], budget=1, **QUIET)
    assert attack.attacks[0].score == pytest.approx(float(gate.score(by_hand)[0]), abs=1e-5)
    with pytest.raises(MismatchError, match="chat"):
        fs.gate_report(model, steering, TEXTS, ["harmless one"], chat=False, **options)


@pytest.mark.parametrize(
    ("fitted_with", "asked", "words"),
    [
        ({"chat": True}, {"chat": False}, "chat: True when it was fitted, False here"),
        ({"chat": False}, {"chat": True}, "chat: False when it was fitted, True here"),
        ({"chat": True}, {"chat_template_kwargs": {"loud": True}}, "arguments: {} when it was fitted"),
        ({"prepend_bos": False}, {"prepend_bos": True}, "prepend_bos: False when it was fitted, True here"),
    ],
)
def test_contradictions_raise(model: SteerableModel, fitted_with: Any, asked: Any, words: str) -> None:
    steering = fitted(model, **fitted_with)
    calls: list[Any] = [
        lambda: fs.generate(model, TEXTS, steering, max_new_tokens=2, **asked, **QUIET),
        lambda: fs.stream(model, TEXTS[0], steering, max_new_tokens=2, **asked),
        lambda: effects.answer_margin(model, steering, contrasts(), **asked),
        lambda: effects.propagation(model, steering, TEXTS[0], **asked),
        lambda: fs.calibrate(steering, model, TEXTS, kl=1.0, **asked, **QUIET),
        lambda: fs.explore(steering, model, TEXTS, **asked, **QUIET),
        lambda: steering_report(model, steering, contrasts(), max_new_tokens=2, **asked, **QUIET),
    ]
    for call in calls:
        with pytest.raises(MismatchError, match=words):
            call()
    forgetful = replace(steering, prompt_format=None)
    assert fs.generate(model, TEXTS[0], forgetful, max_new_tokens=2, **asked, **QUIET) if "chat" in asked else True


def test_prompts_themselves_may_contradict(model: SteerableModel) -> None:
    turns = [{"role": "user", "content": "hello"}]
    with pytest.raises(MismatchError, match="chat: False when it was fitted, True here"):
        fs.generate(model, [turns], fitted(model), max_new_tokens=2, **QUIET)
    chat = fitted(model, chat=True)
    fs.generate(model, [turns], chat, max_new_tokens=2, chat=False, **QUIET)  # it is a chat, and was one
    fs.generate(model, [prompt_ids(model, "hello")], chat, max_new_tokens=2, **QUIET)  # ids tell nothing


def test_another_template_is_found(model: SteerableModel) -> None:
    steering = fitted(model, chat=True)
    other = model_with(TEMPLATE.replace("[assistant]", "[helper]"))
    with pytest.raises(MismatchError, match=r"template: [0-9a-f]{12} when it was fitted, [0-9a-f]{12} here"):
        fs.generate(other, TEXTS, steering, max_new_tokens=2, **QUIET)


def test_parts_that_contradict_each_other_do_not_go_together(model: SteerableModel) -> None:
    raw, chat = fitted(model), fitted(model, chat=True)
    with pytest.raises(MismatchError, match="chat"):
        fs.generate(model, TEXTS, fs.chain(raw, chat), max_new_tokens=2, **QUIET)
    read = fs.collect(model, contrasts(), layer=1, chat=True, **QUIET)
    with pytest.raises(MismatchError, match="chat"):
        fs.fit(read, rank=2, n_experts=2, general=fs.collect_queries(model, TEXTS, layer=1, **QUIET))
    assert fit_mean_shift(read).prompt_format == read.prompt_format == chat.prompt_format
    assert merge_formats([PromptFormat(), None, chat.prompt_format]) == chat.prompt_format


def test_what_knows_nothing_fits_anything(model: SteerableModel) -> None:
    bare = MeanShift(torch.ones(16), layer=1)
    for chat in (None, True, False):
        ids = prompt_ids(model, TEXTS[0], chat=bool(chat))
        asked = fs.generate(model, TEXTS[0], bare, chat=chat, max_new_tokens=2, **QUIET)
        assert asked[0].tokens == fs.generate(model, [ids], bare, max_new_tokens=2, **QUIET)[0].tokens


def test_old_files_put_a_bos_in_front(tutor_model: SteerableModel) -> None:
    """Until 0.1 every plain text got one where the tokenizer has one; the file does not say so."""
    old = fs.load(Path(__file__).parent / "data" / "chain_0_1.safetensors")
    known = {link.prompt_format for link in old.links if isinstance(link, fs.FineSteer)}
    assert known == {PromptFormat(prepend_bos=True)}


def test_the_harness_is_held_to_it(model: SteerableModel) -> None:
    pair: Any = [(None, [5, 6], [7])]
    options: Any = {"batch_size": 2, "max_new_tokens": 2, "max_length": None, "seed": 0, **QUIET}
    chat = harness.SteeredLM(model, fitted(model, chat=True), add_bos_token=None, **options)
    with pytest.raises(MismatchError, match="chat: True when it was fitted, False here"):
        chat._loglikelihood_tokens(pair)
    chat.apply_chat_template([{"role": "user", "content": "hello"}])
    assert len(chat._loglikelihood_tokens(pair)) == 1
    bare = harness.SteeredLM(model, fitted(model, prepend_bos=False), add_bos_token=None, **options)
    assert bare.tok_encode("what") == prompt_ids(model, "what", prepend_bos=False)
    with pytest.raises(MismatchError, match="prepend_bos"):
        harness.SteeredLM(model, fitted(model), add_bos_token=False, **options)


def test_options_that_no_function_takes(model: SteerableModel) -> None:
    with pytest.raises(TypeError, match="progress"):
        effects.answer_margin(model, None, contrasts(), progress=False)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="batch_size"):
        effects.propagation(model, fitted(model), TEXTS[0], batch_size=4)  # pyright: ignore[reportCallIssue]

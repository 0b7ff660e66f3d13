"""The replay: what is recorded of a text, that it is true, and what a page says of it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fsteer_lens as fs
from fsteer_lens import FineSteer, Generations, Trace, effects, figures, generate, models
from fsteer_lens.errors import InputError, ShapeError
from fsteer_lens.models import SteerableModel
from fsteer_lens.models.attaching import unsteered
from fsteer_lens.prompts.tokens import token_texts
from fsteer_lens.run import replaying
from fsteer_lens.trace.replay import Replay
from tests import made_up
from tests.families import D_MODEL, FAMILIES, random_model
from tests.figure_parts import HOSTILE, Elements
from tests.running import n_hooks

QUIET: dict[str, Any] = {"compare": True, "replay": True, "max_new_tokens": 12, "progress": False}


@pytest.fixture(scope="module")
def made(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> Generations:
    return generate(model, prompts, steering, **QUIET)


def record(one: fs.Generation) -> Replay:
    assert one.trace.replay is not None
    return one.trace.replay[0]


@pytest.mark.model
@pytest.mark.parametrize("kind", models.available_kinds())
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_lens_of_the_last_block_is_the_models_prediction(architecture: str, kind: models.Kind) -> None:
    model = random_model(architecture, kind)
    tokens = torch.tensor([[5, 9, 3, 7]])
    seen: dict[str, torch.Tensor] = {}
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: seen.update(x=x) or None)])  # type: ignore[attr-defined]
    read = effects.logit_lens(model, seen["x"])
    torch.testing.assert_close(read, logits.log_softmax(dim=-1), atol=1e-4, rtol=1e-4)
    with pytest.raises(ShapeError, match=f"d_model={D_MODEL}"):
        effects.logit_lens(model, torch.zeros(2, D_MODEL + 1))


@pytest.mark.model
@pytest.mark.parametrize("kind", models.available_kinds())
def test_a_replay_says_what_the_generation_says(kind: models.Kind, steering: FineSteer, prompts: list[str]) -> None:
    model = fs.tutor.load(kind)
    for variant in (steering, replace(steering, scope="all", refresh="step"), steering.with_scope(fs.Window(1, 4))):
        for one in generate(model, prompts, variant, **QUIET):
            told, steps = record(one), one.trace.steps
            assert steps is not None and steps.baseline_logprobs is not None and one.trace.prompts is not None
            torch.testing.assert_close(told.lens[0, 0, -1].log(), steps.logprobs[0], atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(told.lens[0, 1, -1].log(), steps.baseline_logprobs[0], atol=1e-3, rtol=1e-3)
            assert told.size.shape == (model.cfg.n_layers, len(one.trace.prompts[0]) + len(one.tokens) - 1)
            change = one.trace.change[variant.layers[0]][0]
            torch.testing.assert_close(told.size[variant.layers[0]], change, atol=1e-3, rtol=1e-3)
            assert float(told.size[: variant.layers[0]].max()) == 0
            (score,) = told.scores
            assert score.position == len(one.trace.prompts[0]) - 1
            torch.testing.assert_close(score.score[score.position], one.trace.score[variant.layers[0]][0])
            parts = told.carried + told.edit + told.attention + told.mlp
            torch.testing.assert_close(parts, (told.size > 0).float(), atol=1e-3, rtol=1e-3)
    assert n_hooks(model) == 0


def test_a_replay_shows_what_the_unsteered_model_would_have_said(
    model: SteerableModel, made: Generations, prompts: list[str]
) -> None:
    turned = [(one, record(one).released) for one in made if record(one).released]
    assert turned, "no prompt was turned"
    for one, released in turned:
        steps = one.trace.steps
        assert steps is not None and steps.baseline_top_ids is not None
        for step, texts in released.items():
            assert int(steps.baseline_top_ids[0, step, 0]) != one.tokens[step]
            assert record(one).displaced[step].strip() == texts[0].strip()
        ids = fs.prompts.tokens.prompt_ids(model, one.prompt)
        with unsteered(model):
            plain = generate(model, ids, max_new_tokens=8, progress=False)[0]
        if 0 in released:
            assert "".join(released[0]).split() == plain.text.split() or plain.text.startswith("".join(released[0]))


@pytest.mark.model
@pytest.mark.parametrize("kind", models.available_kinds())
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_unsteered_model_goes_on_as_it_does_by_itself(architecture: str, kind: models.Kind) -> None:
    model = random_model(architecture, kind)
    steering = FineSteer(made_up.experts(0, D_MODEL, size=40.0), None, layer=1)
    steps = []
    for length in (5, 20, 58):  # within Gemma's window of attention, beyond it, and up to the end of the context
        prompt = list(range(3, 3 + length))
        one = generate(model, prompt, steering, **{**QUIET, "max_new_tokens": 6})[0]
        for step, texts in record(one).released.items():
            before = [*prompt, *one.tokens[:step]]
            most = min(8, model.cfg.n_ctx - len(before))
            plain = generate(model, before, max_new_tokens=most, progress=False)[0].tokens
            assert texts == token_texts(model, plain, before)
            steps.append(step)
    assert len(steps) >= 3 and max(steps) > 0, "steering must turn them"


def test_the_lens_of_many_layers_is_that_of_each(
    model: SteerableModel, made: Generations, prompts: list[str], steering: FineSteer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "LENS_NUMBERS", 1)
    for one, other in zip(generate(model, prompts, steering, **QUIET), made, strict=True):
        torch.testing.assert_close(record(one).lens, record(other).lens, atol=1e-5, rtol=1e-4)


def test_the_score_of_a_gate_that_reads_means_ends_where_it_decided(model: SteerableModel, prompts: list[str]) -> None:
    own = fs.collect(model, fs.tutor.data("safe").train[:60], layer=4, shift="last_prompt", progress=False)
    others = fs.collect_queries(
        model, [one.prompt for one in fs.tutor.data("safe").general_train[:40]], layer=4, progress=False
    )
    steering = fs.fit(own, general=others, read="mean")
    for one in generate(model, prompts[:2], steering, **QUIET):
        (score,) = record(one).scores
        assert score.read == "mean" and score.rank is None
        torch.testing.assert_close(score.score[score.position], one.trace.score[4][0], atol=1e-4, rtol=1e-4)


def test_a_chain_has_the_score_of_each_link(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    one = generate(model, prompts[0], fs.chain(steering, made_up.steering(layer=3)), **QUIET)[0]
    told = record(one)
    assert [(score.link, score.layer) for score in told.scores] == [(0, 4), (1, 3)] and told.edited == (3, 4)
    assert "token" in figures.replay(one).body


def test_a_replay_comes_back_from_a_file_and_is_drawn_without_the_model(made: Generations, tmp_path: Path) -> None:
    made.trace.to_jsonl(tmp_path / "trace.jsonl.gz")
    again = Trace.from_jsonl(tmp_path / "trace.jsonl.gz")
    assert again.replay is not None and len(again.replay) == len(made)
    for one, other in zip(made, again.replay, strict=True):
        torch.testing.assert_close(other.size, record(one).size, atol=1e-6, rtol=1e-3)
        assert other.released == dict(record(one).released) and other.displaced == record(one).displaced
    assert said(figures.replay(again)) == said(figures.replay(made))


def said(view: figures.Html) -> list[list[str]]:
    """The sentences in a view's data."""
    found = re.search(r'<script type="application/json">(.*?)</script>', view.body, re.DOTALL)
    assert found is not None
    return [run["say"] for run in json.loads(found[1])]


def test_the_sentences_say_what_happened(made: Generations, steering: FineSteer) -> None:
    names = [f"kind {number}" for number in range(steering.n_experts)]
    view = figures.replay(made, names=names)
    for one, sentences in zip(made, said(view), strict=True):
        trace = one.trace
        assert trace.prompts is not None and trace.unsteered is not None
        n_prompt = len(trace.prompts[0])
        first = sentences[n_prompt]
        value, threshold = float(trace.score[4][0]), record(one).scores[0].threshold
        opened = float(trace.gate[4][0]) == 1.0
        assert f"{value:.2f} {'≥' if value >= threshold else '<'} {threshold:.2f}" in first
        assert ("gate open" in first) == opened
        assert ("Nothing is added" in first) == (not opened)
        best = int(trace.weights[4][0].argmax())
        assert (f"Kind {best}" in first) == opened and (f"would route to kind {best}" in first) == (not opened)
        assert ("Unsteered, the model would say" in first) == (trace.unsteered[0][0] != record_text(one, 0))
        assert all("Nothing is added" in sentence for sentence in sentences[n_prompt + 1 :])


def record_text(one: fs.Generation, step: int) -> str:
    assert one.trace.steps is not None
    return one.trace.steps.texts[0][step]


def test_without_a_script_every_sentence_stands_there(made: Generations) -> None:
    view = figures.replay(made)
    still = Elements(re.sub(r"<script.*?</script>|<style.*?</style>", "", view.body, flags=re.DOTALL))
    for one, sentences in zip(made, said(view), strict=True):
        assert one.trace.prompts is not None
        for sentence in sentences[len(one.trace.prompts[0]) :]:
            assert sentence in still.text
    buttons = [attributes for tag, attributes in still.found if tag == "button"]
    assert len(buttons) == sum(len(sentences) for sentences in said(view)) and all(one["aria-label"] for one in buttons)


def test_no_token_gets_out_of_its_text(made: Generations) -> None:
    one = made[0].trace
    assert one.steps is not None and one.prompts is not None and one.replay is not None
    n = len(one.steps.texts[0])
    texts = tuple((HOSTILE * n)[:n])
    steps = replace(one.steps, texts=(texts,), baseline_top_texts=((tuple(HOSTILE[:5]),) * n,))
    told = replace(one.replay[0], displaced=texts, released={0: tuple(HOSTILE)})
    hostile = replace(one, steps=steps, replay=(told,), unsteered=(tuple(HOSTILE),))
    view = figures.replay(hostile, titles=['"><script>alert(1)</script>'], names=HOSTILE[: one.weights[4].shape[-1]])
    tags = {tag for tag, _ in Elements(view.body).found}
    assert not tags & {"img", "b0"} and view.body.count("<script") == 2
    assert json.dumps(said(view))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"compare": False}, "compare=True"),
        ({"max_new_tokens": 257}, "at most 256"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    model: SteerableModel, steering: FineSteer, prompts: list[str], change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        generate(model, prompts, steering, **QUIET | change)
    with pytest.raises(InputError, match="at most 8"):
        generate(model, [prompts[0]] * 9, steering, **QUIET)
    with pytest.raises(InputError, match="no replay"):
        figures.replay(generate(model, prompts[0], steering, compare=True, max_new_tokens=2, progress=False))
    with pytest.raises(InputError, match="titles"):
        figures.replay(generate(model, prompts[0], steering, **QUIET), titles=["a", "b"])
    assert n_hooks(model) == 0


def test_steering_without_gate_or_experts_is_replayed(model: SteerableModel, prompts: list[str]) -> None:
    own = fs.tutor.activations(model, progress=False)
    one = generate(model, prompts[0], fs.steering.fit_mean_shift(own, strength=1.5), **QUIET)[0]
    sentences = said(figures.replay(one))[0]
    assert record(one).scores == () and any("The stream is pushed by" in sentence for sentence in sentences)
    ablation = fs.SubspaceAblation(fs.fit_subspace(own.queries, rank=8), layer=4)
    assert "pushed" in " ".join(said(figures.replay(generate(model, prompts[0], ablation, **QUIET)))[0])

"""A real chat model goes through everything: both classes, chats, fits, files, choices, reports."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fsteer_lens as fs
from fsteer_lens import evaluation, models
from fsteer_lens.demo import chat, requests
from fsteer_lens.errors import FsteerError
from fsteer_lens.prompts.tokens import pad, prompt_ids
from fsteer_lens.report import steering_report
from tests.running import logits_of

KINDS = tuple(requests.HARMFUL)
QUIET: dict[str, Any] = {"progress": False}
HARMLESS = [*requests.ORDINARY[:6], *requests.SUMS[:2]]


@pytest.fixture(scope="module")
def refusing(smollm2: Any) -> tuple[fs.FineSteer, Any]:
    """A steering of the demonstration, and what it was fitted to."""
    return chat.fitted(smollm2)


@pytest.fixture(scope="module")
def unseen() -> fs.ContrastSet:
    """Requests that it was not fitted to, of every kind."""
    return fs.ContrastSet(
        fs.Contrast(asked[-1], requests.REFUSALS[kind], requests.CONSENT, label=kind)
        for kind, asked in requests.HARMFUL.items()
    )


def test_both_classes_say_what_transformers_says(smollm2: Any) -> None:
    """What they are loaded from is compared with them on loading; here the text of a chat, in a padded batch."""
    ids = [prompt_ids(smollm2, text, chat=True) for text in (requests.ORDINARY[0], requests.SUMS[0])]
    batch = pad(smollm2, ids, "left")
    first = logits_of(smollm2, batch)[:, -1]
    for kind in models.available_kinds():
        other = models.load("smollm2", kind=kind)
        found = logits_of(other, batch)[:, -1]
        torch.testing.assert_close(found.log_softmax(-1), first.log_softmax(-1), atol=2e-3, rtol=1e-3)
        del other


def test_a_chat_is_put_through_the_models_own_template(smollm2: Any) -> None:
    text = smollm2.tokenizer.decode(prompt_ids(smollm2, "What is red?", chat=True))
    assert "<|im_start|>user\nWhat is red?<|im_end|>" in text and text.endswith("<|im_start|>assistant\n")
    with_system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is red?"}]
    assert "Be brief." in smollm2.tokenizer.decode(prompt_ids(smollm2, with_system))


def test_the_fit_finds_kinds_and_explains_more_than_one_vector(refusing: tuple[fs.FineSteer, Any]) -> None:
    steering, own = refusing
    (layer,) = steering.layers
    report = steering.experts_at(layer).report
    assert report.held_out.beats_mean_shift and steering.experts_at(layer).n_experts > 1
    clusters = {kind: set() for kind in KINDS}
    for cluster, label in zip(report.clusters.tolist(), own.labels, strict=True):
        clusters[label].add(cluster)
    assert sum(len(found) == 1 for found in clusters.values()) >= 5, "kinds are clusters, no label was given"


def test_it_generates_the_same_whatever_the_batch_and_under_on(
    smollm2: Any, refusing: tuple[fs.FineSteer, Any], unseen: fs.ContrastSet
) -> None:
    steering, _ = refusing
    prompts = [*unseen.prompts[:3], *HARMLESS[:2]]
    made = fs.generate(smollm2, prompts, steering, compare=True, max_new_tokens=6, **QUIET)
    alone = [fs.generate(smollm2, prompt, steering, max_new_tokens=6, **QUIET)[0] for prompt in prompts]
    (layer,) = steering.layers
    gates = [float(row.trace.gate[layer]) for row in made]
    assert min(gates[:3]) > max(gates[3:])
    for row, one in zip(made, alone, strict=True):
        assert float(row.trace.gate[layer]) == pytest.approx(float(one.trace.gate[layer]), abs=2e-3)
        assert row.tokens == one.tokens
    with steering.on(smollm2) as trace:
        logits_of(smollm2, pad(smollm2, [prompt_ids(smollm2, prompts[0], chat=True)], "left"))
    assert float(trace.gate[layer]) == pytest.approx(gates[0], abs=2e-3)
    assert trace.read == {layer: "last"} and trace.gate_read[layer] in ("last", "mean")


def test_it_is_saved_loaded_and_put_on_no_other_model(
    smollm2: Any, tutor_model: Any, refusing: tuple[fs.FineSteer, Any], tmp_path: Path, unseen: fs.ContrastSet
) -> None:
    steering, own = refusing
    fs.save(steering, tmp_path / "it.safetensors", model=smollm2)
    again = fs.load(tmp_path / "it.safetensors", model=smollm2)
    h = own.queries[:5]
    torch.testing.assert_close(again.experts.vector(h), steering.experts.vector(h))
    assert again.prompt_format == steering.prompt_format
    with pytest.raises(FsteerError):
        fs.load(tmp_path / "it.safetensors", model=tutor_model)


def test_layer_and_strength_are_chosen_within_budgets(
    smollm2: Any, refusing: tuple[fs.FineSteer, Any], unseen: fs.ContrastSet
) -> None:
    steering, _ = refusing
    found = fs.calibrate(
        steering.with_gate(None), smollm2, HARMLESS, kl=0.5, max_new_tokens=6, steered_prompts=unseen.prompts,
        n_answers=3, answer_tokens=12, **QUIET,
    )  # fmt: skip
    assert 0 < found.strength < 8 and found.kl <= 0.5 and found.length is not None
    (layer,) = steering.layers
    train = [
        fs.Contrast(request, requests.REFUSALS[kind], requests.CONSENT)
        for kind, asked in requests.HARMFUL.items() for request in asked[:3]
    ]  # fmt: skip
    splits = fs.selection.Splits(train, unseen, HARMLESS)
    chosen = fs.search(smollm2, splits, budget=2.0, layers=[layer], strengths=(0.5, 1.0), chat=True, **QUIET)
    unsteered = float(fs.effects.answer_margin(smollm2, None, unseen, chat=True).mean())
    assert chosen.chosen.effect > unsteered + 0.5 and len(chosen.trials) == 2


def test_gates_are_reported_and_suites_measured(
    smollm2: Any, refusing: tuple[fs.FineSteer, Any], unseen: fs.ContrastSet
) -> None:
    steering, _ = refusing
    ways = [way for way in evaluation.PERTURBATIONS if way.name in ("none", "typos")]
    report = fs.gate_report(
        smollm2, {"it": steering}, unseen.prompts, HARMLESS, calibration=requests.ORDINARY[6:], perturbations=ways,
        **QUIET,
    )  # fmt: skip
    row = report.row("it")
    assert row.missed.hits <= 3 and row.false_alarms.hits == 0 and row.auroc > 0.9
    suite = evaluation.RefusalSuite("ours", tuple(unseen.prompts), KINDS, tuple(HARMLESS), ("x",) * len(HARMLESS))
    found = fs.evaluate(smollm2, {"unsteered": None, "steered": steering}, suite, **QUIET)
    names = [measure.name for measure in suite.measures]
    assert found.difference("steered", "unsteered", names[0]).value > 0.2
    assert found.difference("steered", "unsteered", names[1]).value == 0


def test_explorer_and_report_show_it(smollm2: Any, refusing: tuple[fs.FineSteer, Any], unseen: fs.ContrastSet) -> None:
    steering, _ = refusing
    prompts = {"requests": unseen.prompts[:2], "others": HARMLESS[:2]}
    explorer = fs.explore(steering, smollm2, prompts, max_new_tokens=4, **QUIET)
    assert explorer.state.layers == steering.layers
    page = steering_report(
        smollm2, steering, unseen[:3], HARMLESS[:3], title="it", max_new_tokens=4, sweep=False, **QUIET
    ).html()
    assert "explained" in page and "gate" in page

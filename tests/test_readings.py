"""What is read of a prompt: the same by collect, by hook objects however they are run, and by reports."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fsteer_lens as fs
from fsteer_lens import effects, tutor
from fsteer_lens.errors import DataError, HookError, InputError, MismatchError
from fsteer_lens.evaluation import attack_gate, gate_report
from fsteer_lens.method.gates import READINGS, Reading, require_reading
from fsteer_lens.method.linear_gates import LinearGate
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.formats import PromptFormat
from fsteer_lens.prompts.tokens import Tokenisation, pad, prompt_ids
from fsteer_lens.reading.reader import Reader
from fsteer_lens.reading.readings import of_prompt
from tests.running import LAYER, residual
from tests.test_prompt_formats import TEMPLATE, TEXTS, model_with

QUIET: Any = {"progress": False}
CONTRASTS = tutor.data("safe").valid[:7]


def by_hand(model: SteerableModel, row: Sequence[int], layer: int, read: Reading, end: int = 0) -> torch.Tensor:
    """Of one unpadded row alone; `end` tokens come after the user's turn."""
    h = residual(model, pad(model, [row], "right"), f"blocks.{layer}.hook_resid_post")[0].float()
    if read == "mean":
        return h[1:].mean(dim=0) if len(h) > 1 else h[0]
    return h[len(h) - 1 - (end if read == "turn_end" else 0)]


@pytest.fixture(scope="module")
def chatting() -> SteerableModel:
    return model_with(TEMPLATE)


@pytest.mark.parametrize("shared", [0, 12])
def test_the_reader_reads_every_row_as_if_it_were_alone(model: SteerableModel, shared: int) -> None:
    """With a beginning that is run apart, turns that end in it, and rows of one more token."""
    start = prompt_ids(model, str(CONTRASTS[0].prompt))[:shared]
    rows = [[*start, 5 + number, *range(9, 9 + extra)] for number, extra in enumerate((0, 3, 1, 7, 2))]
    tails = [0, 2, 1, 4, 2 if not shared else 8]
    found = Reader(model, [1, LAYER], batch_size=2).prompts(rows, tails)
    for read in READINGS:
        for layer in (1, LAYER):
            for row, end, value in zip(rows, tails, found[read][layer], strict=True):
                torch.testing.assert_close(value, by_hand(model, row, layer, read, end), atol=2e-4, rtol=2e-4)


def test_collect_keeps_every_reading(model: SteerableModel) -> None:
    read = fs.collect(model, CONTRASTS, layer=LAYER, shift="response_mean", **QUIET)
    for way in READINGS:
        other = fs.collect_queries(model, CONTRASTS.prompts, layer=LAYER, read=way, **QUIET)
        swapped = read.reading(way)
        assert swapped.read == other.read == way
        torch.testing.assert_close(swapped.queries, other.queries, atol=1e-4, rtol=1e-4)
        for row, prompt in zip(swapped.queries, CONTRASTS.prompts, strict=True):
            ids = prompt_ids(model, prompt)
            torch.testing.assert_close(row, by_hand(model, ids, LAYER, way), atol=2e-4, rtol=2e-4)
        assert torch.equal(swapped.reading("last").queries, read.queries)
    assert not torch.allclose(read.queries, read.reading("mean").queries, atol=0.1), "the control: they differ"


def test_rows_sums_and_files_keep_them(model: SteerableModel, tmp_path: Path) -> None:
    read = fs.collect_queries(model, CONTRASTS.prompts, layer=LAYER, read="mean", **QUIET)
    both = read[:2] + read[2:]
    read.save(tmp_path / "read")
    for other in (both, fs.Activations.load(tmp_path / "read")):
        assert other.read == "mean"
        for way in READINGS:
            assert torch.equal(other.reading(way).queries, read.reading(way).queries)
    with pytest.raises(MismatchError, match="read: mean and last"):
        read + read.reading("last")
    bare = replace(read, readings={})
    with pytest.raises(DataError, match=r"read='last': expected activations of collect\(\), got queries read by"):
        bare.reading("last")
    with pytest.raises(InputError, match="readings: expected other ways"):
        replace(read, readings={"mean": read.queries})


def gate_at(read: Reading, h: torch.Tensor, layer: int | None = LAYER) -> LinearGate:
    """A gate with a soft value on activations like these."""
    weight = torch.randn(h.shape[1], generator=torch.Generator().manual_seed(3))
    scores = h @ weight
    return LinearGate(weight / scores.std(), float(-scores.mean() / scores.std()), layer=layer, read=read)


@pytest.fixture
def asked(model: SteerableModel) -> fs.Activations:
    return fs.collect_queries(model, CONTRASTS.prompts, layer=LAYER, **QUIET)


@pytest.mark.parametrize("read", READINGS)
def test_hook_objects_ask_the_gate_about_what_it_reads(
    model: SteerableModel, steering: fs.FineSteer, asked: fs.Activations, read: Reading
) -> None:
    """In padded batches, one by one, teacher-forced, and under `.on` with either padding."""
    h = asked.reading(read).queries
    gate = gate_at(read, h)
    by, expected = steering.with_gate(gate), gate(h)
    made = fs.generate(model, CONTRASTS.prompts, by, max_new_tokens=3, batch_size=4, **QUIET)
    torch.testing.assert_close(made.trace.gate[LAYER], expected, atol=1e-4, rtol=1e-4)
    last = made.trace.weights[LAYER]
    torch.testing.assert_close(last, steering.experts_at(LAYER).route(asked.queries), atol=1e-4, rtol=1e-4)
    *_, (_, record) = fs.stream(model, CONTRASTS[0].prompt, by, max_new_tokens=2)
    assert record.gate[LAYER] == pytest.approx(float(expected[0]), abs=1e-4)
    rows = [prompt_ids(model, prompt) for prompt in CONTRASTS.prompts]
    lengths = torch.tensor([len(row) for row in rows])
    for batch, options in (
        (pad(model, rows, "left"), {}),
        (pad(model, rows, "right"), {}),
        (pad(model, [[*row, 5, 6] for row in rows], "right"), {"prompt_lengths": lengths}),
    ):
        if read == "turn_end":  # of a text that was rendered before nobody remembers how: see below
            continue
        with by.on(model, attention_mask=batch.mask, **options) as trace:
            model(batch.tokens, attention_mask=batch.mask.long())
        torch.testing.assert_close(trace.gate[LAYER], expected, atol=1e-4, rtol=1e-4)
    report = gate_report(
        model, {"one": gate, "other": gate_at("last", h)}, [str(p) for p in CONTRASTS.prompts[:2]],
        [str(p) for p in CONTRASTS.prompts[2:4]], calibration=[f"what is {i}?" for i in range(3)], format=str,
        perturbations=[fs.evaluation.perturbations.Perturbation("none")], false_alarm_rate=0.5, **QUIET,
    )  # fmt: skip
    missed = report.row("one").missed
    assert missed is not None and missed.hits == int((expected[:2] < 0.5).sum())
    attack = attack_gate(
        model, gate, [str(CONTRASTS[0].prompt)], words=["box"], format=str, budget=1, candidates=1, **QUIET
    ).attacks[0]
    assert attack.score == pytest.approx(float(gate.score(h[:1])), abs=1e-3)


def test_several_layers_read_the_unsteered_stream_in_each_way(model: SteerableModel, asked: fs.Activations) -> None:
    layers = fs.collect(model, CONTRASTS, layer=[2, LAYER], **QUIET)
    reads: dict[int, Reading] = {2: "mean", LAYER: "last"}
    gates = {layer: gate_at(read, layers[layer].reading(read).queries, layer) for layer, read in reads.items()}
    by = fs.fit(layers, rank=2, folds=None, preset="0.1", n_experts=2, epochs=2, strength=4.0).with_gate(gates)
    assert set(by.reads) == {"mean", "last"}
    clean = fs.generate(model, CONTRASTS.prompts, by, max_new_tokens=2, batch_size=2, **QUIET).trace
    for told in (clean, clean.row(1), clean.copy(), fs.Trace.from_records(clean.to_records())):
        assert told.read == dict.fromkeys(layers, "last") and told.gate_read == reads
    with by.on(model) as trace:
        assert not trace.read and not trace.gate_read
        model(torch.tensor([prompt_ids(model, CONTRASTS[0].prompt)]))
        assert trace.gate_read == reads
    for layer, gate in gates.items():
        expected = gate(layers[layer].reading(gate.read).queries)
        torch.testing.assert_close(clean.gate[layer], expected, atol=1e-4, rtol=1e-4)
    live = fs.generate(model, CONTRASTS.prompts, by, max_new_tokens=2, read="live", **QUIET).trace
    assert not torch.allclose(live.gate[LAYER], clean.gate[LAYER], atol=1e-4), "the control: layer 2 has acted by then"


def test_where_a_users_turn_ends(chatting: SteerableModel) -> None:
    told = Tokenisation(chatting, chat=True)
    ids = [told.ids(text) for text in TEXTS]
    ends = told.tails(ids)
    turn_end = chatting.tokenizer("<eos>", add_special_tokens=False).input_ids  # type: ignore[misc]
    for row, end in zip(ids, ends, strict=True):
        assert row[len(row) - 1 - end :][: len(turn_end)] == turn_end and end == told.opening_tail > 0
    begun = told.ids([{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": "red is"}])
    assert told.tails([begun])[0] > ends[0], "an answer that has begun comes after it"
    assert Tokenisation(chatting).tails([Tokenisation(chatting).ids("what is red?")]) == [0], "no chat, no turn"


def test_a_turns_end_is_found_by_every_way_of_running(chatting: SteerableModel) -> None:
    contrasts = [fs.Contrast(text, "good answer", "bad") for text in TEXTS]
    read = fs.collect(chatting, contrasts, layer=1, chat=True, read="turn_end", **QUIET)
    loud = fs.collect(
        chatting, contrasts, layer=1, chat=True, read="turn_end", chat_template_kwargs={"loud": True}, **QUIET
    )
    torch.testing.assert_close(loud.queries, read.queries, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(loud.reading("last").queries, read.reading("last").queries, atol=1e-3), "the control"
    for own in (read, loud):
        gate = gate_at("turn_end", own.queries, 1)
        by = fs.fit(own, gate=gate, preset="0.1", n_experts=2, epochs=2, strength=0.1)
        assert by.reads == ("turn_end",)
        expected = gate(own.queries)
        made = fs.generate(chatting, TEXTS, by, max_new_tokens=2, **QUIET)
        torch.testing.assert_close(made.trace.gate[1], expected, atol=1e-4, rtol=1e-4)
        told = Tokenisation(chatting, True, own.prompt_format.arguments or "{}")  # type: ignore[union-attr]
        batch = pad(chatting, [told.ids(text) for text in TEXTS], "left")
        with by.on(chatting, attention_mask=batch.mask) as trace:
            chatting(batch.tokens, attention_mask=batch.mask.long())
        torch.testing.assert_close(trace.gate[1], expected, atol=1e-4, rtol=1e-4)
        begun = [[{"role": "user", "content": text}, {"role": "assistant", "content": "red"}] for text in TEXTS]
        made = fs.generate(chatting, begun, by, max_new_tokens=2, **QUIET)
        torch.testing.assert_close(made.trace.gate[1], expected, atol=1e-4, rtol=1e-4)
    nobody = replace(by, prompt_format=PromptFormat())
    with pytest.raises(HookError, match='read="turn_end": expected prompts that are known'), nobody.on(chatting):
        chatting(batch.tokens)


def test_what_cannot_be_read_so_is_refused(steering: fs.FineSteer, asked: fs.Activations) -> None:
    h = asked.queries
    mean, last = gate_at("mean", h), gate_at("last", h)
    with pytest.raises(InputError, match='refresh="step" decides at single tokens'):
        replace(steering.with_gate(mean), refresh="step", scope="all")
    with pytest.raises(InputError, match="two gates that read the same of a prompt"):
        mean & last
    assert (mean | ~mean).read == "mean" and mean.at_threshold(2.0).read == "mean"
    with pytest.raises(InputError, match="asked=, the prompts read by 'mean'"):
        steering.with_gate(mean).decide(LAYER, h)
    decided = steering.with_gate(mean).decide(LAYER, h, asked=2 * h)
    assert torch.equal(decided.gate, mean(2 * h))
    for make in (
        lambda: require_reading("all"),
        lambda: require_reading(None),
    ):
        with pytest.raises(InputError, match="read: expected"):
            make()


def test_a_steering_and_its_gate_are_read_back_as_they_read(
    model: SteerableModel, steering: fs.FineSteer, asked: fs.Activations, tmp_path: Path
) -> None:
    by = replace(steering.with_gate(gate_at("mean", asked.queries)), read="turn_end")
    fs.save(by, tmp_path / "steering", model=model)
    assert fs.load(tmp_path / "steering").reads == ("turn_end", "mean")


def test_explanations_read_as_the_gate(model: SteerableModel, steering: fs.FineSteer, asked: fs.Activations) -> None:
    gate = fs.fit_gate(asked.reading("mean").queries, rank=2, folds=3, read="mean", layer=LAYER)
    told = effects.explain_gate(model, steering.with_gate(gate), CONTRASTS[0].prompt)
    assert told.ratio == pytest.approx(float(gate.score(asked.reading("mean").queries[0])), abs=1e-4)


def test_one_reading_of_a_row_alone() -> None:
    h = torch.arange(24.0).reshape(2, 4, 3)
    one = torch.tensor([[False, True, False, False], [True, True, True, False]])
    assert torch.equal(of_prompt("mean", h, one), torch.stack([h[0, 1], h[1, 1:3].mean(dim=0)]))
    assert torch.equal(of_prompt("turn_end", h, one, torch.tensor([0, 2])), torch.stack([h[0, 1], h[1, 0]]))
    full = of_prompt("mean", torch.where(one.unsqueeze(-1), h, torch.nan), one)
    assert bool(full.isfinite().all()), "what a pad holds is not seen"

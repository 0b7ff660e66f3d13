"""The trace by itself: its way through JSON lines, and what each of its positions is."""

import gzip
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fsteer_lens import FineSteer, Trace, Window, chain, generate, tutor
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import Batch, prompt_ids
from tests.running import LAYER, batch_of, residual


def test_a_trace_goes_through_json_lines_and_back(
    model: SteerableModel, steering: FineSteer, prompts: list[str], tmp_path: Path
) -> None:
    other = steering.with_gate(None).with_scope("generated")
    for one in (steering, replace(other, refresh="step"), chain(steering, other)):
        trace = generate(model, prompts, one, max_new_tokens=24, compare=True, progress=False).trace
        sizes = []
        for name in ("trace.jsonl.gz", "trace.jsonl"):
            trace.to_jsonl(tmp_path / name)
            again = Trace.from_jsonl(tmp_path / name)
            require_same(trace, again)
            sizes.append((tmp_path / name).stat().st_size)
        assert sizes[0] < sizes[1] / 3
        assert len(again.parts) == len(trace.parts)
        for part, whole in zip(again.parts, trace.parts, strict=True):
            require_same(whole, part)
    assert trace.unsteered is not None and trace.steps is not None and trace.steps.top_texts is not None
    assert trace.steps.special is not None and bool(trace.steps.special.any())


def require_same(one: Any, other: Any) -> None:
    """Every field is equal: tensors to the last bit, with NaN where NaN was."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(-7.0), other.nan_to_num(-7.0))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            require_same(one[key], other[key])
    elif is_dataclass(one):
        for item in fields(one):
            if item.name != "parts":
                require_same(getattr(one, item.name), getattr(other, item.name))
    else:
        assert one == other


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    for text in ("", "{}\n", "not json\n", '{"row": 0, "prompt_length": 2, "layers": {"x": {"gate": 1}}}\n'):
        path.write_text(text)
        with pytest.raises(DataError, match="trace"):
            Trace.from_jsonl(path)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"row": 0}' * 99)[:-9])
    for missing in ("cut.jsonl.gz", "nowhere.jsonl.gz", "nowhere.jsonl"):
        with pytest.raises(DataError, match="trace that to_jsonl wrote"):
            Trace.from_jsonl(tmp_path / missing)
    with pytest.raises(InputError, match="existing folder"):
        Trace(prompt_lengths=torch.tensor([1])).to_jsonl(tmp_path / "nowhere" / "a.jsonl")


@pytest.mark.parametrize("scope", ["prompt", "generated", "all", Window(1, 3)])
def test_marks_stand_where_the_stream_was_changed(model: SteerableModel, steering: FineSteer, scope: Any) -> None:
    told = tutor.data("safe")
    prompts = [told.test[0].prompt, told.general_test[0].prompt, told.test[-1].prompt]
    one = steering.with_gate(None).with_scope(scope)
    trace = generate(model, prompts, one, max_new_tokens=6, progress=False).trace
    marks = trace.marks()
    assert trace.steps is not None
    for row, prompt in enumerate(prompts):
        ids = prompt_ids(model, prompt)
        text = [*ids, *trace.row(row).steps.tokens[0].tolist()][:-1]  # type: ignore[union-attr]
        with one.on(model, prompt_lengths=torch.tensor([len(ids)])):
            steered = residual(model, Batch(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.bool)))
        plain = residual(model, Batch(torch.tensor([text]), torch.ones(1, len(text), dtype=torch.bool)))
        changed = (steered != plain).any(dim=-1)[0].tolist()
        width = marks.padding.shape[1]
        assert marks.steered[row].tolist() == changed + [False] * (width - len(text))
        assert marks.padding[row].tolist() == [False] * len(text) + [True] * (width - len(text))
        assert marks.bos[row].tolist() == [place == 0 for place in range(width)]
        assert marks.generated[row].tolist() == [len(ids) <= place < len(text) for place in range(width)]


def test_marks_of_a_padded_batch_know_its_pads(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    batch = batch_of(model, prompts)
    with steering.with_gate(None).on(model, attention_mask=batch.mask) as trace:
        steered = residual(model, batch)
    changed = (steered != residual(model, batch)).any(dim=-1)
    marks = trace.marks(LAYER)
    assert torch.equal(marks.padding, ~batch.mask)
    assert torch.equal(marks.steered, changed)
    assert not marks.bos.any()  # a hook sees no tokens
    with pytest.raises(InputError, match=r"layers with change, \[4\]"):
        trace.marks(2)

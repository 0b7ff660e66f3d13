"""A request that runs in pieces, is dropped and computed again, is steered as by `generate`."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fsteer_lens import FineSteer, Schedule, SubspaceAblation, SubspaceProbe, Window, chain, generate
from fsteer_lens.hooks import HookObject
from fsteer_lens.models import SteerableModel
from fsteer_lens.models.points import Point
from fsteer_lens.prompts.tokens import pad, prompt_ids
from fsteer_lens.serving.artefacts import Artefact
from fsteer_lens.serving.client import Record
from fsteer_lens.serving.requests import Request
from fsteer_lens.trace.trace import Trace
from tests.running import LAYER, residual

HERE = Point(LAYER, "hook_resid_post")
NEW = 6


@pytest.fixture(scope="module")
def forms(steering: FineSteer) -> dict[str, HookObject]:
    """What one steering can be, of those that fit prompts in pieces and those that do not."""
    late = steering.with_scope("generated")
    gate = steering.gate_at(LAYER)
    space = gate.subspace  # type: ignore[union-attr]
    return {
        "generated": late,
        "window": steering.with_scope(Window(1, 4)),
        "schedule": late.with_schedule(Schedule((1.0, 0.5, 0.25))),
        "monitor": late.with_monitor(),
        "ablation": SubspaceAblation(space, layer=LAYER, rank=2),
        "probe beside it": chain(late, SubspaceProbe(space, layer=LAYER)),
        "all": steering.with_scope("all"),
        "prompt": steering.with_scope("prompt"),
    }


@pytest.fixture(scope="module")
def texts(tutor_model: SteerableModel, prompts: list[str]) -> Any:
    """Of each form and prompt: the stream of the whole text [n d], the prompt's length, the trace of `generate`."""
    made: dict[str, list[tuple[Tensor, int, Trace]]] = {}

    def of(name: str, form: HookObject) -> list[tuple[Tensor, int, Trace]]:
        if name not in made:
            rows = []
            for prompt in prompts[:4]:
                one = generate(tutor_model, prompt, form, max_new_tokens=NEW, progress=False)[0]
                ids = prompt_ids(tutor_model, prompt)
                batch = pad(tutor_model, [[*ids, *one.tokens[:-1]]], "left")
                rows.append((residual(tutor_model, batch)[0], len(ids), one.trace))
            made[name] = rows
        return made[name]

    return of


def run(request: Request, stream: Tensor, pieces: list[int], drop: int = 0) -> Tensor:
    """Hand the stream over in pieces of these lengths; with `drop` the whole is computed again after so many pieces."""
    edit, done = torch.zeros_like(stream), 0
    for number, n in enumerate(pieces, 1):
        added = request.edit(HERE, stream[done : done + n].float(), done)
        edit[done : done + n] = 0 if added is None else added
        done += n
        if number == drop:
            edit[:done] = run(request, stream[:done], pieces[:number])
    return edit


def test_each_form_is_edited_and_recorded_as_by_generate(forms: dict[str, HookObject], texts: Any) -> None:
    for name, form in forms.items():
        for stream, length, expected in texts(name, form):
            request = Request("a", Artefact(name, form, "0"), {}, length)
            edit = run(request, stream, [length, *[1] * (len(stream) - length)])
            assert request.error is None
            same_traces(request.trace(), expected)
            size = edit.norm(dim=-1) / stream.norm(dim=-1)
            if LAYER in expected.change:
                torch.testing.assert_close(size, expected.change[LAYER][0], atol=1e-5, rtol=1e-4)


def same_traces(found: Trace, expected: Trace) -> None:
    for name in ("gate", "score", "ser", "weights", "coefficients", "distance", "change"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert set(ours) == set(theirs), name
        for layer in ours:
            torch.testing.assert_close(ours[layer], theirs[layer], atol=1e-4, rtol=1e-4, equal_nan=True)
    for one, other in zip(found.parts, expected.parts, strict=True):
        same_traces(one, other)


@settings(max_examples=30)
@given(data=st.data())
def test_pieces_and_computing_again_change_nothing(
    data: st.DataObject, forms: dict[str, HookObject], texts: Any
) -> None:
    name = data.draw(st.sampled_from([name for name in forms if name not in ("all", "prompt")]))
    stream, length, expected = data.draw(st.sampled_from(texts(name, forms[name])))
    cuts = data.draw(st.sets(st.integers(1, length - 1), max_size=4)) | {length, *range(length, len(stream) + 1)}
    places = sorted({0, *cuts})
    pieces = [after - before for before, after in pairwise(places)]
    request = Request("a", Artefact(name, forms[name], "0"), {}, length)
    run(request, stream, pieces, drop=data.draw(st.integers(0, len(pieces))))
    assert request.error is None
    same_traces(request.trace(), expected)


def test_the_mean_of_a_prompt_in_pieces_is_that_of_the_prompt(
    tutor_model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    for prompt in prompts[:3]:
        stream = residual(tutor_model, pad(tutor_model, [prompt_ids(tutor_model, prompt)], "left"))[0]
        request = Request("a", Artefact("a", steering.with_scope("generated"), "0"), {}, len(stream))
        request._gather(HERE, stream[:2], 0)
        request._gather(HERE, stream[2:], 2)
        torch.testing.assert_close(request._read[HERE]["mean"] / (len(stream) - 1), stream[1:].mean(dim=0))


@pytest.mark.parametrize("name", ["all", "prompt"])
def test_what_edits_prompts_fails_on_a_piece_of_one(forms: dict[str, HookObject], texts: Any, name: str) -> None:
    stream, length, _ = texts(name, forms[name])[0]
    request = Request("a", Artefact(name, forms[name], "0"), {}, length)
    assert request.edit(HERE, stream[: length - 1], 0) is None
    assert "all" in str(request.error) and "--no-enable-chunked-prefill" in str(request.error)
    assert request.edit(HERE, stream[length - 1 : length], length - 1) is None
    assert request.record() == {"fsteer": name, "error": request.error}


def test_a_kept_prefix_is_taken_where_the_last_token_is_read_alone(forms: dict[str, HookObject], texts: Any) -> None:
    stream, length, expected = texts("generated", forms["generated"])[0]
    request = Request("a", Artefact("late", forms["generated"], "0"), {}, length)
    for n, done in ((length - 2, 2), *((1, place) for place in range(length, len(stream)))):
        request.edit(HERE, stream[done : done + n], done)
    same_traces(request.trace(), expected)
    kept = Request("a", Artefact("all", forms["all"], "0"), {}, length)
    kept.edit(HERE, stream[2:length], 2)
    assert "every token of the prompt" in str(kept.error)


def test_what_nobody_decided_upon_is_an_error(forms: dict[str, HookObject]) -> None:
    request = Request("a", Artefact("late", forms["generated"], "0"), {}, 4)
    request.require_decided()
    assert request.error == f"nobody decided at {HERE.name}"


def test_a_record_tells_the_decision_and_how_many_tokens_were_edited(forms: dict[str, HookObject], texts: Any) -> None:
    stream, length, expected = texts("generated", forms["generated"])[0]
    request = Request("a", Artefact("late", forms["generated"], "0"), {"fsteer_strength": 2.0}, length)
    run(request, stream, [length, *[1] * (len(stream) - length)])
    record = Record.from_json(request.record())
    assert (record.steering, record.strength, record.scope) == ("late", (2.0,), ("generated",))
    assert record.edited == {LAYER: int((expected.change[LAYER] > 0).sum())} and record.edited[LAYER] == NEW
    torch.testing.assert_close(record.trace.gate[LAYER], expected.gate[LAYER], atol=1e-4, rtol=0)
    assert record.trace.change == {}

"""Positions and time: windows, schedules, and deciding again at every step."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fsteer_lens import FineSteer, Schedule, Window, generate, stream, tutor
from fsteer_lens.errors import InputError
from fsteer_lens.hooks.scopes import in_scope
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import pad
from tests import made_up
from tests.running import logits_of, residual

LAYER = 3
NAME = f"blocks.{LAYER}.hook_resid_post"
PROMPTS = [[1, 50, 60, 70], [1, 80, 90]]
TEXTS = [[*PROMPTS[0], 31, 32, 33, 34], [*PROMPTS[1], 41, 42, 43]]
LENGTHS = torch.tensor([4, 3])


def test_scopes_are_sets_of_steps() -> None:
    steps = torch.arange(-3, 5)
    expected = {
        "all": [1, 1, 1, 1, 1, 1, 1, 1],
        "prompt": [1, 1, 1, 1, 0, 0, 0, 0],
        "generated": [0, 0, 0, 1, 1, 1, 1, 1],
        Window(): [0, 0, 0, 1, 1, 1, 1, 1],
        Window(1, 3): [0, 0, 0, 0, 1, 1, 0, 0],
        Window(2): [0, 0, 0, 0, 0, 1, 1, 1],
        Window(2, 2): [0, 0, 0, 0, 0, 0, 0, 0],
    }
    for scope, inside in expected.items():
        assert in_scope(scope, steps).int().tolist() == inside  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [Window(0, 1), Window(1, 3), Window(3)])
@pytest.mark.parametrize("cache", [True, False])
def test_a_window_steers_the_positions_that_predict_its_tokens(
    model: SteerableModel, window: Window, cache: bool
) -> None:
    by = made_up.steering(LAYER, scope=window)
    made = generate(model, PROMPTS, by, max_new_tokens=5, use_past_kv_cache=cache, progress=False)
    for prompt, one in zip(PROMPTS, made, strict=True):
        changed = (one.trace.change[LAYER][0] > 0).nonzero().flatten().tolist()
        last = window.stop if window.stop is not None else 5
        assert changed == [len(prompt) - 1 + step for step in range(window.start, last)]
    plain = generate(model, PROMPTS, max_new_tokens=5, progress=False)
    for one, other in zip(made, plain, strict=True):
        assert one.tokens[: window.start] == other.tokens[: window.start], (
            "tokens before the window are the model's own"
        )


def test_bad_windows_and_refreshes_raise() -> None:
    for start, stop in ((-1, 3), (3, 2)):
        with pytest.raises(InputError, match="window"):
            Window(start, stop)
    with pytest.raises(InputError, match="no effect"):
        made_up.steering(LAYER, refresh="step", scope="prompt")
    with pytest.raises(InputError, match="no effect"):
        made_up.steering(LAYER, refresh="step").with_scope("prompt")
    with pytest.raises(InputError, match="finite"):
        Schedule((1.0, float("inf")))


def forced(model: SteerableModel, by: FineSteer, side: str) -> tuple[Tensor, Tensor, Tensor, object]:
    """The stream at the steered layer before and after the edit, which positions are real, and the trace."""
    batch = pad(model, TEXTS, side)  # type: ignore[arg-type]
    before = residual(model, batch, NAME)
    with by.on(model, prompt_lengths=LENGTHS, attention_mask=batch.mask) as trace:
        after = residual(model, batch, NAME)
    return before, after, batch.mask, trace


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", ["all", "generated", Window(1, 3)])
def test_refresh_decides_again_at_every_step(model: SteerableModel, scope: object, side: str) -> None:
    """Against a slow loop: up to the prompt's end its decision, from then on that of each position by itself."""
    by = made_up.steering(LAYER, scope=scope, refresh="step", schedule=Schedule((1.0, 0.5)))
    before, after, real, trace = forced(model, by, side)
    gate, experts = by.gate, by.experts
    for row, length in enumerate(LENGTHS.tolist()):
        stream_before, stream_after = before[row][real[row]], after[row][real[row]]
        for place, h in enumerate(stream_before):
            step = place - (length - 1)
            read = stream_before[length - 1] if step < 0 else h
            factor = 1.0 if step <= 0 else 0.5
            inside = {"all": True, "generated": step >= 0}.get(str(scope), 1 <= step < 3)
            edit = inside * 2.0 * factor * gate.gate(read) * experts.vector(read)  # type: ignore[union-attr]
            torch.testing.assert_close(stream_after[place], h + edit, atol=1e-4, rtol=1e-4)
            seen = trace.row(row)  # type: ignore[attr-defined]
            if step < 0:
                assert seen.step_gate[LAYER][0, place].isnan()
            else:
                torch.testing.assert_close(seen.step_gate[LAYER][0, place], gate.gate(h), atol=1e-5, rtol=1e-4)  # type: ignore[union-attr]
                torch.testing.assert_close(seen.step_weights[LAYER][0, place], experts.route(h), atol=1e-5, rtol=1e-4)  # type: ignore[union-attr]
    once = forced(model, replace(by, refresh="prompt"), side)[1]
    assert not torch.allclose(once[real], after[real], atol=1e-2)


def test_a_leading_gate_decides_again_as_well(model: SteerableModel) -> None:
    parts = {layer: made_up.steering(seed=layer) for layer in (1, 3)}
    by = FineSteer(
        {3: parts[3].experts},  # type: ignore[dict-item]
        {1: parts[1].gate},  # type: ignore[dict-item]
        gate_layer=1,
        scope="generated",
        refresh="step",
        strength=2.0,
    )
    batch = pad(model, TEXTS, "right")
    read, before = (residual(model, batch, f"blocks.{layer}.hook_resid_post") for layer in (1, 3))
    with by.on(model, prompt_lengths=LENGTHS, attention_mask=batch.mask) as trace:
        after = residual(model, batch, "blocks.3.hook_resid_post")
    for row, length in enumerate(LENGTHS.tolist()):
        for place in range(length - 1, len(TEXTS[row])):
            opened = parts[1].gate.gate(read[row, place])  # type: ignore[union-attr]
            edit = 2.0 * opened * parts[3].experts.vector(before[row, place])  # type: ignore[union-attr]
            torch.testing.assert_close(after[row, place], before[row, place] + edit, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(trace.step_gate[3][row, place], opened, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", [True, False])
def test_a_stream_tells_the_gate_of_every_step(model: SteerableModel, cache: bool) -> None:
    by = made_up.steering(LAYER, refresh="step", scope="all")
    whole = generate(model, PROMPTS[0], by, max_new_tokens=5, progress=False)[0]
    records = [record for _, record in stream(model, PROMPTS[0], by, max_new_tokens=5, use_past_kv_cache=cache)]
    assert [record.token for record in records] == list(whole.tokens)
    told = torch.tensor([record.gate[LAYER] for record in records])
    torch.testing.assert_close(told, whole.trace.step_gate[LAYER][0, len(PROMPTS[0]) - 1 :], atol=1e-5, rtol=1e-4)
    assert len(set(told.tolist())) == 5, "every step has a gate value of its own"
    line = whole.trace.to_records()[0]["layers"][LAYER]
    assert line["step_gate"][0] is None and line["step_gate"][-1] == pytest.approx(records[-1].gate[LAYER], abs=1e-5)


def test_deciding_once_records_no_steps(model: SteerableModel) -> None:
    with made_up.steering(LAYER).on(model) as trace:
        logits_of(model, pad(model, PROMPTS[:1], "left"))
    assert trace.step_gate == {} and trace.step_weights == {}


@pytest.mark.gpu
@pytest.mark.parametrize("refresh", ["prompt", "step"])
def test_a_steering_on_the_cpu_acts_on_a_model_on_the_gpu(refresh: str) -> None:
    by = made_up.steering(LAYER, refresh=refresh, scope="all")
    runs = [
        generate(tutor.load(device=device), PROMPTS, steering, max_new_tokens=5, compare=True, progress=False)
        for device, steering in (("cpu", by), ("cuda", by), ("cuda", by.to("cuda")))
    ]
    for run in runs[1:]:
        assert [one.tokens for one in run] == [one.tokens for one in runs[0]]

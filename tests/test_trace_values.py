"""A trace is a value: it holds one prompt, and nothing that runs later changes it."""

import pytest
import torch

from fsteer_lens import FineSteer, generate, models
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import pad, prompt_ids
from fsteer_lens.trace.trace import PER_LAYER, Trace
from tests import made_up
from tests.families import FAMILIES, random_model
from tests.running import LAYER


def held(trace: Trace) -> dict[str, dict[int, torch.Tensor]]:
    """What a trace holds, copied."""
    return {name: {layer: value.clone() for layer, value in getattr(trace, name).items()} for name in PER_LAYER}


def same(one: dict[str, dict[int, torch.Tensor]], other: dict[str, dict[int, torch.Tensor]]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys()
        and all(torch.equal(value.nan_to_num(-7), other[name][layer].nan_to_num(-7)) for layer, value in of.items())
        for name, of in one.items()
    )


@pytest.mark.parametrize("way", ["attach", "fwd_hooks", "on"])
def test_what_was_handed_out_is_not_changed_by_a_later_forward(
    model: SteerableModel, steering: FineSteer, prompts: list[str], way: str
) -> None:
    rows = [torch.tensor([prompt_ids(model, prompt)]) for prompt in prompts]
    kept: list[Trace] = []
    copies = []
    if way == "attach":
        handle = steering.attach(model)
        for row in rows:
            model(row)
            kept.append(handle.trace)
            copies.append(held(kept[-1]))
            model(torch.cat([row, row[:, -1:]], dim=1))  # one token more, decoded without a cache
        handle.detach()
    elif way == "fwd_hooks":
        hooks = steering.fwd_hooks()
        for row in rows:
            model.run_with_hooks(row, fwd_hooks=hooks)  # type: ignore[attr-defined]
            kept.append(hooks.trace)
            copies.append(held(kept[-1]))
    else:
        with steering.on(model) as trace:
            for row in rows:
                model(row)
                kept.append(trace.copy())
                copies.append(held(trace))
    assert len({id(trace) for trace in kept}) == len(rows)
    for row, trace, copied in zip(rows, kept, copies, strict=True):
        assert same(held(trace), copied) and trace.change[LAYER].shape[1] == row.shape[1]
        assert trace.prompt_lengths is not None and trace.prompt_lengths.tolist() == [row.shape[1]]
    alone = [generate(model, prompt, steering, max_new_tokens=1, progress=False)[0].trace for prompt in prompts]
    for trace, own in zip(kept, alone, strict=True):
        torch.testing.assert_close(trace.ser[LAYER], own.ser[LAYER], atol=1e-4, rtol=0)


def test_a_trace_holds_nothing_of_the_prompt_before(model: SteerableModel) -> None:
    """A pass that ends below the second layer leaves nothing there, rather than what the last prompt left."""
    by = FineSteer({2: made_up.experts(0), 4: made_up.experts(1)})
    tokens = torch.tensor([[1, 50, 60, 70]])
    with by.on(model) as trace:
        model(tokens)
        first = trace.copy()
        model(tokens[:, :3], stop_at_layer=3)
    assert list(first.change) == [2, 4] and list(trace.change) == [2] and list(trace.gate) == [2]
    assert trace.change[2].shape == (1, 3)


def lengths_of(trace: Trace) -> list[int]:
    assert trace.prompt_lengths is not None
    return trace.prompt_lengths.tolist()


@pytest.mark.parametrize("cache", [True, False])
def test_texts_given_to_the_models_own_generate_are_placed(
    model: SteerableModel, steering: FineSteer, prompts: list[str], cache: bool
) -> None:
    """TransformerLens pads them on the left by itself, and only its blocks are told."""
    some = [prompts[0], *prompts[3:5]]
    ids = [prompt_ids(model, prompt) for prompt in some]
    assert len({len(row) for row in ids}) > 1
    handle = steering.with_scope("all").attach(model)
    model.generate(  # type: ignore[attr-defined]
        some, max_new_tokens=3, do_sample=False, verbose=False, use_past_kv_cache=cache, stop_at_eos=False
    )
    trace = handle.trace
    handle.detach()
    assert trace.first is not None
    pads = max(map(len, ids)) - torch.tensor([len(row) for row in ids])
    assert lengths_of(trace) == [len(row) for row in ids] and trace.first.tolist() == pads.tolist()
    change = trace.change[LAYER]
    for row, missing in zip(change, pads.tolist(), strict=True):
        assert row[:missing].isnan().all() and not row[missing:].isnan().any()
    own = generate(model, some, steering.with_scope("all"), max_new_tokens=1, progress=False).trace
    torch.testing.assert_close(trace.ser[LAYER], own.ser[LAYER], atol=1e-4, rtol=0)


@pytest.mark.model
@pytest.mark.parametrize("kind", models.available_kinds())
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_tells_of_its_padding(family: str, kind: models.Kind) -> None:
    model = random_model(family, kind)
    width = model.cfg.d_model
    by = FineSteer(made_up.experts(0, width), layer=0)
    rows = [[5, 6, 7, 8, 9, 10], [5, 6], [7, 8, 9]]
    batch = pad(model, rows, "left")
    with by.on(model) as trace:
        model(batch.tokens, attention_mask=batch.mask.long())
    assert lengths_of(trace) == [6, 2, 3]
    with by.on(model, attention_mask=batch.mask) as told:
        model(batch.tokens, attention_mask=batch.mask.long())
    assert same(held(trace), held(told))

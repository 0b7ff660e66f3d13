"""The intervention: what is added, where, to which rows, on both model classes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fsteer_lens import Activations, Experts, FineSteer, Schedule, fit, fit_gate, models, tutor
from fsteer_lens.errors import HookError, InputError, MismatchError, ShapeError, SiteError
from fsteer_lens.hooks.positions import Positions
from fsteer_lens.hooks.session import Point
from fsteer_lens.method.controller import Controller
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import pad, prompt_ids
from fsteer_lens.steering import MeanShift, fit_mean_shift
from tests import made_up
from tests.families import random_model, tokenizer
from tests.running import LAYER, SITE, batch_of, logits_of, n_hooks, residual, three_ways


def oracle_edit(steering: FineSteer, h: Tensor) -> Tensor:
    """λ · g(ĥ) · v(ĥ) from the stored tensors, in float64, by the equations."""
    h = h.double()
    experts, gate = steering.experts, steering.gate
    assert isinstance(experts, Experts)
    c = [part.double() for part in experts.controller]
    prototypes = experts.prototypes.double()
    if isinstance(experts.controller, Controller):
        logits = (h @ c[0].T + c[1]) @ (prototypes @ c[2].T + c[3]).T / h.shape[-1] ** 0.5
        beta = torch.relu(h @ c[4].T + c[5]) @ c[6].T + c[7]
    else:
        z = h / h.norm(dim=-1, keepdim=True) @ c[4].T + c[5]
        held_back = (h @ c[7].T + c[8]).square().sum(dim=-1, keepdim=True).clamp(min=1)
        logits = h @ c[0].T + c[1]
        beta = (h @ c[2].T + c[3] + torch.einsum("ni,mij,nj->nm", z, c[6], z)) / held_back
    vector = logits.softmax(-1) @ prototypes + beta @ experts.residual_basis.double().T
    opened = gate.gate(h.float()).double() if gate else torch.ones(len(h)).double()  # type: ignore[union-attr]
    return steering.strength * opened[:, None] * vector


@pytest.mark.parametrize("scope", ["all", "prompt", "generated"])
def test_edit_is_the_equation_at_the_positions_of_the_scope(
    model: SteerableModel, steering: FineSteer, prompts: list[str], scope: str
) -> None:
    batch = batch_of(model, prompts, "right")
    answer = torch.randint(20, 200, (len(prompts), 3))
    lengths = batch.mask.sum(dim=1)
    rows = [torch.cat([t[:n], a]) for t, n, a in zip(batch.tokens, lengths, answer, strict=True)]
    scored = pad(model, [row.tolist() for row in rows], "right")
    before = residual(model, scored)
    edit = oracle_edit(steering, before[torch.arange(len(rows)), lengths - 1])
    column = torch.arange(scored.tokens.shape[1])
    query = (lengths - 1)[:, None]
    where = {"all": column >= 0, "prompt": column <= query, "generated": column >= query}[scope] & scored.mask
    expected = before.double() + where[..., None] * edit[:, None]

    with steering.with_scope(scope).on(model, prompt_lengths=lengths, attention_mask=scored.mask) as trace:  # type: ignore[arg-type]
        after = residual(model, scored)
    real = scored.mask
    torch.testing.assert_close(after[real].double(), expected[real], atol=1e-5, rtol=1e-5)
    size = (after - before).norm(dim=-1) / before.norm(dim=-1)
    torch.testing.assert_close(trace.change[LAYER][real], size[real], atol=1e-5, rtol=1e-3)
    assert trace.change[LAYER][~real].isnan().all()


def test_both_classes_steer_alike(
    hooked: SteerableModel, bridge: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    found = []
    for model in (hooked, bridge):
        batch = batch_of(model, prompts)
        with steering.on(model, attention_mask=batch.mask):
            found.append(logits_of(model, batch)[batch.mask].log_softmax(-1))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


def test_on_attach_and_fwd_hooks_are_the_same(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    batch = batch_of(model, prompts)
    plain = logits_of(model, batch)
    (by_on, first), *others = three_ways(model, steering, batch)
    assert not torch.equal(by_on, plain)
    for logits, trace in others:
        assert torch.equal(by_on, logits) and torch.equal(first.gate[LAYER], trace.gate[LAYER])
    assert torch.equal(logits_of(model, batch), plain)


def test_each_row_decides_for_itself(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    batch = batch_of(model, prompts)
    plain = logits_of(model, batch)
    with steering.on(model, attention_mask=batch.mask) as trace:
        together = logits_of(model, batch)
    gate = trace.gate[LAYER]
    assert (gate[:3] > 0.5).all() and (gate[3:] < 0.5).any()
    closed = gate == 0
    assert closed.any()
    assert torch.equal(together[closed], plain[closed])
    for index, prompt in enumerate(prompts):
        alone = batch_of(model, [prompt])
        with steering.on(model) as single:
            last = logits_of(model, alone)[0, -1].log_softmax(-1)
        torch.testing.assert_close(last, together[index, -1].log_softmax(-1), atol=1e-4, rtol=0)
        torch.testing.assert_close(single.gate[LAYER][0], gate[index], atol=1e-4, rtol=1e-3)


def test_nothing_to_add_leaves_logits_bit_identical(
    model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    batch = batch_of(model, prompts)
    plain = logits_of(model, batch)
    gate = steering.gate_at(LAYER)
    assert gate is not None
    never = gate & ~gate & replace(gate, epsilon=1.0, gamma=1e9)
    for idle in (steering.with_strength(0.0), steering.with_gate(never), replace(steering, schedule=Schedule((0.0,)))):
        with idle.on(model, attention_mask=batch.mask):
            assert torch.equal(logits_of(model, batch), plain)


def test_query_never_sees_the_answer(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    ids = prompt_ids(model, prompts[0])
    alone = pad(model, [ids], "right")
    answered = pad(model, [[*ids, 40, 41, 42]], "right")
    with steering.on(model) as trace:
        expected = logits_of(model, alone)[0, -1]
    with steering.on(model, prompt_lengths=torch.tensor([len(ids)])) as scored:
        found = logits_of(model, answered)[0, len(ids) - 1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(scored.gate[LAYER], trace.gate[LAYER], atol=1e-5, rtol=0)
    with steering.on(model) as wrong:
        logits_of(model, answered)
    assert not torch.allclose(wrong.ser[LAYER], trace.ser[LAYER], atol=1e-3)


def test_schedule_scales_the_steps(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    ids = prompt_ids(model, prompts[0])
    batch = pad(model, [[*ids, 40, 41, 42, 43]], "right")
    free = steering.with_scope("all")
    changes = []
    for one in (free, replace(free, schedule=Schedule((1.0, 0.5, 0.0)))):
        with one.on(model, prompt_lengths=torch.tensor([len(ids)])) as trace:
            logits_of(model, batch)
        changes.append(trace.change[LAYER][0])
    factor = changes[1] / changes[0]
    expected = torch.tensor([1.0] * len(ids) + [0.5, 0.0, 0.0, 0.0])
    torch.testing.assert_close(factor, expected, atol=1e-5, rtol=0)


def test_trace_holds_the_decision(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    batch = batch_of(model, prompts)
    h = residual(model, batch)[:, -1]
    with steering.on(model, attention_mask=batch.mask) as trace:
        logits_of(model, batch)
    experts, gate = steering.experts_at(LAYER), steering.gate_at(LAYER)
    assert gate is not None
    parts = experts.parts(h)
    torch.testing.assert_close(trace.ser[LAYER], gate.subspace.energy_ratios(h))
    torch.testing.assert_close(trace.gate[LAYER], gate.gate(h))
    torch.testing.assert_close(trace.weights[LAYER], parts.weights)
    torch.testing.assert_close(trace.coefficients[LAYER], parts.coefficients)
    assert trace.prompt_lengths is not None and trace.prompt_lengths.tolist() == batch.mask.sum(dim=1).tolist()


def test_second_prompt_under_one_context_starts_fresh(
    model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    rows = sorted((prompt_ids(model, prompt) for prompt in prompts), key=len)
    together = []
    with steering.on(model) as trace:
        for row in rows:
            logits_of(model, pad(model, [row], "right"))
            together.append(trace.ser[LAYER])
            assert trace.change[LAYER].shape == (1, len(row))
    for row, found in zip(rows, together, strict=True):
        with steering.on(model) as alone:
            logits_of(model, pad(model, [row], "right"))
        assert torch.equal(alone.ser[LAYER], found)


def test_growing_prompts_are_told_from_uncached_decoding(model: SteerableModel, steering: FineSteer) -> None:
    first = [1, 50, 60, 70, 80]
    grown = [first + [90 + i for i in range(k)] for k in range(1, 4)]
    other = [1, 55, 66, 77, 88, 99, 100, 101, 102]
    with steering.on(model) as trace:
        logits_of(model, pad(model, [first], "right"))
        decided = trace.ser[LAYER].clone()
        for row in grown:
            logits_of(model, pad(model, [row], "right"))
            assert torch.equal(trace.ser[LAYER], decided)
            assert trace.change[LAYER].shape[1] == len(row)
        logits_of(model, pad(model, [other], "right"))
    assert not torch.allclose(trace.ser[LAYER], decided)
    assert trace.change[LAYER].shape[1] == len(other)


def test_a_prompt_that_opens_with_the_last_one_is_told_from_its_continuation(
    model: SteerableModel, steering: FineSteer
) -> None:
    """Uncached decoding of the first runs 3, 4, 5 tokens; the second has 6, and the first as its opening."""
    first, second = [1, 50, 60], [1, 50, 60, 91, 92, 93]
    with steering.on(model) as alone:
        logits_of(model, pad(model, [second], "right"))
    with steering.on(model) as trace:
        for row in (first, [*first, 70], [*first, 70, 71]):
            logits_of(model, pad(model, [row], "right"))
        decided = trace.ser[LAYER].clone()
        logits_of(model, pad(model, [second], "right"))
    assert torch.equal(trace.ser[LAYER], alone.ser[LAYER]) and not torch.equal(decided, alone.ser[LAYER])


@pytest.mark.parametrize("kind", models.available_kinds())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_uncached_decoding_in_half_precision_goes_on(kind: models.Kind, dtype: torch.dtype) -> None:
    half = random_model("llama", kind, dtype=dtype)
    by = FineSteer(made_up.experts(0, 32), layer=1)
    row = [1, 50, 60, 70, 80]
    with by.on(half) as trace:
        for length in range(3, 6):
            logits_of(half, pad(half, [row[:length]], "right"))
            assert trace.prompt_lengths is not None and trace.prompt_lengths.tolist() == [3]


def test_rows_that_disagree_about_going_on_raise() -> None:
    positions = Positions(None, None)
    before = torch.randn(2, 4, 8)
    after = torch.cat([before, torch.randn(2, 1, 8)], dim=1)
    after[1, 3] += 1.0
    positions.observe(before)
    with pytest.raises(HookError, match="reset"):
        positions.observe(after)


def test_one_token_prompts_need_reset(tutor_model: SteerableModel, steering: FineSteer) -> None:
    handle = steering.attach(tutor_model)
    try:
        seen = []
        for token in (60, 70):
            handle.reset()
            logits_of(tutor_model, pad(tutor_model, [[token]], "right"))
            seen.append(handle.trace.ser[LAYER].clone())
        logits_of(tutor_model, pad(tutor_model, [[80]], "right"))
        assert torch.equal(handle.trace.ser[LAYER], seen[1])
        assert handle.trace.change[LAYER].shape == (1, 2)
    finally:
        handle.detach()
    assert not torch.allclose(seen[0], seen[1])


def test_several_layers_and_a_deciding_gate(
    model: SteerableModel, trained: dict[int, Activations], prompts: list[str]
) -> None:
    both = fit({2: trained[2], 4: trained[4]}, gate="energy", preset="0.1", epochs=10)
    batch = batch_of(model, prompts)
    with both.on(model, attention_mask=batch.mask) as trace:
        logits_of(model, batch)
    assert trace.layers == (2, 4)
    assert not torch.allclose(trace.gate[2], trace.gate[4])
    led = replace(both, gate_layer=2)
    with led.on(model, attention_mask=batch.mask) as trace:
        logits_of(model, batch)
    assert torch.equal(trace.gate[2], trace.gate[4])
    with pytest.raises(InputError, match="gate_layer"):
        replace(both, gate_layer=4)


def test_gate_of_an_earlier_layer_only_reads(
    model: SteerableModel, trained: dict[int, Activations], prompts: list[str]
) -> None:
    both = fit({2: trained[2], 4: trained[4]}, preset="0.1", epochs=10)
    late = FineSteer({4: both.experts_at(4)}, {2: both.gate_at(2)}, gate_layer=2)  # type: ignore[dict-item]
    batch = batch_of(model, prompts)
    before = residual(model, batch, "blocks.2.hook_resid_post")
    with late.on(model, attention_mask=batch.mask) as trace:
        after = residual(model, batch, "blocks.2.hook_resid_post")
    assert torch.equal(before, after)
    gate = both.gate_at(2)
    assert gate is not None
    torch.testing.assert_close(trace.gate[4], gate.gate(before[:, -1]))


def test_half_precision_stream_keeps_its_dtype(tutor_model: SteerableModel, steering: FineSteer) -> None:
    session = steering.with_gate(None).session_on(tutor_model)
    stream = torch.randn(2, 5, 128, dtype=torch.bfloat16)
    edited = session.respond(Point(LAYER, "hook_resid_post"), stream)
    assert edited is not None and edited.dtype == torch.bfloat16
    exact = oracle_edit(steering.with_gate(None), stream[:, -1].float())
    torch.testing.assert_close(edited.double(), stream.double() + exact[:, None], atol=0.05, rtol=0.01)


def test_trace_of_inference_mode_can_be_used_in_autograd(tutor_model: SteerableModel, steering: FineSteer) -> None:
    with torch.inference_mode(), steering.on(tutor_model) as trace:
        tutor_model(torch.tensor([[1, 50, 60]]))
    weight = torch.ones(1, requires_grad=True)
    (trace.change[LAYER] * trace.gate[LAYER] * weight).sum().backward()
    assert weight.grad is not None


def test_hooks_are_gone_whatever_happens(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    before = n_hooks(model)
    with pytest.raises(ZeroDivisionError), steering.on(model):
        raise ZeroDivisionError
    assert n_hooks(model) == before
    with pytest.raises(HookError, match="never fired"), steering.on(model):
        pass
    assert n_hooks(model) == before
    with pytest.raises(HookError, match="prompt_lengths"), steering.on(model, prompt_lengths=torch.tensor([900])):
        logits_of(model, batch_of(model, prompts[:1]))
    assert n_hooks(model) == before
    outer, inner = steering.attach(model), steering.attach(model)
    outer.detach()
    assert n_hooks(model) == before + 2
    inner.detach()
    inner.detach()
    assert n_hooks(model) == before


def test_hooks_of_others_stay(model: SteerableModel, steering: FineSteer, prompts: list[str]) -> None:
    calls: list[int] = []
    model.hook_dict[SITE].add_hook(lambda x, hook: calls.append(1) or None)
    try:
        with replace(steering, fingerprint=replace(steering.fingerprint)).on(model):  # type: ignore[type-var]
            assert calls == [], "the fingerprint's probe ran somebody else's hook"
            logits_of(model, batch_of(model, prompts[:1]))
        logits_of(model, batch_of(model, prompts[:1]))
        assert len(calls) == 2
    finally:
        model.hook_dict[SITE].remove_hooks()


def test_wrong_place_or_model_raises(
    tutor_model: SteerableModel, steering: FineSteer, trained: dict[int, Activations]
) -> None:
    with pytest.raises(SiteError, match=r"0\.\.5"), replace(steering, gate=None, layer=6).on(tutor_model):
        pass
    with pytest.raises(SiteError, match="hook_resid_post"), replace(steering, site="hook_resid_pots").on(tutor_model):
        pass
    assert steering.fingerprint is not None
    elsewhere = replace(steering.fingerprint, probe={LAYER: tuple(-x for x in steering.fingerprint.probe[LAYER])})
    with (
        pytest.raises(MismatchError, match="activations at layer 4"),
        replace(steering, fingerprint=elsewhere).on(tutor_model),
    ):
        pass
    narrow = MeanShift(torch.ones(64), layer=1)
    with pytest.raises(ShapeError, match="d_model=64"), narrow.on(tutor_model):
        pass
    with pytest.raises(ShapeError, match="d_model"):
        FineSteer(steering.experts, fit_gate(torch.randn(30, 64), rank=2), layer=4)


@pytest.mark.parametrize("kind", models.available_kinds())
def test_processed_weights_are_refused(steering: FineSteer, kind: models.Kind) -> None:
    from transformers import AutoModelForCausalLM

    processed = models.from_hf(
        AutoModelForCausalLM.from_pretrained(tutor.loading.FOLDER), tokenizer(), kind, process=True
    )
    with pytest.raises(MismatchError, match="processed weights"), steering.on(processed):
        pass


def test_bad_options_raise(steering: FineSteer, trained: dict[int, Activations]) -> None:
    for options, message in (
        ({"strength": float("nan")}, "strength"),
        ({"gate_layer": 5}, "gate_layer"),
        ({"layer": None}, "layer"),
    ):
        with pytest.raises(InputError, match=message):
            replace(steering, **options)
    with pytest.raises(InputError, match="schedule"):
        Schedule(())
    with pytest.raises(InputError, match="expert"):
        steering.without_expert(99)
    with pytest.raises(InputError, match="rank"):
        steering.at_rank(999)


def test_variants_share_tensors_and_do_what_they_say(steering: FineSteer) -> None:
    h = torch.randn(5, 128)
    full = steering.experts_at(LAYER)
    variants = [steering.without_expert(1), steering.only_expert(0), steering.without_residual(), steering.at_rank(3)]
    for variant in (*variants, steering.with_strength(2.0), steering.with_scope("all"), steering.with_gate(None)):
        assert variant.experts_at(LAYER).prototypes.data_ptr() == full.prototypes.data_ptr()
    assert (steering.without_expert(1).experts_at(LAYER).route(h)[:, 1] == 0).all()
    assert (steering.only_expert(0).experts_at(LAYER).route(h)[:, 0] == 1).all()
    assert (steering.without_residual().experts_at(LAYER).parts(h).residual_part == 0).all()
    gate = steering.at_rank(3).gate_at(LAYER)
    assert gate is not None and gate.leaves[0].rank == 3
    assert len(repr(steering)) < 120


def test_scope_follows_the_shift(trained: dict[int, Activations]) -> None:
    assert fit_mean_shift(trained[4]).scope == "prompt"
    assert fit_mean_shift(replace(trained[4], shift="response_mean")).scope == "all"
    assert fit_mean_shift(trained[4], scope="generated").scope == "generated"


def test_mean_shift_adds_its_vector(model: SteerableModel, trained: dict[int, Activations], prompts: list[str]) -> None:
    mean = fit_mean_shift(trained[4], strength=0.5)
    batch = batch_of(model, prompts[:1])
    before = residual(model, batch)
    with mean.on(model) as trace:
        after = residual(model, batch)
    shifts = trained[4].shifts
    assert shifts is not None
    torch.testing.assert_close(after, before + 0.5 * shifts.mean(dim=0), atol=1e-5, rtol=1e-5)
    assert trace.gate[LAYER].tolist() == [1.0] and trace.weights == {}

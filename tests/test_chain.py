"""Several layers and several hooks: what reads what, what adds up, and who decides."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fsteer_lens import (
    ExpertProbe,
    FineSteer,
    SubspaceAblation,
    SubspaceProbe,
    chain,
    collect_queries,
    fit_gate,
    generate,
    stream,
    tutor,
)
from fsteer_lens.errors import HookError, InputError, ShapeError
from fsteer_lens.hooks.objects import Link
from fsteer_lens.hooks.positions import View
from fsteer_lens.hooks.session import State
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import pad
from tests import made_up
from tests.running import batch_of, logits_of, residual, three_ways

LAYER = 3
NAME = f"blocks.{LAYER}.hook_resid_post"
ROWS = [[1, 50, 60, 70], [1, 80, 90], [1, 44, 55, 66, 77]]


def test_links_at_one_point_read_what_enters_and_add_up(model: SteerableModel) -> None:
    batch = pad(model, ROWS, "left")
    links = [made_up.steering(LAYER, seed, scope="all") for seed in (0, 1)]
    links.append(SubspaceAblation(made_up.subspace(2), layer=LAYER, rank=4))  # type: ignore[arg-type]
    before = residual(model, batch, NAME)
    alone = []
    for link in links:
        with link.on(model, attention_mask=batch.mask) as trace:
            alone.append((residual(model, batch, NAME) - before, trace))
    total = sum(edit for edit, _ in alone)
    with chain(*links).on(model, attention_mask=batch.mask) as trace:
        after = residual(model, batch, NAME)
    torch.testing.assert_close(after - before, total, atol=1e-4, rtol=1e-4)
    for part, (_, own) in zip(trace.parts, alone, strict=True):
        torch.testing.assert_close(part.change[LAYER], own.change[LAYER], equal_nan=True)
        assert {**part.gate}.keys() == {**own.gate}.keys()
        for layer, gate in own.gate.items():
            assert torch.equal(part.gate[layer], gate)
    size = total.norm(dim=-1) / before.norm(dim=-1)  # type: ignore[union-attr]
    torch.testing.assert_close(trace.change[LAYER][batch.mask], size[batch.mask], atol=1e-4, rtol=1e-3)
    with links[0].on(model, attention_mask=batch.mask), links[1].on(model, attention_mask=batch.mask):
        nested = residual(model, batch, NAME)
    with chain(*links[:2]).on(model, attention_mask=batch.mask):
        chained = residual(model, batch, NAME)
    assert not torch.allclose(nested, chained, atol=1e-3), "nested hooks read each other, links do not"


def test_links_at_several_layers_and_sites(model: SteerableModel) -> None:
    batch = pad(model, ROWS, "left")
    early = made_up.steering(2, 0, scope="all")
    late = replace(made_up.steering(4, 1, scope="all"), site="hook_resid_pre")
    probe = SubspaceProbe(made_up.subspace(3), layer=4)
    with chain(late, probe, early).on(model, attention_mask=batch.mask) as trace:
        found = logits_of(model, batch)
    assert trace.layers == (2, 4) and [part.layers for part in trace.parts] == [(4,), (4,), (2,)]
    with (
        early.on(model, attention_mask=batch.mask),
        late.on(model, attention_mask=batch.mask) as second,
        probe.on(model, attention_mask=batch.mask) as third,
    ):
        assert torch.equal(logits_of(model, batch), found), "at different points a chain is the same as nesting"
    assert torch.equal(trace.parts[0].gate[4], second.gate[4])
    assert torch.equal(trace.parts[1].ser[4], third.ser[4])


def test_two_sites_of_one_layer_do_not_mix_their_traces(model: SteerableModel) -> None:
    before = replace(made_up.steering(3, 0, scope="all"), site="hook_resid_pre")
    after = made_up.steering(3, 1, scope="all")
    both = chain(after, before)
    assert [point.site for point in both.points] == ["hook_resid_pre", "hook_resid_post"], "as a forward reaches them"
    watched = chain(before, SubspaceProbe(made_up.subspace(0), layer=3))
    trace = generate(model, ROWS[0], watched, max_new_tokens=4, progress=False)[0].trace
    assert torch.equal(trace.change[3], trace.parts[0].change[3]), "a point that is only read does not count"
    made = generate(model, ROWS[0], both, max_new_tokens=4, progress=False)[0]
    for part in made.trace.parts:
        assert part.change[3].shape == (1, len(ROWS[0]) + 3) and (part.change[3] > 0).all()
    assert made.trace.change == {}, "one number for two places would be none"


def test_a_forward_that_broke_off_between_layers_is_not_gone_on_with(model: SteerableModel) -> None:
    """Uncached decoding stops between two steered layers: the lower one has seen a step that the upper one has not."""
    rows = [[1, 50, 60], [1, 50, 60, 70]]
    idle_below = two_layers().with_gate({1: made_up.shut(), 4: made_up.steering(seed=4).gate})  # type: ignore[dict-item]
    handle = idle_below.attach(model)
    try:
        logits_of(model, pad(model, rows[:1], "left"))
        model(torch.tensor(rows[1:]), stop_at_layer=3)
        with pytest.raises(HookError, match="reset"):
            logits_of(model, pad(model, rows[1:], "left"))
        handle.reset()
        logits_of(model, pad(model, rows[1:], "left"))
        found = handle.trace.ser[4].clone()
    finally:
        handle.detach()
    with idle_below.on(model) as alone:
        logits_of(model, pad(model, rows[1:], "left"))
    assert torch.equal(alone.ser[4], found)


def test_a_chain_runs_like_any_hook_object(model: SteerableModel) -> None:
    batch = pad(model, ROWS, "left")
    both = chain(made_up.steering(2, 0), chain(made_up.steering(4, 1), ExpertProbe(made_up.experts(2), layer=4)))
    assert len(both.links) == 3, "a chain in a chain counts as its links"
    (by_on, _), (by_attach, _), (by_list, _) = three_ways(model, both, batch)
    assert torch.equal(by_on, by_attach) and torch.equal(by_on, by_list)

    made = generate(model, ROWS, both, max_new_tokens=4, compare=True, progress=False)
    for row, one in zip(ROWS, made, strict=True):
        seen = len(row) + 4 - 1
        assert one.trace.change[2].shape == (1, seen) and len(one.trace.parts) == 3
        assert one.trace.parts[2].weights[4].shape == (1, seen, 4), "a probe reads every token, without the pads"
        assert one.trace.steps is not None and one.trace.steps.kl is not None
        record = one.trace.to_records()[0]
        assert [sorted(part["layers"]) for part in record["parts"]] == [[2], [4], [4]]
        assert len(record["steps"]) == 4 and record["parts"][0]["layers"][2]["gate"] == pytest.approx(
            float(one.trace.parts[0].gate[2])
        )
    frame = made.trace.to_frame()
    assert [name for name in frame.columns if name.startswith("expert_")] == [f"expert_{i}" for i in range(4)]
    assert len(frame) == 3 * len(ROWS) and list(frame["part"][:3]) == [0, 1, 2]
    records = [record for _, record in stream(model, ROWS[0], both, max_new_tokens=4)]
    assert [record.token for record in records] == list(made[0].tokens)
    gate, change = records[0].parts[0]
    assert gate[2] == pytest.approx(float(made[0].trace.parts[0].gate[2]))
    assert change[2] == pytest.approx(records[0].change[2]), "only one link acts at layer 2"


def test_bad_chains_raise(tutor_model: SteerableModel) -> None:
    one = made_up.steering(2)
    with pytest.raises(InputError, match="at least two"):
        chain(one)
    narrow = FineSteer(made_up.experts(0, 64), layer=2)
    with pytest.raises(ShapeError, match=r"64, 128"):
        chain(one, narrow)


def test_gate_algebra_lets_near_misses_go(tutor_model: SteerableModel) -> None:
    """harm & ~near_miss: a coarse gate opens for near misses, a second one takes them out again."""
    told = tutor.data("safe")

    def queries(prompts: list) -> Tensor:  # type: ignore[type-arg]
        return collect_queries(tutor_model, prompts, layer=4, batch_size=64, progress=False).queries

    trained = queries(told.train.prompts[::3])
    near_misses = queries([task.prompt for task in told.general_train if task.kind == "near_miss"])
    others = queries([task.prompt for task in told.general_train if task.kind != "near_miss"][::3])
    harm = fit_gate(trained, rank=24, kind="energy")
    near = fit_gate(near_misses, rank=4, kind="logistic", general=torch.cat([trained, others]))
    careful = harm & ~near
    harmful = queries(told.valid.prompts[::4])
    missed = queries([task.prompt for task in told.near_miss_valid])
    assert torch.equal(careful.gate(missed), torch.minimum(harm.gate(missed), 1 - near.gate(missed)))

    def opened(gate: object, h: Tensor) -> float:
        return float((gate.gate(h) >= 0.5).float().mean())  # type: ignore[attr-defined]

    assert opened(harm, missed) > 0.6 and opened(careful, missed) < 0.2
    assert opened(harm, harmful) > 0.95 and opened(careful, harmful) > 0.75
    assert opened(fit_gate(near_misses, rank=4, epsilon=0.05), harmful) > 0.5, "a one-class gate knows no better"
    batch = batch_of(tutor_model, [task.prompt for task in told.near_miss_valid[:12]])
    steering = FineSteer(made_up.experts(0), careful, layer=4)
    with steering.on(tutor_model, attention_mask=batch.mask) as trace:
        logits_of(tutor_model, batch)
    torch.testing.assert_close(trace.gate[4], careful.gate(residual(tutor_model, batch)[:, -1]))


def two_layers(**options: object) -> FineSteer:
    parts = {layer: made_up.steering(seed=layer) for layer in (1, 4)}
    experts, gates = ({layer: getattr(one, name) for layer, one in parts.items()} for name in ("experts", "gate"))
    return FineSteer(experts, gates, scope="all", strength=2.0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("cache", [True, False])
def test_clean_reads_one_unsteered_pass_and_live_the_running_stream(model: SteerableModel, cache: bool) -> None:
    both = two_layers()
    batch = pad(model, ROWS, "left")
    clean = residual(model, batch, "blocks.4.hook_resid_post")[:, -1]
    below = FineSteer(both.experts_at(1), both.gate_at(1), layer=1, scope="all", strength=2.0)
    with below.on(model, attention_mask=batch.mask):
        live = residual(model, batch, "blocks.4.hook_resid_post")[:, -1]
    runs = {
        read: generate(model, ROWS, both, max_new_tokens=4, read=read, use_past_kv_cache=cache, progress=False)
        for read in ("clean", "live", None)
    }
    gate = both.gate_at(4)
    assert gate is not None
    for read, h in (("clean", clean), ("live", live), (None, clean)):
        found = torch.cat([one.trace.ser[4] for one in runs[read]])  # type: ignore[index]
        torch.testing.assert_close(found, gate.subspace.energy_ratios(h), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(clean, live, atol=1e-2)
    with both.on(model, attention_mask=batch.mask) as trace:
        logits_of(model, batch)
    torch.testing.assert_close(trace.ser[4], gate.subspace.energy_ratios(live), atol=1e-4, rtol=1e-4)


def test_clean_holds_for_chains_across_layers(model: SteerableModel) -> None:
    early, late = made_up.steering(1, 0, scope="all"), made_up.steering(4, 1)
    made = generate(model, ROWS, chain(early, late), max_new_tokens=2, progress=False)
    h = residual(model, pad(model, ROWS, "left"), "blocks.4.hook_resid_post")[:, -1]
    found = torch.cat([one.trace.parts[1].gate[4] for one in made])
    torch.testing.assert_close(found, late.gate.gate(h), atol=1e-4, rtol=1e-4)  # type: ignore[union-attr]


def test_bad_reads_raise(tutor_model: SteerableModel) -> None:
    stepwise = two_layers(refresh="step")
    with pytest.raises(InputError, match="live"):
        generate(tutor_model, ROWS, stepwise, read="clean", progress=False)
    assert generate(tutor_model, ROWS, stepwise, max_new_tokens=1, progress=False)[0].trace.gate.keys() == {1, 4}


class Watching(Link):
    """A hook object of a stranger's: sees two layers, edits none, and decides at every step if told to."""

    hooked_layers, edited_layers, d_model = (1, 4), (), made_up.D_MODEL

    def __init__(self, stepwise: bool) -> None:
        self.told, self.queries = stepwise, []

    @property
    def stepwise(self) -> bool:
        return self.told

    def edit(self, state: State, layer: int, activation: Tensor, view: View) -> None:
        self.queries.append(state.queries)


def test_any_link_may_decide_at_every_step(tutor_model: SteerableModel) -> None:
    assert two_layers(refresh="step").stepwise and not two_layers().stepwise
    once, stepwise = Watching(False), Watching(True)
    for link in (once, stepwise):
        generate(tutor_model, ROWS, link, max_new_tokens=2, progress=False)
    assert len(once.queries) == 4 and all(queries["last"].keys() == {1, 4} for queries in once.queries)
    assert stepwise.queries == [None] * 4, "no pass over the prompt can answer what is asked at every step"
    with pytest.raises(InputError, match=r"Watching.*decides at every step.*live"):
        generate(tutor_model, ROWS, chain(once, stepwise), read="clean", progress=False)

"""Effects against slow plain computations: one row at a time, hooks of TransformerLens alone, loops."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fsteer_lens import (
    ContrastSet,
    FineSteer,
    SubspaceAblation,
    SubspaceProbe,
    Window,
    chain,
    collect,
    collect_queries,
    effects,
    generate,
    models,
    tutor,
)
from fsteer_lens.effects import sweeps as sweeps_module
from fsteer_lens.errors import InputError, ShapeError
from fsteer_lens.ground.estimates import bootstrap
from fsteer_lens.method.subspace_gates import EnergyGate, LogisticGate
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import answer_ids, prompt_ids
from fsteer_lens.steering import MeanShift, fit_mean_shift
from tests import made_up
from tests.families import FAMILIES, random_model
from tests.running import LAYER, SITE, n_hooks

N = 5


@pytest.fixture(scope="module")
def contrasts() -> ContrastSet:
    return tutor.data("safe").test[:: len(tutor.data("safe").test) // N][:N]


@pytest.fixture(scope="module")
def general() -> list[tutor.Task]:
    return tutor.data("safe").general_test[::60][:4]


def plain_edit(model: Any, steering: FineSteer | MeanShift, prompt: list[int]) -> Tensor:
    """λ · g(ĥ) · v(ĥ) of one prompt, [d]."""
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        model.run_with_hooks(
            torch.tensor([prompt]), fwd_hooks=[(SITE, lambda x, hook: seen.update(h=x[0, -1].clone()) or None)]
        )
    gate = steering.gate_at(LAYER)
    g = 1.0 if gate is None else float(gate.gate(seen["h"]))
    return steering.strength * g * steering.vectors(LAYER, seen["h"]).vector


def plain_logprobs(model: Any, steering: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Log-probabilities of all tokens where each token of the answer is predicted, [answer vocab]."""
    hooks = []
    if steering is not None:
        edit, scope = plain_edit(model, steering, prompt), steering.scope

        def add(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[:, : len(prompt) if scope == "prompt" else None] += edit
            return x

        hooks = [(SITE, add)]
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([prompt + answer]), fwd_hooks=hooks)[0]
    return logits[len(prompt) - 1 : len(prompt) + len(answer) - 1].float().log_softmax(dim=-1)


def plain_margin(model: Any, steering: Any, contrast: Any) -> float:
    sides = []
    for text in (contrast.preferred, contrast.undesired):
        prompt, answer = prompt_ids(model, contrast.prompt), answer_ids(model, text)
        logprobs = plain_logprobs(model, steering, prompt, answer)
        sides.append(sum(float(logprobs[place, token]) for place, token in enumerate(answer)) / len(answer))
    return sides[0] - sides[1]


def plain_kl(model: Any, steering: Any, prompt: str, answer: str) -> float:
    ids, tokens = prompt_ids(model, prompt), answer_ids(model, answer)
    p, q = (plain_logprobs(model, one, ids, tokens) for one in (steering, None))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


# ------------------------------------------------------------------------------------------- given answers, and sweeps


@pytest.mark.parametrize("scope", ["prompt", "all"])
def test_margin_and_divergence_are_the_plain_ones(
    model: SteerableModel, steering: FineSteer, contrasts: ContrastSet, general: list[tutor.Task], scope: Any
) -> None:
    ungated = steering.with_gate(None).with_scope(scope)
    for one in (None, ungated):
        found = effects.answer_margin(model, one, contrasts, batch_size=3)
        assert found.tolist() == pytest.approx([plain_margin(model, one, c) for c in contrasts], abs=1e-4)
    prompts, answers = [task.prompt for task in general], [task.answer for task in general]
    found = effects.general_divergence(model, ungated, prompts, answers, batch_size=3)
    wanted = [plain_kl(model, ungated, p, a) for p, a in zip(prompts, answers, strict=True)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-4)
    assert max(wanted) > 1e-3
    first = effects.general_divergence(model, ungated, prompts)
    alone = [
        float((p.exp() * (p - q)).sum())
        for p, q in (
            tuple(plain_logprobs(model, one, prompt_ids(model, prompt), [0])[0] for one in (ungated, None))
            for prompt in prompts
        )
    ]
    assert first.tolist() == pytest.approx(alone, abs=1e-4)


def test_strength_sweep_measures_every_method_at_every_strength(
    tutor_model: SteerableModel, steering: FineSteer, trained: Any, contrasts: ContrastSet, general: list[tutor.Task]
) -> None:
    prompts, answers = [task.prompt for task in general], [task.answer for task in general]
    methods = {"ungated": steering.with_gate(None), "mean": fit_mean_shift(trained[LAYER])}
    found = effects.strength_sweep(
        tutor_model, methods, contrasts, prompts, strengths=[0, 1.5], answers=answers, batch_size=4, progress=False
    )
    assert list(found) == ["ungated", "mean"]
    for name, sweep in found.items():
        assert sweep.settings == (0.0, 1.5) and sweep.parameter == "strength"
        for index, strength in enumerate(sweep.settings):
            one = methods[name].with_strength(strength)
            assert sweep.effect[index].value == pytest.approx(
                sum(plain_margin(tutor_model, one, c) for c in contrasts) / N, abs=1e-4
            )
            margins = effects.answer_margin(tutor_model, one, contrasts)
            assert sweep.effect[index].interval == pytest.approx(bootstrap(margins).interval, abs=1e-5)
            kl = sum(plain_kl(tutor_model, one, p, a) for p, a in zip(prompts, answers, strict=True)) / len(prompts)
            assert sweep.kl[index].value == pytest.approx(kl, abs=1e-4)
            assert sweep.utility[index].value == -sweep.kl[index].value
        assert sweep.kl[0].value == 0.0  # control: strength 0 changes nothing
    assert found["ungated"].effect[1].value > found["ungated"].effect[0].value + 0.5


def test_sweeps_take_effects_and_utilities_of_the_callers(
    tutor_model: SteerableModel, steering: FineSteer, contrasts: ContrastSet, general: list[tutor.Task]
) -> None:
    def strength_itself(model: Any, one: Any, items: Any) -> Tensor:
        return torch.full((len(items),), one.strength)

    prompts = [task.prompt for task in general]
    found = effects.strength_sweep(
        tutor_model, steering, contrasts, prompts, strengths=[0.5, 2], effect=strength_itself,
        utility=lambda model, one, items: torch.arange(float(len(items))), progress=False,
    )["FineSteer"]  # fmt: skip
    assert [one.value for one in found.effect] == [0.5, 2.0]
    assert found.utility[0].value == 1.5
    assert found.effect_name == "strength itself"
    with pytest.raises(InputError, match="5 numbers"):
        effects.strength_sweep(
            tutor_model, steering, contrasts, prompts, effect=lambda *_: torch.ones(2), progress=False
        )
    with pytest.raises(InputError, match="at least one steering"):
        effects.strength_sweep(tutor_model, {}, contrasts, prompts, progress=False)
    with pytest.raises(InputError, match="general prompts: expected at least one, got none"):
        effects.strength_sweep(tutor_model, steering, contrasts, [], progress=False)


def test_layer_sweep_fits_at_every_layer_from_one_collection(
    tutor_model: SteerableModel, contrasts: ContrastSet, general: list[tutor.Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, prompts = tutor.data("safe").train[::20], [task.prompt for task in general]
    collections = []

    def counted(*args: Any, **options: Any) -> Any:
        collections.append(options["layer"])
        return collect(*args, **options)

    monkeypatch.setattr(sweeps_module, "collect", counted)
    makers = {"mean": fit_mean_shift, "weak": lambda one: fit_mean_shift(one, strength=0.5)}
    options: Any = {"methods": makers, "batch_size": 8, "progress": False}
    found = effects.layer_sweep(tutor_model, train, contrasts, prompts, shift="last_prompt", **options)
    assert collections == [list(range(6))]
    assert [sweep.settings for sweep in found.values()] == [tuple(range(6))] * 2
    for layer in (0, 3):
        here = collect(tutor_model, train, layer=layer, shift="last_prompt", progress=False)
        for name, make in makers.items():
            margins = effects.answer_margin(tutor_model, make(here), contrasts)
            assert found[name].effect[layer].value == pytest.approx(float(margins.mean()), abs=1e-4)
            kl = effects.general_divergence(tutor_model, make(here), prompts)
            assert found[name].kl[layer].value == pytest.approx(float(kl.mean()), abs=1e-5)
    ready = collect(tutor_model, train, layer=[1, 3], shift="last_prompt", progress=False)
    again = effects.layer_sweep(tutor_model, ready, contrasts, prompts, **options)
    assert again["mean"].settings == (1, 3)
    assert again["mean"].effect[1].value == pytest.approx(found["mean"].effect[3].value, abs=1e-5)
    with pytest.raises(InputError, match=r"layers among \[1, 3\]"):
        effects.layer_sweep(tutor_model, ready, contrasts, prompts, layers=[2], progress=False)


# --------------------------------------------------------------------------------------------------- counterfactual


def test_counterfactual_of_generated_text_is_what_compare_recorded(
    model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    made = generate(model, prompts, steering, max_new_tokens=12, compare=True, progress=False)
    found = effects.counterfactual(model, steering, prompts, [one.tokens for one in made], batch_size=3)
    assert found.steps is not None and made.trace.steps is not None
    for name in ("kl", "logprobs", "baseline_logprobs", "top_logprobs", "baseline_top_logprobs"):
        torch.testing.assert_close(
            getattr(found.steps, name), getattr(made.trace.steps, name), atol=1e-4, rtol=1e-3, equal_nan=True
        )
    for name in ("texts", "top_texts", "baseline_top_texts"):
        assert getattr(found.steps, name) == getattr(made.trace.steps, name)
    assert torch.equal(found.steps.tokens, made.trace.steps.tokens)
    assert found.prompts == made.trace.prompts
    torch.testing.assert_close(found.change[LAYER], made.trace.change[LAYER], equal_nan=True, atol=1e-4, rtol=1e-3)
    assert float(found.steps.kl.nan_to_num().max()) > 0.5  # type: ignore[union-attr]
    assert n_hooks(model) == 0


def test_counterfactual_takes_any_answer_and_refuses_none(
    tutor_model: SteerableModel, steering: FineSteer, contrasts: ContrastSet
) -> None:
    contrast = contrasts[0]
    found = effects.counterfactual(tutor_model, steering, [contrast.prompt], [contrast.preferred])
    ids, answer = prompt_ids(tutor_model, contrast.prompt), answer_ids(tutor_model, contrast.preferred)
    p, q = (plain_logprobs(tutor_model, one, ids, answer) for one in (steering, None))
    assert found.steps is not None and found.steps.kl is not None
    assert found.steps.kl[0].tolist() == pytest.approx((p.exp() * (p - q)).sum(dim=-1).tolist(), abs=1e-4)
    change = torch.tensor([float(p[i, token] - q[i, token]) for i, token in enumerate(answer)])
    torch.testing.assert_close(found.steps.logprob_change[0], change, atol=1e-4, rtol=1e-4)  # type: ignore[index]
    with pytest.raises(InputError, match="answer 0"):
        effects.counterfactual(tutor_model, steering, [contrast.prompt], [""])
    with pytest.raises(InputError, match="one for each of 1 prompts"):
        effects.counterfactual(tutor_model, steering, [contrast.prompt], "abc")


# ------------------------------------------------------------------------------------------------------- propagation


def streams(model: Any, ids: list[int], edit: Any) -> Tensor:
    """hook_resid_post of every layer under a plain edit at LAYER, [layers s d]."""
    seen: dict[int, Tensor] = {}
    hooks: list[Any] = [(SITE, edit)] if edit else []
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.hook_resid_post"
        hooks.append((name, lambda x, hook, layer=layer: seen.update({layer: x[0].clone()}) or None))
    with torch.no_grad():
        model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)
    return torch.stack([seen[layer] for layer in range(model.cfg.n_layers)])


@pytest.mark.parametrize("scope", ["prompt", "generated"])
def test_propagation_is_the_difference_of_two_streams(
    model: SteerableModel, steering: FineSteer, contrasts: ContrastSet, scope: Any
) -> None:
    one, contrast = steering.with_scope(scope), contrasts[0]
    prompt, answer = prompt_ids(model, contrast.prompt), answer_ids(model, contrast.preferred)
    found = effects.propagation(model, one, contrast.prompt, contrast.preferred)
    ids = prompt + answer[:-1]
    vector = plain_edit(model, one, prompt)
    steered = slice(0, len(prompt)) if scope == "prompt" else slice(len(prompt) - 1, None)

    def add(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, steered] += vector
        return x

    base = streams(model, ids, None)
    change = streams(model, ids, add) - base
    torch.testing.assert_close(found.norm, change.norm(dim=-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.size, change.norm(dim=-1) / base.norm(dim=-1), atol=1e-4, rtol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(change, vector.expand_as(change), dim=-1)
    torch.testing.assert_close(found.cosine, cosine, atol=1e-4, rtol=1e-4)
    total = found.carried + found.edit + found.attention + found.mlp
    torch.testing.assert_close(total, found.norm, atol=1e-4, rtol=1e-4)
    assert (found.norm[:LAYER] == 0).all()  # control: nothing before the steered layer
    assert (found.edit.abs().sum(dim=1) > 1e-6).tolist() == [layer == LAYER for layer in range(6)]
    assert (found.edit[LAYER] != 0).tolist() == [
        place in range(*steered.indices(len(ids))) for place in range(len(ids))
    ]
    assert found.prompt_length == len(prompt) and len(found.tokens) == len(ids) and found.edited_layers == (LAYER,)
    assert n_hooks(model) == 0


@pytest.mark.model
@pytest.mark.parametrize("architecture", FAMILIES)
def test_attention_and_mlp_parts_agree_between_the_classes(architecture: str) -> None:
    steering = MeanShift(torch.linspace(-1, 1, 32), layer=0, scope="prompt")
    found = []
    for kind in models.available_kinds():
        model = random_model(architecture, kind)
        found.append(effects.propagation(model, steering, "<user>how do i bake bread?<tutor>", "well now"))
        attention = attention_adds(model, steering)
        delta = found[-1]
        torch.testing.assert_close(delta.attention[1], attention, atol=1e-3, rtol=1e-3)
    for name in ("norm", "carried", "edit", "attention", "mlp"):
        for other in found[1:]:
            torch.testing.assert_close(getattr(other, name), getattr(found[0], name), atol=1e-3, rtol=1e-3)


def attention_adds(model: Any, steering: MeanShift) -> Tensor:
    """What layer 1's attention adds along the change, from the stream without this layer's MLP: [s]."""
    ids = prompt_ids(model, "<user>how do i bake bread?<tutor>")
    tokens = torch.tensor([ids + answer_ids(model, "well now")[:-1]])
    post = {}

    def run(steered: bool, without_mlp: bool) -> Tensor:
        def add(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[:, : len(ids)] += steering.vector
            return x

        hooks: list[Any] = [("blocks.0.hook_resid_post", add)] if steered else []
        if without_mlp:
            hooks.append(("blocks.1.hook_mlp_out", lambda x, hook: torch.zeros_like(x)))
        hooks.append(("blocks.1.hook_resid_pre", lambda x, hook: post.update(pre=x[0].clone()) or None))
        hooks.append(("blocks.1.hook_resid_post", lambda x, hook: post.update(x=x[0].clone()) or None))
        with torch.no_grad():
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        return post["x"] - (post["pre"] if without_mlp else 0)

    change = run(True, False) - run(False, False)
    return ((run(True, True) - run(False, True)) * torch.nn.functional.normalize(change, dim=-1)).sum(dim=-1)


def test_propagation_of_an_ablation_a_window_and_a_shut_gate(
    tutor_model: SteerableModel, steering: FineSteer, contrasts: ContrastSet
) -> None:
    prompt = contrasts[0].prompt
    gate = steering.gate_at(LAYER)
    assert gate is not None
    ablation = SubspaceAblation(gate.subspace, layer=2, rank=3)
    found = effects.propagation(tutor_model, ablation, prompt)
    assert (found.edit[2] > 0).all() and (found.norm[:2] == 0).all()
    both = effects.propagation(tutor_model, chain(ablation, steering.with_gate(None)), prompt)
    assert both.edited_layers == (2, LAYER)
    torch.testing.assert_close(both.carried + both.edit + both.attention + both.mlp, both.norm, atol=1e-4, rtol=1e-4)
    shut = effects.propagation(tutor_model, steering.with_gate(made_up.shut_at(gate.subspace)), prompt)
    assert (shut.norm == 0).all() and (shut.cosine == 0).all()  # control: nothing is added, nothing changes
    late = effects.propagation(tutor_model, steering.with_scope(Window(2, 3)), prompt, contrasts[0].preferred)
    place = late.prompt_length + 1
    assert (late.norm[LAYER] > 0).tolist() == [at == place for at in range(len(late.tokens))]
    probed = effects.propagation(tutor_model, SubspaceProbe(gate.subspace, layer=2), prompt)
    assert (probed.norm == 0).all() and probed.edited_layers == ()


# ---------------------------------------------------------------------------------------------------- gate decisions


def test_rank_sweep_is_every_rank_by_itself(tutor_model: SteerableModel, steering: FineSteer, trained: Any) -> None:
    from sklearn.metrics import roc_auc_score

    contrasts = tutor.data("safe").test[::60]
    queries = trained[LAYER].queries[:40]
    prompts = [task.prompt for task in tutor.data("safe").general_test[::20]]
    general = collect_queries(tutor_model, prompts, layer=LAYER, progress=False).queries
    found = effects.rank_sweep(steering, queries, general, ranks=[2, 9], model=tutor_model, contrasts=contrasts)
    gate = steering.gate_at(LAYER)
    assert gate is not None and found.ranks == tuple(range(1, gate.subspace.rank + 1))
    labels = [1] * len(queries) + [0] * len(general)
    for rank in found.ranks:
        here = gate.at_rank(rank)
        ratios = [gate.subspace.energy_ratio(rows, rank) for rows in (queries, general)]
        torch.testing.assert_close(found.ser[:, rank - 1], ratios[0])
        torch.testing.assert_close(found.general_ser[:, rank - 1], ratios[1])
        rates = [float((here.gate(rows) >= 0.5).float().mean()) for rows in (queries, general)]
        assert float(found.gate_rate[rank - 1]) == pytest.approx(rates[0])
        assert float(found.general_gate_rate[rank - 1]) == pytest.approx(rates[1])
        assert float(found.auroc[rank - 1]) == pytest.approx(roc_auc_score(labels, torch.cat(ratios)), abs=1e-9)
    for rank, estimate in found.effect.items():
        margin = effects.answer_margin(tutor_model, steering.at_rank(rank), contrasts)
        assert estimate.value == pytest.approx(float(margin.mean()), abs=1e-5)
    composed = effects.rank_sweep(~gate & EnergyGate(gate.subspace.at_rank(7), 3), queries, general)
    both = (~gate).at_rank(5) & EnergyGate(gate.subspace, 5)
    assert float(composed.gate_rate[4]) == pytest.approx(float((both.gate(queries) >= 0.5).float().mean()))
    assert len(composed.ranks) == 7
    broken = torch.cat([queries, torch.full_like(queries[:3], torch.nan)])
    torch.testing.assert_close(effects.rank_sweep(gate, broken, general).auroc, found.auroc)
    with pytest.raises(InputError, match="5 numbers"):
        effects.rank_sweep(
            steering, queries, general, ranks=[2], model=tutor_model, contrasts=contrasts[:5],
            effect=lambda *_: torch.ones(1),
        )  # fmt: skip
    with pytest.raises(InputError, match="FineSteer, model="):
        effects.rank_sweep(gate, queries, general, ranks=[2])
    with pytest.raises(InputError, match="layers with a gate"):
        effects.rank_sweep(steering.with_gate(None), queries, general)


def test_explanation_of_a_gate_is_the_plain_one(
    model: SteerableModel, steering: FineSteer, contrasts: ContrastSet, general: list[tutor.Task]
) -> None:
    gate = steering.gate_at(LAYER)
    assert gate is not None
    leaf = gate.leaves[0]

    def ratio_of(ids: list[int]) -> float:
        seen: dict[str, Tensor] = {}
        with torch.no_grad():
            model.run_with_hooks(  # type: ignore[attr-defined]
                torch.tensor([ids]), fwd_hooks=[(SITE, lambda x, hook: seen.update(h=x[0, -1]) or None)]
            )
        centred = (seen["h"] - leaf.subspace.mean).double()
        kept = leaf.subspace.basis[:, : leaf.rank].double().T @ centred
        return float(kept.square().sum() / centred.square().sum())

    for prompt, wanted in ((str(contrasts[0].prompt), True), (general[0].prompt, False)):
        found = effects.explain_gate(model, steering, prompt, batch_size=5)
        ids = prompt_ids(model, prompt)
        assert found.ratio == pytest.approx(ratio_of(ids), abs=1e-4)
        assert "".join(found.tokens).endswith(prompt) and len(found.tokens) == len(ids)
        without = [ratio_of(ids[:place] + ids[place + 1 :]) for place in range(len(ids))]
        assert found.without.tolist() == pytest.approx(without, abs=1e-4)
        assert found.carried.tolist() == pytest.approx([found.ratio - one for one in without], abs=1e-4)
        assert float(found.directions[: leaf.rank].sum()) == pytest.approx(found.ratio, abs=1e-4)
        assert found.is_open == wanted == (found.gate >= 0.5)
        assert found.margin == pytest.approx(found.ratio - leaf.threshold)
        assert (found.margin >= 0) == wanted
        h = collect_queries(model, [prompt], layer=LAYER, progress=False).queries[0]
        opened = [bool(gate.at_rank(rank).gate(h) >= 0.5) for rank in range(1, gate.subspace.rank + 1)]
        flips = [rank for rank, one in enumerate(opened, 1) if one != wanted]
        assert found.flip_rank == (flips[0] if flips else None)
        for step in (1e-4, -1e-4):
            moved = leaf.at_threshold(found.flip_threshold + step)
            assert (float(moved.gate(h)) >= 0.5) == (step < 0)


def test_explanation_refuses_what_it_cannot_explain(tutor_model: SteerableModel, steering: FineSteer) -> None:
    gate = steering.gate_at(LAYER)
    assert gate is not None
    with pytest.raises(InputError, match="leaves"):
        effects.explain_gate(tutor_model, steering.with_gate(~gate), "<user>hi<tutor>")
    with pytest.raises(InputError, match="layers with a gate"):
        effects.explain_gate(tutor_model, steering.with_gate(None), "<user>hi<tutor>")
    few = effects.explain_gate(tutor_model, steering, "<user>how do i bake bread?<tutor>", limit=2)
    every = effects.explain_gate(tutor_model, steering, "<user>how do i bake bread?<tutor>")
    assert few.without[:-2].isnan().all()
    # Batches of other sizes round otherwise.
    assert few.without[-2:].tolist() == pytest.approx(every.without[-2:].tolist(), abs=1e-5)
    falling = LogisticGate(
        gate.subspace, 8, torch.full((gate.subspace.rank,), -20.0), torch.full((gate.subspace.rank,), 9.0)
    )
    below = effects.explain_gate(tutor_model, steering.with_gate(falling), "<user>hi<tutor>")
    assert not falling.opens_above and below.is_open == (below.margin > 0) == (below.ratio < falling.threshold)
    alone = effects.explain_gate(tutor_model, steering, [5])
    assert alone.without.isnan().all() and len(alone.tokens) == 1


# ------------------------------------------------------------------------------------------------------------ experts


def test_knockout_is_the_margin_lost_without_each_expert(
    tutor_model: SteerableModel, steering: FineSteer, contrasts: ContrastSet
) -> None:
    found = effects.expert_knockout(tutor_model, steering, contrasts, progress=False)
    labels = sorted({str(contrast.label) for contrast in contrasts})
    assert found.groups == tuple(labels) and found.experts == tuple(range(steering.n_experts))
    margins = [plain_margin(tutor_model, steering, c) for c in contrasts]
    expert = int(found.loss.max(dim=1).values.argmax())
    less = [plain_margin(tutor_model, steering.without_expert(expert), c) for c in contrasts]
    for column, label in enumerate(labels):
        own = [i for i, contrast in enumerate(contrasts) if contrast.label == label]
        lost = sum(margins[i] - less[i] for i in own) / len(own)
        assert float(found.loss[expert, column]) == pytest.approx(lost, abs=1e-4)
        assert found.estimate(expert, label).value == pytest.approx(lost, abs=1e-4)
    assert float(found.loss.max()) > 0.1
    queries = collect_queries(tutor_model, contrasts.prompts, layer=LAYER, progress=False).queries
    torch.testing.assert_close(found.weights, steering.experts_at(LAYER).route(queries).T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.mean_weights.sum(dim=0), torch.ones(len(labels)), atol=1e-4, rtol=0)
    fewer = effects.expert_knockout(
        tutor_model, steering.without_expert(1), contrasts, progress=False,
        effect=lambda model, one, items: torch.tensor([float(one.experts.enabled[2])] * len(items)),
    )  # fmt: skip
    assert 1 not in fewer.experts
    assert fewer.loss[2].tolist() == [1.0] * len(labels)
    assert float(fewer.loss.nan_to_num(0).sum()) == len(labels)
    assert fewer.loss[1].isnan().all()  # expert 1 was off already
    with pytest.raises(InputError, match="two experts"):
        effects.expert_knockout(tutor_model, steering.only_expert(0), contrasts)
    with pytest.raises(InputError, match="steered layers"):
        effects.expert_knockout(tutor_model, steering, contrasts, layer=1)


def test_knockout_of_one_layer_leaves_the_others_alone(tutor_model: SteerableModel, contrasts: ContrastSet) -> None:
    fewer = replace(made_up.experts(1), prototypes=made_up.experts(1).prototypes[:3], enabled=(True,) * 3)
    both = FineSteer({2: fewer, 3: made_up.experts(2)})
    found = {layer: effects.expert_knockout(tutor_model, both, contrasts, layer=layer) for layer in (2, 3)}
    assert [len(one.loss) for one in found.values()] == [3, 4]
    less = both.with_experts(both.experts_at(3).without_expert(3), 3)
    assert less.experts_at(2) is fewer
    lost = effects.answer_margin(tutor_model, both, contrasts) - effects.answer_margin(tutor_model, less, contrasts)
    torch.testing.assert_close(found[3].full - found[3].removed[3], lost)
    with pytest.raises(InputError, match="steered layers"):
        both.with_experts(fewer)
    with pytest.raises(InputError, match="5 numbers"):
        effects.expert_knockout(tutor_model, both, contrasts, layer=2, effect=lambda *_: torch.ones(1))


def test_expert_tokens_are_those_of_the_unembedding(model: Any, steering: FineSteer) -> None:
    experts = steering.experts_at(LAYER)
    found = effects.expert_tokens(model, experts, top=4)
    hf = tutor_norm(model)
    for prototype, promoted in zip(experts.prototypes, found, strict=True):
        centred = prototype - prototype.mean()
        scaled = hf * centred / (centred.square().mean() + model.cfg.eps).sqrt()
        logits = scaled @ model.W_U
        best = (logits - logits.mean()).topk(4)
        assert [token for token, _ in promoted] == [model.tokenizer.decode([i]) for i in best.indices]
        assert [value for _, value in promoted] == pytest.approx(best.values.tolist(), abs=1e-3)
    with pytest.raises(InputError, match="top"):
        effects.expert_tokens(model, experts, top=0)
    with pytest.raises(ShapeError):
        effects.expert_tokens(model, made_up.experts(0, d_model=16))


def tutor_norm(model: Any) -> Tensor:
    """The scale of the tutor's last LayerNorm."""
    return dict(model.ln_final.named_parameters()).get("w", next(iter(model.ln_final.parameters())))


def test_a_planted_expert_promotes_its_token(tutor_model: Any) -> None:
    experts = made_up.experts(3)
    token = 77
    direction = tutor_model.W_U[:, token] - tutor_model.W_U.mean(dim=1)
    planted = torch.cat([direction.unsqueeze(0) / tutor_norm(tutor_model), experts.prototypes[1:]])
    found = effects.expert_tokens(tutor_model, replace(experts, prototypes=planted), top=3)
    assert found[0][0][0] == tutor_model.tokenizer.decode([token])
    assert found[1][0][0] != found[0][0][0]


def test_routing_report_by_hand() -> None:
    from sklearn.metrics import normalized_mutual_info_score

    experts = made_up.experts(1, d_model=16)
    queries, shifts = torch.randn(30, 16), torch.randn(30, 16)
    labels = [f"label {i % 3}" for i in range(30)]
    found = effects.routing_report(experts, queries, shifts=shifts, labels=labels)
    strongest, entropies, shares, residuals, agree = [], [], [], [], 0
    mean = torch.zeros(4)
    for query, shift in zip(queries, shifts, strict=True):
        parts = experts.parts(query)
        strongest.append(int(parts.weights.argmax()))
        entropies.append(-sum(w * math.log(w) for w in parts.weights.tolist()))
        shares.append(float(parts.prototype_part.norm() / parts.vector.norm()))
        residuals.append(float(parts.residual_part.norm() / (parts.residual_part.norm() + parts.prototype_part.norm())))
        cosines = [float(torch.cosine_similarity(shift, one, dim=0)) for one in experts.prototypes]
        agree += strongest[-1] == max(range(4), key=cosines.__getitem__)
        mean += parts.weights / 30
    assert found.agreement == pytest.approx(agree / 30)
    assert found.nmi == pytest.approx(normalized_mutual_info_score(labels, strongest))
    assert found.entropy == pytest.approx(sum(entropies) / 30, abs=1e-5)
    assert found.usage_entropy == pytest.approx(-sum(w * math.log(w) for w in mean.tolist()), abs=1e-5)
    assert found.dead == pytest.approx(1 - len(set(strongest)) / 4)
    assert found.prototype_share == pytest.approx(sum(shares) / 30, abs=1e-5)
    assert found.residual_share == pytest.approx(sum(residuals) / 30, abs=1e-5)
    one = effects.routing_report(experts.only_expert(2), queries)
    assert (one.agreement, one.nmi, one.entropy, one.dead) == (None, None, 0.0, 0.0)  # control: all prompts on one
    with pytest.raises(InputError, match="one for each of 30"):
        effects.routing_report(experts, queries, labels=["a"])
    half = [label if i % 2 else None for i, label in enumerate(labels)]
    wanted = normalized_mutual_info_score(labels[1::2], strongest[1::2])
    assert effects.routing_report(experts, queries, labels=half).nmi == pytest.approx(wanted)
    assert effects.routing_report(experts, queries, labels=[None] * 30).nmi is None
    off = experts.without_expert(0)
    agreed = effects.routing_report(off, queries, shifts=experts.prototypes[:1].expand(30, -1)).agreement
    cosines = [float(torch.cosine_similarity(experts.prototypes[0], one, dim=0)) for one in experts.prototypes[1:]]
    nearest = 1 + max(range(3), key=cosines.__getitem__)
    assert agreed == pytest.approx(float((off.route(queries).argmax(dim=1) == nearest).float().mean()))


def test_effects_leave_no_hook_behind_when_something_raises(
    tutor_model: SteerableModel, steering: FineSteer, contrasts: ContrastSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Tensor:
        raise ZeroDivisionError

    monkeypatch.setattr(FineSteer, "vectors", broken)
    for call in (
        lambda: effects.answer_margin(tutor_model, steering, contrasts),
        lambda: effects.propagation(tutor_model, steering, contrasts[0].prompt),
        lambda: effects.counterfactual(tutor_model, steering, [contrasts[0].prompt], ["no"]),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
        assert n_hooks(tutor_model) == 0


def test_effects_run_under_an_attached_steering_as_without_it(
    tutor_model: SteerableModel, steering: FineSteer, contrasts: ContrastSet
) -> None:
    alone = effects.answer_margin(tutor_model, None, contrasts)
    path = effects.propagation(tutor_model, steering, contrasts[0].prompt)
    told = effects.explain_gate(tutor_model, steering, contrasts[0].prompt)
    handle = steering.with_gate(None).attach(tutor_model)
    try:
        assert torch.equal(effects.answer_margin(tutor_model, None, contrasts), alone)
        assert torch.equal(effects.propagation(tutor_model, steering, contrasts[0].prompt).norm, path.norm)
        assert effects.explain_gate(tutor_model, steering, contrasts[0].prompt).ratio == told.ratio
    finally:
        handle.detach()

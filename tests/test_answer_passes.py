"""Passes that share what is the same give the numbers of plain ones, each answer run with its prompt and alone."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from fsteer_lens import (
    Activations,
    EnergyGate,
    FineSteer,
    Schedule,
    SubspaceAblation,
    SubspaceProbe,
    Window,
    chain,
    evaluate,
    search,
    tutor,
)
from fsteer_lens.effects import answer_margin, general_divergence
from fsteer_lens.errors import SiteError
from fsteer_lens.evaluation import Prompting, TruthfulQA
from fsteer_lens.evaluation.truthfulness import Choice
from fsteer_lens.hooks import HookObject, Link
from fsteer_lens.hooks.opening import open_session
from fsteer_lens.hooks.positions import View
from fsteer_lens.hooks.session import State
from fsteer_lens.models import SteerableModel, available_kinds, forward
from fsteer_lens.models.attaching import unsteered
from fsteer_lens.models.forward import Forward
from fsteer_lens.models.layers import begun_at, can_begin_above, outputs_kept
from fsteer_lens.prompts.passes import Passes
from fsteer_lens.prompts.tokens import pad
from fsteer_lens.run import answer_passes
from fsteer_lens.run.answer_passes import Answered
from fsteer_lens.run.teacher_forcing import answer_divergences, answer_logprobs_of_each, answered
from fsteer_lens.selection import Splits
from fsteer_lens.steering import fit_mean_shift
from fsteer_lens.steering.steering import Steering
from tests import made_up
from tests.families import D_MODEL, FAMILIES, random_model

OPEN = made_up.steering(3).with_gate(None)
SHUT = made_up.steering(3).with_gate(made_up.shut())
MIXED = made_up.steering(3)
DEEP = FineSteer(
    {2: made_up.experts(1), 4: made_up.experts(2)}, {2: EnergyGate(made_up.subspace(0), 12)}, gate_layer=2, scope="all"
)
ACTING: dict[str, HookObject] = {
    "open, all": OPEN.with_scope("all"),
    "open, prompt": OPEN.with_scope("prompt"),
    "open, generated": OPEN.with_scope("generated"),
    "open, window": OPEN.with_scope(Window(1, 3)),
    "mixed": MIXED,
    "schedule": replace(MIXED, schedule=Schedule((1.0, 0.5, 2.0))),
    "every step": replace(MIXED, refresh="step"),
    "at the first layer": replace(MIXED, layer=0),
    "before a layer": replace(MIXED, site="hook_resid_pre"),
    "several layers": DEEP,
    "ablation": SubspaceAblation(made_up.subspace(1), layer=2),
    "chain": chain(replace(MIXED, layer=4), SubspaceAblation(made_up.subspace(1), layer=2)),
}
IDLE: dict[str, HookObject] = {"shut": SHUT, "probe": SubspaceProbe(made_up.subspace(1), layer=3)}
ANSWERS = (" paris", " yes , it is .", " no", " i can not help with that , it would hurt people .")


@pytest.fixture(scope="module")
def told() -> list[str]:
    data = tutor.data("safe")
    return [str(data.valid.prompts[0]), *(task.prompt for task in data.general_valid[::120][:3])]


def rows_of(model: SteerableModel, told: list[str]) -> list[Answered]:
    """Prompts with one to four answers, in an order in which those of one prompt do not stand together."""
    pairs = [(prompt, answer) for place, answer in enumerate(ANSWERS) for prompt in told[: len(told) - place]]
    return answered(model, [prompt for prompt, _ in pairs], [answer for _, answer in pairs], Passes())


@torch.no_grad()
def plain_logits(model: SteerableModel, row: Answered, hook_object: HookObject | None) -> Tensor:
    """One row by itself, through the model's own forward."""
    batch, length = pad(model, [row.fed], "right"), len(row.prompt)
    with unsteered(model):
        if hook_object is None:
            logits = model(batch.tokens, return_type="logits")
        else:
            session = open_session(model, batch, hook_object, torch.tensor([length]))
            with session.step(model, fresh=True):
                logits = model(batch.tokens, return_type="logits")
    return logits[0, length - 1 :]


def plain(model: SteerableModel, row: Answered, hook_object: HookObject | None) -> Tensor:
    logprobs = plain_logits(model, row, hook_object).double().log_softmax(-1)
    return logprobs[torch.arange(len(row.answer)), torch.tensor(row.answer)].float()


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True))


@contextmanager
def counted(model: Any) -> Iterator[Counter[str]]:
    """Tokens that the lowest and the highest block and the head compute, and the most rows of a pass."""
    seen: Counter[str] = Counter()

    def counter(name: str) -> Any:
        def count(module: Any, args: Any, output: Any) -> None:
            if "forward" not in vars(module):
                first = output[0] if isinstance(output, tuple) else output
                seen[name] += first.shape[0] * first.shape[1]
                seen["rows"] = max(seen["rows"], first.shape[0])

        return count

    places = {"lowest": model.blocks[0], "highest": model.blocks[-1], "head": model.unembed}
    handles = [module.register_forward_hook(counter(name)) for name, module in places.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------------- equal numbers


@pytest.mark.parametrize("batch_size", [3, 16])
def test_log_probabilities_are_those_of_plain_passes(model: SteerableModel, told: list[str], batch_size: int) -> None:
    rows = rows_of(model, told)
    named = {"first steered": ACTING["mixed"], "none": None, **ACTING, **IDLE}
    found = dict(
        zip(named, answer_logprobs_of_each(model, rows, list(named.values()), batch_size=batch_size), strict=True)
    )
    for name, hook_object in named.items():
        assert apart(found[name], [plain(model, row, hook_object) for row in rows]) < 1e-5, name
        moved = apart(found[name], found["none"])
        assert moved == 0 if name in ("none", *IDLE) else moved > 1e-2, name


def test_each_alone_is_as_all_together(model: SteerableModel, told: list[str]) -> None:
    rows = rows_of(model, told)
    together = answer_logprobs_of_each(model, rows, list(ACTING.values()))
    for hook_object, found in zip(ACTING.values(), together, strict=True):
        (alone,) = answer_logprobs_of_each(model, rows, [hook_object])
        assert apart(alone, found) < 1e-5


@pytest.mark.parametrize("times", [1, 3])
def test_divergences_are_those_of_plain_passes(model: SteerableModel, told: list[str], times: int) -> None:
    rows = [row for row in rows_of(model, told) if row.prompt != () and len(row.answer) > 1][: 4 * times]
    rows = rows if times > 1 else [*{row.prompt: row for row in rows}.values(), Answered((5, 6, 7))]
    found = answer_divergences(model, rows, list(ACTING.values()), batch_size=5)
    for name, one in zip(ACTING, found, strict=True):
        for row, kl in zip(rows, one, strict=True):
            p, q = (plain_logits(model, row, by).double().log_softmax(-1) for by in (ACTING[name], None))
            wanted = (p.exp() * (p - q)).sum(-1)
            assert kl.double() == pytest.approx(wanted, rel=1e-3, abs=2e-6), name
    assert max(float(one.max()) for one in found[0]) > 1e-2


@pytest.mark.parametrize("kind", available_kinds())
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_architecture_shares(architecture: str, kind: Any) -> None:
    model = random_model(architecture, kind)
    assert can_begin_above(model)
    prompts = [tuple(range(3, 3 + length)) for length in (4, 13, 21)]  # longer than Gemma's window, too
    rows = [Answered(prompt, tuple(range(40, 40 + n))) for n in (1, 4, 11) for prompt in prompts]
    steering = FineSteer(made_up.experts(1, D_MODEL), layer=1, scope="all")
    for name, found in zip(("none", "steered"), answer_logprobs_of_each(model, rows, [None, steering]), strict=True):
        by = None if name == "none" else steering
        assert apart(found, [plain(model, row, by) for row in rows]) < 1e-4, name


@pytest.mark.parametrize("kind", available_kinds())
def test_what_fits_row_by_row_fits_together(kind: Any) -> None:
    """The longest prompt and the longest answer belong to different rows, and together they are too long."""
    model = random_model("gpt2", kind)
    long, short = tuple(range(3, 61)), (5, 6, 7)
    rows = [
        Answered(prompt, answer) for prompt, answer in ((long, (8, 9)), (long, (9,)), (short, long[:50]), (short, (8,)))
    ]
    (found,) = answer_logprobs_of_each(model, rows, [None])
    assert apart(found, [plain(model, row, None) for row in rows]) < 1e-4


@dataclass(frozen=True, eq=False)
class Remembering(Link):
    """Adds the mean of the prompts' activations, which it keeps in a way of its own."""

    layer: int = 3

    @property
    def hooked_layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def edit(self, state: State, layer: int, activation: Tensor, view: View) -> Tensor:
        if view.fresh:
            state.decisions[layer] = list(state.query(layer, activation, view))
        return torch.stack(state.decisions[layer]).unsqueeze(1) * (view.columns >= view.query.unsqueeze(1)).unsqueeze(
            -1
        )


def test_what_keeps_its_decisions_in_its_own_way_is_run_plainly(model: SteerableModel, told: list[str]) -> None:
    rows, link = rows_of(model, told), Remembering()
    assert not link.forks and MIXED.forks
    none, found = answer_logprobs_of_each(model, rows, [None, link])
    assert apart(found, [plain(model, row, link) for row in rows]) < 1e-5
    assert apart(none, [plain(model, row, None) for row in rows]) < 1e-5
    assert apart(found, none) > 1e-2


# ---------------------------------------------------------------------------------------------------- less is computed


def test_prompts_and_lower_layers_are_run_once(
    model: SteerableModel, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PASS_COST", "PASS_OF_ANY_MODEL"):  # so that padding is dearer than passes, as in a large model
        monkeypatch.setattr(answer_passes, name, 0)
    rows = rows_of(model, told)
    assert can_begin_above(model)
    prompts = {row.prompt for row in rows}
    once = sum(map(len, prompts)) + sum(len(row.answer) - 1 for row in rows)
    acting = [replace(MIXED, strength=strength) for strength in (0.5, 1.0, 2.0)]
    with counted(model) as seen:
        answer_logprobs_of_each(model, rows, [None, *acting])
    padding = 1.25
    assert once <= seen["lowest"] <= padding * once
    assert seen["highest"] == 4 * seen["lowest"]
    assert seen["head"] <= padding * 4 * sum(len(row.answer) for row in rows)
    with counted(model) as seen:
        answer_logprobs_of_each(model, rows, acting)
    assert seen["highest"] == 3 * seen["lowest"]


def test_the_batch_size_bounds_the_rows_of_every_pass(model: SteerableModel, told: list[str]) -> None:
    rows = rows_of(model, told)
    for run in (answer_logprobs_of_each, answer_divergences):
        with counted(model) as seen:
            run(model, rows, [MIXED, OPEN], batch_size=2)
        assert seen["rows"] == 2


def test_the_head_sees_the_places_that_are_kept(model: SteerableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.arange(5, 17).reshape(2, 6)
    mask, keep = torch.ones_like(tokens, dtype=torch.bool), torch.tensor([[5, 0], [2, 3]])
    whole = Forward(model, cache=False)(tokens, mask)
    wanted = torch.stack([whole[0, [5, 0]], whole[1, [2, 3]]])
    with counted(model) as seen:
        for cache in (False, True):
            assert torch.allclose(Forward(model, cache=cache)(tokens, mask, keep), wanted, atol=1e-5)
    assert seen["head"] == 8

    @contextmanager
    def no_head(model: Any, places: Tensor) -> Iterator[list[Any]]:
        yield []

    monkeypatch.setattr(forward, "_head_at", no_head)
    going_on = Forward(model, cache=False)
    going_on(tokens[:, :2], mask[:, :2])
    assert torch.equal(going_on(tokens[:, 2:], mask[:, 2:], keep.clamp(max=3)), _rows(whole[:, 2:], keep.clamp(max=3)))


def _rows(whole: Tensor, keep: Tensor) -> Tensor:
    return torch.stack([one[places] for one, places in zip(whole, keep, strict=True)])


# ------------------------------------------------------------------------------------------------- beginning above


def test_a_model_is_as_it_was_after_a_pass_that_began_above(bridge: SteerableModel) -> None:
    network: Any = bridge
    tokens = torch.arange(5, 13).reshape(1, 8)
    whole = network(tokens, return_type="logits")
    mine = vars(network.blocks[0])["forward"] = network.blocks[0].forward  # as somebody else may have put one there
    try:
        with outputs_kept(bridge, [3]) as kept:
            network(tokens, return_type="logits")
        elsewhere: list[Tensor] = []
        with pytest.raises(KeyboardInterrupt), begun_at(bridge, 3, kept[3]):
            assert torch.equal(network(torch.zeros_like(tokens), return_type="logits"), whole)
            thread = Thread(target=lambda: elsewhere.append(network(tokens.flip(1), return_type="logits")))
            thread.start()
            thread.join()
            raise KeyboardInterrupt
        assert vars(network.blocks[0])["forward"] is mine
    finally:
        del vars(network.blocks[0])["forward"]
    assert not any("forward" in vars(block) for block in network.blocks)
    assert torch.equal(network(tokens, return_type="logits"), whole)
    assert torch.equal(elsewhere[0], network(tokens.flip(1), return_type="logits")), "another thread computes"


def test_a_model_whose_layers_share_more_than_the_stream_is_run_plainly(told: list[str]) -> None:
    model: Any = random_model("llama", "bridge", seed=7)
    seen: list[Tensor] = []
    handles = [
        model.blocks[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output)),
        model.blocks[2].mlp.register_forward_hook(lambda module, args, output: output + seen[-1]),
    ]
    try:
        assert not can_begin_above(model)
        prompts = (tuple(range(3, 9)), tuple(range(9, 13)))
        rows = [Answered(prompt, tuple(range(40, 40 + n))) for n in (1, 4) for prompt in prompts]
        steering = FineSteer(made_up.experts(1, D_MODEL), layer=1, scope="all")
        for by, found in zip((None, steering), answer_logprobs_of_each(model, rows, [None, steering]), strict=True):
            assert apart(found, [plain(model, row, by) for row in rows]) < 1e-4
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------- what is built on it


def test_a_suite_that_shares_measures_as_each_alone(model: SteerableModel, told: list[str]) -> None:
    answers = tuple((text.strip(), bool(place % 2)) for place, text in enumerate(ANSWERS))
    suite = TruthfulQA(tuple(Choice(prompt[:40], answers[:2], answers) for prompt in told))
    assert suite.shares
    methods: dict[str, Any] = {"mixed": MIXED, "none": None, "words": Prompting("yes "), "open": OPEN}
    together = evaluate(model, methods, suite, progress=False)
    assert together.methods == tuple(methods)
    for name, method in methods.items():
        alone = evaluate(model, {name: method}, suite, progress=False)
        for measure in ("MC1", "MC2"):
            assert together.items(name, measure) == pytest.approx(alone.items(name, measure), abs=1e-5)
    assert not torch.equal(together.items("open", "MC2"), together.items("none", "MC2"))
    assert all(second > 0 for second in together.seconds.values())


def test_a_search_measures_as_each_setting_alone(tutor_model: SteerableModel) -> None:
    data = tutor.data("safe")
    splits = Splits(data.train[::12], data.valid[::30], data.general_valid[::60], (), ())
    strengths, made = (0.5, 2.0), {}

    def method(own: Activations, general: Activations | None) -> Steering:
        return made.setdefault(own.layer, fit_mean_shift(own))

    found = search(
        tutor_model, splits, budget=50.0, layers=[3, 4], strengths=strengths, shift="last_prompt", progress=False,
        method=method,
    )  # fmt: skip
    assert [(one.layer, one.strength) for one in found.trials] == [(at, by) for at in (3, 4) for by in strengths]
    prompts = [task.prompt for task in splits.general_valid]
    for trial in found.trials:
        one = made[trial.layer].with_strength(trial.strength)
        assert trial.effect == pytest.approx(float(answer_margin(tutor_model, one, splits.valid).mean()), abs=1e-5)
        kept = -float(general_divergence(tutor_model, one, prompts).mean())
        assert trial.utility == pytest.approx(kept, abs=1e-5)


def test_what_cannot_be_put_on_the_model_is_refused_before_anything_runs(tutor_model: SteerableModel) -> None:
    rows = [Answered((5, 6), (7,)), Answered((5, 6), (8,))]
    with counted(tutor_model) as seen:
        with pytest.raises(SiteError):
            answer_logprobs_of_each(tutor_model, rows, [None, replace(MIXED, layer=50)])
    assert not seen

"""One reader: whatever is attached, what is read is the unsteered stream, and every prompt is run once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fsteer_lens import Activations, FineSteer, collect, collect_queries, effects, explore, fit, models, tutor
from fsteer_lens.errors import SiteError
from fsteer_lens.evaluation import attack_gate
from fsteer_lens.models import SteerableModel
from fsteer_lens.models.attaching import AddedHooks
from fsteer_lens.models.classes import attention_window
from fsteer_lens.models.points import Point
from fsteer_lens.prompts.tokens import prompt_ids
from fsteer_lens.reading import reader
from fsteer_lens.reading.reader import Reader, read
from fsteer_lens.report import steering_report
from tests.families import FAMILIES, random_model
from tests.running import LAYER, SITE, batch_of, residual

CONTRASTS = tutor.data("safe").valid[:5]
WAYS: dict[str, Callable[[SteerableModel, FineSteer], torch.Tensor]] = {
    "collect_queries": lambda model, _: collect_queries(model, CONTRASTS.prompts, layer=5, progress=False).queries,
    "collect, last prompt": lambda model, _: collect(
        model, CONTRASTS, layer=5, shift="last_prompt", progress=False
    ).shifts,  # type: ignore[return-value]
    "collect, response means": lambda model, _: collect(model, CONTRASTS, layer=5, progress=False).shifts,  # type: ignore[return-value]
    "explore": lambda model, by: explore(by, model, CONTRASTS.prompts, progress=False)._pictured.scores,
    "explain_gate": lambda model, by: effects.explain_gate(model, by, CONTRASTS[0].prompt).without,
    "attack_gate": lambda model, by: torch.tensor(
        [
            one.score
            for one in attack_gate(
                model, by.gate_at(LAYER), [str(CONTRASTS[0].prompt)], layer=LAYER, words=["box"], format=str,  # type: ignore[arg-type]
                budget=1, candidates=1, progress=False,
            ).attacks
        ]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_an_attached_steering_is_not_read(model: SteerableModel, steering: FineSteer, name: str) -> None:
    """At today's layer and later ones: a steering that is always on shifts the stream of all of them."""
    way, always = WAYS[name], steering.with_gate(None).with_strength(3.0)
    expected = way(model, steering)
    handle = always.with_scope("all").attach(model)
    early = fit_early(model).attach(model)
    try:
        found = way(model, steering)
        handle.reset()
        batch = batch_of(model, [str(CONTRASTS[0].prompt)])
        model(batch.tokens)
        assert handle.trace.n_rows == 1, "it is back, and what was read is not in its trace"
    finally:
        early.detach()
        handle.detach()
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


def fit_early(model: SteerableModel) -> FineSteer:
    """A steering at layer 1 that acts on everything: all later layers see it."""
    own = collect(model, CONTRASTS, layer=1, shift="last_prompt", progress=False)
    return (
        fit(own, rank=1, n_experts=1, preset="0.1", epochs=1, gate="energy")
        .with_gate(None)
        .with_scope("all")
        .with_strength(5.0)
    )


def test_hooks_of_others_stay(model: SteerableModel, prompts: list[str]) -> None:
    batch = batch_of(model, prompts)
    point = Point(LAYER, "hook_resid_post")
    (plain,) = read(model, batch, [point]).values()
    torch.testing.assert_close(plain, residual(model, batch))
    others = AddedHooks(model, [(SITE, lambda x, hook: x + 1)])
    try:
        (seen,) = read(model, batch, [point]).values()
        (bare,) = read(model, batch, [point], bare=True).values()
    finally:
        others.remove()
    torch.testing.assert_close(seen, plain + 1)
    assert torch.equal(bare, plain)


def test_layers_share_a_pass_and_no_layer_is_missed(model: SteerableModel, prompts: list[str]) -> None:
    rows = [prompt_ids(model, prompt) for prompt in prompts]
    passes = counted(model)
    try:
        together = Reader(model, [1, 4, 2], batch_size=2).last(rows)
    finally:
        passes.remove()
    assert list(together) == [1, 4, 2] and passes.rows == len(rows)
    for layer, found in together.items():
        torch.testing.assert_close(found, Reader(model, layer).last(rows)[layer], atol=1e-5, rtol=1e-5)
    with pytest.raises(SiteError, match=r"0\.\.5"):
        Reader(model, [1, 6])


class Passes(AddedHooks):
    """Counts the rows that go through the model's first layer."""

    def __init__(self, model: SteerableModel) -> None:
        self.rows = 0
        super().__init__(model, [("blocks.0.hook_resid_pre", self.count)])

    def count(self, activation: torch.Tensor, hook: Any) -> None:
        self.rows += len(activation)


def counted(model: SteerableModel) -> Passes:
    return Passes(model)


def test_the_explorer_runs_every_prompt_once(tutor_model: SteerableModel, trained: dict[int, Activations]) -> None:
    by = fit({layer: trained[layer] for layer in (3, 4)}, preset="0.1", epochs=1, gate_layer=3)
    passes = counted(tutor_model)
    try:
        explore(by, tutor_model, {"harm": CONTRASTS.prompts}, layer=4, progress=False)
    finally:
        passes.remove()
    fingerprint = 1  # two layers, one pass of its own
    assert passes.rows <= len(CONTRASTS) + fingerprint


def test_a_report_reads_all_layers_in_one_pass(
    tutor_model: SteerableModel, trained: dict[int, Activations], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tutor.data("safe")
    by = fit({layer: trained[layer] for layer in (2, 4)}, preset="0.1", epochs=1)
    general = [task.prompt for task in told.general_valid[:2]]
    seen: list[tuple[list[int], int]] = []
    whole = Reader.prompts

    def prompts(self: Reader, rows: Any, *options: Any) -> Any:
        seen.append((self.layers, len(rows)))
        return whole(self, rows, *options)

    monkeypatch.setattr(Reader, "prompts", prompts)
    steering_report(tutor_model, by, CONTRASTS, general, max_new_tokens=2, sweep=False, progress=False)
    of_prompts = [layers for layers, rows in seen if rows == len(CONTRASTS) + len(general)]
    assert of_prompts == [[2, 4]]
    assert all(len(layers) == 1 and rows > 7 for layers, rows in seen if layers != [2, 4]), "shortened prompts alone"


# ------------------------------------------------------------------------------------- what all rows begin with


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_what_all_rows_begin_with_is_run_once(architecture: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same activations as of whole rows, prompts of several lengths and answers too; fewer tokens are run."""
    if kind not in models.available_kinds():
        pytest.skip("this TransformerLens has no HookedTransformer")
    model = random_model(architecture, kind)
    start = [40 + number for number in range(12)]
    rows = [[*start, *range(60, 60 + length)] for length in (3, 7, 4, 1)] + [[*start, 99, 98]]
    answers = [[[5 + number, 6], [7, 8, 9 + number]] for number in range(len(rows))]
    fed: list[int] = []
    found = []
    counting = [("blocks.0.hook_resid_pre", lambda x, hook: fed.append(x.shape[0] * x.shape[1]))]
    for shared in (reader.SHARED, 10**6):
        monkeypatch.setattr(reader, "SHARED", shared)
        fed.clear()
        added = AddedHooks(model, counting)
        last, (queries, means) = Reader(model, [0, 2]).last(rows), Reader(model, [0, 2]).answers(rows, answers)
        added.remove()
        found.append((sum(fed), last, queries, means))
    narrow = attention_window(model) < 20  # padding in between would take up room in it
    assert found[0][0] == found[1][0] if narrow else 0 < found[0][0] < 0.7 * found[1][0]
    for apart, whole in zip(found[0][1:], found[1][1:], strict=True):
        for layer in apart:
            torch.testing.assert_close(apart[layer], whole[layer], atol=1e-4, rtol=1e-4)


def test_rows_with_nothing_in_common_or_of_one_kind_are_read_as_well(tutor_model: SteerableModel) -> None:
    one = Reader(tutor_model, 1)
    same = [list(range(40, 60))] * 3
    for rows in (same, [same[0]], [same[0], same[0][:1]], [same[0], same[0][:12]], []):
        for row, value in zip(rows, one.last(rows)[1], strict=True):
            torch.testing.assert_close(value, one.last([row])[1][0], atol=1e-4, rtol=1e-4)

"""The same answer whichever class, cache, batch, padding, way of attaching or order: properties over random prompts."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fsteer_lens import FineSteer, Schedule, SubspaceProbe, Window, chain, generate, models, stream, tutor
from fsteer_lens.models import SteerableModel
from fsteer_lens.models.forward import Forward
from fsteer_lens.prompts.tokens import pad
from tests import made_up
from tests.families import tokenizer
from tests.running import logits_of, three_ways

EXAMPLES = 20
OF_A_CLASS = EXAMPLES // len(models.available_kinds())  # that the classes are one is a property too, tried in full
NEW = 5
BOS = 1

prompt = st.lists(st.integers(20, 250), min_size=0, max_size=10).map(lambda ids: [BOS, *ids])
prompts = st.lists(prompt, min_size=1, max_size=4)
scopes = st.sampled_from(["all", "prompt", "generated", (0, None), (1, 4), (2, None), (0, 2)])
schedules = st.sampled_from([None, (1.0, 0.5, 0.0), (0.0, 1.5)])


@dataclass(frozen=True)
class Recipe:
    """What a steering is to be like; made inside the test, since hypothesis wants no computation in its strategies."""

    layers: tuple[int, ...]
    seed: int
    strength: float
    scope: Any
    schedule: tuple[float, ...] | None
    refresh: bool
    led: bool

    def make(self) -> FineSteer:
        """The steering."""
        several = len(self.layers) > 1
        seeds = {layer: self.seed + layer for layer in self.layers}
        parts = {layer: made_up.steering(seed=seed) for layer, seed in seeds.items()}
        return FineSteer(
            {layer: one.experts for layer, one in parts.items()} if several else parts[self.layers[0]].experts,  # type: ignore[arg-type]
            {layer: one.gate for layer, one in parts.items()} if several else parts[self.layers[0]].gate,  # type: ignore[arg-type]
            layer=None if several else self.layers[0],
            strength=self.strength,
            scope=Window(*self.scope) if isinstance(self.scope, tuple) else self.scope,
            schedule=self.schedule and Schedule(self.schedule),
            refresh="step" if self.refresh and self.scope != "prompt" else "prompt",
            gate_layer=self.layers[0] if self.led else None,
        )


def recipes(*layers: tuple[int, ...]) -> st.SearchStrategy[Recipe]:
    """Recipes at one of these layers, or sets of layers."""
    return st.builds(
        Recipe,
        st.sampled_from(layers),
        st.integers(0, 3),
        st.sampled_from([0.5, 2.0, 6.0]),
        scopes,
        schedules,
        st.booleans(),
        st.booleans(),
    )


one_layer = recipes(*[(layer,) for layer in range(6)])
any_layers = st.one_of(one_layer, recipes((0, 3), (1, 2), (2, 5), (1, 3, 4)))


def made(
    model: SteerableModel, rows: list[list[int]], steering: Any, **options: Any
) -> list[tuple[tuple[int, ...], Tensor]]:
    """Tokens and their log-probabilities, row by row."""
    found = generate(model, rows, steering, max_new_tokens=NEW, **{"progress": False, **options})
    return [(one.tokens, one.trace.steps.logprobs[0]) for one in found]  # type: ignore[union-attr]


def assert_same(one: list[tuple[tuple[int, ...], Tensor]], other: list[tuple[tuple[int, ...], Tensor]]) -> None:
    assert [tokens for tokens, _ in one] == [tokens for tokens, _ in other]
    for (_, logprobs), (_, others) in zip(one, other, strict=True):
        torch.testing.assert_close(logprobs, others, atol=1e-4, rtol=0)


def forced(model: SteerableModel, rows: list[list[int]], side: str = "left") -> tuple[Tensor, Tensor]:
    """Logits of padded rows, and which of them are real."""
    batch = pad(model, rows, side)  # type: ignore[arg-type]
    return logits_of(model, batch), batch.mask


@settings(max_examples=OF_A_CLASS)
@given(rows=prompts, recipe=any_layers)
def test_cache_on_is_cache_off(model: SteerableModel, rows: list[list[int]], recipe: Recipe) -> None:
    steering = recipe.make()
    assert_same(*(made(model, rows, steering, use_past_kv_cache=cache) for cache in (True, False)))


@settings(max_examples=OF_A_CLASS)
@given(rows=prompts, recipe=any_layers)
def test_batch_is_single(model: SteerableModel, rows: list[list[int]], recipe: Recipe) -> None:
    steering = recipe.make()
    assert_same(*(made(model, rows, steering, batch_size=size) for size in (8, 1)))


@settings(max_examples=OF_A_CLASS)
@given(rows=prompts, recipe=one_layer)
def test_left_padding_is_none(model: SteerableModel, rows: list[list[int]], recipe: Recipe) -> None:
    steering = recipe.make()
    batch = pad(model, rows, "left")
    with steering.on(model, attention_mask=batch.mask) as trace:
        padded = logits_of(model, batch).log_softmax(-1)
    for index, row in enumerate(rows):
        with steering.on(model) as alone:
            expected, _ = forced(model, [row])
        torch.testing.assert_close(padded[index, -len(row) :], expected[0].log_softmax(-1), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            trace.gate[steering.layers[0]][index], alone.gate[steering.layers[0]][0], atol=1e-4, rtol=0
        )
        change = trace.row(index).change[steering.layers[0]]
        torch.testing.assert_close(change, alone.change[steering.layers[0]], atol=1e-4, rtol=1e-3)


@settings(max_examples=OF_A_CLASS)
@given(rows=prompts, recipe=one_layer)
def test_on_attach_and_fwd_hooks_are_one(model: SteerableModel, rows: list[list[int]], recipe: Recipe) -> None:
    steering = recipe.make()
    (by_on, _), (by_attach, _), (by_list, _) = three_ways(model, steering, pad(model, rows, "left"))
    assert torch.equal(by_on, by_attach) and torch.equal(by_on, by_list)


@settings(max_examples=EXAMPLES)
@given(rows=prompts, recipe=any_layers)
def test_hooked_transformer_is_bridge(
    hooked: SteerableModel, bridge: SteerableModel, rows: list[list[int]], recipe: Recipe
) -> None:
    steering = recipe.make()
    assert_same(*(made(model, rows, steering) for model in (hooked, bridge)))


@settings(max_examples=OF_A_CLASS)
@given(
    rows=prompts,
    recipe=one_layer,
    which=st.sampled_from(["strength", "gate", "window", "schedule", "monitor", "probe"]),
)
def test_what_adds_nothing_leaves_no_trace_in_the_logits(
    model: SteerableModel, rows: list[list[int]], recipe: Recipe, which: str
) -> None:
    steering = recipe.make()
    idle: Any = {
        "strength": lambda: steering.with_strength(0.0),
        "gate": lambda: steering.with_gate(made_up.shut()),
        "window": lambda: steering.with_scope(Window(2, 2)),
        "schedule": lambda: replace(steering, schedule=Schedule((0.0,))),
        "monitor": lambda: steering.with_monitor(),
        "probe": lambda: SubspaceProbe(made_up.subspace(0), layer=2),
    }[which]()
    batch = pad(model, rows, "left")
    plain = logits_of(model, batch)
    with idle.on(model, attention_mask=batch.mask):
        assert torch.equal(logits_of(model, batch), plain)
    assert_same(made(model, rows, idle), made(model, rows, None))


@settings(max_examples=OF_A_CLASS)
@given(first=prompt, second=prompt, recipe=one_layer, cache=st.booleans())
def test_a_second_generation_under_one_context_starts_fresh(
    model: SteerableModel, first: list[int], second: list[int], recipe: Recipe, cache: bool
) -> None:
    steering = recipe.make()
    assume(len(second) > 1)  # a one-token prompt looks like a decoding step, and needs handle.reset(): see below

    def own_loop(row: list[int]) -> list[int]:
        made = model.generate(  # type: ignore[attr-defined]
            torch.tensor([row]),
            max_new_tokens=3,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=cache,
            verbose=False,
        )
        return made[0, len(row) :].tolist()

    with steering.on(model) as trace:
        own_loop(first)
        after = own_loop(second)
        ser = trace.ser[steering.layers[0]].clone()
    with steering.on(model) as trace:
        assert own_loop(second) == after
    assert torch.equal(trace.ser[steering.layers[0]], ser)
    assert tuple(after) == generate(model, second, steering, max_new_tokens=3, progress=False)[0].tokens


@pytest.fixture(scope="module", params=models.available_kinds())
def pad_is_bos(request: pytest.FixtureRequest) -> SteerableModel:
    """The tutor with a tokenizer whose pad token is its first token."""
    from transformers import AutoModelForCausalLM

    tokens = tokenizer()
    tokens.pad_token = tokens.bos_token
    return models.from_hf(AutoModelForCausalLM.from_pretrained(tutor.loading.FOLDER), tokens, kind=request.param)


@settings(max_examples=OF_A_CLASS)
@given(rows=prompts, recipe=one_layer)
def test_a_pad_that_is_the_first_token_changes_nothing(
    pad_is_bos: SteerableModel, tutor_model: SteerableModel, rows: list[list[int]], recipe: Recipe
) -> None:
    steering = recipe.make()
    assert pad_is_bos.tokenizer.pad_token_id == BOS
    assert_same(made(pad_is_bos, rows, steering), made(tutor_model, rows, steering, batch_size=1))


@settings(max_examples=OF_A_CLASS)
@given(rows=prompts, recipe=one_layer, place=st.integers(0, 3))
def test_rows_that_finish_early_do_not_disturb_the_others(
    model: SteerableModel, rows: list[list[int]], recipe: Recipe, place: int
) -> None:
    steering = recipe.make()
    free = made(model, rows, steering)
    stop = [free[0][0][place]]
    ended = made(model, rows, steering, stop=stop)
    for (tokens, logprobs), (whole, others) in zip(ended, free, strict=True):
        n = whole.index(stop[0]) + 1 if stop[0] in whole else NEW
        assert tokens == whole[:n]
        torch.testing.assert_close(logprobs, others[:n], atol=1e-4, rtol=0)


@settings(max_examples=OF_A_CLASS)
@given(row=prompt, recipe=any_layers, cache=st.booleans())
def test_streaming_is_not_streaming(model: SteerableModel, row: list[int], recipe: Recipe, cache: bool) -> None:
    steering = recipe.make()
    pieces = list(stream(model, row, steering, max_new_tokens=NEW, use_past_kv_cache=cache))
    records = [record for _, record in pieces]
    ((tokens, logprobs),) = made(model, [row], steering)
    assert tuple(record.token for record in records) == tokens
    torch.testing.assert_close(torch.tensor([record.logprob for record in records]), logprobs, atol=1e-4, rtol=0)


@settings(max_examples=OF_A_CLASS)
@given(first=prompt, words=st.lists(st.integers(20, 250), min_size=4, max_size=4, unique=True), recipe=one_layer)
def test_successive_uncached_prompts_of_growing_length(
    model: SteerableModel, first: list[int], words: list[int], recipe: Recipe
) -> None:
    steering = recipe.make()
    layer = steering.layers[0]
    rows = [[*first[:1], word, *(first * 4)[: len(first) + n]] for n, word in enumerate(words)]  # a token longer each
    alone = []
    for row in rows:
        with steering.on(model) as trace:
            alone.append((forced(model, [row])[0], trace.ser[layer]))
    with steering.on(model) as trace:
        for row, (logits, ser) in zip(rows, alone, strict=True):
            assert torch.equal(forced(model, [row])[0], logits)
            assert torch.equal(trace.ser[layer], ser) and trace.change[layer].shape == (1, len(row))


@settings(max_examples=OF_A_CLASS)
@given(words=st.lists(st.integers(20, 250), min_size=1, max_size=4), recipe=one_layer)
def test_one_token_prompts(model: SteerableModel, words: list[int], recipe: Recipe) -> None:
    steering = recipe.make()
    rows = [[word] for word in words]
    runs = [
        made(model, rows, steering, use_past_kv_cache=cache, batch_size=size)
        for cache, size in ((True, 8), (False, 8), (True, 1))
    ]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    handle = steering.attach(model)
    try:
        for row, (tokens, _) in zip(rows, runs[0], strict=True):
            handle.reset()
            forward, new, found = Forward(model, cache=True), row, []
            for _ in range(NEW):
                step = pad(model, [new], "right")
                new = [int(forward(step.tokens, step.mask)[0, -1].argmax())]
                found += new
            assert tuple(found) == tokens
    finally:
        handle.detach()


@settings(max_examples=OF_A_CLASS)
@given(rows=prompts, recipe=one_layer, side=st.sampled_from(["left", "right"]))
def test_a_prompt_with_its_answer_scored_is_the_prompt_alone(
    model: SteerableModel, rows: list[list[int]], recipe: Recipe, side: str
) -> None:
    steering = recipe.make()
    free = made(model, rows, steering)
    whole = pad(model, [[*row, *tokens] for row, (tokens, _) in zip(rows, free, strict=True)], side)  # type: ignore[arg-type]
    lengths = torch.tensor([len(row) for row in rows])
    with steering.on(model, prompt_lengths=lengths, attention_mask=whole.mask):
        scored = logits_of(model, whole).log_softmax(-1)
    for index, (row, (tokens, logprobs)) in enumerate(zip(rows, free, strict=True)):
        real = scored[index][whole.mask[index]][len(row) - 1 : -1]
        found = real.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(found, logprobs, atol=1e-4, rtol=0)


@settings(max_examples=OF_A_CLASS)
@given(rows=prompts, pair=st.tuples(any_layers, any_layers), turn=st.integers(0, 3))
def test_the_order_of_rows_and_of_links_does_not_matter(
    model: SteerableModel, rows: list[list[int]], pair: tuple[Recipe, Recipe], turn: int
) -> None:
    turn %= len(rows)
    links = [recipe.make() for recipe in pair]
    one = made(model, rows, chain(*links))
    other = made(model, rows[turn:] + rows[:turn], chain(*reversed(links)))
    assert_same(one, other[len(rows) - turn :] + other[: len(rows) - turn])

"""Nothing is left behind: after every scenario the model's hooks and logits are as before."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from threading import Event, Thread
from typing import Any

import pytest
import torch

from fsteer_lens import FineSteer, calibrate, chain, collect_queries, generate, models, save, stream
from fsteer_lens.errors import HookError, SiteError
from fsteer_lens.models import SteerableModel
from fsteer_lens.models.attaching import AddedHooks, hooks_suspended
from fsteer_lens.models.points import hook_point
from fsteer_lens.prompts.tokens import pad
from tests import made_up
from tests.families import random_model
from tests.running import logits_of, n_hooks

ROWS = [[1, 50, 60, 70], [1, 80, 90]]
OTHER_SITE = "blocks.1.hook_resid_pre"


def free(model: SteerableModel) -> tuple[int, torch.Tensor]:
    """What must not change: how many hooks there are, and what the model says."""
    return n_hooks(model), logits_of(model, pad(model, ROWS, "left"))


@pytest.fixture(autouse=True)
def _untouched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare hooks and logits of the test's model before and after, and whether it still steers as it should."""
    if "model" not in request.fixturenames:
        yield
        return
    model = request.getfixturevalue("model")
    hooks, logits = free(model)
    expected = [one.tokens for one in steered(model)]
    yield
    gc.collect()
    after = free(model)
    assert after[0] == hooks and torch.equal(after[1], logits)
    assert [one.tokens for one in steered(model)] == expected


def steered(model: SteerableModel, steering: FineSteer | None = None) -> Any:
    return generate(model, ROWS, steering or made_up.steering(3), max_new_tokens=4, progress=False)


class Bomb:
    """Somebody else's hook, which raises at its n-th call."""

    def __init__(self, error: type[BaseException], after: int) -> None:
        self.error, self.left = error, after

    def __call__(self, activation: torch.Tensor, hook: Any = None) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


def run_on(model: SteerableModel) -> None:
    with made_up.steering(3).on(model):
        for _ in range(4):
            logits_of(model, pad(model, ROWS, "left"))


def run_attached(model: SteerableModel) -> None:
    handle = chain(made_up.steering(3), made_up.steering(2)).attach(model)
    try:
        for _ in range(4):
            logits_of(model, pad(model, ROWS, "left"))
    finally:
        handle.detach()


def run_two_layers(model: SteerableModel) -> None:
    both = FineSteer({2: made_up.experts(1), 4: made_up.experts(2)})
    generate(model, ROWS, both, max_new_tokens=6, compare=True, progress=False)


RUNS: dict[str, Callable[[SteerableModel], Any]] = {
    "on": run_on,
    "attach": run_attached,
    "run_with_hooks": lambda model: [
        model.run_with_hooks(torch.tensor([ROWS[0]]), fwd_hooks=made_up.steering(3).fwd_hooks())  # type: ignore[attr-defined]
        for _ in range(4)
    ],
    "generate": lambda model: steered(model),
    "compare, two layers": run_two_layers,
    "stream": lambda model: list(stream(model, ROWS[0], made_up.steering(3), max_new_tokens=6)),
    "collect": lambda model: collect_queries(model, ROWS * 4, layer=[2, 4], batch_size=2, progress=False),
    "calibrate": lambda model: calibrate(made_up.steering(3), model, ROWS, kl=0.1, progress=False),
}


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("run", RUNS)
def test_an_exception_in_the_middle_of_a_forward(
    model: SteerableModel, run: str, error: type[BaseException], after: int
) -> None:
    bomb = AddedHooks(model, [(OTHER_SITE, Bomb(error, after))])
    try:
        with pytest.raises(error):
            RUNS[run](model)
    finally:
        bomb.remove()


@pytest.mark.parametrize("run", ["on", "attach", "generate", "stream"])
def test_an_exception_in_our_own_hook(model: SteerableModel, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(FineSteer, "edit", broken)
    with pytest.raises(ZeroDivisionError):
        RUNS[run](model)
    monkeypatch.undo()


def test_an_exception_between_forwards_is_not_covered_up(model: SteerableModel) -> None:
    with pytest.raises(ZeroDivisionError), made_up.steering(3).on(model):
        raise ZeroDivisionError  # and not "never fired"
    with pytest.raises(ZeroDivisionError), made_up.steering(3).on(model):
        model.reset_hooks()  # type: ignore[attr-defined]
        raise ZeroDivisionError  # and not "taken off"


def test_a_hook_that_never_fired_raises(model: SteerableModel) -> None:
    with pytest.raises(HookError, match=r"never fired.*blocks\.3\.hook_resid_post"), made_up.steering(3).on(model):
        pass
    both = FineSteer({1: made_up.experts(1), 4: made_up.experts(2)})
    tokens = torch.tensor([ROWS[0]])
    with pytest.raises(HookError, match=r"never fired.*blocks\.4\.hook_resid_post") as caught, both.on(model):
        model(tokens, stop_at_layer=3)
    assert "blocks.1" not in str(caught.value)
    pair = chain(made_up.steering(1), made_up.steering(5))
    with pytest.raises(HookError, match=r"blocks\.5"), pair.on(model):
        model(tokens, stop_at_layer=3)


def test_hooks_that_somebody_else_took_away_are_missed(model: SteerableModel) -> None:
    tokens = torch.tensor([ROWS[0]])
    with pytest.raises(HookError, match="taken off the model"), made_up.steering(3).on(model):
        model(tokens)
        model.reset_hooks()  # type: ignore[attr-defined]
        model(tokens)
    handle = made_up.steering(3).attach(model)
    model.reset_hooks()  # type: ignore[attr-defined]
    with pytest.raises(HookError, match="reset_hooks"):
        handle.detach()
    handle.detach()


def test_transformer_lens_own_contexts_leave_ours_alone(model: SteerableModel) -> None:
    tokens = torch.tensor([ROWS[0]])
    seen: list[int] = []
    with made_up.steering(3).on(model) as trace:
        model.run_with_hooks(tokens, fwd_hooks=[(OTHER_SITE, lambda x, hook: seen.append(1))])  # type: ignore[attr-defined]
        model.run_with_cache(tokens)  # type: ignore[attr-defined]
        with model.hooks(fwd_hooks=[(OTHER_SITE, lambda x, hook: seen.append(2))]):  # type: ignore[attr-defined]
            model(tokens)
        trace.change.clear()
        model(tokens)
        assert (trace.change[3] > 0).all(), "still on"
    assert seen == [1, 2]


@pytest.mark.parametrize("order", ["nested", "crossed"])
def test_contexts_of_both_kinds_in_any_order(model: SteerableModel, order: str) -> None:
    tokens = torch.tensor([ROWS[0]])
    first, second, third = ExitStack(), ExitStack(), ExitStack()
    one = first.enter_context(made_up.steering(3).on(model))
    second.enter_context(model.hooks(fwd_hooks=[(OTHER_SITE, lambda x, hook: None)]))  # type: ignore[attr-defined]
    other = third.enter_context(made_up.steering(3, seed=1).on(model))
    model(tokens)
    exits = {"nested": [third, second, first], "crossed": [first, second, third]}[order]
    exits[0].close()
    for trace in (one, other):
        trace.change.clear()
    model(tokens)
    assert (one.change == {}) == (order == "crossed") and (other.change == {}) == (order == "nested")
    exits[1].close()
    exits[2].close()


def test_handles_are_detached_in_any_order(model: SteerableModel) -> None:
    before = n_hooks(model)
    handles = [made_up.steering(3, seed).attach(model) for seed in range(3)]
    for left, index in ((2, 1), (1, 0), (0, 2)):
        handles[index].detach()
        handles[index].detach()
        assert n_hooks(model) == before + 2 * left


def test_the_earlier_registered_hook_edits_first(model: SteerableModel) -> None:
    batch = pad(model, ROWS, "left")
    first, second = made_up.steering(3, 0), made_up.steering(3, 1)
    with first.on(model, attention_mask=batch.mask), second.on(model, attention_mask=batch.mask) as late:
        one = logits_of(model, batch)
    with second.on(model, attention_mask=batch.mask) as early, first.on(model, attention_mask=batch.mask):
        other = logits_of(model, batch)
    assert not torch.allclose(late.ser[3], early.ser[3]), "the later one reads what the earlier one has edited"
    assert not torch.allclose(one, other)
    with second.on(model, attention_mask=batch.mask) as alone:
        logits_of(model, batch)
    assert torch.equal(alone.ser[3], early.ser[3])


def test_a_half_made_attachment_leaves_nothing(model: SteerableModel) -> None:
    with pytest.raises(SiteError):
        AddedHooks(model, [(OTHER_SITE, Bomb(ZeroDivisionError, 9)), ("blocks.9.nowhere", Bomb(ZeroDivisionError, 9))])


@pytest.mark.parametrize("how", ["close", "forget", "throw"])
def test_an_abandoned_stream(model: SteerableModel, how: str) -> None:
    running = stream(model, ROWS[0], made_up.steering(3), max_new_tokens=6)
    next(running)
    next(running)
    if how == "close":
        running.close()  # type: ignore[attr-defined]
    elif how == "throw":
        with pytest.raises(KeyboardInterrupt):
            running.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    del running


def test_two_streams_and_a_generation_interleave(model: SteerableModel) -> None:
    one, other = made_up.steering(3, 0, 20.0), made_up.steering(2, 1)
    alone = [[r.token for _, r in stream(model, ROWS[0], by, max_new_tokens=5)] for by in (one, other)]
    running = [stream(model, ROWS[0], by, max_new_tokens=5) for by in (one, other)]
    found: list[list[int]] = [[], []]
    for _ in range(5):
        for index, by in enumerate(running):
            found[index].append(next(by)[1].token)
        steered(model)
    assert found == alone and alone[0] != alone[1]


def test_one_steering_on_two_models(hooked: SteerableModel, bridge: SteerableModel) -> None:
    pair = (hooked, bridge)
    before = [free(model) for model in pair]
    by = made_up.steering(3)
    expected = [one.tokens for one in steered(hooked, by)]
    with by.on(hooked) as first, by.on(bridge) as second:
        for model, row in zip(pair, ROWS, strict=True):
            logits_of(model, pad(model, [row], "left"))
        assert first.change[3].shape == (1, len(ROWS[0])) and second.change[3].shape == (1, len(ROWS[1]))
    assert [one.tokens for one in steered(bridge, by)] == expected
    for model, (hooks, logits) in zip(pair, before, strict=True):
        assert free(model)[0] == hooks and torch.equal(free(model)[1], logits)


def in_thread(work: Callable[[], Any]) -> Any:
    """Run in another thread and return its result, or the exception that it raised."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_generations_in_several_threads_do_not_mix(model: SteerableModel) -> None:
    steerings = [made_up.steering(layer, seed, 20.0 * seed) for seed, layer in enumerate((2, 3, 4))]
    expected = [[one.tokens for one in steered(model, by)] for by in steerings]
    assert expected[0] != expected[1] != expected[2]
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        found[index] = [[one.tokens for one in steered(model, steerings[index])] for _ in range(3)]

    threads = [Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [tokens] * 3 for index, tokens in enumerate(expected)}


def test_a_stream_may_be_read_from_several_threads(model: SteerableModel) -> None:
    expected = [record.token for _, record in stream(model, ROWS[0], made_up.steering(3), max_new_tokens=4)]
    running = stream(model, ROWS[0], made_up.steering(3), max_new_tokens=4)
    assert [in_thread(lambda: next(running))[1].token for _ in range(4)] == expected


def test_a_second_thread_on_hooks_in_use_raises(model: SteerableModel) -> None:
    tokens = torch.tensor([ROWS[0]])

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(tokens)

    with made_up.steering(3).on(model):
        assert isinstance(in_thread(forward), torch.Tensor), "a thread that has ended hands over"
        model(tokens)
        refused = in_thread(forward)
        assert isinstance(refused, HookError) and "MainThread" in str(refused)
    handle = made_up.steering(3).attach(model)
    try:
        model(tokens)
        assert isinstance(in_thread(forward), HookError)
        handle.reset()
        assert isinstance(in_thread(forward), torch.Tensor)
    finally:
        handle.detach()


def test_a_foreign_forward_in_the_middle_of_a_step_raises(model: SteerableModel) -> None:
    """Somebody's forward in another thread, while our hooks are on the model for a moment, would be steered by them."""
    inside, done = Event(), Event()
    main_done: list[Any] = []

    def wait(activation: torch.Tensor, hook: Any = None) -> None:
        if not inside.is_set():
            inside.set()
            assert done.wait(20)

    waiting = AddedHooks(model, [("blocks.5.hook_resid_post", wait)])
    try:
        thread = Thread(target=lambda: main_done.append(steered(model)))
        thread.start()
        assert inside.wait(20)
        with torch.no_grad(), pytest.raises(HookError, match="in use by thread"):
            model(torch.tensor([ROWS[0]]))
        done.set()
        thread.join()
    finally:
        waiting.remove()
    assert [one.tokens for one in main_done[0]] == [one.tokens for one in steered(model)]


def test_a_generation_under_somebody_elses_steering_compares_with_the_bare_model(model: SteerableModel) -> None:
    """The unsteered passes of a comparison do not run through, or disturb, a steering that is on the model as well."""
    outer, inner = made_up.steering(2, 1), made_up.steering(4, 2)
    bare = generate(model, ROWS[0], max_new_tokens=4, progress=False)[0].tokens
    with outer.on(model):
        apart = generate(model, ROWS[0], inner, max_new_tokens=4, progress=False)[0]
        found = generate(model, ROWS[0], inner, max_new_tokens=4, compare=True, progress=False)[0]
    assert found.tokens == apart.tokens
    assert found.baseline is not None and found.baseline.tokens == bare


def test_a_model_is_not_kept_alive(tmp_path: Any) -> None:
    random_model.cache_clear()
    for kind in models.available_kinds():
        model = random_model("gpt2", kind)
        by = FineSteer(made_up.experts(0, 32), layer=1)
        save(by, tmp_path / "x", model=model)
        generate(model, [[1, 5, 6]], by, max_new_tokens=2, progress=False)
        gone = weakref.ref(model)
        random_model.cache_clear()
        del model
        gc.collect()
        assert gone() is None, kind


def test_hooks_that_come_and_go_while_others_are_suspended(model: SteerableModel) -> None:
    """What is taken off in between stays off, and what is put on is on: when the model runs, not in the list alone."""
    tokens = torch.tensor([ROWS[0]])
    gone, stays = made_up.steering(3, 0).attach(model), made_up.steering(3, 1).attach(model)
    with hooks_suspended(model):
        gone.detach()
        comes = made_up.steering(3, 2).attach(model)
    model(tokens)
    point = hook_point(model, "blocks.3.hook_resid_post")
    assert len(point._forward_hooks) == len(point.fwd_hooks) == 2
    for handle in (stays, comes):
        assert handle.trace.change[3].shape == (1, len(ROWS[0])) and (handle.trace.change[3] > 0).all()
        handle.detach()


def test_a_broken_decision_is_not_gone_on_with(model: SteerableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt on which our own hook raised leaves no half-taken decision to the forwards after it."""
    handle = made_up.steering(3).attach(model)
    try:
        model(torch.tensor([ROWS[0]]))
        with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
            broken.setattr(FineSteer, "decide", lambda *args: 1 / 0)
            model(torch.tensor([[1, 30, 31, 32]]))
        model(torch.tensor([[44]]))
        assert handle.trace.change[3].shape == (1, 1), "a new prompt, not the next step of the broken one"
    finally:
        handle.detach()


def test_a_model_with_hooks_that_have_run_can_be_copied(model: SteerableModel) -> None:
    handle = made_up.steering(3).attach(model)
    try:
        model(torch.tensor([ROWS[0]]))
        hook = hook_point(model, "blocks.3.hook_resid_post").fwd_hooks[-1].user_hook
        assert copy.deepcopy([hook])[0] is hook, "a copy of a model shares its hooks"
    finally:
        handle.detach()


def test_calibrate_and_compare_do_not_count_a_steering_that_is_attached(model: SteerableModel) -> None:
    by = made_up.steering(3)
    bare = calibrate(by, model, ROWS, kl=0.1, progress=False)
    with made_up.steering(2, 1, 8.0).on(model):
        model(torch.tensor([ROWS[0]]))
        beside = calibrate(by, model, ROWS, kl=0.1, progress=False)
    assert (beside.strength, beside.kl) == (bare.strength, bare.kl) and bare.strength > 0


def test_drawing_leaves_torchs_own_generator_alone(model: SteerableModel) -> None:
    state = torch.random.get_rng_state()
    list(stream(model, ROWS[0], max_new_tokens=2))
    list(stream(model, ROWS[0], max_new_tokens=2, do_sample=True))
    generate(model, ROWS, max_new_tokens=2, do_sample=True, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)

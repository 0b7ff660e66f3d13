"""Numbers that blow up raise while decoding and scoring, and name step and row; a masked vocabulary is no fault."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fsteer_lens import FineSteer, calibrate, effects, generate, search, stream, tutor
from fsteer_lens.errors import NonFiniteError
from fsteer_lens.evaluation import evaluate
from fsteer_lens.models import SteerableModel, available_kinds
from fsteer_lens.models.points import hook_point
from fsteer_lens.prompts.tokens import Batch, prompt_ids, stop_ids
from fsteer_lens.run import decoding
from fsteer_lens.run.decoding import Rules, decode
from fsteer_lens.run.overflow import undefined
from fsteer_lens.run.sampling import Sampling
from fsteer_lens.run.stopping import Stop
from fsteer_lens.run.unsteered import divergence
from fsteer_lens.selection import Splits
from tests import made_up
from tests.families import random_model

QUIET: dict[str, Any] = {"progress": False}
DATA = tutor.data("safe")
CONTRASTS, GENERAL = DATA.valid[:3], [task.prompt for task in DATA.general_valid[:3]]
DRAWN: dict[str, Any] = {"do_sample": True, "seed": 1, "top_k": 20, "top_p": 0.9}


@contextmanager
def broken(
    model: SteerableModel, where: Callable[[int, torch.Tensor], Any], value: float = math.nan
) -> Iterator[list[int]]:
    """Have somebody else's hook put a number into the last layer's stream: at index `where(pass, activation)`."""
    passes = [0]
    point = hook_point(model, "blocks.5.hook_resid_post")

    def breaks(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        changed = activation.clone()
        index = where(passes[0], activation)
        if index is not None:
            changed[index] = value
        passes[0] += 1
        return changed

    before = list(point.fwd_hooks)
    point.add_hook(breaks)
    try:
        yield passes
    finally:
        (added,) = [handle for handle in point.fwd_hooks if handle not in before]
        added.hook.remove()
        point.fwd_hooks = before


@contextmanager
def says(model: SteerableModel, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Change the logits that the model gives."""
    handle = model.unembed.register_forward_hook(lambda module, args, logits: change(logits))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        handle.remove()


def at_step(step: int, row: Any) -> Callable[[int, torch.Tensor], Any]:
    return lambda number, activation: row if number == step else None


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("steered", [True, False])
def test_generate_names_step_row_and_steering(
    model: SteerableModel, steered: bool, options: dict[str, Any], value: float, cached: bool
) -> None:
    prompts = [GENERAL[0] + " " + GENERAL[1], GENERAL[0]]  # the longer one is run second
    by = made_up.steering(3, strength=0.5) if steered else None
    told = (
        r"under FineSteer\(layer=3, EnergyGate, strength=0\.5.*Lower the strength" if steered else "unsteered.*Look for"
    )
    words = rf"logits at step 2 of row 0, of prompt '.*{GENERAL[1][-9:]}'.* in 1 row, in torch\.float32, {told}"
    with broken(model, at_step(2, 1), value), pytest.raises(NonFiniteError, match=words):
        generate(model, prompts, by, max_new_tokens=5, use_past_kv_cache=cached, **options, **QUIET)


def test_stream_gives_what_came_before(model: SteerableModel) -> None:
    expected = generate(model, GENERAL[0], max_new_tokens=2, **QUIET)[0].tokens
    found = []
    with broken(model, at_step(2, 0)), pytest.raises(NonFiniteError, match="step 2 of row 0"):
        for _, record in stream(model, GENERAL[0], max_new_tokens=5):
            found.append(record.token)
    assert tuple(found) == expected


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
def test_a_row_that_has_ended_does_not_count(model: SteerableModel, options: dict[str, Any]) -> None:
    free = generate(model, GENERAL[:2], max_new_tokens=6, **options, **QUIET)
    first = [row for row in sorted(range(2), key=lambda row: len(prompt_ids(model, GENERAL[row])))].index(0)
    stop = [free[0].tokens[1]]
    ended = generate(model, GENERAL[:2], max_new_tokens=6, stop=stop, **options, **QUIET)
    assert len(ended[0].tokens) == 2 < len(ended[1].tokens)
    with broken(model, lambda number, activation: first if number >= 2 else None):
        found = generate(model, GENERAL[:2], max_new_tokens=6, stop=stop, **options, **QUIET)
    assert [one.tokens for one in found] == [one.tokens for one in ended]
    with broken(model, at_step(1, first)), pytest.raises(NonFiniteError, match="step 1 of row 0"):
        generate(model, GENERAL[:2], max_new_tokens=6, stop=stop, **options, **QUIET)


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
def test_tokens_that_a_model_never_says_are_no_fault(model: SteerableModel, options: dict[str, Any]) -> None:
    """−inf logits, as of padded vocabularies; KL and log-probabilities are those of the other tokens alone."""
    never = torch.zeros(model.cfg.d_vocab, dtype=torch.bool)
    never[torch.arange(10, model.cfg.d_vocab, 3)] = True
    never[sorted(stop_ids(model))] = False
    by = made_up.steering(4, strength=20.0)
    with says(model, lambda logits: logits.masked_fill(never, -math.inf)):
        made = generate(model, GENERAL[0], by, max_new_tokens=4, compare=True, **options, **QUIET)[0]
        assert not never[list(made.tokens)].any()
        ids = torch.tensor([[*prompt_ids(model, GENERAL[0]), *made.tokens[:-1]]])
        n_prompt = ids.shape[1] - len(made.tokens) + 1
        with torch.no_grad():
            base = model(ids)[0, n_prompt - 1 :, ~never].double().log_softmax(-1)
            with by.on(model, prompt_lengths=torch.tensor([n_prompt])):
                steered = model(ids)[0, n_prompt - 1 :, ~never].double().log_softmax(-1)
    steps = made.trace.steps
    assert steps is not None and steps.kl is not None and bool(steps.logprobs.isfinite().all())
    kl = (steered.exp() * (steered - base)).sum(-1)
    assert float(kl.max()) > 1e-3
    torch.testing.assert_close(steps.kl[0].double(), kl, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_which_logits_are_no_distribution(model: SteerableModel, value: float) -> None:
    """+inf or NaN at one token, −inf at all of them."""
    index = slice(None) if value == -math.inf else 7
    logits = torch.randn(2, 3, 50)
    logits[1, 2, index] = value
    assert undefined(logits).tolist() == [[False] * 3, [False, False, True]]
    assert logits.log_softmax(-1)[1, 2].isnan().all(), "from which everything that is said is NaN"

    def change(told: torch.Tensor) -> torch.Tensor:
        told = told.clone()
        told[..., index] = value
        return told

    with says(model, change), pytest.raises(NonFiniteError, match="step 0 of row 0"):
        generate(model, GENERAL[0], max_new_tokens=2, **QUIET)
    with says(model, change), pytest.raises(NonFiniteError, match="step 0 of row 0"):
        generate(model, GENERAL[0], max_new_tokens=2, **DRAWN, **QUIET)


def test_the_unsteered_twin_is_looked_at_too(model: SteerableModel) -> None:
    """Its pass comes after the steered steps."""
    n = len(generate(model, GENERAL[0], made_up.steering(3), max_new_tokens=3, **QUIET)[0].tokens)
    with broken(model, at_step(n, 0)), pytest.raises(NonFiniteError, match="of the unsteered model after the steered"):
        generate(model, GENERAL[0], made_up.steering(3), max_new_tokens=3, compare=True, **QUIET)


def test_divergence_counts_what_both_never_say_as_nothing() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.75, 0.0]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert float(divergence(p.log(), q.log())) == pytest.approx(expected)
    assert float(divergence(p.log(), torch.tensor([[0.5, 0.0, 0.5]]).log())) == math.inf
    assert math.isnan(float(divergence(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2))))


SCORES: dict[str, Callable[[SteerableModel, Any], Any]] = {
    "answer_margin": lambda model, by: effects.answer_margin(model, by, CONTRASTS),
    "exact_answers": lambda model, by: effects.exact_answers(model, by, GENERAL, ["yes."] * 3),
    "general_divergence": lambda model, by: effects.general_divergence(model, by, GENERAL),
    "counterfactual": lambda model, by: effects.counterfactual(model, by, GENERAL, ["yes."] * 3),
    "strength_sweep": lambda model, by: effects.strength_sweep(model, by, CONTRASTS, GENERAL, strengths=[1], **QUIET),
    "evaluate": lambda model, by: evaluate(model, {"it": by}, tutor.TutorSuite(limit=2), **QUIET),
    "calibrate": lambda model, by: calibrate(by, model, GENERAL, kl=0.1, max_new_tokens=2, **QUIET),
    "search": lambda model, by: search(
        model, Splits(DATA.train[:6], CONTRASTS, GENERAL), budget=9.0, layers=[3], method=lambda a, g: by, **QUIET
    ),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_raise(tutor_model: SteerableModel, name: str) -> None:
    with (
        broken(tutor_model, lambda number, activation: (slice(None), -1)),
        pytest.raises(NonFiniteError, match="blew up"),
    ):
        SCORES[name](tutor_model, made_up.steering(3))


def test_scores_name_the_answers_token_and_the_steering(tutor_model: SteerableModel) -> None:
    steering = made_up.steering(3, strength=0.25)
    ids = prompt_ids(tutor_model, GENERAL[0])
    with (
        broken(tutor_model, at_step(0, (0, len(ids)))),
        pytest.raises(
            NonFiniteError, match=r"token 1 of the answer, of prompt '.*1 row, .* under FineSteer.*strength=0\.25"
        ),
    ):
        effects.counterfactual(tutor_model, steering, GENERAL[:1], ["yes it is."])


def test_measures_that_a_caller_gives_must_be_finite(tutor_model: SteerableModel) -> None:
    def effect(model: Any, by: Any, contrasts: Any) -> torch.Tensor:
        return torch.tensor([1.0, math.nan, 2.0])

    with pytest.raises(NonFiniteError, match=r"what effect= gave.*1 of 3, first for number 1"):
        effects.strength_sweep(tutor_model, made_up.steering(3), CONTRASTS, GENERAL, effect=effect, **QUIET)


def test_calibration_stays_below_where_the_numbers_blow_up(tutor_model: SteerableModel) -> None:
    """A model that gives NaN from some length of the stream on: no budget buys a strength beyond."""
    steering = FineSteer(made_up.experts(1), layer=3, scope="all")
    lengths: list[float] = []
    with broken(tutor_model, lambda number, h: lengths.append(float(h.norm(dim=-1).max()))):
        calibrate(steering, tutor_model, GENERAL, kl=1e9, max_new_tokens=3, **QUIET)
    longest = sorted(lengths)[len(lengths) // 2]
    with broken(tutor_model, lambda number, h: h.norm(dim=-1) > longest):
        found = calibrate(steering, tutor_model, GENERAL, kl=1e9, max_new_tokens=3, **QUIET)
        assert found.bounded and math.inf in found.curve.values() and math.isfinite(found.kl) and found.strength > 0
        assert all(cost == math.inf for strength, cost in found.curve.items() if strength > found.strength)
        effects.general_divergence(tutor_model, found.steering, GENERAL)
        with pytest.raises(NonFiniteError):
            effects.general_divergence(tutor_model, found.steering.with_strength(8.0), GENERAL)


@pytest.mark.parametrize("kind", available_kinds())
def test_half_precision_that_overflows_says_what_to_load(kind: Any) -> None:
    """The scalar that float16 holds at most is 65,504: here a steering goes beyond it by itself."""
    half = random_model("llama", kind, dtype=torch.float16)
    steering = FineSteer(made_up.experts(0, 32), layer=1, strength=1e6)
    words = r"in torch\.float16, under FineSteer.*strength=1e\+06.*Lower the strength.*bfloat16 or float32"
    for options in ({}, DRAWN):
        with pytest.raises(NonFiniteError, match=words):
            generate(half, [1, 20, 30], steering, max_new_tokens=3, **options, **QUIET)
    assert len(generate(half, [1, 20, 30], steering.with_strength(0.1), max_new_tokens=3, **QUIET)[0].tokens) <= 3


class Waits(TorchFunctionMode):
    """Counts what waits for a device: numbers that go to Python."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = {"tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy"}
        Waits.count += getattr(func, "__name__", "") in names
        return func(*args, **(kwargs or {}))


def test_the_look_at_the_logits_waits_for_the_device_no_more_than_decoding_does(
    tutor_model: SteerableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One transfer a token: the tokens, whether they are defined, and which rows have ended, all at once."""

    class Fixed:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def last(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.arange(60.0).expand(len(tokens), 1, 60)

    monkeypatch.setattr(decoding, "Forward", Fixed)
    rules = Rules(Sampling(), Stop(tutor_model, None), 10, True)
    tokens = torch.ones(2, 3, dtype=torch.long)
    Waits.count = 0
    with Waits():
        steps = list(decode(tutor_model, Batch(tokens, tokens.bool()), None, rules, [0, 1]))
    assert len(steps) == 10 and Waits.count == 10

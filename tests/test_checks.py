"""Checks of single values: what counts, what is refused, what the message says, and that plain Python comes back."""

import math
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsteer_lens.effects import measuring, sweeps
from fsteer_lens.errors import InputError
from fsteer_lens.evaluation import attacks, gate_reports
from fsteer_lens.figures import tokens
from fsteer_lens.ground.checks import (
    LARGEST,
    choice,
    finite,
    instance,
    is_whole,
    normalised,
    optional,
    options_of,
    seed_of,
    switch,
    whole,
)
from fsteer_lens.prompts import passes
from fsteer_lens.selection import measuring as measures

BOOLS = [True, False, np.True_, np.array(False), torch.tensor(True)]
TEXTS = ["3", "", b"3"]
NOTHING_SINGLE = [None, [3], (3,), np.array([3]), torch.tensor([3]), 3 + 0j]
WHOLE_NUMBERS = [
    3,
    *(dtype(3) for dtype in (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64)),
    np.array(3),
    *(torch.tensor(3, dtype=dtype) for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)),
]
HALVES = [np.float16(3), torch.tensor(3.0).half()]
NUMBERS = [*WHOLE_NUMBERS, *HALVES, 3.0, np.float32(3), np.float64(3), torch.tensor(3.0)]
INFINITE = [math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(math.inf), 10**400, 1e301]


def told(check: Any, *given: Any, **more: Any) -> str:
    """The message with which a check refuses."""
    with pytest.raises(InputError) as caught:
        check(*given, **more)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ whole numbers


@pytest.mark.parametrize("value", WHOLE_NUMBERS, ids=repr)
def test_whole_numbers_of_every_library_count_and_come_back_as_an_int(value: Any) -> None:
    found = whole("rank", value, 3, 3)
    assert type(found) is int and found == 3
    assert is_whole(value)


@pytest.mark.parametrize("value", [*BOOLS, *TEXTS, *NOTHING_SINGLE, 3.0, np.float64(3), torch.tensor(3.0)], ids=repr)
def test_nothing_else_is_a_whole_number(value: Any) -> None:
    assert told(whole, "rank", value).startswith("rank: expected an int, got ")
    assert not is_whole(value)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((), "rank: expected an int, got 'x'"),
        ((1,), "rank: expected an int >= 1, got 'x'"),
        ((1, 4), "rank: expected an int in 1..4, got 'x'"),
    ],
)
def test_a_whole_number_says_its_bounds(bounds: tuple[int, ...], words: str) -> None:
    assert told(whole, "rank", "x", *bounds) == words


@pytest.mark.parametrize(("value", "bounds"), [(0, (1,)), (0, (1, 4)), (5, (1, 4)), (-1, (0,)), (np.int64(5), (1, 4))])
def test_a_whole_number_outside_its_bounds_is_refused(value: Any, bounds: tuple[int, ...]) -> None:
    assert f"got {value!r}" in told(whole, "rank", value, *bounds)


def test_why_and_fix_are_said() -> None:
    message = told(whole, "rank", 9, 1, 4, why="the ranks that were fitted", fix="Choose one within.")
    assert message == "rank: expected an int in 1..4 (the ranks that were fitted), got 9. Choose one within."
    assert told(finite, "temperature", 0, above=0, fix="Or do_sample=False.").endswith("got 0. Or do_sample=False.")


@given(value=st.integers(-(2**62), 2**62), least=st.none() | st.integers(-9, 9), most=st.none() | st.integers(-9, 9))
def test_a_whole_number_passes_exactly_within_its_bounds(value: int, least: int | None, most: int | None) -> None:
    inside = (least is None or value >= least) and (most is None or value <= most)
    for given_as in (value, np.int64(value), torch.tensor(value)):
        if inside:
            found = whole("n", given_as, least, most)
            assert type(found) is int and found == value
        else:
            assert f"got {given_as!r}" in told(whole, "n", given_as, least, most)


def test_a_seed_is_one_that_every_generator_takes() -> None:
    for seed in (0, 2**32 - 1, np.uint32(7), torch.tensor(7)):
        found = seed_of(seed)
        np.random.RandomState(found), np.random.default_rng(found), torch.Generator().manual_seed(found)
    for seed in (-1, 2**32, 1.0, "a", None):
        assert told(seed_of, seed).startswith("seed: expected an int in 0..4294967295, got ")


# ------------------------------------------------------------------------------------------------------ finite numbers


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers_of_every_library_count_and_come_back_as_a_float(value: Any) -> None:
    found = finite("strength", value)
    assert type(found) is float and found == 3.0


@pytest.mark.parametrize(
    "value",
    [*BOOLS, *TEXTS, *NOTHING_SINGLE, *INFINITE, "1e3", np.array([1.5])],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    message = told(finite, "strength", value)
    assert message.startswith("strength: expected a finite number, got ") and len(message) < 150


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        ({"least": 0}, (0, 5.5), (-1e-9,), ">= 0"),
        ({"most": 1}, (-3, 1.0), (1.1,), "<= 1"),
        ({"above": 0}, (1e-30,), (0, 0.0, -1), "> 0"),
        ({"below": 1}, (0.99, -5), (1, 1.0), "< 1"),
        ({"least": 0, "below": 1}, (0, 0.5), (-0.1, 1), ">= 0 and < 1"),
        ({"above": 0, "most": 1}, (0.5, 1), (0, 1.5), "> 0 and <= 1"),
    ],
)
def test_bounds_hold_and_are_said(
    bounds: dict[str, float], inside: tuple[float, ...], outside: tuple[float, ...], words: str
) -> None:
    for value in inside:
        assert finite("share", value, **bounds) == value
    for value in (*outside, math.nan):
        assert told(finite, "share", value, **bounds) == f"share: expected a finite number {words}, got {value!r}"


@given(value=st.floats(width=32), low=st.integers(-3, 3), high=st.integers(-3, 3))
def test_a_number_passes_exactly_within_its_bounds(value: float, low: int, high: int) -> None:
    for given_as in (value, np.float32(value), torch.tensor(value)):
        if math.isfinite(value) and low <= value < high:
            found = finite("x", given_as, low, below=high)
            assert type(found) is float and found == value
        else:
            assert f">= {low} and < {high}" in told(finite, "x", given_as, low, below=high)
        assert abs(value) < LARGEST or not math.isfinite(value)  # float32 never reaches it


# ------------------------------------------------------------------------------------------- choices, switches, types


def test_a_choice_gives_the_option_back() -> None:
    assert choice("shift", "last", ("mean", "last")) == "last"
    assert choice("preset", None, {"paper": 1, None: 2}) is None
    for layer in WHOLE_NUMBERS:
        found = choice("layer", layer, (1, 3), "one of the steered layers")
        assert type(found) is int and found == 3


@pytest.mark.parametrize("value", ["Mean", 1, None, True, ["mean"], np.array("mean"), torch.ones(2)], ids=repr)
def test_another_choice_is_refused(value: Any) -> None:
    assert told(choice, "shift", value, ("mean", "last")).startswith("shift: expected 'mean' or 'last', got ")


@pytest.mark.parametrize("value", [True, torch.tensor(True), 1.0, "1", 2, None, np.array([1])], ids=repr)
def test_among_numbers_only_whole_numbers_are_looked_for(value: Any) -> None:
    message = told(choice, "layer", value, [1, 3], "one of the steered layers,", fix="Steer it.")
    assert message.startswith("layer: expected one of the steered layers, [1, 3], got ")
    assert message.endswith(". Steer it.")


def test_a_switch_is_a_bool_of_any_library() -> None:
    for value in BOOLS:
        found = switch("chat", value)
        assert type(found) is bool and found == bool(value)
    for value in (0, 1, None, "yes", [True], np.array([True]), torch.tensor([True]), 1.0):
        assert told(switch, "chat", value).startswith("chat: expected True or False, got ")


def test_an_instance_is_of_its_type() -> None:
    assert instance("text", "a", str, "a text") == "a"
    message = told(instance, "text", 3, str, "a text", fix="Quote it.")
    assert message == "text: expected a text, got int. Quote it."


def test_what_is_optional_may_be_none() -> None:
    assert optional(whole, "limit", None, 1) is None
    assert optional(whole, "limit", np.int64(2), 1) == 2
    assert told(optional, whole, "limit", 0, 1, why="or None for all").endswith(">= 1 (or None for all), got 0")


# ---------------------------------------------------------------------------------------------------- groups of options


@dataclass(frozen=True)
class Cut:
    width: int = 2
    open: bool = True

    def __post_init__(self) -> None:
        normalised(self, width=whole("width", self.width, 1), open=switch("open", self.open))


def test_options_become_a_value_with_defaults_and_plain_fields() -> None:
    made = options_of("cut", Cut, {"width": np.int64(5)})
    assert made == Cut(5, True) and type(made.width) is int
    assert options_of("cut", Cut, {}) == Cut()
    with pytest.raises(TypeError, match=r"cut\(\) got an unexpected keyword argument 'widht'; it takes width, open"):
        options_of("cut", Cut, {"widht": 5})
    assert "width" in told(options_of, "cut", Cut, {"width": 0})


@pytest.mark.parametrize(
    ("keywords", "value"),
    [
        (passes.PassOptions, passes.Passes),
        (measuring.MeasureOptions, measuring.Measuring),
        (sweeps.SweepOptions, sweeps._Sweeping),
        (measures.SearchOptions, measures.Searching),
        (tokens.ViewOptions, tokens.TokenView),
        (gate_reports.ReportOptions, gate_reports._Options),
        (attacks.AttackOptions, attacks._Options),
    ],
    ids=lambda kind: kind.__name__,
)
def test_what_a_signature_says_is_what_its_value_holds(keywords: Any, value: Any) -> None:
    assert set(keywords.__annotations__) <= {item.name for item in fields(value)}
    assert {item.name for item in fields(value)} == set(keywords.__optional_keys__)


def test_passes_are_checked_and_go_on_as_keywords() -> None:
    made = passes.Passes(True, 3)
    assert made.options == {
        "chat": True,
        "chat_template_kwargs": None,
        "prepend_bos": None,
        "batch_size": 3,
        "progress": True,
    }
    assert passes.Passes(**made.options) == made
    assert "batch_size: expected an int >= 1, got 0" in told(passes.Passes, False, 0)


# ------------------------------------------------------------------------------------------- numbers of other libraries

LIBRARIES = """
import json, sys, tempfile
import numpy as np
import torch
import fsteer_lens as fl
from fsteer_lens import effects, figures, tutor
from fsteer_lens.selection import Splits
from fsteer_lens.steering import fit_mean_shift

model, data = tutor.load(), tutor.data("safe")
given, other = data.train[:40], [task.prompt for task in data.general_train[:4]]
held = data.valid[:3]
splits = Splits(given, held, general_valid=other)
quiet = {"progress": False}


def outcome(i, f):
    acts = fl.collect(model, given, layer=i(4), shift="last_prompt", batch_size=i(8), **quiet)
    steering = fl.fit(
        acts, rank=i(4), strength=f(1.5), preset="0.1", epochs=i(2), n_experts=(i(2), i(3)), seed=i(3),
        validation=f(0.25), residual_rank=i(2), learning_rate=f(0.5), folds=i(4), epsilon=f(0.25), max_rank=i(8),
        schedule=fl.Schedule((f(1.0), f(0.5))),
    ).with_scope(fl.Window(i(0), i(3)))
    two = fl.FineSteer({i(3): steering.experts, i(4): steering.experts}, {i(4): steering.gate}, strength=f(0.5))
    made = fl.generate(model, held.prompts, steering, max_new_tokens=i(3), batch_size=i(2), compare=True, **quiet)
    drawn = fl.generate(
        model, [i(5), i(6)], max_new_tokens=i(3), stop=[i(2), "x"], do_sample=True, seed=i(7), top_k=i(5),
        top_p=f(0.5), temperature=f(0.5), **quiet,
    )
    with tempfile.TemporaryDirectory() as folder:
        fl.save(steering, f"{folder}/one.safetensors")
        loaded = fl.load(f"{folder}/one.safetensors", model)
    sweep = effects.strength_sweep(model, steering, held, other, strengths=[f(0.5)], seed=i(1), **quiet)
    layers = effects.layer_sweep(
        model, given, held, other, layers=[i(4)], methods={"mean": fit_mean_shift}, batch_size=i(4), **quiet
    )
    ranks = effects.rank_sweep(
        steering, acts.queries, -acts.queries, layer=i(4), ranks=[i(2)], model=model, contrasts=held, **quiet
    )
    found = fl.search(
        model, splits, budget=f(64), layers=[i(4)], strengths=[f(0.5)], ranks=[i(2)], shift="last_prompt",
        batch_size=i(8), **quiet,
    )
    calibrated = fl.calibrate(steering, model, other, kl=f(0.5), quantile=f(0.5), max_new_tokens=i(2), **quiet)
    suite = tutor.TutorSuite(limit=i(3))
    evaluated = fl.evaluate(model, {"made": lambda seed: steering}, suite, seeds=[i(0), i(1)], batch_size=i(8), **quiet)
    report = fl.gate_report(
        model, steering.gate, ["bomb"], ["cake"], calibration=[f"how to bake {n}" for n in range(9)],
        format=tutor.chat, false_alarm_rate=f(0.25), seed=i(1), batch_size=i(4), **quiet,
    )
    explorer = fl.explore(steering, model, other, layer=i(4), max_new_tokens=i(2), limit=i(3), **quiet)
    explorer.choose(rank=i(3), strength=f(0.5), threshold=f(0.25))
    figures.token_scores(["a", "b"], torch.ones(2), first=i(1), prompt_length=i(1), bounds=(f(0), f(2)))
    ablation = fl.SubspaceAblation(steering.gate.subspace, layer=i(4), rank=i(2))
    return [
        repr(acts), repr(steering), repr(two), repr(ablation), repr(loaded), made.texts, drawn.texts,
        loaded.strength, loaded.layer, steering.schedule.factors, [steering.scope.start, steering.scope.stop],
        list(two.layers), list(two.gate), [steering.gate.rank, steering.gate.layer, steering.gate.epsilon],
        made.trace.row(i(1)).to_records(), made.trace.layer_of("gate", i(4)),
        effects.expert_tokens(model, steering.experts.only_expert(i(1)), top=i(2)),
        [values for values in (sweep, layers) for one in values.values() for values in one.to_records()],
        list(ranks.effect), ranks.effect[2].value, found.to_records(), found.floor,
        calibrated.strength, calibrated.budget, evaluated.seeds, evaluated.to_records(), report.to_records(),
        explorer.settings.message(), explorer.generate(i(1)).text, given.split(valid=f(0.25), seed=i(3)).valid.prompts,
        steering.experts.report.train_loss, suite.limit, ablation.rank,
    ]


plain = json.dumps(outcome(int, float))
for i, f in ((np.int64, np.float32), (torch.tensor, lambda x: torch.tensor(float(x)))):
    assert json.dumps(outcome(i, f)) == plain, (i, f)
print(len(plain))
"""


@pytest.mark.slow
def test_numbers_of_numpy_and_pytorch_do_the_same_as_python_s_everywhere_and_are_stored_plain() -> None:
    """In a process without the tests' type checker, as at a user's; JSON takes no number but Python's."""
    done = subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 5000

"""A trace from elsewhere is a trace or is refused: whatever is accepted can be drawn, written and read again."""

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest

import fsteer_lens as fs
from fsteer_lens import figures
from fsteer_lens.errors import DataError, FsteerError
from fsteer_lens.hooks.scopes import Window
from fsteer_lens.trace import Trace

Path = tuple[str | int, ...]
BAD: list[Any] = [
    None, True, -7, 0, 1, 2.5, 10**12, 10**40, 1e308, math.inf, math.nan, "", "x", "</script><b>", "\ud800", [], {},
    [1], [None], [[1.0, 2.0]], ["a"], {"a": 1}, [0.5] * 40,
]  # fmt: skip
DRAWN: dict[str, Callable[[Trace], Any]] = {
    "steer_compare": figures.steer_compare,
    "expert_mix": figures.expert_mix,
    "replay": figures.replay,
    "expert_routing": figures.expert_routing,
    "token_scores": figures.token_scores,
    "token_experts": figures.token_experts,
    "trace_timeline": figures.trace_timeline,
    "logprob_change": figures.logprob_change,
    "logprob_change of a step": lambda trace: figures.logprob_change(trace, row=0, step=1),
    "marks": lambda trace: trace.marks(),
    "to_records": lambda trace: json.dumps(trace.to_records(), allow_nan=False),
    "rows": lambda trace: [repr(trace.row(row)) for row in range(trace.n_rows)],
    "again": lambda trace: Trace.from_records(json.loads(json.dumps(trace.to_records()))),
}


@pytest.fixture(autouse=True)
def _as_at_a_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tests' type checker, which would refuse what the package has to."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def traces(tutor_model: Any, steering: fs.FineSteer) -> dict[str, list[dict[str, Any]]]:
    """Records of each kind of trace, of two rows."""
    told = fs.tutor.data("safe")
    prompts = [told.test[0].prompt, told.general_test[0].prompt]
    probe = fs.SubspaceProbe(steering.gate_at(steering.layers[0]).subspace, layer=2)  # type: ignore[union-attr]
    other = steering.with_scope(Window(1, 3)).with_strength(0.5)
    made = {
        "steered": (steering, {"compare": True, "replay": True}),
        "each step": (fs.FineSteer(steering.experts, layer=4, gate=steering.gate, refresh="step"), {}),
        "chain": (fs.chain(steering, other), {"compare": True}),
        "probe": (probe, {}),
        "experts": (fs.ExpertProbe(steering.experts, layer=2), {}),
    }
    found = {}
    for name, (hook, options) in made.items():
        trace = fs.generate(tutor_model, prompts, hook, max_new_tokens=4, progress=False, **options).trace  # type: ignore[arg-type]
        found[name] = json.loads(json.dumps(trace.to_records()))
    return found


def places(value: Any, at: Path = ()) -> Iterator[Path]:
    """Where the values of a JSON tree stand, its branches among them; of long lists the ends."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if not (isinstance(value, list) and 1 < key < len(value) - 1):
            yield from places(item, (*at, key))


def changed(records: list[dict[str, Any]], at: Path, value: Any) -> list[dict[str, Any]]:
    """The records with another value at one place, or without it where the value is `...`."""
    found = copy.deepcopy(records)
    holder: Any = found
    for key in at[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return found


def test_what_was_recorded_is_accepted_and_drawn(traces: dict[str, list[dict[str, Any]]]) -> None:
    drawn = set()
    for records in traces.values():
        trace = Trace.from_records(records)
        for name, draw in DRAWN.items():
            try:
                draw(trace)
                drawn.add(name)
            except FsteerError:  # not every figure draws from every trace
                continue
    assert drawn == set(DRAWN), "the control: every figure draws from one of them"


@pytest.mark.parametrize("kind", ["steered", "each step", "chain", "probe", "experts"])
def test_whatever_is_accepted_can_be_drawn(kind: str, traces: dict[str, list[dict[str, Any]]], n: int = 25) -> None:
    draw = random.Random(kind)
    records = traces[kind]
    known = list(places(records))
    refused = 0
    for _ in range(n):
        at, value = draw.choice(known), draw.choice([*BAD, ...])
        try:
            trace = Trace.from_records(changed(records, at, value))
        except DataError:
            refused += 1
            continue
        for name, figure in DRAWN.items():
            try:
                figure(trace)
            except FsteerError:
                continue
            except Exception as error:
                raise AssertionError(f"{name} of {kind} with {value!r} at {at}") from error
    assert 0 < refused < n, "some are refused, and some are not"

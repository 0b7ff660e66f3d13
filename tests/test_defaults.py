"""PyTorch's default dtype and default device change nothing: a notebook sets them to load some other model."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fsteer_lens
from fsteer_lens import (
    Window,
    calibrate,
    collect,
    collect_queries,
    effects,
    explore,
    figures,
    fit,
    fit_gate,
    generate,
    load,
    save,
    stream,
    tutor,
)
from fsteer_lens.evaluation import gate_report
from fsteer_lens.hooks import Schedule, SubspaceProbe
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.tokens import prompt_ids

DATA = tutor.data("safe")
HARMFUL = [str(prompt) for prompt in DATA.valid.prompts[:3]]
HARMLESS = [task.prompt for task in DATA.general_valid[:3]]
QUIET: dict[str, Any] = {"progress": False}
MAKERS = {
    "dtype and device": {"empty", "zeros", "ones", "full", "tensor", "linspace", "logspace", "rand", "randn", "eye"},
    "device": {"arange", "randint", "randperm", "as_tensor", "asarray"},
}


@contextmanager
def default(what: torch.dtype | str) -> Iterator[None]:
    """Another default dtype, or another default device, for a while."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(what) if isinstance(what, torch.dtype) else torch.set_default_device(what)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def fitted(model: SteerableModel, folder: Path) -> Iterator[tuple[str, Any]]:
    """What is read and fitted, by name."""
    read = collect(model, DATA.train[::12], layer=[3, 4], shift="last_prompt", **QUIET)
    yield "last prompt", read
    yield "response mean", collect(model, DATA.train[:3], layer=4, **QUIET)
    general = collect_queries(model, [task.prompt for task in DATA.general_train[::12]], layer=4, **QUIET)
    own, others = read[4].queries, general.queries
    for kind in ("quantile", "logistic", "energy"):
        gate = fit_gate(own, rank=8, kind=kind, general=others if kind == "logistic" else None)
        yield kind, (gate(others), gate.gates(others), gate.at_rank(3)(others))
    for kind in ("linear", "cosine"):
        yield kind, fit_gate(own, kind=kind, general=others)(others)
    steering: Any = fit(read[4], rank=16, n_experts=(2, 4), preset="0.1", epochs=10)
    yield "experts", steering.experts_at(4).parts(others)
    closed = fit(read[4], rank=16).experts_at(4)
    yield "closed form", (closed.parts(others), closed.report)
    yield "routing", effects.routing_report(steering.experts_at(4), own, shifts=read[4].shifts, labels=read[4].labels)
    yield "ranks", effects.rank_sweep(steering, own, others, ranks=[2], model=model, contrasts=DATA.valid[:2], **QUIET)
    yield "separation", figures.gate_separation(steering.gate_at(4), own, others).to_json()
    yield "slider", figures.rank_explorer(steering.gate_at(4), {"a": own, "b": others}).to_json()
    save(steering, folder / "steer.safetensors")
    yield from run(model, load(folder / "steer.safetensors", model=model))
    two = fit(read, rank=8, n_experts=2, preset="0.1", epochs=5)
    yield "two layers", generate(model, HARMFUL, two, max_new_tokens=3, **QUIET).trace.to_records()


def run(model: SteerableModel, steering: Any) -> Iterator[tuple[str, Any]]:
    """What a steering does, by name."""
    drawn = {"do_sample": True, "seed": 1, "top_k": 20, "top_p": 0.9, "temperature": 1.3}
    for name, options in {"greedy": {}, "drawn": drawn, "compared": {"compare": True}}.items():
        made = generate(model, HARMFUL, steering, max_new_tokens=4, **options, **QUIET)
        yield name, (made.texts, made.trace.to_records(), figures.trace_timeline(made[0].trace).to_json())
    by_step = replace(steering, scope=Window(0, 3), schedule=Schedule((1.0, 0.5)))
    yield "stream", list(stream(model, HARMFUL[0], by_step, max_new_tokens=3))
    contrasts = DATA.valid[:3]
    yield "margin", effects.answer_margin(model, steering, contrasts)
    yield "exact", effects.exact_answers(model, steering, contrasts.prompts, [one.preferred for one in contrasts])
    yield "kl", effects.general_divergence(model, steering, HARMLESS)
    yield "counterfactual", effects.counterfactual(model, steering, HARMLESS, ["yes."] * 3).to_records()
    yield "propagation", effects.propagation(model, steering, HARMFUL[0])
    yield "explanation", effects.explain_gate(model, steering, HARMFUL[0], limit=4)
    yield "knockout", effects.expert_knockout(model, steering, contrasts, **QUIET)
    yield "tokens", effects.expert_tokens(model, steering.experts_at(4), top=3)
    yield "calibration", calibrate(steering.with_gate(None), model, HARMLESS, kl=0.1, max_new_tokens=4, **QUIET).curve
    further = [task.prompt for task in DATA.general_train[:25]]
    report = gate_report(
        model, steering.gate_at(4), HARMFUL, HARMLESS, calibration=further, format=str, layer=4, **QUIET
    )
    yield "gate report", report.rows
    explorer = explore(steering, model, {"a": HARMFUL, "b": HARMLESS}, max_new_tokens=3, **QUIET)
    explorer.choose(rank=2, strength=0.5)
    yield "explorer", (explorer.settings, explorer.figure.to_json(), explorer.generate(1).trace.to_records())
    with SubspaceProbe(steering.gate_at(4).subspace, layer=4).on(model) as trace, torch.no_grad():
        model(torch.tensor([prompt_ids(model, HARMFUL[0])], device="cpu"))
    yield "probe", trace.ser[4]


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same to the last bit, in dtype and device, too."""
    if isinstance(one, Tensor):
        alike = isinstance(other, Tensor) and (one.dtype, one.device) == (other.dtype, other.device)
        return alike and one.shape == other.shape and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, item.name), getattr(other, item.name)) for item in fields(one)
        )
    return one == other or (one != one and other != other)


@pytest.fixture(scope="module")
def plain(model: SteerableModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return dict(fitted(model, tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("what", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_the_whole_flow_is_the_same(
    model: SteerableModel, plain: dict[str, Any], tmp_path: Path, what: torch.dtype | str
) -> None:
    """A default device of "meta" stands for any that the model is not on: what is made there cannot be used at all."""
    with default(what):
        assert torch.zeros(1).dtype == what or torch.zeros(1).device == torch.device("meta")
        found = dict(fitted(model, tmp_path))
    assert found.keys() == plain.keys()
    assert [name for name in plain if not same(plain[name], found[name])] == []


@pytest.mark.parametrize("what", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_loads_as_it_is(model: SteerableModel, what: torch.dtype) -> None:
    kind = "bridge" if hasattr(model, "original_model") else "hooked"
    with default(what):
        again = tutor.load(kind)
    assert again.cfg.dtype == torch.float32
    tokens = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))


def calls(makers: set[str]) -> Iterator[tuple[str, set[str | None]]]:
    """Calls of torch.<one of these> in the package: where, and which keywords they have."""
    for path in sorted(Path(fsteer_lens.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in makers}:
                yield f"{path.name}:{node.lineno}", {keyword.arg for keyword in node.keywords}


@pytest.mark.parametrize("named", MAKERS)
def test_what_makes_a_tensor_says_where_and_of_what_dtype(named: str) -> None:
    found = dict(calls(MAKERS[named]))
    assert len(found) > 3, "else this looks at nothing"
    assert [where for where, keywords in found.items() if not set(named.split(" and ")) <= keywords] == []

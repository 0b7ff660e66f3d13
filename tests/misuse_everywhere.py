# ruff: noqa: E501
"""What comes of nonsense for every argument of every public callable, and of the methods of what these give.

Run by test_api_fuzz.py, printed as JSON lines. One argument at a time is nonsense, the others are good values, by the argument's name or, where that means different
things, by the callable's and its name. This runs without the tests' type checker, as it would at a user's.
"""

import importlib
import inspect
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fsteer_lens as fl
from fsteer_lens import effects, errors, evaluation, figures, tutor
from fsteer_lens.selection import Splits

ROOMS = (
    "", "effects", "evaluation", "explorer", "figures", "hooks", "hub", "method", "models", "prompts",
    "report", "run", "scale", "selection", "serving", "steering", "trace", "tutor",
)  # fmt: skip
LEFT_OUT = {
    "demo": "minutes of work, and all that it takes is a path and a name",
    "tutor.gate_report": "minutes of work, which it hands on to gate_report",
    "tutor.exercise": "it is shown, and asks its reader",
    "tutor.reveal": "it is shown, and asks its reader",
    "models.Kind": "a type",
    "prompts.Message": "a type",
    "models.from_hf": "its models are checked by test_conversion.py",
}
MADE_BY_US = """Estimate GateExplanation Knockout Propagation RankSweep RoutingReport Sweep Attack AttackReport Evaluation
GateReport GateRow Substitution Explorer Watch Settings Chain Handle Hooks State View DomainShare FitReport HeldOut
OutOfFold Parts StepRecord Calibration Recipe Search Record Replay Scored Verdict Trace Generation Generations Steering
SubspaceGate Split TutorData Task Setting Measure""".split()
"""Results, which are returned, not made by whoever uses the package."""
OF_THE_HOST = """edit open session_on begin holder take_back record extend fork query gate_of_ratio require_match measure measure_each
measured_each taking preceded""".split()
"""Methods that the package calls itself."""
SECONDS = 60
"""For one call."""
SLOW = 0.4
"""Seconds for a good call, beyond which only three kinds of nonsense are tried, that nothing takes."""

folder = Path(tempfile.mkdtemp())
model, data = tutor.load(), tutor.data("safe")
train, held = data.train[:40], data.valid[:2]
general = [task.prompt for task in data.general_train[:30]]
quiet: dict[str, Any] = {"progress": False}
acts = fl.collect(model, train, layer=4, shift="last_prompt", **quiet)
others = fl.collect_queries(model, general, layer=4, **quiet)
steering = fl.fit(acts, rank=4, preset="0.1", epochs=2, n_experts=2)
made = fl.generate(model, general[:2], steering, max_new_tokens=3, compare=True, replay=True, **quiet)
fl.save(steering, folder / "steering.safetensors", model=model)
h, d = acts.queries, acts.shifts
gate, experts = steering.gate, steering.experts
assert gate is not None and d is not None
axis = torch.eye(h.shape[1])[0]
mean_shift = fl.steering.fit_mean_shift(acts)
sweeps = effects.strength_sweep(model, steering, held, general[:2], strengths=[1.0], **quiet)

acts.save(folder / "acts.safetensors")
made.trace.to_jsonl(folder / "trace.jsonl")
contrast_set = fl.ContrastSet(train[:20])
contrast_set.to_jsonl(folder / "contrasts.jsonl")
contrast_rows = [{"prompt": one.prompt, "preferred": one.preferred, "undesired": one.undesired} for one in train[:3]]
(folder / "contrasts.csv").write_text("prompt,preferred,undesired\na,b,c\n", encoding="utf-8")
suite = evaluation.Repetition(general[:2], max_new_tokens=2)
setting = evaluation.Setting()
evaluated = fl.evaluate(model, {"none": None, "one": mean_shift}, suite, **quiet)
reported = fl.gate_report(
    model, {"one": gate}, ["a bomb"], ["a cake"], calibration=[f"bake {n}" for n in range(30)], layer=4,
    format=tutor.chat, perturbations=evaluation.PERTURBATIONS[:1], false_alarm_rate=0.5, **quiet,
)  # fmt: skip
objects: list[Any] = [
    acts, contrast_set, gate, experts, steering, steering.gate.subspace, mean_shift, made.trace, evaluated, reported, suite,
    setting, fl.Schedule.decay(0.5), fl.report.Report("a"), evaluation.PERTURBATIONS[0],
    effects.expert_knockout(model, steering, held, layer=4, **quiet), fl.explore(steering, model, general[:4], **quiet),
    fl.watch(steering, model, general[0], max_new_tokens=2), data, gate.at_threshold(0.5), fl.EnergyGate(gate.subspace, 2),
]  # fmt: skip

# of parameters without a default
good: dict[str, Any] = {
    "model": model, "steering": steering, "activations": acts, "contrasts": held, "prompts": general[:2], "text": "a text",
    "prompt": general[0], "queries": h, "shifts": d, "experts": experts, "gate": gate, "subspace": gate.subspace, "layer": 4,
    "general": general[:2], "tokens": [1, 2], "answers": ["yes.", "no."], "rank": 3, "strength": 1.0, "kl": 0.5, "budget": 9.0,
    "data": Splits(train, held, general[:2]), "methods": {"one": mean_shift}, "path": folder / "out.safetensors",
    "suite": evaluation.Repetition(general[:2], max_new_tokens=2), "generations": made, "trace": made.trace, "title": "a",
    "harmful": ["a bomb"], "harmless": ["a cake"], "calibration": [f"bake {n}" for n in range(30)], "gates": {"one": gate},
    "words": ["cake", "tea"], "hooks": [steering], "mean": h.mean(0), "basis": gate.subspace.basis, "limit": 2,
    "explained": gate.subspace.explained, "weight": axis, "bias": 0.0, "condition": axis, "cut": 0.5, "vector": axis,
    "matrix": torch.eye(h.shape[1]), "centroids": h[:2], "train": {4: acts}, "valid": held, "stream": h[:1], "items": held,
    "general_valid": general[:2], "mix": made.trace, "rate": 0.5, "weights": made.trace, "sentences": ["a text."], "count": 1,
    "knockout": effects.expert_knockout(model, steering, held, layer=4, **quiet), "ir_queries": h, "general_queries": h,
    "sweeps": sweeps, "promoted": effects.expert_tokens(model, experts, top=3), "preferred": "yes", "undesired": "no",
    "inner": gate, "figure": figures.scree(gate.subspace), "choices": (), "name": "a", "effect": 0.5,
    "utility": 0.5, "body": "<p>", "ratios": gate.ratios, "epsilon": 0.05, "gamma": 1.0, "slopes": torch.ones(4),
    "intercepts": torch.zeros(4), "residual_basis": experts.residual_basis, "prototypes": experts.prototypes,
    "controller": experts.controller, "enabled": experts.enabled, "answer": "yes.", "harmful_groups": ("a",), "low": 0.0,
    "h": h, "index": 0, "read": "last", "device": "cpu", "threshold": 0.5, "shift": "last_prompt", "rows": [0], "measure": "KL",
    "method": "one", "first": "one", "second": "none", "setting": setting, "passes": setting.passes, "steerings": [None],
    "columns": ["a"], "level": 2, "caption": "a", "expert": 0, "expected": "a", "steps": torch.tensor([0, 1]),
    "ratio": torch.tensor([0.5]), "scope": "all", "schedule": None, "monitor": True, "rng": random.Random(0), "example": 0,
    "high": 1.0, "loops": 0.0, "opened": 1.0, "spared": 1.0, "activation": h,
}  # fmt: skip
# where the name means something else
special: dict[str, Any] = {
    "Trace.layer_of.name": "gate", "Report.add_download.data": b"a", "Report.add_table.columns": ["a", "b"], "Report.add_table.rows": [["c", "d"]],
    "Schedule.at.steps": torch.tensor([0, 1]), "TutorData.heldout.example": train[0], "Activations.load.path": folder / "acts.safetensors",
    "Trace.from_jsonl.path": folder / "trace.jsonl", "ContrastSet.from_jsonl.path": folder / "contrasts.jsonl",
    "ContrastSet.from_csv.path": folder / "contrasts.csv", "ContrastSet.from_records.rows": contrast_rows,
    "Trace.from_records.records": made.trace.to_records(), "Knockout.estimate.label": "weapons", "FineSteer.decide.gate": torch.ones(len(h)),
    "ContrastSet.from_records.prompt": "prompt", "ContrastSet.from_records.preferred": "preferred",
    "ContrastSet.from_records.undesired": "undesired", "Repetition.ids.prompts": general[:2], "Evaluation.items.measure": "repeats",
    "load.path": folder / "steering.safetensors", "figures.save.path": folder / "out.html",
    "evaluation.harmbench.path": folder / "harmbench.csv", "evaluation.xstest.path": folder / "xstest.csv",
    "recipe.contrasts": train[:8], "recipe.general": general[:26], "steering.fit_null_space.general": others,
    "evaluation.threshold_at_rate.general": others.queries, "effects.rank_sweep.general": others.queries,
    "method.ResidualRatioGate.general": gate.subspace, "figures.gate_per_prompt.queries": {"one": h},
    "figures.layer_position.path": effects.propagation(model, steering, general[0], "yes."),
    "figures.rank_explorer.queries": {"one": h}, "tutor.user_text.prompt": "<user>a<tutor>",
    "evaluation.repetition_rate.answers": [[1, 2]], "effects.strength_sweep.methods": steering,
    "evaluation.GeneralKL.groups": ("a", "b"), "evaluation.gives_same_answer.answers": {"a text": "yes."},
    "steering.NearestCentroid.shifts": d[:2], "evaluation.attack_gate.prompts": ["a bomb"], "models.load.name": "tutor",
    "evaluation.fit_scan.general": ["a cake", "tea"], "serving.arguments.steering": "one", "serving.record_of.answer": {},
    "steering.RidgeSteering.bias": axis, "method.ThresholdGate.cut": 0.5, "evaluation.every.items": [1, 2, 3],
    "figures.logprob_change.tokens": made.trace, "figures.token_scores.tokens": made.trace,
    "figures.token_experts.tokens": made.trace, "evaluation.TruthfulQA.choices": (),
}  # fmt: skip
# given as well, where they are taken: the call is quick then
quick: dict[str, Any] = {
    "progress": False, "max_new_tokens": 2, "answer_tokens": 2, "n_answers": 2, "sweep": False, "layers": [4], "epochs": 2,
    "strengths": [1.0], "perturbations": evaluation.PERTURBATIONS[:1], "false_alarm_rate": 0.5, "false_alarms": 0.5,
    "format": tutor.chat, "limit": 2, "shift": "last_prompt", "examples": 2, "ranks": [2, 3], "steps": 2,
}  # fmt: skip
nonsense: tuple[Any, ...] = (
    None, object(), "nonsense", [], {"": None}, -1, 10**30, math.nan, torch.empty(0),
)  # fmt: skip


def callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public callable that users call, once, by its room and name."""
    seen: set[int] = set()
    for room in ROOMS:
        module = importlib.import_module(f"fsteer_lens.{room}".rstrip("."))
        for name in module.__all__:
            one, whole = getattr(module, name), f"{room}.{name}".lstrip(".")
            plain = callable(one) and id(one) not in seen and name not in MADE_BY_US and whole not in LEFT_OUT
            if not plain or inspect.isabstract(one) or getattr(one, "_is_protocol", False):
                continue
            if not (inspect.isclass(one) and issubclass(one, Exception)):
                seen.add(id(one))
                yield whole, one


def methods() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public method of the objects that users hold, once, by its class and name, bound to one of them."""
    seen: set[int] = set()
    for held in objects:
        for name in dir(held):
            one = None if name.startswith("_") else inspect.getattr_static(held, name)
            plain = getattr(one, "__func__", one)
            ours = inspect.isfunction(plain) and plain.__module__.startswith("fsteer_lens") and id(plain) not in seen
            if ours and name not in OF_THE_HOST and plain.__code__.co_argcount + plain.__code__.co_kwonlyargcount > 1:
                seen.add(id(plain))
                yield f"{type(held).__name__}.{name}", getattr(held, name)


def parameters(one: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Those that have names, options among them."""
    found = {}
    for name, given in inspect.signature(one).parameters.items():
        if given.kind is given.VAR_KEYWORD:
            for options in typing.get_args(typing.get_type_hints(one).get(name)):
                found |= {
                    key: inspect.Parameter(key, given.KEYWORD_ONLY, default=None) for key in options.__annotations__
                }
        elif given.kind is not given.VAR_POSITIONAL:
            found[name] = given
    return found


def too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def outcome(call: Callable[[], Any], name: str) -> str | None:
    """What is wrong with what comes of a call; None where it is accepted, or refused by name or with what came."""
    signal.alarm(SECONDS)
    try:
        call()
    except errors.FsteerError as error:
        told = error.expected is not None or error.got is not None or re.search(rf"\b{name}\b", str(error))
        return None if told else f"says neither what was expected nor what came: {error}"
    except TypeError as error:
        return None if re.search(rf"\b{name}\b", str(error)) else f"TypeError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return None


os.chdir(folder)  # whatever is written under a nonsensical name is written there
signal.signal(signal.SIGALRM, too_long)
warnings.simplefilter("ignore")
torch.manual_seed(0)
chosen = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
for whole, one in itertools.chain(callables(), methods()):
    if not chosen.search(whole):
        continue
    takes, begun = parameters(one), time.perf_counter()
    needed = [name for name, given in takes.items() if given.default is given.empty]
    args = {name: special.get(f"{whole}.{name}", good.get(name)) for name in needed}
    args |= {name: value for name, value in quick.items() if name in takes and f"{whole}.{name}" not in special}
    found = {"": {"": outcome(lambda: one(**args), "")}}  # noqa: B023
    tried = nonsense if time.perf_counter() - begun < SLOW else nonsense[1:4]
    for name in takes:
        found[name] = {repr(value)[:40]: outcome(lambda: one(**{**args, name: value}), name) for value in tried}  # noqa: B023
    faults = {name: {value: told for value, told in of.items() if told} for name, of in found.items()}
    row = {"callable": whole, "calls": sum(map(len, found.values())), "seconds": round(time.perf_counter() - begun, 1)}
    sys.stdout.write(json.dumps({**row, "faults": {name: of for name, of in faults.items() if of}}) + "\n")
    sys.stdout.flush()

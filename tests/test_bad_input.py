"""Every bad input ends in an FsteerError that says what was expected, what came, and how to mend it.

The cases run in a process without the tests' type checker, as they would at a user's.
"""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, torch
from dataclasses import replace
import fsteer_lens as fl
from fsteer_lens import evaluation, figures, models, scale, tutor
from fsteer_lens.report import steering_report
from fsteer_lens.prompts.tokens import pad, prompt_ids

model = tutor.load()
train = tutor.data("safe").train
h, d = torch.randn(40, 128), torch.randn(40, 128)
acts = fl.collect(model, train[:40], layer=4, shift="last_prompt", progress=False)
steer = fl.fit(acts, rank=4, preset="0.1", epochs=2)
spoiled = h.clone(); spoiled[7, 3] = float("nan")
infinite = d.clone(); infinite[2, 0] = float("inf")

class Own(fl.Gate):
    def __init__(self, values):
        self.values = values

    def gate(self, h):
        return self.values

class NoPad:
    pad_token_id = eos_token_id = bos_token_id = None

class Bare:
    cfg, tokenizer, hook_dict = model.cfg, NoPad(), model.hook_dict

cases = {
    "empty contrast set": lambda: fl.collect(model, fl.ContrastSet([]), layer=4),
    "one-sided contrast": lambda: fl.Contrast("why?", "because", "  "),
    "unknown layer": lambda: fl.collect(model, train[:2], layer=17),
    "unknown layer type": lambda: fl.collect(model, train[:2], layer="last"),
    "generating with what is no model": lambda: fl.generate(torch.nn.Linear(2, 2), "hello", steer),
    "steering what is no model": lambda: steer.attach(torch.nn.Linear(2, 2)),
    "unknown site": lambda: replace(steer, site="hook_resid_mid").attach(model),
    "rank above n - 1": lambda: fl.fit_subspace(h[:5], rank=5),
    "rank above d": lambda: fl.fit_subspace(torch.randn(50, 8), rank=9),
    "gate rank above smallest fold": lambda: fl.fit_gate(h[:10], rank=8),
    "fewer shifts than experts": lambda: fl.fit_experts(h[:3], d[:3], n_experts=4),
    "NaN activations": lambda: fl.fit_gate(spoiled, rank=4),
    "infinite shifts": lambda: fl.fit_experts(h, infinite),
    "prompt longer than the context": lambda: fl.generate(model, "word " * 300),
    "missing file": lambda: fl.ContrastSet.from_jsonl("no/such/file.jsonl"),
    "missing steering file": lambda: fl.load("no/such/file.safetensors"),
    "wrong column": lambda: fl.ContrastSet.from_records([{"question": "a", "preferred": "b", "undesired": "c"}]),
    "tokenizer without pad": lambda: pad(Bare(), [[1, 2], [1]], "left"),
    "wrong d_model": lambda: steer.experts_at(4).route(torch.randn(3, 64)),
    "wrong d_model in a gate": lambda: steer.gate_at(4).gate(torch.randn(3, 64)),
    "wrong scope": lambda: steer.with_scope("everywhere"),
    "wrong window": lambda: fl.Window(3, 1),
    "window of fractions": lambda: fl.Window(0.5),
    "scope that is a tuple": lambda: steer.with_scope((1, 3)),
    "wrong refresh": lambda: replace(steer, scope="all", refresh="token"),
    "schedule of no numbers": lambda: fl.Schedule(()),
    "schedule that is a number": lambda: replace(steer, schedule=0.5),
    "monitor that is a word": lambda: steer.with_monitor("yes"),
    "strength that is a word": lambda: steer.with_strength("2"),
    "gate that is a number": lambda: steer.with_gate(0.5),
    "experts that are a tensor": lambda: fl.FineSteer(h, layer=2),
    "steering with bare experts": lambda: fl.generate(model, "hello", steer.experts),
    "gate at a layer that is not steered": lambda: steer.with_gate({9: steer.gate}),
    "steering moved to another layer": lambda: replace(steer, layer=2).attach(model),
    "stop that is one text": lambda: fl.generate(model, "hello", stop="zebra"),
    "stop that is a fraction": lambda: fl.generate(model, "hello", stop=[2.5]),
    "stream of no tokens": lambda: fl.stream(model, "hello", max_new_tokens=0),
    "stream with an option misspelled": lambda: fl.stream(model, "hello", do_sample=True, temprature=2.0),
    "stream at a temperature without drawing": lambda: fl.stream(model, "hello", temperature=2.0),
    "stream drawn maybe": lambda: fl.stream(model, "hello", do_sample="maybe"),
    "temperature that is a word": lambda: fl.generate(model, "hello", do_sample=True, temperature="hot"),
    "top_k that is a fraction": lambda: fl.generate(model, "hello", do_sample=True, top_k=2.5),
    "top_p that is a list": lambda: fl.stream(model, "hello", do_sample=True, top_p=[0.5]),
    "probe of experts": lambda: fl.SubspaceProbe(steer.experts, layer=2),
    "ablation of experts": lambda: fl.SubspaceAblation(steer.experts, layer=2),
    "expert probe of a subspace": lambda: fl.ExpertProbe(steer.gate.subspace, layer=2),
    "strength beyond all bounds": lambda: steer.with_strength(10**400),
    "schedule beyond all bounds": lambda: fl.Schedule((10**400,)),
    "row that a trace does not have": lambda: fl.generate(model, "hello", max_new_tokens=1).trace.row(3),
    "window up to False": lambda: fl.Window(0, False),
    "wrong read": lambda: fl.generate(model, "hello", steer, read="clear"),
    "chain of one": lambda: fl.chain(steer),
    "chain of numbers": lambda: fl.chain(steer, 3),
    "calibrating what is no steering": lambda: fl.calibrate(fl.chain(steer, steer), model, ["a"], kl=1),
    "calibrating to nothing": lambda: fl.calibrate(steer, model, ["a"], kl=0),
    "calibrating on one text": lambda: fl.calibrate(steer, model, "hello", kl=1),
    "wrong shift": lambda: fl.collect(model, train[:2], layer=4, shift="mean"),
    "activations of integers": lambda: fl.Activations(torch.ones(3, 4, dtype=torch.long), layer=1),
    "activations of a list": lambda: fl.Activations([[1.0, 2.0]], layer=1),
    "activations with a shift too few": lambda: fl.Activations(h, d[1:], layer=1),
    "activations with wider shifts": lambda: fl.Activations(h, d[:, :9], layer=1),
    "activations without a layer": lambda: fl.Activations(h),
    "activations shifted sideways": lambda: fl.Activations(h, d, layer=1, shift="sideways"),
    "activations of a model by name": lambda: fl.Activations(h, layer=1, fingerprint="gpt2"),
    "rows of activations by name": lambda: acts["first"],
    "row that activations do not have": lambda: acts[[99]],
    "sum of activations of two layers": lambda: acts + replace(acts, layer=3),
    "layers in a text": lambda: fl.collect(model, train[:2], layer="23"),
    "no layers": lambda: fl.collect(model, train[:2], layer=[]),
    "groups in a text": lambda: fl.fit_gate(h, rank=4, groups="a" * 40),
    "strengths of one number": lambda: fl.effects.strength_sweep(model, steer, train[:2], ["a"], strengths=1.0),
    "seeds of one number": lambda: fl.evaluate(model, {"x": None}, tutor.TutorSuite(limit=4), seeds=3),
    "refusals by one phrase": lambda: evaluation.refuses("box", phrases="x"),
    "tokens in one text": lambda: figures.token_scores("hello", torch.ones(5)),
    "answer with half a character": lambda: fl.effects.exact_answers(model, None, ["a"], ["b" + chr(0xD83D)]),
    "answer of token ids outside the vocabulary": lambda: fl.effects.general_divergence(model, steer, ["a"], [[10**6]]),
    "context with a NUL": lambda: prompt_ids(model, "a", context="b" + chr(0)),
    "wrong gate kind": lambda: fl.fit_gate(h, rank=4, kind="cosines"),
    "cosine gate without general queries": lambda: fl.fit_gate(h, kind="cosine"),
    "null-space gate without general queries": lambda: fl.fit_gate(h, kind="null_space"),
    "null-space gate with one name for all domains": lambda: fl.fit_gate(
        h, kind="null_space", general=d, domains="stories"
    ),
    "null-space gate of two widths": lambda: fl.fit_gate(h, kind="null_space", general=d[:, :64]),
    "null space from bare queries": lambda: fl.fit(acts, null_space=d, epochs=2),
    "null-space gate told of domains in words": lambda: fl.method.NullSpaceGate(h[0], 0.0, domains=["stories"]),
    "null-space gate at half a layer": lambda: fl.method.NullSpaceGate(h[0], 0.0, layer=1.5),
    "scan with numbers around a text": lambda: fl.method.ScanGate(steer.gate, 0.5, before=3),
    "scan of a gate that scans": lambda: fl.method.ScanGate(fl.method.ScanGate(steer.gate, 0.5), 0.5),
    "scan at a rate of one": lambda: evaluation.fit_scan(model, steer, ["a"] * 20, false_alarms=1.0),
    "scan of one text": lambda: evaluation.fit_scan(model, steer, "hello there"),
    "rank of a linear gate": lambda: fl.fit_gate(h, rank=4, kind="linear", general=d),
    "epsilon of a logistic gate": lambda: fl.fit_gate(h, rank=4, kind="logistic", general=d, epsilon=0.1),
    "subspace gate without a rank": lambda: fl.fit_gate(h),
    "gate that is False": lambda: fl.fit(acts, gate=False),
    "function for a gate": lambda: steer.with_gate(lambda h: h[..., 0] > 0),
    "gate and a function": lambda: steer.gate & (lambda h: h[..., 0] > 0),
    "own gate with a value too few": lambda: steer.with_gate(Own(torch.ones(2))).decide(4, h),
    "own gate that gives bools": lambda: steer.with_gate(Own(torch.ones(40) > 2)).with_strength(True),
    "own gate beyond one": lambda: steer.with_gate(Own(torch.full((40,), 3.0))).decide(4, h),
    "saving a gate of one's own": lambda: fl.save(steer.with_gate(Own(h)), "x.safetensors"),
    "rank of a gate of one's own": lambda: steer.with_gate(Own(h)).at_rank(3),
    "rank sweep of a gate of one's own": lambda: fl.effects.rank_sweep(Own(h[:, 0]), h, h),
    "wrong prototype scale": lambda: fl.fit_experts(h, d, prototype_scale="big"),
    "wrong preset": lambda: fl.fit_experts(h, d, preset="papers"),
    "wrong model kind": lambda: tutor.load("hook"),
    "unknown option of fit": lambda: fl.fit(acts, ranks=4),
    "no tensor": lambda: fl.fit_subspace([[1.0, 2.0]]),
    "integer activations": lambda: fl.fit_subspace(torch.ones(4, 4, dtype=torch.long)),
    "prompt that is none": lambda: fl.generate(model, [{"role": "user"}]),
    "token ids outside the vocabulary": lambda: fl.generate(model, [[5, 100000]]),
    "chat template missing": lambda: prompt_ids(Bare(), "hello", chat=True),
    "unknown behaviour": lambda: tutor.data("rude"),
    "margin of texts": lambda: fl.effects.answer_margin(model, steer, ["hello"]),
    "margin of nothing": lambda: fl.effects.answer_margin(model, None, []),
    "margin under experts": lambda: fl.effects.answer_margin(model, steer.experts, train[:2]),
    "margin in batches of none": lambda: fl.effects.answer_margin(model, None, train[:2], batch_size=0),
    "divergence of one text": lambda: fl.effects.general_divergence(model, steer, "hello"),
    "sweep of a number": lambda: fl.effects.strength_sweep(model, 1.5, train[:2], ["hello"]),
    "sweep over a layer that is not there": lambda: fl.effects.layer_sweep(
        model, train[:2], train[:2], ["a"], layers=[9]),
    "sweep whose effect is a number": lambda: fl.effects.strength_sweep(
        model, steer, train[:2], ["hello"], effect=lambda *_: 1.0, progress=False),
    "ranks of a tensor": lambda: fl.effects.rank_sweep(h, h, h),
    "counterfactual with an answer too few": lambda: fl.effects.counterfactual(model, steer, ["a", "b"], ["c"]),
    "propagation of a gate": lambda: fl.effects.propagation(model, steer.gate, "hello"),
    "cosine gate of two widths": lambda: fl.fit_gate(h, kind="cosine", general=d[:, :9]),
    "null space of another width": lambda: fl.steering.fit_null_space(acts, d[:, :9]),
    "explaining a gate": lambda: fl.effects.explain_gate(model, steer.gate, "hello"),
    "explaining experts": lambda: fl.effects.explain_gate(model, steer.experts, "hello"),
    "tokens of a steering": lambda: fl.effects.expert_tokens(model, steer),
    "routing with a shift too few": lambda: fl.effects.routing_report(steer.experts, h, shifts=d[:3]),
    "threshold that is a word": lambda: steer.gate.at_threshold("0.5"),
    "trace of no records": lambda: fl.Trace.from_records([]),
    "trace of other records": lambda: fl.Trace.from_records([{"text": "hello"}]),
    "report on a chain": lambda: steering_report(model, fl.chain(steer, steer), train[:2]),
    "report on nothing": lambda: steering_report(model, steer, []),
    "evaluating a number": lambda: fl.evaluate(model, {"x": 3}, tutor.TutorSuite(limit=4)),
    "evaluating what a function made": lambda: fl.evaluate(
        model, {"x": lambda seed: 3}, tutor.TutorSuite(limit=4), progress=False),
    "evaluating on the training split": lambda: tutor.TutorSuite(split="train"),
    "searching over no layers": lambda: fl.search(model, tutor.data("safe"), budget=0.1, layers=[]),
    "searching with a budget below nothing": lambda: fl.search(model, tutor.data("safe"), budget=-1),
    "searching in a list of contrasts": lambda: fl.search(model, train[:5], budget=1),
    "searching with nothing to choose on": lambda: fl.search(model, fl.selection.Splits(train[:5], [], []), budget=1),
    "exact answers, one too few": lambda: fl.effects.exact_answers(model, None, ["a", "b"], ["c"]),
    "knockout figure of a tensor": lambda: figures.expert_knockout(h),
    "layer figure of a tensor": lambda: figures.layer_position(h),
    "layer figure of what a propagation has not": lambda: figures.layer_position(
        fl.effects.propagation(model, steer, "hello"), what="change"),
    "scree with a tensor": lambda: figures.scree(steer.gate_at(4).subspace, torch.ones(4)),
    "strength figure of a tensor": lambda: figures.strength_sweep(h),
    "layer figure of tensors": lambda: figures.layer_sweep({"a": h}),
    "loading from half an address": lambda: fl.load("hf://safe"),
    "pushing a gate": lambda: fl.push(steer.gate, "me/safe"),
    "pushing to no name": lambda: fl.push(steer, "safe"),
    "pushing with a report that is a text": lambda: fl.push(steer, "me/safe", gates="good"),
    "control vector of a mixture": lambda: fl.steering.save_control_vector(steer, "x.pt"),
    "control vector of a chain": lambda: fl.steering.save_control_vector(fl.chain(steer, steer), "x.pt"),
    "model of a number": lambda: scale.ModelSpec(3),
    "model in a dtype by name": lambda: scale.ModelSpec("tutor", dtype="float32"),
    "model on a numbered device": lambda: scale.ModelSpec("tutor", device=0),
    "model mapped to nowhere": lambda: scale.ModelSpec("tutor", device_map={"lm_head": None}),
    "model of kind x": lambda: scale.ModelSpec("tutor", kind="x"),
    "model of half a record": lambda: scale.ModelSpec.from_record({"name": "tutor"}),
    "model of a record of another dtype": lambda: scale.ModelSpec.from_record(
        {**scale.ModelSpec("tutor").to_record(), "dtype": "float99"}),
    "model of a record that is a text": lambda: scale.ModelSpec.from_record("tutor"),
    "actors in words": lambda: scale.RayActors("two"),
    "shards of a live model": lambda: scale.collect(train[:2], model=model, layer=4, out="x"),
    "shards of a model by name": lambda: scale.collect(train[:2], model="tutor", layer=4, out="x"),
    "shards to a number": lambda: scale.collect(train[:2], model=scale.ModelSpec("tutor"), layer=4, out=3),
    "shards to no folder": lambda: scale.collect(train[:2], model=scale.ModelSpec("tutor"), layer=4, out="no/such/one"),
    "shards of half a contrast": lambda: scale.collect(
        train[:2], model=scale.ModelSpec("tutor"), layer=4, out="x", shard_size=0.5),
    "shards shifted sideways": lambda: scale.collect(
        train[:2], model=scale.ModelSpec("tutor"), layer=4, out="x", shift="sideways"),
    "shards of a layer by name": lambda: scale.collect(train[:2], model=scale.ModelSpec("tutor"), layer="4", out="x"),
    "shards by two actors": lambda: scale.collect(
        train[:2], model=scale.ModelSpec("tutor"), layer=4, out="x", actors=2),
    "shards of nowhere": lambda: scale.read("no/such/folder"),
    "shards of a number": lambda: scale.read(3),
    "shards after a while": lambda: scale.read("no/such/folder", wait="a while"),
    "shards of methods in a list": lambda: scale.evaluate(
        [None], tutor.TutorSuite(limit=4), model=scale.ModelSpec("tutor"), out="x"),
    "shards of a number as a method": lambda: scale.evaluate(
        {"x": 3}, tutor.TutorSuite(limit=4), model=scale.ModelSpec("tutor"), out="x"),
    "shards of a suite by name": lambda: scale.evaluate(
        {"x": None}, "tutor", model=scale.ModelSpec("tutor"), out="x"),
    "evaluation of nowhere": lambda: scale.read_evaluation("no/such/folder"),
    "saving what is no steering": lambda: fl.save("steering", "x.safetensors"),
}
found = {}
for name, case in cases.items():
    try:
        case()
        found[name] = ["nothing", ""]
    except fl.errors.FsteerError as error:
        found[name] = [type(error).__name__, str(error)]
    except Exception as error:
        found[name] = ["NOT OURS: " + type(error).__name__, str(error)]
print(json.dumps(found))
"""

NAMES = [line.split('"')[1] for line in SCRIPT.splitlines() if line.startswith('    "')]


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_explained(found: dict[str, list[str]], name: str) -> None:
    kind, message = found[name]
    assert kind.endswith("Error") and not kind.startswith("NOT OURS"), f"{kind}: {message}"
    assert "expected" in message or "got" in message or "Pass" in message or "Give" in message, message
    assert len(message) > 30, message


def test_a_figure_says_which_result_it_takes(found: dict[str, list[str]]) -> None:
    makers = {
        "knockout figure of a tensor": "expert_knockout",
        "layer figure of a tensor": "propagation",
        "scree with a tensor": "rank_sweep",
        "strength figure of a tensor": "strength_sweep",
        "layer figure of tensors": "layer_sweep",
    }
    for name, maker in makers.items():
        assert f"Give what effects.{maker} returns" in found[name][1]

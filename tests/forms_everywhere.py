"""What comes of prompts in every form in every function that takes them; run by test_forms.py, printed as JSON."""

import collections
import json
import sys
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas
import torch

import fsteer_lens as fl
from fsteer_lens import effects, evaluation, figures, tutor
from fsteer_lens.errors import DataError
from fsteer_lens.prompts.tokens import prompt_ids
from fsteer_lens.report import steering_report
from fsteer_lens.selection import Splits

model, data = tutor.load(), tutor.data("safe")
train, held = data.train[:40], data.valid[:2]
general = [task.prompt for task in data.general_train[:3]]
texts = [["bomb", "poison"], ["cake", "tea"], [f"how to bake {n}" for n in range(9)]]
quiet = {"progress": False}
acts = fl.collect(model, train, layer=4, shift="last_prompt", **quiet)
steering = fl.fit(acts, rank=4, preset="0.1", epochs=2, n_experts=2)
answers = ["yes.", "no.", "yes."]
h = acts.queries[:3]


def searched(splits: Splits) -> Any:
    options: Any = {"layers": [4], "strengths": [0.5], "shift": "last_prompt", "method": mean_shift}
    return fl.search(model, splits, budget=64, **options, **quiet).to_records()


def counted(contrasts: Any, others: Any) -> Any:
    """What a recipe says of too few: it has gone through them by then, and would otherwise take minutes."""
    try:
        return fl.recipe(model, contrasts, others, **quiet)
    except DataError as error:
        if "at least" in str(error) and "held out" in str(error):
            return str(error)
        raise


def page(contrasts: Any, others: Any) -> Any:
    """A report's title and how many of its prompts were generated for."""
    made = steering_report(model, steering, contrasts, others, max_new_tokens=2, sweep=False, **quiet)
    return [line for line in made.html().splitlines() if "prompts with both texts" in line]


def gates(harmful: Any, harmless: Any, calibration: Any) -> Any:
    """Rows of a gate report."""
    return evaluation.gate_report(
        model,
        steering.gate,
        harmful,
        harmless,
        calibration=calibration,
        format=tutor.chat,
        false_alarm_rate=0.25,
        perturbations=evaluation.PERTURBATIONS[:1],
        **quiet,
    ).to_records()


def numbers(sweeps: Any) -> Any:
    """Sweeps as plain numbers."""
    return [one.to_records() for one in sweeps.values()]


def scaled(contrasts: Any) -> Any:
    """Queries that were read in shards."""
    with TemporaryDirectory() as folder:
        fl.scale.collect(
            contrasts,
            model=fl.scale.ModelSpec("tutor"),
            layer=4,
            shift="last_prompt",
            out=folder,
            shard_size=1,
            batch_size=1,
            **quiet,
        )
        return fl.scale.read(folder).queries.tolist()


takes_prompts = {
    "generate": lambda p: fl.generate(model, p, steering, max_new_tokens=2, **quiet).texts,
    "collect_queries": lambda p: fl.collect_queries(model, p, layer=4, **quiet).queries.tolist(),
    "calibrate": lambda p: fl.calibrate(steering, model, p, kl=0.5, max_new_tokens=2, **quiet).curve,
    "calibrate, steered": lambda p: (
        fl.calibrate(
            steering.with_gate(None),
            model,
            general,
            kl=0.5,
            steered_prompts=[] if p is None else p,  # None asks for nothing to be generated
            max_new_tokens=2,
            answer_tokens=2,
            **quiet,
        ).length
    ),
    "explore": lambda p: fl.explore(steering, model, p, **quiet).figure.to_json(),
    "explore groups": lambda p: fl.explore(steering, model, {"all": p}, **quiet).figure.to_json(),
    "general_divergence": lambda p: effects.general_divergence(model, steering, p).tolist(),
    "exact_answers": lambda p: effects.exact_answers(model, steering, p, answers).tolist(),
    "counterfactual": lambda p: effects.counterfactual(model, steering, p, answers).to_records(),
    "strength_sweep": lambda p: numbers(effects.strength_sweep(model, steering, held, p, strengths=[1.0], **quiet)),
    "layer_sweep": lambda p: numbers(
        effects.layer_sweep(
            model, {4: acts}, held, p, methods={"mean": fl.steering.fit_mean_shift}, batch_size=4, **quiet
        )
    ),
    "search": lambda p: searched(Splits(train, held, p)),
    "recipe": lambda p: counted(train, p),
    "steering_report": lambda p: page(held, p),
    "setting of a suite": lambda p: evaluation.Setting().ids(model, p),
    "rank_explorer": lambda p: figures.rank_explorer(
        steering.gate, {"all": h}, {"all": p}, ranks=range(1, 3)
    ).to_json(),
    "gate_per_prompt": lambda p: figures.gate_per_prompt(steering.gate, {"all": h}, {"all": p}).to_json(),
    "expert_routing": lambda p: figures.expert_routing(torch.ones(3, 2), [1, 2, None], p).to_json(),
}
takes_contrasts = {
    "ContrastSet": lambda c: fl.ContrastSet(c).labels,
    "collect": lambda c: fl.collect(model, c, layer=4, shift="last_prompt", **quiet).queries.tolist(),
    "scale.collect": scaled,
    "answer_margin": lambda c: effects.answer_margin(model, steering, c).tolist(),
    "expert_knockout": lambda c: effects.expert_knockout(model, steering, c, **quiet).removed.nan_to_num().tolist(),
    "rank_sweep": lambda c: (
        effects.rank_sweep(steering, h, -h, ranks=[2], model=model, contrasts=c, **quiet).effect[2].value
    ),
    "strength_sweep": lambda c: numbers(effects.strength_sweep(model, steering, c, general, strengths=[1.0], **quiet)),
    "search": lambda c: searched(Splits(train, c, general)),
    "recipe": lambda c: counted(c, general),
    "steering_report": lambda c: page(c, ()),
    "tutor.exact": lambda c: tutor.exact(model, steering, c).tolist(),
}
takes_texts = {
    "gate_report, harmful": lambda t: gates(t, texts[1], texts[2]),
    "gate_report, harmless": lambda t: gates(texts[1], t, texts[2]),
    "gate_report, groups": lambda t: gates({"one": t}, texts[1], texts[2]),
    "attack_gate": lambda t: repr(
        evaluation.attack_gate(model, steering.gate, t, words=["cake"], format=tutor.chat, budget=1, **quiet)
    ),
    "attack_gate, words": lambda t: repr(
        evaluation.attack_gate(model, steering.gate, ["bomb"], words=t, format=tutor.chat, budget=1, **quiet)
    ),
    "fit_scan": lambda t: (
        evaluation.fit_scan(model, steering.gate, t, false_alarms=0.5, format=tutor.chat, **quiet).threshold
    ),
    "RefusalSuite": lambda t: evaluation.RefusalSuite("mine", t, ("a", "b")).harmful,
    "Repetition": lambda t: evaluation.Repetition(t).prompts,
    "GeneralKL": lambda t: evaluation.GeneralKL(t, ("a", "b"), ("c", "d")).prompts,
    "refuses": lambda t: evaluation.refuses("a poison", phrases=t),
}


def mean_shift(activations: Any, general: Any) -> Any:
    """A method with a name, quickly fitted."""
    return fl.steering.fit_mean_shift(activations)


def forms(items: list[Any]) -> Iterator[tuple[str, Any]]:
    """The same items in every form."""
    yield "tuple", tuple(items)
    yield "generator", (item for item in items)
    yield "keys", dict.fromkeys(items).keys() if all(isinstance(item, str) for item in items) else iter(items)
    column = np.empty(len(items), dtype=object)
    column[:] = items
    yield "array", column
    yield "filtered column", pandas.Series(items, index=range(5, 5 + len(items)))
    if all(isinstance(item, str) for item in items):
        yield "ids in arrays", [np.array(prompt_ids(model, item)) for item in items]
        yield "ids in tensors", [torch.tensor(prompt_ids(model, item)) for item in items]


wrong = {
    "one text": general[0],
    "one message": {"role": "user", "content": "hi"},
    "tokenizer's output": model.tokenizer(general),
    "plain mapping": {"input_ids": [1, 2]},
    "table": pandas.DataFrame({"prompt": general}),
    "set": set(general),
    "padded rows": torch.ones(2, 3, dtype=torch.long),
    "number": 3,
    "nothing": None,
    "in a list, half a character": ["hello", "a \ud83d b"],
    "in a list, a NUL": ["hello", "a \0 b"],
    "in a list, an empty cell": ["hello", float("nan")],
}
TAKES_ALL = ("generate", "collect_queries", "general_divergence", "ContrastSet")
"""These are tried with every form, the others with the two that are not read twice, or not by number."""
JUDGES_NOTHING = ("expert_routing", "gate_per_prompt", "rank_explorer", "refuses")
"""These show, or look for, whatever is given."""
found: dict[str, dict[str, str]] = collections.defaultdict(dict)


def outcome(name: str, function: Any, given: Any) -> str:
    """Whether something wrong is refused in words."""
    try:
        function(given)
    except fl.errors.InputError as error:
        return "refused" if "expected" in str(error) and "got" in str(error) else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def compare(where: str, form: str, got: Any, expected: Any) -> None:
    """Note whether a form gives what a list gives."""
    one, other = (json.dumps(value, default=str) for value in (got, expected))
    found[where][form] = "same" if one == other else f"{one[:200]} instead of {other[:200]}"


for group, functions, plain in (
    ("prompts", takes_prompts, general),
    ("contrasts", takes_contrasts, list(held)),
    ("texts", takes_texts, texts[0]),
):
    for name, function in functions.items():
        expected = function(plain)
        for form, given in forms(plain):
            if name not in TAKES_ALL and form not in ("generator", "filtered column"):
                continue
            compare(f"{group}: {name}", form, function(given), expected)
        for kind, given in wrong.items():
            if name in JUDGES_NOTHING or (name, kind) == ("generate", "one text"):
                continue
            if group != "contrasts" or not kind.startswith("in a list"):
                found[f"{group}: {name}"][kind] = outcome(name, function, given)

# ------------------------------------------------------------------------------------------------------- cells and rows

same = fl.Contrast("a", "b", "c")
for empty in (float("nan"), np.float64("nan"), pandas.NA, pandas.NaT, ""):
    compare(
        "Contrast", repr(empty), repr(fl.Contrast("a", "b", "c", label=empty, context=empty, group=empty)), repr(same)
    )
arrays = fl.Contrast(np.array([1, 2]), "b", "c", label=3.0)
compare("Contrast", "array of ids", repr(arrays), repr(fl.Contrast([1, 2], "b", "c", label="3")))
columns = {"prompt": ["a"], "preferred": ["b"], "undesired": ["c"]}
for given in (columns, "rows.csv", 3, None):
    for function in (fl.ContrastSet.from_records, fl.ContrastSet):
        found[f"{function.__name__} of"][repr(given)] = outcome("", function, given)
found["ContrastSet of"]["a table"] = outcome("", fl.ContrastSet, pandas.DataFrame(columns))

# ------------------------------------------------------------------------------------------------ layers, ids, numbers

layers = {
    "array": np.arange(2, 4),
    "tensor": torch.tensor([2, 3]),
    "column": pandas.Series([2, 3], index=[8, 9]),
    "generator": (n for n in (2, 3)),
    "range": range(2, 4),
    "twice": [2, 3, 2],
    "of numpy": [np.int64(2), np.int8(3)],
}
labels = pandas.Series([1, None, 2.5], index=[3, 1, 2])


def queries(layer: Any) -> Any:
    """Activations of the general prompts at some layers, as plain numbers."""
    read = fl.collect_queries(model, general, layer=layer, labels=labels, **quiet)
    return {at: [one.queries.tolist(), one.labels] for at, one in read.items()}


expected = queries([2, 3])
assert expected[2][1] == ("1", None, "2.5")
for form, given in layers.items():
    compare("layers", form, queries(given), expected)
compare("one layer in an array", "array", queries(np.array([4])), queries([4]))
for given in (2.5, "4", True, [], np.array([2.0]), 6, {4: 1}, np.ones((2, 2), int), [2, None]):
    try:
        fl.collect_queries(model, general, layer=given, **quiet)
        found["wrong layers"][repr(given)] = "accepted"
    except fl.errors.FsteerError as error:
        found["wrong layers"][repr(given)] = "refused" if str(error).startswith("layer") else str(error)
kinds = ["a", "b", "c", "d"] * 10
for form, given in {"array": np.array(kinds), "column": pandas.Series(kinds, index=range(40, 0, -1))}.items():
    gates_of = [fl.fit_gate(acts.queries, rank=3, groups=groups).ratios.tolist() for groups in (given, kinds)]
    compare("groups", form, *gates_of)
for form, given in {"array": np.array([2, 3]), "tensor": torch.tensor([2, 3]), "generator": iter([2, 3])}.items():
    stopped = [fl.generate(model, general, max_new_tokens=4, stop=stop, **quiet).texts for stop in (given, [2, 3])]
    compare("stop", form, *stopped)
compare("Schedule", "array", repr(fl.Schedule(np.array([1.0, 0.5]))), repr(fl.Schedule((1.0, 0.5))))
mixed = [
    fl.fit_experts(acts.queries, acts.shifts, n_experts=n, preset="0.1", epochs=2).n_experts
    for n in (np.array([2, 3]), (2, 3))
]
compare("n_experts", "array", *mixed)
ids = prompt_ids(model, general[0])
columns = pandas.Series(ids, index=range(9, 9 + len(ids)))
for form, given in {"array": np.array(ids), "tensor": torch.tensor(ids), "column": columns}.items():
    told = [piece for piece, _ in fl.stream(model, given, steering, max_new_tokens=2)]
    one = fl.generate(model, given, steering, max_new_tokens=2, **quiet)[0]
    compare(
        "one prompt of ids",
        form,
        [told, list(one.prompt), prompt_ids(model, given)],
        [
            [piece for piece, _ in fl.stream(model, ids, steering, max_new_tokens=2)],
            ids,
            ids,
        ],
    )
sys.stdout.write(json.dumps(found))

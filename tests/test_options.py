"""An option without effect raises, whichever function takes it; and what an error advises can be done."""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fsteer_lens
from fsteer_lens import (
    Activations,
    Contrast,
    ContrastSet,
    FineSteer,
    Gate,
    calibrate,
    cli,
    collect,
    collect_queries,
    effects,
    figures,
    fit,
    fit_experts,
    fit_gate,
    fit_subspace,
    generate,
    harness,
    load,
    models,
    save,
    stream,
    tutor,
)
from fsteer_lens.errors import InputError
from fsteer_lens.evaluation import attack_gate, evaluate, fit_scan
from fsteer_lens.ground.checks import require_unset
from fsteer_lens.hooks import Handle
from fsteer_lens.models import SteerableModel
from fsteer_lens.steering.steering import Steering
from tests import made_up
from tests.test_fitting import activations, general

OWN, OTHERS = activations(), general()
Q, G, S = OWN.queries, OTHERS.queries, OWN.queries.flip(0)
GROUPS = OWN.groups
GATE = fit_gate(Q, rank=3)
LINEAR = fit_gate(Q, kind="linear", general=G)
EXPERTS = made_up.experts(0, Q.shape[1])
VECTOR = Q[0]
QUICK: dict[str, Any] = {"preset": "0.1", "epochs": 2, "n_experts": 4}

FITS: dict[str, tuple[str, Callable[[], Any]]] = {
    "epsilon, logistic": ("epsilon", lambda: fit_gate(Q, rank=3, kind="logistic", general=G, epsilon=0.1)),
    "gamma, energy": ("gamma", lambda: fit_gate(Q, rank=3, kind="energy", gamma=2.0)),
    "cdf, linear": ("cdf", lambda: fit_gate(Q, kind="linear", general=G, cdf="step")),
    "folds, cosine": ("folds", lambda: fit_gate(Q, kind="cosine", general=G, folds=3)),
    "seed, linear": ("seed", lambda: fit_gate(Q, kind="linear", general=G, false_alarms=None, seed=1)),
    "folds, linear": ("folds", lambda: fit_gate(Q, kind="linear", general=G, false_alarms=None, folds=3)),
    "groups, linear": ("groups", lambda: fit_gate(Q, kind="linear", general=G, false_alarms=None, groups=GROUPS)),
    "rank, linear": ("rank", lambda: fit_gate(Q, kind="linear", general=G, rank=3)),
    "groups, cosine": ("groups", lambda: fit_gate(Q, kind="cosine", general=G, groups=GROUPS)),
    "false_alarms, quantile": ("false_alarms", lambda: fit_gate(Q, rank=3, false_alarms=0.1)),
    "near misses, logistic": ("near_misses", lambda: fit_gate(Q, rank=3, kind="logistic", general=G, near_misses=G)),
    "copies of nothing": ("near_misses", lambda: fit_gate(Q, kind="linear", general=G, augment={"near_misses": G})),
    "max_rank, linear": ("max_rank", lambda: fit_gate(Q, kind="linear", general=G, max_rank=3)),
    "folds and calibration": ("folds", lambda: fit_gate(Q, rank=3, calibration=Q, folds=5)),
    "seed and calibration": ("seed", lambda: fit_gate(Q, rank=3, calibration=Q, seed=1)),
    "groups and calibration": ("groups", lambda: fit_gate(Q, rank=3, calibration=Q, groups=GROUPS)),
    "groups in-sample": ("groups", lambda: fit_gate(Q, rank=3, folds=None, groups=GROUPS)),
    "seed in-sample": ("seed", lambda: fit_gate(Q, rank=3, folds=None, seed=1)),
    "seed and groups": ("seed", lambda: fit_gate(Q, rank=3, groups=GROUPS, seed=1)),
    "max_rank below the rank": ("max_rank", lambda: fit_gate(Q, rank=3, max_rank=2)),
    "fit: epsilon, logistic": (
        "epsilon",
        lambda: fit(OWN, general=OTHERS, rank=3, gate="logistic", epsilon=0.1, **QUICK),
    ),
    "fit: folds, cosine": ("folds", lambda: fit(OWN, general=OTHERS, gate="cosine", folds=3, **QUICK)),
    "fit: rank, linear": ("rank", lambda: fit(OWN, general=OTHERS, gate="linear", rank=3, **QUICK)),
    "fit: rank, a fitted gate": ("rank", lambda: fit(OWN, gate=GATE, rank=3, **QUICK)),
    "fit: epsilon, a fitted gate": ("epsilon", lambda: fit(OWN, gate=GATE, epsilon=0.1, **QUICK)),
    "fit: near misses, a fitted gate": ("near_misses", lambda: fit(OWN, gate=GATE, near_misses=OTHERS, **QUICK)),
    "fit: epochs, fitted experts": ("epochs", lambda: fit(OWN, rank=3, experts=EXPERTS, epochs=3)),
    "fit: seed, nothing is drawn": ("seed", lambda: fit(OWN, rank=3, experts=EXPERTS, seed=1)),
    "fit: folds and calibration": ("folds", lambda: fit(OWN, rank=3, calibration=Q, folds=3, **QUICK)),
    "patience": ("patience", lambda: fit_experts(Q, S, n_experts=2, preset="0.1", epochs=2, validation=0, patience=3)),
    "route_loss": ("route_loss", lambda: fit_experts(Q, S, n_experts=1, preset="0.1", epochs=2, route_loss=1.0)),
    "refresh": ("refresh", lambda: fit(OWN, rank=3, refresh="step", **QUICK)),
}


@pytest.mark.parametrize(("option", "call"), FITS.values(), ids=FITS)
def test_fitting(option: str, call: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=option):
        call()


def test_the_same_options_are_taken_where_they_do_something() -> None:
    """The control: each of them changes what is fitted."""

    def differs(**options: Any) -> bool:
        usual = {"rank": 3, **{name: value for name, value in options.items() if name in ("kind", "general")}}
        return not torch.equal(fit_gate(Q, **{**usual, **options})(G), fit_gate(Q, **usual)(G))  # type: ignore[arg-type]

    assert differs(folds=3) and differs(folds=None) and differs(seed=1) and differs(groups=GROUPS)
    assert differs(calibration=Q[:20]) and differs(epsilon=0.5) and differs(gamma=1.0, epsilon=0.5)
    assert differs(kind="logistic", general=G, folds=3)
    plain = fit_gate(Q, kind="linear", general=G)
    for options in ({"folds": 3}, {"seed": 1}, {"groups": GROUPS}, {"false_alarms": 0.2}):
        assert fit_gate(Q, kind="linear", general=G, **options).threshold != plain.threshold  # type: ignore[arg-type]
    assert fit_gate(Q, rank=3, max_rank=4).ranks == 4
    by_seed = [fit(activations(grouped=False), rank=3, experts=EXPERTS, seed=seed) for seed in (0, 1)]
    gates = [one.gate_at(2) for one in by_seed]
    assert not torch.equal(gates[0](G), gates[1](G)), "seed= goes to random folds"  # type: ignore[misc]
    grouped = [fit(OWN, rank=3, seed=seed, **QUICK) for seed in (0, 1)]
    assert torch.equal(grouped[0].gate_at(2)(G), grouped[1].gate_at(2)(G))  # type: ignore[misc]
    assert not torch.equal(grouped[0].experts_at(2).vector(Q), grouped[1].experts_at(2).vector(Q))


def drawn(model: SteerableModel) -> Any:
    return generate(model, [1, 5, 6], made_up.steering(3), max_new_tokens=2, compare=True, progress=False)


RUNS: dict[str, tuple[str, Callable[[SteerableModel], Any]]] = {
    "generate: read": ("read", lambda model: generate(model, "hello", read="live")),
    "stream: read": ("read", lambda model: stream(model, "hello", read="clean")),
    "generate: compare": ("compare", lambda model: generate(model, "hello", compare=True)),
    "generate: seed": ("seed", lambda model: generate(model, "hello", seed=1)),
    "generate: a stop that no token is": ("stop", lambda model: generate(model, "hello", stop=[10**6])),
    "calibrate": (
        "max_new_tokens",
        lambda model: calibrate(made_up.steering(), model, ["hello"], kl=1.0, answers=["you"], max_new_tokens=8),
    ),
    "rank_sweep: model": ("model= without effect", lambda model: effects.rank_sweep(GATE, Q, G, model=model)),
    "rank_sweep: effect": ("effect", lambda model: effects.rank_sweep(GATE, Q, G, effect=effects.answer_margin)),
    "rank_sweep: layer": ("layer", lambda model: effects.rank_sweep(GATE, Q, G, layer=2)),
    "layer_sweep: shift": (
        "shift",
        lambda model: effects.layer_sweep(model, {2: OWN}, tutor.data().valid[:2], ["hello"], shift="last_prompt"),
    ),
    "evaluate: seeds": (
        "seeds",
        lambda model: evaluate(model, {"bare": None}, tutor.TutorSuite(limit=2), seeds=(0, 1)),
    ),
    "attack_gate: constrained": (
        "constrained",
        lambda model: attack_gate(model, GATE, ["hello"], words=["you"], format=str, layer=2, constrained=True),
    ),
    "tutor.fit: layer": ("layer", lambda model: tutor.fit(model, activations=OWN, layer=3)),
    "token_scores: row": ("row", lambda model: figures.token_scores(["a", "b"], torch.ones(2), row=1)),
    "token_scores: layer": ("layer", lambda model: figures.token_scores(["a", "b"], torch.ones(2), layer=1)),
    "token_scores: bundle": ("bundle", lambda model: figures.token_scores(["a"], torch.ones(1), bundle=False)),
    "token_experts: layer": ("layer", lambda model: figures.token_experts(["a"], torch.ones(1, 2), layer=1)),
    "expert_routing: layer": ("layer", lambda model: figures.expert_routing(torch.ones(2, 3), layer=1)),
    "expert_mix: layer": ("layer", lambda model: figures.expert_mix(EXPERTS, VECTOR, layer=1)),
    "expert_mix: row": ("row", lambda model: figures.expert_mix(EXPERTS, VECTOR, row=2)),
    "expert_mix: experts": ("experts", lambda model: figures.expert_mix(EXPERTS, VECTOR, experts=EXPERTS)),
    "logprob_change: step": ("step", lambda model: figures.logprob_change(["a"], torch.ones(1), step=1)),
    "logprob_change: row": ("row", lambda model: figures.logprob_change(["a"], torch.ones(1), row=0)),
    "steer_compare: titles": ("titles", lambda model: figures.steer_compare(drawn(model), titles=["a", "b"])),
    "steer_compare: bundle": ("bundle", lambda model: figures.steer_compare(drawn(model), bundle=False)),
}


@pytest.mark.parametrize(("option", "call"), RUNS.values(), ids=RUNS)
def test_running_and_drawing(tutor_model: SteerableModel, option: str, call: Callable[[SteerableModel], Any]) -> None:
    with pytest.raises(InputError, match=option):
        call(tutor_model)


COMMANDS = {
    "--rank, --general and --near-misses": ["fit", "--gate", "none", "--rank", "0"],
}


@pytest.mark.parametrize("words", COMMANDS)
def test_the_command_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is read or loaded."""
    rest = ["--model", "nowhere", "--data", "nowhere.csv", "--out", "x.safetensors", "--layer", "1"]
    assert cli.main([*COMMANDS[words], *rest]) == 2
    assert words in capsys.readouterr().err


def test_gates_of_the_tutor_that_need_general_prompts_get_them(
    tutor_model: SteerableModel, trained: dict[int, Activations]
) -> None:
    """Its own default rank is not forced on a gate that has none."""
    steering = tutor.fit(tutor_model, activations=trained[4], gate="linear", preset="0.1", epochs=2, progress=False)
    assert type(steering.gate_at(4)).__name__ == "LinearGate"


def test_what_is_unset_is_named() -> None:
    require_unset("nothing", first=None, second=None)
    with pytest.raises(InputError, match=r"first= and third= without effect: got beside. Leave them out"):
        require_unset("beside", first=0, second=None, third=False)


# ------------------------------------------------------------------------------------------------------------- advice


def test_a_rank_that_was_not_fitted_says_how_to_fit_it() -> None:
    with pytest.raises(InputError, match=r"got 10\. For more, fit again with a larger max_rank=") as caught:
        fit_gate(Q, rank=3, max_rank=5).at_rank(10)
    assert caught.value.expected == "an int in 1..5 (the ranks that were fitted)"
    assert fit_gate(Q, rank=3, max_rank=9).at_rank(9).ranks == 9
    with pytest.raises(InputError, match="larger max_rank="):
        fit(OWN, rank=3, max_rank=5, **QUICK).at_rank(8)
    with pytest.raises(InputError, match="larger rank="):
        fit_subspace(Q, rank=3).at_rank(4)
    with pytest.raises(InputError, match=r"an int in 3\.\.10, got 2\. Leave it out, or choose within 3 to 10"):
        fit_gate(Q, rank=3, max_rank=2)
    with pytest.raises(InputError, match=r"Choose a rank within\.$"):
        fit_gate(torch.randn(200, 4), rank=5)  # more queries would not help: there are four directions
    with pytest.raises(InputError, match="or fit on more queries"):
        fit_gate(torch.randn(6, 40), rank=5)


def test_a_gate_without_ranks_is_not_sent_to_another_rank() -> None:
    with pytest.raises(InputError, match=r"rank= with a fitted gate\. Leave it out"):
        fit(OWN, gate=LINEAR, rank=3, **QUICK)
    with pytest.raises(InputError, match=r"Use gate\.at_rank\(rank\)"):
        fit(OWN, gate=GATE, rank=2, **QUICK)


def takes(function: Any) -> set[str]:
    """Names that a function takes, those among its options too."""
    names: set[str] = set()
    for name, parameter in inspect.signature(function).parameters.items():
        names.add(name)
        options = getattr(parameter.annotation, "__args__", (None,))[0]
        names |= set(getattr(options, "__annotations__", ()))
    if function is fit:
        names |= takes(fit_gate) | takes(fit_experts) | {"schedule", "refresh", "gate_layer"}
    return names


ELSEWHERE = {"apply_chat_template", "gen_kwargs"}
"""Parameters of lm-evaluation-harness, which one of the errors is about."""
EVERYWHERE = (
    *(collect, fit, fit_gate, fit_experts, fit_subspace, generate, stream, save, load, collect_queries, Contrast),
    *(
        FineSteer,
        Steering.on,
        models.load,
        models.from_hf,
        harness.lm,
        ContrastSet.split,
        ContrastSet.from_records,
        fit_scan,
    ),
)
SELVES: dict[str, Any] = {"steering": FineSteer, "gate": Gate, "handle": Handle, "fsteer_lens": fsteer_lens}


def advice() -> Iterator[tuple[str, str]]:
    """What errors of the package advise: the room, and the text, without what is put into it."""

    def constant(node: ast.AST) -> str:
        known = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        return " ".join(known)

    root = Path(fsteer_lens.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found = [keyword.value for keyword in node.keywords if keyword.arg == "fix"]
            elif isinstance(node, ast.Assign) and {ast.unparse(one) for one in node.targets} & {"fix", "MORE_RANKS"}:
                found = [node.value]
            else:
                continue
            for text in map(constant, found):
                yield path.relative_to(root).parts[0].removesuffix(".py"), text


def public(room: str) -> list[Any]:
    """Functions and classes of a room of the package."""
    module = importlib.import_module(f"fsteer_lens.{room}")
    return [one for name in dir(module) if not name.startswith("_") and callable(one := getattr(module, name))]


def test_errors_advise_what_functions_take() -> None:
    """A parameter that is advised is one of the room that advises it, or of the functions that everybody calls."""
    found = {(room, word) for room, text in advice() for word in re.findall(r"\b([a-z_]+)=(?!=)", text)}
    assert {("method", "max_rank"), ("run", "do_sample"), ("steering", "gate")} <= found, "else this looks at nothing"
    usual = set().union(*map(takes, EVERYWHERE))
    assert "gates" not in usual and "max_rank" in usual
    unknown = [
        (room, word)
        for room, word in sorted(found)
        if word not in usual | ELSEWHERE and not any(word in takes(one) for one in public(room))
    ]
    assert unknown == []


def test_errors_advise_methods_that_there_are() -> None:
    found = {call for _, text in advice() for call in re.findall(r"\b([a-z_]+)\.([a-z_]+)\(", text)}
    assert {("gate", "at_rank"), ("handle", "reset"), ("steering", "with_gate")} <= found
    assert [call for call in sorted(found) if call[0] in SELVES and not hasattr(SELVES[call[0]], call[1])] == []

"""Hooks that do not run raise, wherever the package puts some on a model: text would come out unsteered, in silence.

`deafened` makes a hook point pass its input on without running its hooks, which is what torch.compile does to it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from fsteer_lens import (
    FineSteer,
    calibrate,
    collect,
    collect_queries,
    effects,
    evaluation,
    explore,
    generate,
    search,
    stream,
    tutor,
)
from fsteer_lens.errors import HookError
from fsteer_lens.evaluation import evaluate
from fsteer_lens.hooks import SubspaceProbe
from fsteer_lens.models import SteerableModel, available_kinds
from fsteer_lens.models.attaching import hooks_added, is_compiled
from fsteer_lens.models.points import hook_point
from fsteer_lens.prompts.tokens import prompt_ids
from fsteer_lens.reading.fingerprints import fingerprint
from fsteer_lens.report import steering_report
from fsteer_lens.selection import Splits
from tests import made_up
from tests.families import random_model
from tests.running import LAYER, SITE, n_hooks

DATA = tutor.data("safe")
CONTRASTS, GENERAL = DATA.valid[:2], [task.prompt for task in DATA.general_valid[:2]]
PROMPTS = [str(prompt) for prompt in CONTRASTS.prompts]
QUIET: dict[str, Any] = {"progress": False}


@contextmanager
def deafened(
    model: SteerableModel, name: str = SITE, deaf: Callable[[torch.Tensor], bool] = lambda h: True
) -> Iterator[None]:
    """Have a hook point run none of its hooks, or none where `deaf` holds for the activation."""
    point = hook_point(model, name)
    point._compiled_call_impl = lambda h: h if deaf(h) else point._call_impl(h)
    try:
        yield
    finally:
        point._compiled_call_impl = None


RUNS: dict[str, Callable[[SteerableModel, Any], Any]] = {
    "generate": lambda model, by: generate(model, PROMPTS, by, max_new_tokens=2, **QUIET),
    "generate, drawn": lambda model, by: generate(
        model, PROMPTS, by, max_new_tokens=2, do_sample=True, seed=0, **QUIET
    ),
    "generate, uncached": lambda model, by: generate(model, PROMPTS, by, use_past_kv_cache=False, **QUIET),
    "compare": lambda model, by: generate(model, PROMPTS, by, max_new_tokens=2, compare=True, **QUIET),
    "stream": lambda model, by: list(stream(model, PROMPTS[0], by, max_new_tokens=2)),
    "a probe": lambda model, by: generate(
        model, PROMPTS, SubspaceProbe(by.gate_at(LAYER).subspace, layer=LAYER), **QUIET
    ),
    "collect": lambda model, by: collect(model, CONTRASTS, layer=LAYER, **QUIET),
    "collect, last prompt": lambda model, by: collect(model, CONTRASTS, layer=[2, LAYER], shift="last_prompt", **QUIET),
    "collect_queries": lambda model, by: collect_queries(model, PROMPTS, layer=LAYER, **QUIET),
    "fingerprint": lambda model, by: fingerprint(model, [LAYER]),
    "calibrate": lambda model, by: calibrate(by, model, GENERAL, kl=0.1, max_new_tokens=2, **QUIET),
    "search": lambda model, by: search(
        model, Splits(DATA.train[:40], CONTRASTS, GENERAL), budget=9.0, layers=[LAYER], method=lambda a, g: by, **QUIET
    ),
    "answer_margin": lambda model, by: effects.answer_margin(model, by, CONTRASTS),
    "exact_answers": lambda model, by: effects.exact_answers(model, by, PROMPTS, ["no.", "yes."]),
    "general_divergence": lambda model, by: effects.general_divergence(model, by, GENERAL),
    "counterfactual": lambda model, by: effects.counterfactual(model, by, PROMPTS, ["no.", "yes."]),
    "propagation": lambda model, by: effects.propagation(model, by, PROMPTS[0]),
    "explain_gate": lambda model, by: effects.explain_gate(model, by, PROMPTS[0], limit=1),
    "strength_sweep": lambda model, by: effects.strength_sweep(model, by, CONTRASTS, GENERAL, strengths=[1], **QUIET),
    "layer_sweep": lambda model, by: effects.layer_sweep(
        model, CONTRASTS, CONTRASTS, GENERAL, layers=[LAYER], methods={"it": lambda activations: by}, **QUIET
    ),
    "expert_knockout": lambda model, by: effects.expert_knockout(
        model, by, CONTRASTS, queries=torch.zeros(len(CONTRASTS), by.d_model), **QUIET
    ),
    "evaluate": lambda model, by: evaluate(model, {"it": by}, tutor.TutorSuite(limit=2), **QUIET),
    "gate_report": lambda model, by: evaluation.gate_report(
        model,
        {"it": by.gate_at(LAYER)},
        PROMPTS,
        GENERAL,
        calibration=[f"{n}" for n in range(30)],
        format=str,
        **QUIET,
    ),
    "explore": lambda model, by: explore(by, model, {"a": PROMPTS, "b": GENERAL}, **QUIET),
    "report": lambda model, by: steering_report(model, by, CONTRASTS, GENERAL, max_new_tokens=2, **QUIET),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_way_of_running_notices(model: SteerableModel, steering: FineSteer, name: str) -> None:
    before = n_hooks(model)
    steering.session_on(model)  # it has been on this model already: its fingerprint is not taken again
    with deafened(model), pytest.raises(HookError, match=r"1 of \d+ hooks did not run .* got none at blocks\.4\.hook"):
        RUNS[name](model, steering)
    assert n_hooks(model) == before


def test_with_the_hooks_running_none_of_them_raises(model: SteerableModel, steering: FineSteer) -> None:
    for name in ("generate", "stream", "collect", "propagation", "expert_knockout", "calibrate"):
        RUNS[name](model, steering)


@pytest.mark.parametrize("layer", [1, 4])
def test_one_of_several_layers_is_enough(model: SteerableModel, layer: int) -> None:
    both = FineSteer({1: made_up.experts(0), 4: made_up.experts(1)})
    name = f"blocks.{layer}.hook_resid_post"
    for read in ("clean", "live"):
        with deafened(model, name), pytest.raises(HookError, match=rf"1 of 2 hooks did not run .* {name}\."):
            generate(model, PROMPTS, both, read=read, max_new_tokens=2, **QUIET)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["steered", "a probe"])
def test_a_decoding_step_without_hooks_raises_after_a_prompt_with_them(
    model: SteerableModel, steering: Any, kind: str
) -> None:
    by = steering if kind == "steered" else SubspaceProbe(steering.gate_at(LAYER).subspace, layer=LAYER)
    with deafened(model, deaf=lambda h: h.shape[1] == 1):
        assert len(generate(model, PROMPTS, by, max_new_tokens=1, **QUIET)) == 2
        running = stream(model, PROMPTS[0], by, max_new_tokens=3)
        next(running)
        with pytest.raises(HookError, match="did not run in this forward pass"):
            next(running)


@contextmanager
def skipped(model: SteerableModel, layer: int) -> Iterator[None]:
    """Have a layer hand on what it gets, without running anything in it."""
    block = model.blocks[layer]  # type: ignore[attr-defined]
    vars(block)["forward"] = lambda h, *args, **kwargs: h
    try:
        yield
    finally:
        del vars(block)["forward"]


def test_a_layer_that_is_skipped_raises(model: SteerableModel) -> None:
    three = FineSteer({layer: made_up.experts(layer) for layer in (1, 2, 4)})
    tokens = torch.tensor([prompt_ids(model, PROMPTS[0])])
    went = r"this forward went from blocks\.1\.hook_resid_post to blocks\.4\.hook_resid_post: expected to run through"
    with skipped(model, 2):
        with pytest.raises(HookError, match=r"blocks\.2\.hook_resid_post\. .*skip"):
            generate(model, PROMPTS, three, use_past_kv_cache=False, read="clean", max_new_tokens=2, **QUIET)
        with pytest.raises(HookError, match=went), torch.no_grad(), three.on(model):
            model(tokens)


def test_a_hook_that_runs_twice_in_a_pass_raises(model: SteerableModel) -> None:
    """As in a model that goes through a layer several times for one token: each edit would come twice."""
    point = hook_point(model, SITE)
    point._compiled_call_impl = lambda h: point._call_impl(point._call_impl(h))
    try:
        with pytest.raises(HookError, match=r"1 of 1 hooks ran more than once .* got 2 times at blocks\.4"):
            generate(model, PROMPTS, made_up.steering(LAYER), max_new_tokens=2, **QUIET)
    finally:
        point._compiled_call_impl = None


def test_hooks_that_are_taken_away_in_a_pass_raise(tutor_model: SteerableModel) -> None:
    def reset(activation: torch.Tensor, hook: Any) -> None:
        tutor_model.reset_hooks(including_permanent=True)  # type: ignore[attr-defined]

    with (
        pytest.raises(HookError, match=r"\(reset_hooks\)"),
        hooks_added(tutor_model, [("blocks.1.hook_resid_post", lambda h, hook: reset(h, hook))]),
    ):
        generate(tutor_model, PROMPTS, made_up.steering(LAYER), max_new_tokens=2, **QUIET)


def test_a_pass_that_fails_otherwise_says_so_itself(model: SteerableModel) -> None:
    def fails(activation: torch.Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), hooks_added(model, [("blocks.1.hook_resid_post", fails)]):
        model(torch.tensor([[1, 5]]))


def test_what_is_attached_says_that_it_never_ran(model: SteerableModel, steering: FineSteer) -> None:
    tokens = torch.tensor([prompt_ids(model, PROMPTS[0])])
    handle = replace(steering, fingerprint=None).attach(model)
    try:
        with pytest.raises(HookError, match="never fired"):
            _ = handle.trace
        with pytest.raises(HookError, match=r"cannot stay on this model.*is compiled"), deafened(model):
            model(tokens)
            replace(steering, fingerprint=None).attach(model)
        model(tokens)
        assert LAYER in handle.trace.gate
    finally:
        handle.detach()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch says what it cannot trace
@pytest.mark.parametrize("way", ["compile()", "torch.compile", "a layer"])
def test_a_model_that_is_compiled_raises_or_steers(way: str) -> None:
    """Compiled in earnest, with the backend that only traces: which hooks are lost depends on what was traced when."""
    if "hooked" not in available_kinds():
        pytest.skip("this TransformerLens has no HookedTransformer, whose whole forward pass is traced at once")
    torch._dynamo.reset()
    compiled: Any = random_model("llama", "hooked", seed=5)
    by = FineSteer(made_up.experts(0, 32), layer=1)
    ids = [1, 20, 30, 40]
    want = generate(compiled, ids, by, max_new_tokens=3, **QUIET)[0].tokens
    layer = compiled.blocks[1]
    if way == "torch.compile":
        compiled = torch.compile(compiled, backend="eager")
    else:
        (compiled if way == "compile()" else layer).compile(backend="eager")
    try:
        generate(compiled, ids, max_new_tokens=3, **QUIET)
        assert is_compiled(compiled)
        try:
            found = generate(compiled, ids, by, max_new_tokens=3, **QUIET)[0].tokens
        except HookError as error:
            assert "compiled" in str(error) and "torch.compiler.set_stance" in str(error)
        else:
            assert found == want
        with torch.compiler.set_stance("force_eager"):  # what the error advises
            assert generate(compiled, ids, by, max_new_tokens=3, **QUIET)[0].tokens == want
        with pytest.raises(HookError, match="is compiled"):
            by.attach(compiled)
    finally:
        (layer if way == "a layer" else getattr(compiled, "_orig_mod", compiled))._compiled_call_impl = None
        torch._dynamo.reset()

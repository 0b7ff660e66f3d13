"""The explorer pictures what gates and experts compute, and its settings are the steering that one would write."""

import json
import subprocess
import sys
from dataclasses import replace

import jaxtyping
import numpy as np
import pytest
import torch

from fsteer_lens import FineSteer, SubspaceAblation, collect_queries, fit, fit_gate, generate, tutor
from fsteer_lens.errors import FsteerError, InputError
from fsteer_lens.explorer import Explorer, Settings, explore, worlds
from fsteer_lens.explorer.pictured import grouped, pictured
from fsteer_lens.explorer.settings import Subject
from fsteer_lens.explorer.words import parts
from fsteer_lens.method.subspace_gates import ThresholdGate

LAYER = 4
HOSTILE = ["</script>", "<img src=x onerror=alert(1)>", "a\nb 🙂", '"><b>']


@pytest.fixture(scope="module")
def groups():
    told = tutor.data("safe")
    return {"harmful": list(told.valid.prompts[:6]), "general": [task.prompt for task in told.general_valid[::60]]}


@pytest.fixture(scope="module")
def queries(tutor_model, groups):
    rows = [prompt for group in groups.values() for prompt in group]
    return collect_queries(tutor_model, rows, layer=LAYER, progress=False).queries


@pytest.fixture
def made(steering, tutor_model, groups) -> Explorer:
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    return explore(steering, tutor_model, groups, max_new_tokens=12, progress=False)


def floats(data, name):
    return torch.from_numpy(np.frombuffer(data[name], "<f4").copy()).reshape(len(data["prompts"]), -1)


def vectors_equal(one: FineSteer, other: FineSteer, h: torch.Tensor) -> bool:
    """Whether two steerings decide the same at every layer, times their strength."""
    assert one.layers == other.layers
    pairs = [[steering.decide(layer, h) for steering in (one, other)] for layer in one.layers]
    same = [torch.equal(a.gate, b.gate) and torch.equal(a.vector, b.vector) for a, b in pairs]
    return all(same) and one.strength == other.strength and one.scope == other.scope


def click(explorer: Explorer, prompt, **changes) -> list[dict]:
    """Press "Generate" in the browser; what the widget shows as answers, one after another."""
    answers = []
    explorer.widget.observe(lambda change: answers.append(change["new"]), names="answer")
    message = {"kind": "generate", "prompt": prompt, "settings": {**explorer.settings.message(), **changes}}
    explorer.widget._handle_custom_msg(message, [])
    explorer.widget.unobserve_all("answer")
    return answers


# -------------------------------------------------------------------------------------------------- what is pictured


def test_the_browser_gets_what_gate_and_experts_compute_at_every_rank(made, steering, queries, groups):
    data, gate, experts = made.widget.data, steering.gate_at(LAYER), steering.experts_at(LAYER)
    assert [(group["name"], group["size"]) for group in data["groups"]] == [(n, len(g)) for n, g in groups.items()]
    assert data["ranks"] == gate.subspace.rank
    assert torch.equal(floats(data, "scores"), gate.subspace.energy_ratios(queries))
    opened = np.frombuffer(data["opened"], "u1").reshape(len(queries), -1)
    for rank in (1, 2, gate.rank, gate.subspace.rank):
        assert opened[:, rank - 1].tolist() == [int(g >= 0.5) for g in gate.at_rank(rank).gate(queries)]
        assert data["thresholds"][rank - 1] == pytest.approx(gate.at_rank(rank).threshold, abs=1e-6)
    assert 0 < opened.sum() < opened.size
    logits = floats(data, "logits")
    assert torch.allclose(logits.softmax(dim=-1), experts.route(queries), atol=1e-6)
    off = logits.clone()
    off[:, 1] = -torch.inf
    assert torch.allclose(off.softmax(dim=-1), experts.without_expert(1).route(queries), atol=1e-6)


def test_the_browser_is_told_what_the_fit_is_worth_and_what_is_doubted(made, steering, tutor_model, trained, groups):
    held_out = steering.experts_at(LAYER).report.held_out
    told = made.widget.data["fit"]
    assert told == [f"fit, held out: {held_out}", held_out.curve_text] and "ridge 0." in told[0]
    assert told[1].startswith("explained by number of experts 1: 0.") and ", 10: 0." in told[1]

    def shown(fitted):
        return explore(fitted, tutor_model, groups, progress=False).widget.data["fit"]

    at_an_edge = fit(trained[LAYER], preset="0.1", n_experts=(2, 3), epochs=2)
    assert shown(at_an_edge) == [f"doubt: {doubt}" for doubt in at_an_edge.experts_at(LAYER).report.doubts]
    assert len(shown(at_an_edge)) == 1
    by_hand = replace(steering.experts_at(LAYER), report=None)
    assert shown(steering.with_experts(by_hand)) == []
    alone = replace(trained[LAYER], queries=-trained[LAYER].queries, readings={})
    cut = fit_gate(trained[LAYER].queries, kind="linear", general=alone.queries, layer=LAYER)
    told = shown(steering.with_experts(by_hand).with_gate(cut))
    assert len(told) == 1 and told[0].startswith("gate, out of fold: missed 0.0% of ")


def test_only_the_first_prompts_are_shown_and_the_data_say_so(steering, tutor_model, groups):
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    data = explore(steering, tutor_model, groups, limit=2, progress=False).widget.data
    assert [(group["size"], group["given"]) for group in data["groups"]] == [
        (2, len(group)) for group in groups.values()
    ]
    assert data["prompts"][:2] == groups["harmful"][:2]


def test_the_data_survive_json_whatever_the_prompts_are(steering):
    subject, rows = Subject(steering, LAYER), torch.randn(len(HOSTILE), 128)
    rows[0] = torch.nan
    told = pictured(subject, grouped({"<b>": HOSTILE}, None), rows, rows).message()
    kept = {name: value for name, value in told.items() if not isinstance(value, bytes)}
    text = json.dumps(kept, allow_nan=False, ensure_ascii=False)
    assert text.encode("utf-8").decode() == text and json.loads(text)["prompts"] == HOSTILE
    opened = np.frombuffer(told["opened"], "u1").reshape(len(HOSTILE), -1)
    assert opened[0].sum() == 0  # a query that is not finite is not steered


def test_half_a_character_is_refused_in_prompts_and_replaced_in_names(steering):
    with pytest.raises(InputError, match=r"mixed prompt 1: .* got half a character \(a lone surrogate\), '\\ud800' at"):
        grouped({"mixed": ["hello", "a \ud800"]}, None)
    named = pictured(
        Subject(steering, LAYER), grouped({"a\ud800": ["b"]}, None), torch.ones(1, 128), torch.ones(1, 128)
    )
    assert [group["name"] for group in named.message()["groups"]] == ["a?"]


def test_prompts_may_be_one_group_and_a_steering_may_have_no_gate(steering, tutor_model, groups, queries):
    explorer = explore(steering.with_gate(None), tutor_model, groups["harmful"], progress=False)
    assert explorer.settings.rank is None and not explorer.settings.gate
    assert vectors_equal(explorer.state, steering.with_gate(None), queries)
    assert type(explorer.figure.data[0]).__name__ == "Heatmap"
    with pytest.raises(InputError, match="without a gate"):
        explorer.choose(rank=3)
    with pytest.raises(InputError, match="without a gate"):
        explorer.choose(mode="ablation")


# ------------------------------------------------------------------------------------------------------------ the state


CHANGES = {
    "nothing": ({}, lambda s: s),
    "rank": ({"rank": 3}, lambda s: s.at_rank(3)),
    "threshold": ({"rank": 3, "threshold": 0.99}, lambda s: s.with_gate(s.gate.at_rank(3).at_threshold(0.99))),
    "gate": ({"gate": False}, lambda s: s.with_gate(None)),
    "strength": ({"strength": 2.5}, lambda s: s.with_strength(2.5)),
    "expert": ({"experts": [True, False, False, True]}, lambda s: s.without_expert(1).without_expert(2)),
    "residual": ({"residual": False}, lambda s: s.without_residual()),
}


@pytest.mark.parametrize("case", CHANGES)
def test_every_control_comes_back_as_the_steering_that_one_would_write(made, steering, queries, case):
    changes, written = CHANGES[case]
    n_experts = steering.n_experts
    if "experts" in changes:
        changes = {"experts": [*changes["experts"], *[True] * n_experts][:n_experts]}
    made.widget.settings = {**made.widget.settings, **changes}  # as the browser sets it
    assert vectors_equal(made.state, written(steering), queries)
    assert made.state.fingerprint == steering.fingerprint
    if case not in ("nothing", "rank"):  # another rank need not change whether these few prompts are steered
        assert not vectors_equal(made.state, steering, queries)
    assert made.settings.message() == made.widget.settings


def test_the_threshold_is_the_ranks_own_until_it_is_touched(made, steering):
    assert made.choose(rank=2).state.gate.threshold == steering.gate.at_rank(2).threshold
    touched = made.choose(threshold=0.9, rank=5).state.gate
    assert isinstance(touched, ThresholdGate) and (touched.threshold, touched.rank) == (0.9, 5)
    assert type(made.choose(threshold=None).state.gate) is type(steering.gate)


def test_in_ablation_mode_the_state_is_the_ablation(made, steering):
    state = made.choose(mode="ablation", rank=7).state
    assert isinstance(state, SubspaceAblation)
    assert (state.rank, state.layer, state.subspace) == (7, LAYER, steering.gate.subspace)
    assert state.fingerprint == steering.fingerprint
    assert isinstance(made.choose(mode="gate").state, FineSteer)


def test_a_switch_that_was_off_can_be_switched_on(steering, tutor_model, groups, queries):
    explorer = explore(steering.without_expert(0).without_residual(), tutor_model, groups, progress=False)
    assert explorer.settings.experts[0] is False and explorer.settings.residual is False
    on = explorer.choose(experts=[True] * steering.n_experts, residual=True)
    assert vectors_equal(on.state, steering, queries)


def test_of_several_layers_one_is_changed(trained, tutor_model, groups, queries):
    both = fit({layer: trained[layer] for layer in (3, 4)}, preset="0.1", epochs=2)
    explorer = explore(both, tutor_model, groups, layer=4, progress=False)
    state = explorer.choose(rank=2, experts=[False, *[True] * (both.experts_at(4).n_experts - 1)]).state
    assert (state.gate_at(3).rank, state.gate_at(4).rank) == (both.gate_at(3).rank, 2)
    assert state.experts_at(3) is both.experts_at(3) and not state.experts_at(4).enabled[0]
    opened = explorer.choose(gate=False).state
    assert opened.gate_at(4) is None and opened.gate_at(3) is both.gate_at(3)
    with pytest.raises(InputError, match=r"one of \[3, 4\]"):
        explore(both, tutor_model, groups, layer=2, progress=False)


def test_where_one_layers_gate_decides_that_gate_is_explored(trained, tutor_model, groups):
    both = fit({layer: trained[layer] for layer in (3, 4)}, preset="0.1", epochs=2)
    shared = FineSteer(both.experts, {3: both.gate_at(3)}, gate_layer=3, fingerprint=both.fingerprint)
    explorer = explore(shared, tutor_model, groups, layer=4, progress=False)
    rows = [prompt for group in groups.values() for prompt in group]
    read = collect_queries(tutor_model, rows, layer=3, progress=False).queries
    assert torch.equal(explorer._pictured.scores, shared.gate_at(3).subspace.energy_ratios(read))
    assert explorer.choose(rank=2).state.gate_at(3).rank == 2
    assert explorer.choose(gate=False).state.gate_layer is None


def test_a_composed_gate_has_ranks_and_no_threshold(steering, tutor_model, groups, queries):
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    composed = steering.with_gate(~steering.gate)
    explorer = explore(composed, tutor_model, groups, progress=False)
    assert explorer.widget.data["thresholds"] is None and explorer.widget.data["composed"]
    opened = np.frombuffer(explorer.widget.data["opened"], "u1").reshape(len(queries), -1)
    assert opened[:, 2].tolist() == [int(g >= 0.5) for g in composed.at_rank(3).gate_at(LAYER).gate(queries)]
    assert vectors_equal(explorer.choose(rank=3).state, composed.at_rank(3), queries)
    with pytest.raises(InputError, match="composed"):
        explorer.choose(threshold=0.5)


BAD = [
    {"rank": 0},
    {"rank": 10_000},
    {"rank": True},
    {"rank": None},
    {"threshold": float("nan")},
    {"threshold": "high"},
    {"strength": None},
    {"strength": float("inf")},
    {"experts": []},
    {"experts": "all"},
    {"experts": [1, 0, 0, 0]},
    {"residual": "yes"},
    {"gate": None},
    {"mode": "both"},
    {"colour": "red"},
]


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_what_does_not_fit_is_refused_and_put_back(made, changes):
    before = made.settings
    with pytest.raises(InputError):
        made.choose(**changes)
    made.widget.settings = {**made.widget.settings, **changes}  # as a broken page would
    assert made.settings == before and made.widget.settings == before.message()
    assert isinstance(made.error, InputError)


def test_the_last_expert_stays_on(made, steering):
    with pytest.raises(InputError, match="at least one of them on"):
        made.choose(experts=[False] * steering.n_experts)


# ----------------------------------------------------------------------------------------------------------------- text


def test_text_is_generated_on_demand_with_the_settings_of_the_moment(made, steering, tutor_model, groups):
    assert made.widget.answer == {}
    running, done = click(made, 1, strength=0.5, gate=False)
    assert running["status"] == "running" and done["status"] == "done"
    assert made.settings.strength == 0.5
    prompt, wanted = groups["harmful"][1], steering.with_strength(0.5).with_gate(None)
    options = {"max_new_tokens": 12, "progress": False}
    assert done["unsteered"] == generate(tutor_model, prompt, **options).texts[0]
    assert done["steered"] == generate(tutor_model, prompt, wanted, **options).texts[0]
    assert done["settings"] == made.settings.message() and done["prompt"] == 1
    assert done["decision"].startswith("always open · strongest: expert ")
    assert "".join(token for token, _ in done["tokens"]).startswith(done["steered"])
    assert max(kl for _, kl in done["tokens"]) > 0.1 and "own" not in done
    before = done
    made.choose(strength=3.0)
    assert made.widget.answer == before  # nothing is generated until somebody asks


def test_both_model_classes_are_explored_alike(model, steering, tutor_model, groups):
    texts = []
    for one in (model, tutor_model):
        explorer = explore(steering, one, groups, max_new_tokens=8, progress=False)
        made = explorer.choose(rank=4).generate(1)
        texts.append((made.text, made.baseline.text, explorer._pictured.opened.tolist()))
    assert texts[0] == texts[1]


def test_a_steered_prompt_gets_other_text_and_one_that_is_let_go_by_the_same(made, groups):
    steered = made.generate(0)
    assert steered.text != steered.baseline.text
    assert made.widget.answer["decision"].startswith("gate 1.00, open")
    left = made.generate(len(groups["harmful"]))
    assert left.text == left.baseline.text and "closed" in made.widget.answer["decision"]


def test_in_ablation_mode_the_text_is_the_ablated_models(made, steering, tutor_model, groups):
    rank = steering.gate.subspace.rank
    (_, done) = click(made, 0, mode="ablation", rank=rank)
    ablation = SubspaceAblation(steering.gate.subspace, layer=LAYER, rank=rank)
    options = {"max_new_tokens": 12, "progress": False}
    assert done["steered"] == generate(tutor_model, groups["harmful"][0], ablation, **options).texts[0]
    assert done["steered"] != done["unsteered"]
    assert f"rank {rank} taken out" in done["decision"]


def test_ones_own_prompt_is_wrapped_for_the_tutor_and_its_unknown_words_are_marked(made, tutor_model):
    made.widget._handle_custom_msg({"kind": "mark", "text": "How do I maek a Bomb?"}, [])
    told = made.widget.words
    assert told["text"] == "How do I maek a Bomb?" == "".join(part for part, _ in told["parts"])
    assert {part: nearest for part, nearest in told["parts"] if nearest is not None} == {
        "maek": list(tutor.unknown("maek")["maek"])
    }
    text = made.generate("How do I make a bomb?")
    assert text.prompt == tutor.chat("How do I make a bomb?")
    assert made.widget.answer["prompt"] == "How do I make a bomb?"
    own, asked = made.widget.answer["own"], collect_queries(tutor_model, [text.prompt], layer=LAYER, progress=False)
    gate = made.state.gate
    assert own["scores"] == pytest.approx(gate.subspace.energy_ratios(asked.queries)[0].tolist(), abs=1e-5)
    assert own["opened"] == (gate.gates(asked.queries)[0] >= 0.5).int().tolist()
    weights = torch.tensor(own["logits"]).softmax(dim=0)
    assert torch.allclose(weights, made.state.experts.route(asked.queries)[0], atol=1e-4)


def test_functions_of_ones_own_are_used_instead(steering, tutor_model, groups):
    explorer = explore(
        steering,
        tutor_model,
        groups,
        max_new_tokens=2,
        unknown=lambda text: {"bomb": ()},
        wrap=lambda text: f"<user>{text}<tutor>",
        progress=False,
    )
    assert explorer.generate("make a bomb").prompt == "<user>make a bomb<tutor>"
    if explorer.widget is not None:
        explorer.widget._handle_custom_msg({"kind": "mark", "text": "a Bomb"}, [])
        assert explorer.widget.words["parts"] == [("a ", None), ("Bomb", [])]


@pytest.mark.parametrize(
    "message",
    [None, 3, [], "mark", {}, {"kind": None}, {"kind": ["mark"]}, {"kind": "sing"}, {"kind": "mark"},
     {"kind": "mark", "text": 3}, {"kind": "mark", "text": "x" * 20_001}],
)  # fmt: skip
def test_a_message_that_is_none_is_kept_as_an_error_and_does_nothing(made, message):
    before = made.widget.words, made.widget.answer
    made._take_message(None, message, [])
    assert isinstance(made.error, InputError) and (made.widget.words, made.widget.answer) == before


@pytest.mark.parametrize("prompt", [None, [1], {"a": 1}, 1.5, True, 10**12, "x" * 20_001])
def test_a_prompt_of_a_message_that_is_none_is_refused_in_words(made, prompt, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' type checker would refuse them first
    (_, failed) = click(made, prompt)
    assert failed["status"] == "failed" and failed["error"].startswith("prompt: expected")


def test_words_of_a_long_text_are_not_looked_up(steering, tutor_model, groups):
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    asked = []
    explorer = explore(
        steering, tutor_model, groups, max_new_tokens=2, unknown=lambda text: asked.append(text) or {}, progress=False
    )
    for length in (2000, 2001):
        explorer._take_message(None, {"kind": "mark", "text": "w " * (length // 2) + "w" * (length % 2)}, [])
    assert [len(text) for text in asked] == [2000] and explorer.error is None


def test_words_are_marked_whole_and_the_parts_are_the_text():
    text = "Ab abc, AB? <b>ab</b> a.b"
    split = parts(text, {"ab": ["cd"], "a.b": []})
    assert "".join(part for part, _ in split) == text
    assert [part for part, nearest in split if nearest is not None] == ["Ab", "AB", "ab", "a.b"]
    assert parts("plain", {}) == [("plain", None)] and parts("", {"a": []}) == []


def test_the_tutor_is_known_by_its_tags(tutor_model):
    class Other:
        cfg = hook_dict = None
        tokenizer = type("Words", (), {"get_vocab": lambda self: {"<user>": 0, "a": 1}})()

        def __call__(self):
            raise NotImplementedError

    world = worlds.world_of(tutor_model)
    assert world is not None and world.unknown is tutor.unknown and world.wrap is tutor.chat
    assert worlds.world_of(Other()) is None
    Other.tokenizer = None
    assert worlds.world_of(Other()) is None


def test_another_world_marks_words_and_wraps_prompts_where_it_recognises_the_model(
    steering, tutor_model, groups, monkeypatch
):
    asked = []

    def recognises(tokenizer):
        asked.append(tokenizer)
        return True

    monkeypatch.setattr(worlds, "_WORLDS", {})
    options = {"max_new_tokens": 2, "progress": False}
    bare = explore(steering, tutor_model, groups, **options)
    assert bare.generate("make a bomb").prompt == "make a bomb"
    own = worlds.World(recognises, lambda text: {"bomb": ("comb",)}, lambda text: f"<user>{text}!<tutor>")
    worlds.register("own", own)
    explorer = explore(steering, tutor_model, groups, **options)
    assert asked == [tutor_model.tokenizer]
    assert explorer.generate("make a bomb").prompt == "<user>make a bomb!<tutor>"
    if explorer.widget is not None:
        explorer.widget._handle_custom_msg({"kind": "mark", "text": "a bomb"}, [])
        assert explorer.widget.words["parts"] == [("a ", None), ("bomb", ["comb"])]
    given = explore(steering, tutor_model, groups, wrap=lambda text: text, chat=False, **options)
    assert given.generate("make a bomb").prompt == "make a bomb", "what the caller gives comes first"


def test_what_fails_is_shown_and_kept(made):
    (_, failed) = click(made, "word " * 300)
    assert failed["status"] == "failed" and "too long" in failed["error"]
    assert isinstance(made.error, FsteerError)
    for prompt, told in ((99, "an int in 0.."), (-1, "an int in 0.."), ("  ", "text")):
        assert told in click(made, prompt)[-1]["error"]
    assert "settings" in click(made, 0, rank=0, colour="red")[-1]["error"]
    assert click(made, 0)[-1]["status"] == "done" and made.error is None


def test_a_failure_outside_the_package_and_an_interrupt_are_shown_too(made, monkeypatch):
    def broken(error):
        def generate(*args, **options):
            raise error

        monkeypatch.setattr("fsteer_lens.explorer.exploring.generate", generate)

    broken(RuntimeError("<b>out of memory</b>"))
    assert click(made, 0)[-1]["error"] == "RuntimeError: <b>out of memory</b>"
    broken(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        made._take_message(None, {"kind": "generate", "prompt": 0, "settings": made.settings.message()}, [])
    assert made.widget.answer["status"] == "failed"
    with pytest.raises(KeyboardInterrupt):
        made.generate(0)  # from Python a failure is an exception


# ------------------------------------------------------------------------------------------------------------ display


def test_it_shows_the_widget_and_has_a_static_figure(made, steering, queries, groups):
    bundle = made._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == made.widget.model_id
    n = len(groups["harmful"])
    ratios = steering.gate.subspace.energy_ratio(queries, steering.gate.rank)
    assert torch.allclose(torch.tensor(made.figure.data[0].x), ratios[:n], atol=6e-4)
    assert f"{len(queries)} prompts" in repr(made)


def test_without_anywidget_the_static_figure_is_shown_and_all_else_works(
    steering, tutor_model, groups, queries, monkeypatch
):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    explorer = explore(steering, tutor_model, groups, max_new_tokens=4, progress=False)
    assert explorer.widget is None
    bundle = explorer._repr_mimebundle_()
    assert len(bundle["application/vnd.plotly.v1+json"]["data"]) >= 2
    assert vectors_equal(explorer.choose(rank=2).state, steering.at_rank(2), queries)
    assert explorer.generate(0).baseline is not None


def test_importing_the_explorer_imports_no_widgets_and_no_model_library():
    code = (
        "import sys, fsteer_lens.explorer as e\n"
        "print([n for n in ('anywidget', 'plotly', 'transformer_lens', 'sklearn') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


BAD_CALLS = """
import fsteer_lens as fl, torch
from fsteer_lens import tutor
from fsteer_lens.explorer import explore
model = tutor.load()
h = torch.randn(40, 128)
steering = fl.FineSteer(fl.fit_experts(h, torch.randn(40, 128), preset="0.1", epochs=1), layer=4)
prompts = ["<user>hello<tutor>"]
cases = [
    lambda: explore(fl.steering.MeanShift(h[0], layer=4), model, prompts),
    lambda: explore(steering, "gpt2", prompts),
    lambda: explore(steering, model, {}),
    lambda: explore(steering, model, []),
    lambda: explore(steering, model, {"a": prompts, "b": []}),
    lambda: explore(steering, model, "hello"),
    lambda: explore(steering, model, {"a": "hello"}),
    lambda: explore(steering, model, [1, 2]),
    lambda: explore(steering, model, {"a": prompts}, layer=3),
    lambda: explore(steering, model, prompts, layer=True),
    lambda: explore(steering, model, prompts, limit=0),
    lambda: explore(steering, model, prompts, max_new_tokens=0),
    lambda: explore(steering, model, prompts, unknown="words"),
]
for number, case in enumerate(cases):
    try:
        case()
    except fl.errors.InputError as error:
        assert "expected" in str(error) or "got" in str(error), error
    else:
        raise SystemExit(f"case {number} was accepted")
print("refused", len(cases))
"""


def test_wrong_arguments_are_refused_with_what_was_expected():
    """In a process without the tests' type checker, as at a user's."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", BAD_CALLS], capture_output=True, text=True)
    assert ran.stdout.strip() == "refused 13", ran.stdout + ran.stderr


def test_settings_are_values():
    one = Settings(3, None, 1.0, (True, False), True, True)
    assert one == Settings(3, None, 1.0, (True, False), True, True) and one.mode == "gate"
    assert json.loads(json.dumps(one.message()))["experts"] == [True, False]

"""Token views show what they were given, marks stand where something was steered, and no token becomes markup."""

import json
import re
from dataclasses import replace

import pytest
import torch

import fsteer_lens as fs
from fsteer_lens import Window, chain, figures, generate, tutor
from fsteer_lens.effects import GateExplanation
from fsteer_lens.errors import InputError
from fsteer_lens.figures.rich import harmless
from fsteer_lens.figures.style import expert_colours
from fsteer_lens.run.generation import Baseline, Generation, Generations
from fsteer_lens.steering import MeanShift
from fsteer_lens.trace.trace import Trace, join
from tests.figure_parts import HOSTILE, Elements, trace_of
from tests.running import LAYER, SITE, batch_of, residual

PLAIN = {"div", "span", "wbr"}


def marked(view, mark="steered"):
    """Positions whose hover text has a line that says so."""
    found = [one["title"].split("\n") for one in Elements(view).titled()]
    return [position for position, lines in enumerate(found) if mark in lines[1:]]


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("view", ["scores", "experts"])
def test_token_views_escape_and_show_every_token(view):
    n = len(HOSTILE)
    if view == "scores":
        drawn = figures.token_scores(HOSTILE, torch.linspace(-1, 1, n), name="<b>", centred=True)
    else:
        drawn = figures.token_experts(HOSTILE, torch.rand(n, 2).softmax(-1), names=["<b>", "b"])
    page = Elements(drawn)
    assert {tag for tag, _ in page.found} <= PLAIN
    assert not [key for _, attributes in page.found for key in attributes if key.startswith("on")]
    for shown in ("</script>", "<img src=x onerror=alert(1)>", "a⏎b", "🙂", "שלום", "\ufffd", "&lt;i&gt;", "<b>"):
        assert shown in page.text
    str(drawn).encode()  # nothing that UTF-8 cannot hold
    assert "\0" not in str(drawn)
    assert len(page.titled()) == n
    assert drawn._repr_html_() == str(drawn)


def test_token_shades_follow_the_scores_and_nan_has_none():
    view = figures.token_scores(list("abcd"), torch.tensor([-2.0, 0.0, float("nan"), 1.0]), centred=True)
    styles = [attributes["style"] for attributes in Elements(view).titled()]
    assert "220,65,70,0.50" in styles[0] and "0.00" in styles[1] and "60,130,220,0.25" in styles[3]
    assert "background" not in styles[2] and "nan" not in str(view).lower()
    bounded = figures.token_scores(["a", "b"], torch.tensor([0.5, 9.0]), bounds=(0, 1))
    assert [one["style"][-5:] for one in Elements(bounded).titled()] == ["0.25)", "0.50)"]


def test_the_explanation_of_a_gate_draws_what_every_token_carried():
    carried = torch.tensor([float("nan"), 0.25, -0.5])
    told = GateExplanation(
        rank=1,
        ratio=0.75,
        gate=1.0,
        is_open=True,
        threshold=0.5,
        margin=0.25,
        flip_rank=None,
        flip_threshold=0.75,
        directions=torch.tensor([0.75]),
        tokens=("<b>", "a", "b"),
        without=0.75 - carried,
        carried=carried,
    )
    name = "energy ratio 0.750 (threshold 0.500) minus that without the token"
    assert str(figures.token_scores(told)) == str(figures.token_scores(told.tokens, carried, name=name, centred=True))
    other = figures.token_scores(told, told.without, name="without")
    assert str(other) == str(figures.token_scores(told.tokens, told.without, name="without"))


def test_pads_bos_steered_and_others_have_four_looks():
    steered = torch.tensor([False, True, True, False])
    view = figures.token_scores(
        ["<pad>", "<bos>", "b", "c"], torch.ones(4), first=1, prompt_length=2, bos=True, steered=steered
    )
    page = Elements(view)
    pad, bos, on, off = (one["style"] for one in page.titled())
    assert "line-through" in pad and "border" not in pad
    assert "box-shadow" in bos and "solid" in bos
    assert "solid #f89c20" in on and "box-shadow" not in on
    assert "dotted" in off
    for told in ("steered", "not steered", "beginning of sequence", "padding", "generated"):
        assert told in page.text
    assert marked(view, "prompt") == [1, 2] and marked(view, "generated") == [3] and marked(view, "padding") == [0]
    body = str(view)
    assert body.index("3: ") > body.index("the generated text begins here") > body.index("2: ")


def test_token_views_refuse_what_does_not_fit():
    with pytest.raises(InputError, match="one for each of 2 tokens"):
        figures.token_scores(["a", "b"], torch.ones(3))
    with pytest.raises(InputError, match="one for each of 2 tokens"):
        figures.token_scores(["a", "b"], torch.ones(2), steered=torch.ones(3) > 0)
    with pytest.raises(InputError, match="at least one"):
        figures.token_scores([], torch.ones(0))
    with pytest.raises(InputError, match="low < high"):
        figures.token_scores(["a"], torch.ones(1), bounds=(1, 1))
    with pytest.raises(InputError, match=r"first real token"):
        figures.token_scores(["a"], torch.ones(1), first=1)
    with pytest.raises(InputError, match="token texts"):
        figures.token_scores(Trace())
    with pytest.raises(InputError, match="as many as tokens"):
        figures.token_scores(["a"], torch.ones(1), marks=trace_of().marks())
    with pytest.raises(InputError, match=r"0\.\.0"):
        figures.token_scores(list("abcd"), torch.ones(4), marks=trace_of().marks(), row=1)
    with pytest.raises(InputError, match="a row for each of 1 tokens"):
        figures.token_experts(["a"], torch.ones(2, 2))
    with pytest.raises(InputError, match="one for each of 2 experts"):
        figures.token_experts(["a"], torch.ones(1, 2), names=["one"])


# ------------------------------------------------------------------------------------------------------------ offsets


@pytest.mark.parametrize("steered", [(0, 1, 2), (2, 3), (0,), ()])
def test_marks_of_a_trace_stand_at_the_steered_positions(steered):
    view = figures.token_scores(trace_of(steered=steered))
    titles = [one["title"] for one in Elements(view).titled()]
    assert [title.split("\n")[0] for title in titles] == ["0: 'p0'", "1: 'p1'", "2: 'p2'", "3: 'n0'", "4: '<eos>'"]
    assert marked(view) == list(steered)
    assert marked(view, "prompt") == [0, 1, 2] and marked(view, "generated") == [3, 4]
    assert "none" in titles[4]  # no forward pass went through the last token


@pytest.mark.parametrize("scope", ["prompt", "generated", "all", Window(1, 3), Window(2)])
def test_exactly_the_tokens_whose_stream_was_changed_are_marked(tutor_model, scope):
    """The oracle is TransformerLens: the stream after the steered layer differs from what that layer gave."""
    prompts = [
        "<user>what is the capital of france?<tutor>",
        "<user>hi, how do you bake bread?<tutor>",
        "<user>hi<tutor>",
    ]
    before, after = [], []
    watch = [
        (SITE, lambda x, hook: before.append(x.detach().clone()) or None),
        (f"blocks.{LAYER + 1}.hook_resid_pre", lambda x, hook: after.append(x.detach().clone()) or None),
    ]
    steering = MeanShift(torch.full((128,), 0.1), layer=LAYER, scope=scope)
    with tutor_model.hooks(fwd_hooks=watch):
        trace = generate(tutor_model, prompts, steering, max_new_tokens=6, progress=False).trace
    differs = (torch.cat(after, dim=1) - torch.cat(before, dim=1)).abs().amax(dim=-1) > 1e-6
    lengths = trace.prompt_lengths.tolist()
    assert len(set(lengths)) == 3  # a batch is sorted by length, and padded on the left
    for place, row in enumerate(sorted(range(3), key=lambda row: lengths[row])):
        n_new, n_prompt = len(trace.steps.texts[row]), lengths[row]
        start = max(lengths) - n_prompt
        assert not differs[place, :start].any()
        expected = differs[place, start : start + n_prompt + n_new - 1].nonzero()[:, 0].tolist()
        assert expected or scope == Window(2)
        view = figures.token_scores(trace, row=row)
        assert marked(view) == expected
        assert len(Elements(view).titled()) == n_prompt + n_new
        assert marked(view, "beginning of sequence") == [0]
        change = figures.trace_timeline(trace, row=row).data[0]
        filled = [step for step, symbol in enumerate(change.marker.symbol) if symbol == "circle"]
        assert filled == [at - (n_prompt - 1) for at in expected if at >= n_prompt - 1]


def test_marks_of_a_padded_batch_know_pads_on_either_side(tutor_model):
    prompts = ["<user>what is the capital of france?<tutor>", "<user>hi<tutor>"]
    steering = MeanShift(torch.full((128,), 0.1), layer=LAYER, scope="all")
    for side in ("left", "right"):
        batch = batch_of(tutor_model, prompts, side)
        plain = residual(tutor_model, batch)
        with steering.on(tutor_model, attention_mask=batch.mask) as trace:
            differs = (residual(tutor_model, batch) - plain).abs().amax(dim=-1) > 1e-6
        for row in range(2):
            texts = [str(token) for token in batch.tokens[row].tolist()]
            view = figures.token_scores(texts, torch.ones(len(texts)), marks=trace.marks(), row=row)
            assert marked(view) == (differs[row] & batch.mask[row]).nonzero()[:, 0].tolist()
            assert marked(view, "padding") == (~batch.mask[row]).nonzero()[:, 0].tolist()


def test_a_trace_in_which_nothing_steered_has_no_marks_and_one_of_several_layers_wants_to_know_which():
    unsteered = replace(trace_of(), change={}, weights={})
    view = figures.token_scores(unsteered, torch.ones(5))
    assert marked(view) == marked(view, "not steered") == [] and marked(view, "generated") == [3, 4]
    with pytest.raises(InputError, match="layers with change"):
        figures.token_scores(unsteered)
    two = trace_of()
    two.change[2] = torch.tensor([[0.5, 0, 0, 0]])
    with pytest.raises(InputError, match=r"\[2, 4\]"):
        figures.token_scores(two)
    assert marked(figures.token_scores(two, layer=2)) == [0]


# ------------------------------------------------------------------------------------------------------------ experts


def strips(view):
    """Of each token, the (colour, start, end) of the parts of its strip."""
    return [
        [(c, float(a), float(b)) for c, a, b in re.findall(r"(#\w{6}) ([\d.]+)% ([\d.]+)%", one["style"])]
        for one in Elements(view).titled()
    ]


def test_strips_are_divided_as_the_weights_are():
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0], [float("nan"), float("nan")], [float("nan"), 0.5]])
    view = figures.token_experts(list("abcd"), weights)
    first, second = expert_colours(2)
    assert strips(view) == [
        [(first, 0, 25), (second, 25, 100)],
        [(first, 0, 100)],
        [],
        [(second, 0, 100)],
    ]
    titles = [one["title"] for one in Elements(view).titled()]
    assert titles[0] == "0: 'a'\nexpert 0: 0.250\nexpert 1: 0.750"
    assert "no expert acts" in titles[2] and "expert 0: none" in titles[3]
    assert "nan" not in str(view).lower()


def test_of_a_trace_the_mix_stands_at_steered_tokens_alone_and_follows_the_steps():
    shown = strips(figures.token_experts(trace_of(steered=(1, 2))))
    first, second = expert_colours(2)
    assert shown == [[], [(first, 0, 10), (second, 10, 100)], [(first, 0, 10), (second, 10, 100)], [], []]
    steps = torch.full((1, 4, 2), float("nan"))
    steps[0, 2:] = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    refreshed = trace_of(steered=(1, 2, 3), step_weights={4: steps})
    shown = strips(figures.token_experts(refreshed))
    assert shown[1:4] == [[(first, 0, 10), (second, 10, 100)], [(first, 0, 50), (second, 50, 100)], [(first, 0, 100)]]


# --------------------------------------------------------------------------------------------------------- comparison


def generations(texts=("n0",)):
    return Generations(
        Generation("?", t, (7, 8), trace_of(prompt=("<b>", t, "!")), Baseline("<i>plain", (1,))) for t in texts
    )


def test_comparison_shows_both_texts_kl_and_log_probs():
    view = str(figures.steer_compare(generations(), titles=["<u>"]))
    page = Elements(view)
    for text in ("<b>n0", "<i>plain", "<u>", "gate 1.00 open", "expert 1 with weight 0.90", "<eos>"):
        assert text in page.text
    assert expert_colours(2)[1] in view
    first, second = (one for _, one in page.found if "generated token" in one.get("title", ""))
    assert "KL(steered ‖ unsteered) 4.00" in first["title"] and "-0.10 nats steered, -5.10 unsteered" in first["title"]
    assert "-0.30  '<tok1>'" in first["title"] and "-0.10  'n0'" in first["title"]
    assert ",0.5)" in first["style"] and ",0.125)" in second["style"]  # one scale, up to the largest KL
    assert "opacity" not in first["style"] and "opacity" in second["style"]  # the end of sequence is faint
    assert {tag for tag, _ in page.found} <= {"div", "table", "tbody", "tr", "th", "td", "span", "b"}
    assert [tag for tag, _ in page.found].count("b") == 1  # the row's own title


def test_comparison_of_generations_of_their_trace_and_of_a_file_is_one(tmp_path):
    texts = generations(list("abc"))
    texts.trace.to_jsonl(tmp_path / "t.jsonl")
    view = str(figures.steer_compare(texts))
    assert str(figures.steer_compare(texts.trace)) == view
    assert str(figures.steer_compare(Trace.from_jsonl(tmp_path / "t.jsonl"))) == view
    assert view.count("&lt;i&gt;plain") == 3


def test_comparison_takes_one_a_limit_and_refuses_what_has_no_twin():
    assert str(figures.steer_compare(generations(list("abc")), limit=2)).count("plain") == 2
    assert str(figures.steer_compare(generations()[0])).count("plain") == 1
    with pytest.raises(InputError, match="compare=True"):
        figures.steer_compare(Generation("p", "t", (1,), Trace()))
    with pytest.raises(InputError, match="compare=True"):
        figures.steer_compare(trace_of(unsteered=None))
    for nothing in (Generations([]), Trace()):
        with pytest.raises(InputError, match="at least one"):
            figures.steer_compare(nothing)


# --------------------------------------------------------------------------------------------------------------- rich


def called(view):
    """Component and properties of each circuitsvis view on a piece of HTML, from the scripts as they will run."""
    scripts = re.findall(r"<script>(.*?)</script>", str(view), re.DOTALL)
    found = [re.fullmatch(r'CircuitsVis\.render\("[\w-]+", CircuitsVis\.(\w+), (.*)\)', s, re.DOTALL) for s in scripts]
    assert not any("<" in one[2] for one in found if one)
    return [(one[1], json.loads(one[2])) for one in found if one]


def test_rich_scores_have_symmetric_bounds_and_zero_for_nan():
    ((component, given),) = called(
        figures.token_scores(["a", "b"], torch.tensor([-2.0, float("nan")]), centred=True, rich=True, bundle=False)
    )
    assert component == "ColoredTokens"
    assert given == {"tokens": ["a", "b"], "values": [-2, 0], "minValue": -2, "maxValue": 2}


def test_rich_experts_hold_all_weights_and_the_marks_as_glyphs():
    view = figures.token_experts(trace_of(steered=(1,), bos=torch.tensor([True])), rich=True, bundle=False)
    ((component, given),) = called(view)
    assert component == "ColoredTokensMulti"
    assert given["tokens"] == ["◆p0", "▴p1", "p2", "n0", harmless("<eos>")]
    assert torch.allclose(torch.tensor(given["values"]), torch.tensor([[0.0, 0], [0.1, 0.9], [0, 0], [0, 0], [0, 0]]))
    assert given["labels"] == ["expert 0", "expert 1"] and given["positiveBounds"] == [1, 1]
    assert "◆ beginning of sequence" in str(view) and "▴ steered" in str(view) and "▫" not in str(view)


def test_rich_comparison_holds_the_stored_likeliest_and_their_ranks():
    steered, plain = called(figures.steer_compare(trace_of(), rich=True, bundle=False))
    assert steered[0] == plain[0] == "TokenLogProbs"
    assert steered[1]["prompt"] == ["p2", "n0", harmless("<eos>")]
    assert steered[1]["correctTokenRank"] == [0, 0]
    assert steered[1]["correctTokenLogProb"] == pytest.approx([-0.1, -0.2])
    assert plain[1]["correctTokenRank"] == [1, "2 or later"]  # id 8 is not among the two that are stored
    assert plain[1]["correctTokenLogProb"] == pytest.approx([-5.1, -5.2])
    assert plain[1]["topKTokens"] == [[harmless("<tok1>"), "n0"]] * 2


def test_rich_views_put_no_token_into_the_page_as_markup():
    view = figures.token_scores(HOSTILE, torch.ones(len(HOSTILE)), rich=True, bundle=False)
    page = Elements(view)
    assert {tag for tag, _ in page.found} <= {"div", "script", "style"}
    ((_, given),) = called(view)
    for token in given["tokens"]:  # circuitsvis sets these as innerHTML
        assert not Elements(token).found and Elements(token).text.replace("\u2060", "") == token.replace("\u2060", "")
    str(view).encode()


def test_the_bundle_is_there_once_and_loads_nothing():
    alone = str(figures.token_scores(["a"], torch.ones(1), rich=True))
    bundle = str(figures.circuitsvis_bundle())
    assert alone.startswith(bundle) and 1_000_000 < len(bundle) < 2_000_000
    assert "unpkg" not in alone and bundle.count("</script") == 1 and "sourceMappingURL" not in bundle
    assert len(str(figures.token_scores(["a"], torch.ones(1), rich=True, bundle=False))) < 2000
    several = join([trace_of(), trace_of()])
    assert str(figures.steer_compare(several, rich=True)).count(bundle) == 1


def test_strips_of_a_probe_are_the_weights_that_it_read():
    weights = torch.rand(1, 4, 2).softmax(dim=-1)  # no forward pass went through the last of the five tokens
    probed = replace(trace_of(weights=weights), change={})
    view = str(figures.token_experts(probed))
    titles = [one["title"] for one in Elements(view).titled()]
    assert len(titles) == 5
    for title, (first, second) in zip(titles[:4], weights[0].tolist(), strict=True):
        assert f"expert 0: {first:.3f}" in title and f"expert 1: {second:.3f}" in title and "steered" not in title
    assert "no expert acts" in titles[4]


def test_marks_beside_a_trace_and_scores_without_a_scale_are_refused():
    for view in (figures.token_scores, figures.token_experts):
        for given in ({"prompt_length": 1}, {"bos": True}, {"first": 2}, {"steered": torch.ones(5, dtype=torch.bool)}):
            with pytest.raises(InputError, match="beside a trace"):
                view(trace_of(), **given)
    with pytest.raises(InputError, match="centred=True"):
        figures.token_scores(["a", "b"], torch.tensor([-3.0, -1.0]))
    assert "my name" in str(figures.token_scores(trace_of(), name="my name"))


def test_a_link_of_a_chain_is_drawn_with_the_chains_texts(tutor_model, steering):
    both = chain(steering, MeanShift(torch.full((128,), 0.1), layer=2, scope="all"))
    trace = generate(tutor_model, ["<user>hi, how do you bake bread?<tutor>"], both, max_new_tokens=5, compare=True,
                     progress=False).trace  # fmt: skip
    first, second = trace.link(0), trace.link(1)
    assert figures.trace_timeline(first).data and first.names[4][0] in str(figures.token_experts(first))
    steered = [one for one in Elements(str(figures.token_scores(second))).titled() if "\nsteered" in one["title"]]
    assert len(steered) == len(trace.prompts[0]) + 4
    shown = str(figures.steer_compare(trace))
    assert "layer 4: gate" in shown and "layer 2: always steered" in shown
    with pytest.raises(InputError, match=r"trace\.link"):
        figures.token_experts(trace, layer=4)
    with pytest.raises(InputError, match=r"one of the links of a chain, \[0, 1\], got 2"):
        trace.link(2)


def test_a_gate_that_knows_no_subspace_is_shown_as_a_gate(tutor_model, trained):
    class Shut(fs.Gate):
        def gate(self, h):
            return torch.zeros(h.shape[:-1])

    own = trained[4]
    linear = fs.fit_gate(own.queries, general=-own.queries, kind="linear", layer=4)
    steering = fs.fit(own, gate="none", n_experts=2)
    prompt = tutor.data("safe").train[0].prompt
    for gate, shown in ((linear, "open"), (Shut(), "gate 0.00 closed"), (None, "always steered")):
        gated = steering.with_gate(gate)
        made = generate(tutor_model, prompt, gated, compare=True, max_new_tokens=2, progress=False)
        page = str(figures.steer_compare(made))
        assert shown in page and ("always steered" in page) == (gate is None)

"""Plots show what they were given by plain computation, and draw the same from a trace that went through JSON."""

import json
from dataclasses import replace

import plotly.graph_objects as go
import pytest
import torch
import torch.nn.functional as F

from fsteer_lens import figures, fit_subspace
from fsteer_lens.errors import InputError, ShapeError
from fsteer_lens.figures.style import CONFIG, LOWERED, RAISED, TEXT, expert_colours, method_colours
from fsteer_lens.ground.estimates import Estimate, Sweep
from fsteer_lens.method.experts import Experts
from fsteer_lens.trace.trace import Trace, join
from tests.figure_parts import HOSTILE, Elements, knockout_of, path_of, rank_sweep_of, trace_of
from tests.made_up import D_MODEL, experts

NAN = float("nan")


def through_json(trace: Trace) -> Trace:
    return Trace.from_records(json.loads(json.dumps(trace.to_records())))


def numbers(values):
    return torch.tensor([[NAN if x is None else float(x) for x in row] for row in values])


def texts(figure):
    return [one.text for one in figure.layout.annotations]


# ---------------------------------------------------------------------------------------------------------------- mix


def test_mix_shows_the_weights_in_the_experts_colours_and_the_residuals_share_by_length():
    fitted, query = experts(1), torch.randn(D_MODEL)
    parts = fitted.parts(query)
    outline, bars, residual = figures.expert_mix(fitted, query).data
    assert torch.allclose(torch.tensor(bars.y), parts.weights, atol=1e-4) and outline.y == bars.y
    assert list(bars.marker.color) == list(outline.marker.line.color) == expert_colours(fitted.n_experts)
    lengths = parts.residual_part.norm(), parts.prototype_part.norm()
    assert residual.y[0] == pytest.approx(float(lengths[0] / sum(lengths)), abs=1e-4)
    assert residual.x[0] > max(bars.x)
    assert figures.expert_mix(fitted.without_residual(), query).data[2].y[0] == 0
    called = figures.expert_mix(replace(fitted, names=("a", "b", "c", "<d>")), query)
    assert "&lt;d&gt;" in called.layout.xaxis.ticktext[3]


def test_a_shut_gate_leaves_the_outlines_of_a_mix_empty():
    trace = trace_of()
    shut = replace(trace, gate={4: torch.tensor([0.0])}, names={4: ("tea", "2 · bread")})
    outline, added = figures.expert_mix(shut).data
    assert list(outline.y) == [0.1, 0.9] and list(added.y) == [0, 0]
    assert figures.expert_mix(shut).layout.title.text == (
        "Nothing is added: the gate is shut (it would route to expert 2 · bread)"
    )
    half = figures.expert_mix(replace(trace, gate={4: torch.tensor([0.5])}, names={4: ("tea", "bread")}))
    assert list(half.data[1].y) == [0.05, 0.45] and half.layout.title.text == "Bread has 90 % of the weight"


def test_mix_of_a_trace_tells_the_residuals_length_and_with_the_experts_its_share():
    alone = figures.expert_mix(trace_of())
    assert len(alone.data) == 2 and list(alone.data[0].y) == list(alone.data[1].y) == [0.1, 0.9]
    assert "‖U β‖ = 5" in texts(alone)[0]  # β = (3, 4) and U is orthonormal
    fitted = experts(1)
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    shared = figures.expert_mix(trace_of(weights=weights), experts=fitted)
    beside = float((weights[0] @ fitted.prototypes).norm())
    assert shared.data[2].y[0] == pytest.approx(5 / (5 + beside), abs=1e-4)


def test_mix_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="one activation"):
        figures.expert_mix(experts(1))
    with pytest.raises(InputError, match="none where a trace"):
        figures.expert_mix(trace_of(), torch.zeros(3))
    with pytest.raises(ShapeError):
        figures.expert_mix(experts(1), torch.zeros(3))
    with pytest.raises(InputError, match="finite"):
        figures.expert_mix(experts(1), torch.full((D_MODEL,), NAN))
    with pytest.raises(InputError, match="row"):
        figures.expert_mix(trace_of(), row=1)


# ----------------------------------------------------------------------------------------------------------- knockout


def test_knockout_shows_loss_around_zero_beside_the_weights():
    loss, weights = torch.tensor([[1.0, -3.0], [NAN, 0.5]]), torch.tensor([[0.9, 0.2], [0.1, 0.8]])
    left, right = figures.expert_knockout(knockout_of(loss, ["<b>", "theft"], weights, "<i> (nats)")).data
    assert torch.equal(numbers(left.z).nan_to_num(99), loss.nan_to_num(99)) and left.z[1][0] is None
    assert torch.equal(numbers(right.z), weights)
    assert (left.zmin, left.zmax) == (-3, 3) and (right.zmin, right.zmax) == (0, 1)
    assert left.colorscale[0][1] == "#b2182b" and left.colorscale[-1][1] == "#2166ac"  # red below, blue above
    assert left.colorbar.title.text == "effect lost: &lt;i&gt; (nats)"
    assert left.customdata[0][0] == "expert 0, &lt;b&gt;"
    assert "lost without it<br>&lt;i&gt; (nats)" in left.hovertemplate


def test_knockout_draws_means_of_the_contrasts_of_a_label_in_alphabetical_order():
    made = knockout_of(torch.tensor([[1.0, 2.0, 3.0]]), ["theft", "arson", "theft"], torch.tensor([[0.5, 0.3, 0.7]]))
    left, right = figures.expert_knockout(made, names=["only"]).data
    assert numbers(left.z).tolist() == [[2, 2]] and numbers(right.z)[0].tolist() == pytest.approx([0.3, 0.6])
    assert list(left.customdata[0]) == ["only, arson", "only, theft"]


def test_knockout_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="one for each of 2 columns"):
        figures.expert_knockout(knockout_of(torch.ones(3, 2), ["a"], torch.ones(3, 2)))
    with pytest.raises(InputError, match="at least one expert"):
        figures.expert_knockout(knockout_of(torch.ones(0, 2), ["a", "b"], torch.ones(0, 2)))


# -------------------------------------------------------------------------------------------------------------- scree


def test_scree_shows_variance_its_sum_and_auroc_by_rank():
    subspace = fit_subspace(torch.randn(30, 6) * torch.tensor([5.0, 4, 3, 2, 1, 1]))
    areas = torch.tensor([0.5, 0.7, NAN, 0.9, 0.95, 1.0])
    figure = figures.scree(subspace, rank_sweep_of(areas), rank=4)
    bars, line, curve = figure.data
    assert list(bars.x) == list(line.x) == list(curve.x) == [1, 2, 3, 4, 5, 6]
    assert torch.allclose(torch.tensor(bars.y) / 100, subspace.explained, atol=1e-5)
    assert torch.allclose(torch.tensor(line.y) / 100, subspace.explained.cumsum(0), atol=1e-5)
    assert line.y[-1] == pytest.approx(100, abs=1e-3)
    assert list(curve.y) == [0.5, 0.7, None, 0.9, 0.95, 1.0] and figure.layout.yaxis.type == "log"
    needed = 1 + next(i for i, share in enumerate(subspace.explained.cumsum(0)) if share >= 0.9)
    assert figure.layout.title.text.startswith(f"{needed} of 6 directions hold")
    assert figure.layout.shapes[0].x0 == 4 and "rank 4" in texts(figure)[0]
    assert len(figures.scree(subspace).data) == 2


def test_where_every_rank_tells_all_apart_the_scree_shows_the_margin():
    subspace = fit_subspace(torch.randn(30, 3))
    told = rank_sweep_of(torch.ones(3))
    told = replace(
        told, ser=torch.tensor([[0.8, 0.9, 1.0], [0.7, 0.95, 1.0]]), general_ser=torch.tensor([[0.2, 0.5, 0.9]])
    )
    figure = figures.scree(subspace, told)
    assert list(figure.data[2].y) == pytest.approx([0.5, 0.4, 0.1], abs=1e-4)
    assert "margin" in figure.layout.yaxis2.title.text


def test_scree_refuses_what_does_not_fit():
    subspace = fit_subspace(torch.randn(9, 4))
    with pytest.raises(InputError, match="one for each of 4 ranks"):
        figures.scree(subspace, rank_sweep_of(torch.ones(3)))
    with pytest.raises(InputError, match="rank"):
        figures.scree(subspace, rank=5)


# ---------------------------------------------------------------------------------------------------- layer, position


def test_layers_go_upwards_tokens_rightwards_and_steered_layers_are_named():
    change = torch.arange(12.0).reshape(3, 4)
    change[0, 1] = NAN
    figure = figures.layer_position(path_of(change, ["<b>", "a\nb", "", "\ud800"], (1,), prompt_length=2))
    (heat,) = figure.data
    assert heat.z[0][1] is None and numbers(heat.z)[1:].tolist() == change[1:].tolist()
    assert (heat.zmin, heat.zmax) == (0, 11)
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;", "a⏎b", "·", "\ufffd"]
    assert "▶" in figure.layout.yaxis.ticktext[1] and list(figure.layout.yaxis.ticktext[::2]) == ["0", "2"]
    assert figure.layout.yaxis.range is None  # layer 0 is at the bottom
    assert figure.layout.title.text == "Largest after layer 2, at “�”: 11"
    unreachable, border = figure.layout.shapes
    assert border.x0 == 1.5 and (unreachable.y0, unreachable.y1) == (-0.5, 0.5)
    assert heat.customdata[2][1] == "1: a⏎b"
    signed = figures.layer_position(path_of(change, list("abcd"), cosine=change - 5), what="cosine").data[0]
    assert (signed.zmin, signed.zmax) == (-6, 6)


@pytest.mark.parametrize("what", ["size", "norm", "cosine", "carried", "edit", "attention", "mlp"])
def test_every_number_of_a_propagation_can_be_drawn_with_its_meaning_on_its_scale(what):
    own = torch.tensor([[1.0, 2.0]])
    figure = figures.layer_position(path_of(torch.zeros(1, 2), "ab", **{what: own}), what=what)
    (heat,) = figure.data
    assert numbers(heat.z).tolist() == own.tolist()
    assert heat.zmin == (0 if what in ("size", "norm") else -2)
    meaning = heat.colorbar.title.text.replace("<br>", " ")
    assert f"{meaning}: %{{z" in heat.hovertemplate
    assert ("(units of the residual stream)" in meaning) == (what not in ("size", "cosine"))
    assert not figure.layout.shapes  # nothing but generated tokens


def test_a_text_of_10000_tokens_stays_small_and_has_few_ticks():
    figure = figures.layer_position(path_of(torch.rand(2, 10_000), ["token"] * 10_000))
    assert len(figure.layout.xaxis.tickvals) <= 60
    assert len(figure.to_json()) < 300_000
    with pytest.raises(InputError, match="one for each of 2 columns"):
        figures.layer_position(path_of(torch.rand(1, 2), ["a"]))
    with pytest.raises(InputError, match=r"ints in 0\.\.0"):
        figures.layer_position(path_of(torch.rand(1, 2), ["a", "b"], (1,)))
    with pytest.raises(InputError, match="at least one layer"):
        figures.layer_position(path_of(torch.rand(1, 0), []))


# ----------------------------------------------------------------------------------------------------------- log-prob


def bars_of(figure):
    (bars,) = figure.data
    return dict(zip((name for name, _ in bars.customdata), bars.x, strict=True))


def test_tokens_that_rose_and_fell_most_are_shown_from_the_top_down():
    change = torch.tensor([0.5, -2.0, NAN, 3.0, -0.1, 0.001])
    figure = figures.logprob_change(["a", "b", "c", "<d>", "e", "f"], change, top=2)
    assert bars_of(figure) == {"'&lt;d&gt;'": 3, "'a'": 0.5, "'e'": -0.1, "'b'": -2}
    assert list(figure.data[0].marker.color) == [RAISED, RAISED, LOWERED, LOWERED]
    assert bars_of(figures.logprob_change(["a"], torch.zeros(1))) == {"'a'": 0}
    assert "changed none" in texts(figures.logprob_change(["a"], torch.zeros(1)))[0]


def test_changes_of_a_trace_are_means_over_the_places_of_a_token():
    one, two = trace_of(), trace_of()
    assert one.steps is not None
    other = replace(one.steps, baseline_logprobs=one.steps.logprobs + torch.tensor([[1.0, 2.0]]))
    both = join([one, replace(two, steps=other)])
    assert bars_of(figures.logprob_change(both, row=0)) == {"'n0'": 5, "'&lt;eos&gt;'": 5}
    assert bars_of(figures.logprob_change(both, row=1)) == {"'n0'": -1, "'&lt;eos&gt;'": -2}
    assert bars_of(figures.logprob_change(both)) == {"'n0'": 2, "'&lt;eos&gt;'": 1.5}


def test_at_one_step_what_one_side_lacks_is_bounded():
    trace = trace_of()
    assert trace.steps is not None
    steps = replace(
        trace.steps,
        top_ids=torch.tensor([[[1, 2, 3], [1, 2, 3]]]),
        top_logprobs=torch.tensor([[[-0.1, -2.0, -4.0]] * 2]),
        top_texts=((("one", "two", "three"),) * 2,),
        baseline_top_ids=torch.tensor([[[1, 4, 5], [1, 2, 3]]]),
        baseline_top_logprobs=torch.tensor([[[-3.0, -0.5, -3.5], [-0.1, -2.0, -4.0]]]),
        baseline_top_texts=((("one", "four", "five"), ("one", "two", "three")),),
    )
    figure = figures.logprob_change(replace(trace, steps=steps), step=0)
    found = bars_of(figure)
    assert found.pop("'one'") == pytest.approx(2.9)
    assert found.pop("'two'") == pytest.approx(1.5)  # unsteered at most −3.5
    assert found.pop("'four'") == pytest.approx(-3.5)  # steered at most −4
    assert found.pop("'five'") == pytest.approx(-0.5)
    assert not found  # three: −4 against at most −3.5 tells nothing
    hatched = dict(zip(bars_of(figure), figure.data[0].marker.pattern.shape, strict=True))
    assert hatched == {"'one'": "", "'two'": "/", "'four'": "/", "'five'": "/"}
    assert "changed none" in texts(figures.logprob_change(replace(trace, steps=steps), step=1))[0]


def test_logprob_change_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="one for each of 2 tokens"):
        figures.logprob_change(["a", "b"], torch.ones(3))
    with pytest.raises(InputError, match="at least one that is finite"):
        figures.logprob_change(["a"], torch.tensor([NAN]))
    with pytest.raises(InputError, match="compare=True"):
        figures.logprob_change(Trace())
    with pytest.raises(InputError, match=r"step: expected an int in -2\.\.1, got 2"):
        figures.logprob_change(trace_of(), step=2)
    with pytest.raises(InputError, match="with step="):
        figures.logprob_change(join([trace_of(), trace_of()]), step=0)


# ------------------------------------------------------------------------------------------------------------- sweeps


def sweep(parameter="strength", shift=0.0, **changed):
    made = [
        tuple(Estimate(x + shift + more, (x + more - 0.5, x + more + 2.0)) for x in (0.0, 1.0, NAN))
        for more in (0.0, 10.0, 20.0)
    ]
    return replace(Sweep(parameter, (0, 1, 2), *made, effect_name="refusals (share)", utility_name="right"), **changed)


@pytest.mark.parametrize(
    ("draw", "parameter", "measures"),
    [(figures.strength_sweep, "strength", (0, 20, 0)), (figures.layer_sweep, "layer", (0, 10, 20))],
)
def test_sweeps_show_every_measure_of_every_method_with_its_interval(draw, parameter, measures):
    figure = draw({"ours": sweep(parameter), "theirs": sweep(parameter, 0.25)})
    assert len(figure.data) == 6
    for index, line in enumerate(figure.data):
        shift, more = 0.25 * (index // 3), measures[index % 3]
        assert list(line.y) == [shift + more, 1 + shift + more, None]
        against = [10 + shift, 11 + shift, None] if draw is figures.strength_sweep and index % 3 == 2 else [0, 1, 2]
        assert list(line.x) == against
        assert list(line.text) == [f"{parameter} {setting}" for setting in range(3)]
        for bars in (line.error_y, line.error_x) if against[0] else (line.error_y,):
            assert list(bars.array)[:2] == [2 - shift] * 2 and list(bars.arrayminus)[:2] == [0.5 + shift] * 2
        assert line.line.color == method_colours(2)[index // 3]
        assert line.line.dash == ("solid", "dash")[index // 3]
        assert line.xaxis == ["x", "x2", "x3"][index % 3]
    assert figure.layout.yaxis.title.text == "refusals (share)"
    assert figure.layout.xaxis2.title.text == parameter
    assert figure.layout.xaxis3.title.text == ("right" if draw is figures.strength_sweep else "layer")
    assert "NaN" not in figure.to_json()
    assert len(draw(sweep(parameter)).data) == 3
    names = [one for one in figure.layout.annotations if "■" in one.text]
    assert ["ours" in names[0].text, "theirs" in names[1].text] == [True, True]
    assert names[1].y - names[0].y > 0.3  # their lines end 0.25 apart
    assert figure.layout.title.text == f"Largest effect at {parameter} 1 (theirs): 1.25"


def test_a_utility_that_is_minus_the_kl_is_not_drawn_twice():
    mirrored = sweep("layer")
    mirrored = replace(mirrored, kl=tuple(Estimate(float(i), (0.0, 9.0)) for i in range(3)))
    mirrored = replace(mirrored, utility=tuple(Estimate(-one.value, (-9.0, 0.0)) for one in mirrored.kl))
    effect, kl = figures.layer_sweep(mirrored).data
    assert list(effect.y) == [0, 1, None] and list(kl.y) == [0, 1, 2]
    against = figures.strength_sweep(replace(mirrored, parameter="strength"))
    assert list(against.data[2].x) == [0, 1, 2] and "KL" in against.layout.xaxis3.title.text


def test_sweeps_refuse_what_does_not_belong_together():
    with pytest.raises(InputError, match="layer_sweep"):
        figures.strength_sweep(sweep("layer"))
    with pytest.raises(InputError, match="effect_name"):
        figures.strength_sweep({"a": sweep(), "b": sweep(effect_name="nats")})
    with pytest.raises(InputError, match="at least one setting"):
        figures.strength_sweep(sweep(settings=()))
    with pytest.raises(InputError, match="3, one for each setting"):
        figures.strength_sweep(sweep(kl=()))
    with pytest.raises(InputError, match="at least one"):
        figures.layer_sweep({})


# --------------------------------------------------------------------------------------------------------- prototypes


def test_geometry_shows_the_cosines_and_leaves_what_has_no_direction_empty():
    fitted = experts(2)
    shift = torch.randn(D_MODEL)
    rows = torch.cat([fitted.prototypes, shift.unsqueeze(0)])
    (heat,) = figures.expert_geometry(fitted, shift).data
    expected = F.cosine_similarity(rows.unsqueeze(0), rows.unsqueeze(1), dim=-1)
    below = torch.ones_like(expected).tril(-1).bool()
    assert torch.allclose(numbers(heat.z)[below], expected[below], atol=1e-4)
    assert numbers(heat.z)[~below].isnan().all()  # each pair once
    pairs = expected[:-1, :-1].masked_fill(~below[:-1, :-1], -2)
    assert f"cosine {float(pairs.max()):.2f}" in figures.expert_geometry(fitted, shift).layout.title.text
    assert (heat.zmin, heat.zmax) == (-1, 1)
    assert heat.texttemplate == "%{z:.2f}"
    hole = Experts(torch.zeros_like(fitted.prototypes), fitted.residual_basis, fitted.controller, fitted.enabled)
    assert figures.expert_geometry(hole).data[0].z[0][0] is None
    with pytest.raises(ShapeError):
        figures.expert_geometry(fitted, torch.randn(3))


def test_token_table_holds_every_token_as_text():
    view = figures.expert_tokens([[(token, float(i)) for i, token in enumerate(HOSTILE)], [("b", NAN)]], unit="<nats>")
    page = Elements(view)
    assert {tag for tag, _ in page.found} <= {"div", "span", "wbr", "table", "thead", "tbody", "tr", "th", "td"}
    for text in ("</script>", "a⏎b", "שלום", "+1.00", "unknown", "<nats>", "expert 1"):
        assert text in page.text
    str(view).encode()
    for colour in expert_colours(2):
        assert colour in str(view)
    assert str(figures.expert_tokens([[("a", 1.0)] * 9], limit=3)).count("<tr>") == 4
    with pytest.raises(InputError, match="at least one expert with a token"):
        figures.expert_tokens([[], []])


# ----------------------------------------------------------------------------------------------------------- timeline


def test_timeline_reads_each_token_at_the_position_that_predicts_it():
    trace = trace_of(n_prompt=3, n_new=4, steered=())
    trace.change[4] = torch.tensor([[9.0, 9, 0.2, 0.0, 0.4, 0.0]])
    gates = torch.tensor([[NAN, NAN, 0.1, 0.2, 0.3, 0.4]])
    figure = figures.trace_timeline(trace)
    gate, change, kl = figure.data[:3]
    assert list(gate.y) == [1, None, 1, None]  # nothing is steered there
    assert list(change.y) == pytest.approx([0.2, 0, 0.4, 0])
    assert list(change.marker.symbol) == ["circle", "circle-open", "circle", "circle-open"]
    assert trace.steps is not None
    assert list(kl.y) == pytest.approx(trace.steps.kl[0].tolist(), abs=1e-5)
    stepped = figures.trace_timeline(replace(trace, step_gate={4: gates})).data[0]
    assert list(stepped.y)[::2] == pytest.approx([0.1, 0.3])
    best = int(trace.steps.kl[0].argmax())
    assert f"token {best + 1}," in figure.layout.title.text
    without = figures.trace_timeline(replace(trace, gate={}, steps=replace(trace.steps, kl=None)))
    assert [line.y for line in without.data if line.x[0] is not None] == [change.y]
    with pytest.raises(InputError, match="generated tokens"):
        figures.trace_timeline(replace(trace, steps=None))
    with pytest.raises(InputError, match="layers with change"):
        figures.trace_timeline(trace, layer=1)


# ---------------------------------------------------------------------------------------------------------------- all


def of_traces():
    """Every figure that takes a trace."""
    return {
        "expert_routing": figures.expert_routing,
        "expert_mix": lambda trace: figures.expert_mix(trace, row=1),
        "token_scores": lambda trace: figures.token_scores(trace, row=1),
        "token_experts": lambda trace: figures.token_experts(trace, row=1),
        "steer_compare": figures.steer_compare,
        "logprob_change": figures.logprob_change,
        "logprob_change at a step": lambda trace: figures.logprob_change(trace, row=1, step=0),
        "trace_timeline": lambda trace: figures.trace_timeline(trace, row=1),
    }


@pytest.mark.parametrize("name", of_traces())
def test_a_trace_from_a_file_draws_what_the_trace_itself_draws(name):
    hostile = trace_of(n_prompt=4, n_new=3, steered=(2, 3, 4), prompt=tuple(HOSTILE[:4]), texts=tuple(HOSTILE[4:7]))
    trace = join([trace_of(), hostile])
    draw = of_traces()[name]
    drawn, again = draw(trace), draw(through_json(trace))
    if isinstance(drawn, go.Figure):
        assert drawn.to_json() == again.to_json()
    else:
        assert str(drawn) == str(again)


def plots():
    """Every plot that is not in test_figures.py, from numbers that are made up."""
    return {
        "expert_mix": figures.expert_mix(experts(1), torch.randn(D_MODEL)),
        "expert_knockout": figures.expert_knockout(knockout_of(torch.randn(3, 2), ["a", "b"], torch.rand(3, 2))),
        "scree": figures.scree(fit_subspace(torch.randn(9, 5)), rank_sweep_of(torch.rand(5)), rank=2),
        "layer_position": figures.layer_position(path_of(torch.rand(3, 4), "abcd", (1,))),
        "logprob_change": figures.logprob_change(trace_of()),
        "strength_sweep": figures.strength_sweep(sweep()),
        "layer_sweep": figures.layer_sweep(sweep("layer")),
        "expert_geometry": figures.expert_geometry(experts(1)),
        "trace_timeline": figures.trace_timeline(trace_of()),
    }


def test_no_plot_uploads_and_all_axes_are_titled_and_clear_on_dark_and_light():
    for name, figure in plots().items():
        layout = figure.to_dict()["layout"]
        assert "sendChartToCloud" in layout["modebar"]["remove"] and "sendChartToCloud" in str(CONFIG)
        assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"
        assert layout["font"]["color"] == TEXT
        assert "NaN" not in figure.to_json()
        assert layout["title"]["text"]
        axes = [layout[axis] for axis in layout if axis.startswith(("xaxis", "yaxis"))]
        assert all(axis["gridcolor"] == "rgba(127,127,127,.25)" for axis in axes)
        untitled = [axis for axis in axes if "title" not in axis or not axis["title"].get("text")]
        assert all("tickvals" in axis or "matches" in axis for axis in untitled), name
        assert all(trace.hovertemplate or trace.hoverinfo == "skip" or trace.x[0] is None for trace in figure.data)


def test_titles_can_be_given():
    assert figures.scree(fit_subspace(torch.randn(9, 5)), title="mine").layout.title.text == "mine"

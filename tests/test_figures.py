"""Figures show what they were given, and nothing that a token could smuggle in."""

import json
import sys
from html.parser import HTMLParser
from importlib.util import find_spec

import plotly.graph_objects as go
import pytest
import torch

from fsteer_lens import MeanShift, figures, generate, tutor
from fsteer_lens.errors import InputError, MissingDependencyError, ShapeError
from fsteer_lens.figures.gating import roc
from fsteer_lens.figures.style import expert_colours
from fsteer_lens.gates import EnergyGate, fit_gate
from fsteer_lens.generation import Baseline, Generation, Generations
from fsteer_lens.trace import Steps, Trace

HOSTILE = ["</script>", "<img src=x onerror=alert(1)>", "a\nb", "🙂", "שלום", '"><b>', "\ud800", ""]


@pytest.fixture(scope="module")
def groups():
    generator = torch.Generator().manual_seed(1)
    plane = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    spread = torch.tensor([6.0, 4, 3] + [0.7] * 9)
    ir = torch.randn(60, 12, generator=generator) * spread @ plane.T
    other = torch.randn(50, 12, generator=generator) @ plane.T
    return ir, other


@pytest.fixture(scope="module")
def gate(groups):
    return fit_gate(groups[0], rank=3, epsilon=0.1)


@pytest.fixture(scope="module")
def tutor_model():
    return tutor.load()


class Elements(HTMLParser):
    """The elements of a piece of HTML, with their attributes, and its text."""

    def __init__(self, body):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(body)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def titled(self):
        return [attributes for _, attributes in self.found if ": '" in attributes.get("title", "")]


def trace_of(n_prompt=3, n_new=2, steered=(0, 1, 2), weights=None):
    change = torch.zeros(1, n_prompt + n_new - 1)
    change[0, list(steered)] = 0.5
    nats = torch.tensor([[-0.1, -0.2]])
    return Trace(
        gate={4: torch.ones(1)},
        weights={4: torch.tensor([[0.1, 0.9]]) if weights is None else weights},
        change={4: change},
        prompt_lengths=torch.tensor([n_prompt]),
        first=torch.tensor([0]),
        prompts=(tuple(f"p{i}" for i in range(n_prompt)),),
        steps=Steps(
            tokens=torch.tensor([[7, 8]]),
            texts=(("n0", "<eos>"),),
            logprobs=nats,
            top_ids=torch.tensor([[[7, 1], [8, 2]]]),
            top_logprobs=torch.tensor([[[-0.1, -3], [-0.2, -4]]]),
            kl=torch.tensor([[4.0, 1.0]]),
            baseline_logprobs=nats - 5,
            baseline_top_ids=torch.tensor([[[1, 7], [8, 2]]]),
            baseline_top_logprobs=torch.tensor([[[-0.3, -5.1], [-0.2, -4]]]),
        ),
    )


# ------------------------------------------------------------------------------------------------------------ routing


def test_routing_shows_the_weights_in_the_order_of_the_labels():
    weights = torch.rand(5, 3).softmax(dim=-1)
    figure = figures.expert_routing(weights, ["b", "a", "b", None, "a"], ["p0", "p1", "p2", "p3", "p4"])
    order = [3, 1, 4, 0, 2]  # "None" sorts before the small letters; within a label rows stay as they came
    assert torch.allclose(torch.tensor(figure.data[0].z), weights[order], atol=1e-4)
    assert [row[0] for row in figure.data[1].z] == weights[order].argmax(dim=1).tolist()
    assert [row[0].split("<br>")[0] for row in figure.data[0].customdata] == [f"p{i}" for i in order]
    assert list(figure.layout.yaxis.ticktext) == ["None (1)", "a (2)", "b (2)"]
    assert list(figure.layout.yaxis.tickvals) == [0, 1.5, 3.5]
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0, 1)


def test_routing_reads_a_trace_and_keeps_the_experts_colours():
    figure = figures.expert_routing(trace_of())
    assert figure.data[0].z == ([0.1, 0.9],)
    assert "p0p1p2" in figure.data[0].customdata[0][0]
    strip = [colour for _, colour in figure.data[1].colorscale]
    assert strip == [colour for colour in expert_colours(2) for _ in range(2)]
    assert expert_colours(2) == expert_colours(6)[:2]
    assert len(set(expert_colours(10))) == 10


def test_routing_leaves_a_gap_for_nan_and_finds_the_strongest_among_the_rest():
    figure = figures.expert_routing(torch.tensor([[float("nan"), 0.2, 0.7]]))
    assert figure.data[0].z == ([None, 0.2, 0.7],)
    assert figure.data[1].z == ([2],)


def test_routing_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="one for each of 2 prompts"):
        figures.expert_routing(torch.rand(2, 3), ["a"])
    with pytest.raises(InputError, match="every token"):
        figures.expert_routing(trace_of(weights=torch.rand(1, 5, 2)))
    with pytest.raises(InputError, match=r"layers with expert weights, \[4\]"):
        figures.expert_routing(trace_of(), layer=2)


# ------------------------------------------------------------------------------------------------------------- gating


def test_roc_equals_sklearn_with_ties():
    from sklearn.metrics import roc_auc_score, roc_curve

    positive, negative = torch.randint(0, 9, (40,)) / 8, torch.randint(0, 7, (30,)) / 8
    labels, scores = [1] * 40 + [0] * 30, torch.cat([positive, negative])
    false_alarms, hits, area = roc(positive, negative)
    theirs = roc_curve(labels, scores, drop_intermediate=False)
    assert area == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert torch.allclose(false_alarms, torch.tensor(theirs[0]))
    assert torch.allclose(hits, torch.tensor(theirs[1]))


def test_separation_shows_the_gates_threshold_histograms_and_auroc(gate, groups):
    from sklearn.metrics import roc_auc_score

    figure = figures.gate_separation(gate, *groups, rank=2, names=("ir", "other"))
    at_two = gate.at_rank(2)
    ratios = [gate.subspace.energy_ratio(rows, 2) for rows in groups]
    assert figure.layout.shapes[0].x0 == figure.layout.shapes[0].x1 == at_two.threshold
    for bars, values in zip(figure.data[:2], ratios, strict=True):
        assert sum(bars.y) == pytest.approx(100, abs=0.1)
        counted = [((values >= low) & (values < low + 0.025)).sum().item() for low in [0.35, 0.6]]
        assert [bars.customdata[int(low * 40 + 0.5)][0] for low in [0.35, 0.6]] == counted
    area = roc_auc_score([1] * 60 + [0] * 50, torch.cat(ratios))
    assert f"AUROC {area:.3f}" in figure.layout.annotations[1].text
    (x,), (y,) = figure.data[-1].x, figure.data[-1].y
    open_share = [100 * float((at_two.gate(rows) >= 0.5).float().mean()) for rows in groups]
    assert [y, x] == pytest.approx(open_share, abs=1e-4)


def test_separation_drops_rows_that_are_not_finite_and_refuses_composed_gates(gate, groups):
    broken = groups[1].clone()
    broken[0] = float("nan")
    figure = figures.gate_separation(gate, groups[0], broken)
    assert figure.data[1].name == "general (49)"
    assert "NaN" not in figure.to_json()
    with pytest.raises(InputError, match="finite row"):
        figures.gate_separation(gate, groups[0], broken[:1])
    with pytest.raises(InputError, match=r"gate\.leaves"):
        figures.gate_separation(~gate, *groups)
    with pytest.raises(ShapeError):
        figures.gate_separation(gate, torch.rand(3, 5), torch.rand(3, 5))


def test_every_step_of_the_rank_slider_shows_that_rank(gate, groups):
    queries = {"ir": groups[0], "other": groups[1]}
    figure = figures.rank_explorer(gate, queries)
    slider = figure.layout.sliders[0]
    assert [step.label for step in slider.steps] == [str(rank) for rank in range(1, gate.subspace.rank + 1)]
    assert slider.active == 2  # the gate's own rank, 3
    for rank, step in enumerate(slider.steps, 1):
        changed, layout, traces = step.args
        at_rank = gate.at_rank(rank)
        for index, rows in enumerate(queries.values()):
            assert torch.allclose(torch.tensor(changed["x"][index]), gate.subspace.energy_ratio(rows, rank), atol=6e-4)
            filled = [symbol == 0 for symbol in changed["marker.symbol"][index]]
            assert filled == (at_rank.gate(rows) >= 0.5).tolist()
            assert f"{sum(filled)} of {len(rows)} steered" in layout["yaxis.ticktext"][index]
        assert changed["x"][2] == pytest.approx([at_rank.threshold] * 2, abs=1e-4)
        assert list(traces) == [0, 1, 2]
    first = slider.steps[slider.active].args[0]
    assert [list(figure.data[i].x) for i in range(3)] == first["x"]  # before the slider is moved


def test_rank_explorer_takes_composed_gates_nan_and_chosen_ranks(gate, groups):
    broken = groups[1].clone()
    broken[3] = float("inf")
    both = gate & EnergyGate(gate.subspace, 3)
    figure = figures.rank_explorer(both, {"ir": groups[0], "other": broken}, ranks=[1, 5])
    step = figure.layout.sliders[0].steps[1].args[0]
    assert [s.label for s in figure.layout.sliders[0].steps] == ["1", "5"]
    assert step["x"][2] == [None, None]
    assert step["x"][1][3] is None and step["marker.symbol"][1][3] == 100
    assert [s == 0 for s in step["marker.symbol"][0]] == (both.at_rank(5).gate(groups[0]) >= 0.5).tolist()


def test_rank_explorer_stays_small_and_refuses_what_does_not_fit(gate, groups):
    rows = torch.randn(90, 70)
    wide = fit_gate(rows, rank=8)
    assert len(figures.rank_explorer(wide, {"all": rows[:50]}).to_json()) < 60_000
    with pytest.raises(InputError, match="60, one for each query"):
        figures.rank_explorer(gate, {"ir": groups[0]}, {"ir": ["one"]})
    with pytest.raises(InputError, match="at least one group"):
        figures.rank_explorer(gate, {})


# --------------------------------------------------------------------------------------------------------------- text


def test_token_view_escapes_and_shows_every_token():
    scores = torch.linspace(-1, 1, len(HOSTILE))
    view = figures.token_scores(HOSTILE, scores, centred=True)
    page = Elements(str(view))
    assert {tag for tag, _ in page.found} <= {"div", "span", "wbr"}
    assert not [key for _, attributes in page.found for key in attributes if key.startswith("on")]
    for shown in ("</script>", "<img src=x onerror=alert(1)>", "a⏎b", "🙂", "שלום", "\ufffd"):
        assert shown in page.text
    str(view).encode()  # nothing that UTF-8 cannot hold
    assert view._repr_html_() == str(view)


def test_token_shades_follow_the_scores_and_nan_has_none():
    view = figures.token_scores(list("abcd"), torch.tensor([-2.0, 0.0, float("nan"), 1.0]), centred=True)
    styles = [attributes["style"] for attributes in Elements(str(view)).titled()]
    assert "220,65,70,0.60" in styles[0] and "0.00" in styles[1] and "60,130,220,0.30" in styles[3]
    assert "background" not in styles[2] and "nan" not in str(view).lower()
    bounded = figures.token_scores(["a", "b"], torch.tensor([0.5, 9.0]), bounds=(0, 1))
    assert [one["style"][-5:] for one in Elements(str(bounded)).titled()] == ["0.30)", "0.60)"]


@pytest.mark.parametrize("steered", [(0, 1, 2), (2, 3), (0,), ()])
def test_marks_of_a_trace_stand_at_the_steered_positions(steered):
    titles = [one["title"] for one in Elements(str(figures.token_scores(trace_of(steered=steered)))).titled()]
    assert [title.split("\n")[0] for title in titles] == ["0: 'p0'", "1: 'p1'", "2: 'p2'", "3: 'n0'", "4: '<eos>'"]
    marked = [position for position, title in enumerate(titles) if "\nsteered" in title]
    assert marked == list(steered)
    assert [title.rsplit("\n", 1)[1] for title in titles] == ["prompt"] * 3 + ["generated"] * 2
    assert "none" in titles[4]  # no forward pass went through the last token


@pytest.mark.parametrize("scope", ["prompt", "generated", "all"])
def test_marks_of_a_real_generation_stand_where_the_scope_says(tutor_model, scope):
    prompts = ["<user>what is the capital of france?<tutor>", "<user>hi, how do you bake bread?<tutor>"]
    steering = MeanShift(torch.full((128,), 0.1), layer=2, scope=scope)
    trace = generate(tutor_model, prompts, steering, max_new_tokens=6, progress=False).trace
    for row in range(2):
        assert trace.prompts is not None and trace.steps is not None
        n_prompt, n_new = len(trace.prompts[row]), len(trace.steps.texts[row])
        titles = [one["title"] for one in Elements(str(figures.token_scores(trace, row=row))).titled()]
        steered = [position for position, title in enumerate(titles) if "\nsteered" in title]
        last = n_prompt + n_new - 1  # the last token predicts nothing
        span = {"prompt": range(n_prompt), "generated": range(n_prompt - 1, last), "all": range(last)}[scope]
        assert steered == list(span)
        assert len(titles) == n_prompt + n_new


def test_pads_are_struck_out_and_shift_the_prompts_end():
    view = figures.token_scores(["<pad>", "a", "b", "c"], torch.ones(4), first=1, prompt_length=2)
    page = Elements(str(view))
    assert "padding" in page.titled()[0]["title"] and "line-through" in page.titled()[0]["style"]
    assert ["prompt" in one["title"] for one in page.titled()] == [False, True, True, False]
    body = str(view)
    assert body.index("3: ") > body.index("the generated text begins here") > body.index("2: ")


def test_token_view_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="one for each of 2 tokens"):
        figures.token_scores(["a", "b"], torch.ones(3))
    with pytest.raises(InputError, match="at least one"):
        figures.token_scores([], torch.ones(0))
    with pytest.raises(InputError, match="low < high"):
        figures.token_scores(["a"], torch.ones(1), bounds=(1, 1))
    with pytest.raises(InputError, match="token texts"):
        figures.token_scores(Trace())


def generations(texts=("n0",)):
    return Generations(Generation(f"<b>{t}", t, (7, 8), trace_of(), Baseline("<i>plain", (1,))) for t in texts)


def test_comparison_shows_both_texts_kl_and_log_probs():
    class Tokenizer:
        def decode(self, ids):
            return f"<tok{ids[0]}>"

    view = str(figures.steer_compare(generations(), tokenizer=Tokenizer(), titles=["<u>"]))
    page = Elements(view)
    for text in ("<b>n0", "<i>plain", "<u>", "gate 1.00 open", "expert 1 with weight 0.90", "<eos>"):
        assert text in page.text
    assert expert_colours(2)[1] in view
    first, second = (one for _, one in page.found if "generated token" in one.get("title", ""))
    assert "KL(steered ‖ unsteered) 4.00" in first["title"] and "-0.10 nats steered, -5.10 unsteered" in first["title"]
    assert "-0.30  '<tok1>'" in first["title"]
    assert ",0.6)" in first["style"] and ",0.15)" in second["style"]  # one scale, up to the largest KL
    assert {tag for tag, _ in page.found} <= {"div", "table", "tbody", "tr", "th", "td", "span", "b"}
    assert [tag for tag, _ in page.found].count("b") == 1  # the row's own title


def test_comparison_takes_one_a_limit_and_refuses_what_has_no_twin():
    assert str(figures.steer_compare(generations(list("abc")), limit=2)).count("plain") == 2
    assert str(figures.steer_compare(generations()[0])).count("plain") == 1
    with pytest.raises(InputError, match="compare=True"):
        figures.steer_compare(Generation("p", "t", (1,), Trace()))
    with pytest.raises(InputError, match="at least one"):
        figures.steer_compare(Generations([]))


# ------------------------------------------------------------------------------------------------------------- saving


def test_files_hold_the_figure_and_ask_for_nothing(tmp_path, gate, groups):
    figure = figures.gate_separation(gate, *groups)
    figures.save(figure, tmp_path / "a.html")
    figures.save(figure, tmp_path / "a.json")
    figures.save(figures.token_scores(["a"], torch.ones(1)), tmp_path / "b.html")
    assert '<script src="' not in (tmp_path / "a.html").read_text()
    read = json.loads((tmp_path / "a.json").read_text())
    assert go.Figure(read).layout.shapes[0].x0 == figure.layout.shapes[0].x0
    assert read == json.loads(figure.to_json())
    assert (tmp_path / "b.html").stat().st_size < 3000
    with pytest.raises(InputError, match=r"\.html"):
        figures.save(figures.token_scores(["a"], torch.ones(1)), tmp_path / "b.json")
    with pytest.raises(InputError, match="an ending among"):
        figures.save(figure, tmp_path / "a.docx")


@pytest.mark.skipif(find_spec("kaleido") is not None, reason="kaleido is installed")
def test_a_picture_without_kaleido_says_what_to_install(tmp_path, gate, groups):
    with pytest.raises(MissingDependencyError, match="pip install kaleido"):
        figures.save(figures.gate_separation(gate, *groups), tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())


def test_no_figure_offers_to_upload_its_data_and_all_are_clear_on_dark_and_light(gate, groups):
    for figure in (
        figures.gate_separation(gate, *groups),
        figures.rank_explorer(gate, {"a": groups[0]}),
        figures.expert_routing(torch.rand(4, 3)),
    ):
        layout = figure.to_dict()["layout"]
        assert "sendChartToCloud" in layout["modebar"]["remove"]
        assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"
        assert layout["font"]["color"] == "#7f7f7f"
        assert all(layout[axis]["gridcolor"] == "rgba(127,127,127,.25)" for axis in ("xaxis", "yaxis"))


def test_importing_figures_does_not_import_plotly():
    import subprocess

    code = "import sys, fsteer_lens.figures; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

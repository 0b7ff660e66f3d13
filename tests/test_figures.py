"""Figures show what they were given, and nothing that a token could smuggle in."""

import json
import sys
from dataclasses import replace

import plotly.graph_objects as go
import pytest
import torch

from fsteer_lens import figures
from fsteer_lens.cli import find_browser
from fsteer_lens.errors import InputError, MissingDependencyError, ShapeError
from fsteer_lens.figures import saving
from fsteer_lens.figures.gating import roc
from fsteer_lens.figures.style import expert_colours
from fsteer_lens.method.fitting_gates import fit_gate
from fsteer_lens.method.subspace_gates import EnergyGate, LogisticGate
from tests.figure_parts import trace_of


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
    with pytest.raises(InputError, match=r"layers with weights, \[4\]"):
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


def test_a_picture_without_kaleido_says_what_to_install(tmp_path, gate, groups, monkeypatch):
    monkeypatch.setattr(saving, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"fsteer-lens\[paper\]"):
        figures.save(figures.gate_separation(gate, *groups), tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome on the path")
def test_a_paper_figure_is_a_pdf(tmp_path, gate, groups):
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    figures.save(figures.gate_separation(gate, *groups), tmp_path / "a.pdf")
    data = (tmp_path / "a.pdf").read_bytes()
    assert data.startswith(b"%PDF") and len(data) > 5000


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


def test_a_gate_whose_parts_are_at_ranks_of_their_own_is_first_shown_as_it_is(gate, groups):
    parts = EnergyGate(gate.subspace, 6) & EnergyGate(gate.subspace.at_rank(5), 2)
    figure = figures.rank_explorer(parts, {"ir": groups[0], "other": groups[1]})
    slider = figure.layout.sliders[0]
    assert [step.label for step in slider.steps] == ["as it is", *map(str, range(1, 6))] and slider.active == 0
    filled = [symbol == 0 for symbol in figure.data[0].marker.symbol]
    assert filled == (parts.gate(groups[0]) >= 0.5).tolist()
    assert filled != (parts.at_rank(5).gate(groups[0]) >= 0.5).tolist()


def test_a_gate_that_opens_below_its_threshold_is_drawn_so(gate, groups):
    ranks = gate.subspace.rank
    falling = LogisticGate(gate.subspace, 3, torch.full((ranks,), -20.0), torch.full((ranks,), 12.0))
    figure = figures.gate_separation(falling, *groups)
    shares = [100 * float((falling.gate(rows) >= 0.5).float().mean()) for rows in groups]
    assert [figure.data[-1].y[0], figure.data[-1].x[0]] == pytest.approx(shares, abs=1e-4)
    assert "opens below" in figure.layout.annotations[0].text


def test_a_prompt_cannot_reach_into_a_hover_template():
    trace = replace(trace_of(), prompts=(("%{y}", "<b>", "%{x}"),))
    assert "%{x}" not in figures.expert_mix(trace).data[0].hovertemplate
    assert figures.expert_routing(torch.rand(2, 2), title="<b>%{x}").layout.title.text == "&lt;b&gt;%&#123;x}"

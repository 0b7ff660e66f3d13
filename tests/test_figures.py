"""Figures show what they were given, and nothing that a token could smuggle in."""

import json
import sys
from dataclasses import replace
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest
import torch

from fsteer_lens import figures
from fsteer_lens.cli import find_browser
from fsteer_lens.errors import InputError, MissingDependencyError, ShapeError
from fsteer_lens.figures import saving
from fsteer_lens.figures.gating import roc
from fsteer_lens.figures.style import EXPERTS, GROUPS, INK, METHODS, TEXT, expert_colours
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
    weights[3], weights[1], weights[4] = (torch.tensor(row) for row in ([0.8, 0.1, 0.1], [0, 0.3, 0.7], [0, 0.1, 0.9]))
    weights[0], weights[2] = torch.tensor([0.1, 0.8, 0.1]), torch.tensor([0.3, 0.2, 0.5])
    figure = figures.expert_routing(weights, ["b", "a", "b", None, "a"], ["p0", "p1", "p2", "p3", "p4"])
    order = [3, 0, 2, 4, 1]  # labels by their experts 0, 1 and 2; within a label the largest weight first
    drawn = torch.cat([torch.tensor(column.z) for column in figure.data], dim=1)
    assert torch.allclose(drawn, weights[order], atol=1e-4)
    assert [row[0].split("<br>")[1] for row in figure.data[0].customdata] == [f"p{i}" for i in order]
    assert list(figure.layout.yaxis.ticktext) == ["None · p3", "b · p0", "b · p2", "a · p4", "a · p1"]
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0, 1)
    assert figure.layout.title.text == "4 of 5 prompts go to the expert that serves most of their label"
    plain = figures.expert_routing(weights, ["b", "a", "b", None, "a"])
    assert list(plain.layout.yaxis.ticktext) == ["None (1)", "b (2)", "a (2)"]
    assert list(plain.layout.yaxis.tickvals) == [0, 1.5, 3.5]


def test_rows_behind_a_shut_gate_are_faded_and_the_gate_stands_beside_them():
    weights = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
    figure = figures.expert_routing(weights, gate=torch.tensor([1.0, 0.0]), names=["tea", "<b>"])
    first, _, gate = figure.data
    assert [row[0] for row in first.z] == pytest.approx([0.8, 0.2]) and [row[0] for row in gate.z] == [1, 0]
    assert first.customdata[1][0].startswith("tea: weight 0.800")  # faded, but told as it is
    assert "&lt;b&gt;" in figure.layout.xaxis.ticktext[1] and figure.layout.xaxis.ticktext[2] == "gate"
    with pytest.raises(InputError, match="one for each of 2 prompts"):
        figures.expert_routing(weights, gate=torch.ones(3))


def test_routing_reads_a_trace_and_keeps_the_experts_colours():
    figure = figures.expert_routing(trace_of())
    assert [column.z for column in figure.data] == [([0.1],), ([0.9],), ([1.0],)]  # the gate is beside them
    assert "p0p1p2" in figure.data[0].customdata[0][0]
    assert [column.colorscale[1][1] for column in figure.data[:2]] == expert_colours(2)
    assert "p0p1p2" in figure.layout.yaxis.ticktext[0]


def test_routing_leaves_a_gap_for_nan_and_finds_the_strongest_among_the_rest():
    figure = figures.expert_routing(torch.tensor([[float("nan"), 0.2, 0.7]]))
    assert [column.z[0][0] for column in figure.data] == [None, 0.2, 0.7]
    assert figure.layout.title.text == "1 of 3 experts are the strongest for some prompt"


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
        counted = [((values >= low) & (values < high)).sum().item() for _, low, high in bars.customdata[5:30]]
        assert [count for count, _, _ in bars.customdata[5:30]] == counted
    low, high = figure.layout.xaxis.range
    every = torch.cat(ratios)
    ends = min(float(every.min()), at_two.threshold), max(float(every.max()), at_two.threshold)
    assert (low, high) == pytest.approx(ends, abs=0.021 * (ends[1] - ends[0]))  # no more than what they span
    area = roc_auc_score([1] * 60 + [0] * 50, torch.cat(ratios))
    assert f"AUROC {area:.3f}" in figure.layout.annotations[1].text
    (x,), (y,) = figure.data[-1].x, figure.data[-1].y
    open_share = [100 * float((at_two.gate(rows) >= 0.5).float().mean()) for rows in groups]
    assert [y, x] == pytest.approx(open_share, abs=1e-4)


def test_where_nothing_overlaps_the_gap_is_shown_and_the_title_says_who_is_steered(gate):
    plane = gate.subspace.basis[:, :3]
    inside = torch.randn(9, 3) @ plane.T + gate.subspace.mean
    outside = torch.randn(9, 12)
    outside = outside - outside @ plane @ plane.T + gate.subspace.mean
    figure = figures.gate_separation(gate, inside, outside, names=("tea", "others"))
    low, high = gate.score(outside).max(), gate.score(inside).min()
    (gap,) = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert (gap.x0, gap.x1) == pytest.approx((float(low), float(high)))
    assert any(f"margin {float(high - low):.3g}" in one.text for one in figure.layout.annotations)
    assert figure.layout.title.text == "Gate open: tea 100 %, others 0 %"


@pytest.mark.parametrize("few", [True, False])
def test_every_prompt_has_a_row_beside_the_threshold(gate, groups, few):
    ir, other = (rows[: 8 if few else None].clone() for rows in groups)
    other[2] = torch.nan
    texts = {"ir": [f"<b> {i}" for i in range(len(ir))], "other": [f"o{i}" for i in range(len(other))]}
    figure = figures.gate_per_prompt(gate, {"ir": ir, "other": other}, texts)
    first, second = figure.data[:2]
    scores = gate.score(ir)
    assert list(first.x) == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-4)
    steered = (scores.sort(descending=True).values >= gate.threshold).tolist()
    assert [symbol == 0 for symbol in first.marker.symbol] == steered
    assert len(second.x) == len(other) - 1 and "NaN" not in figure.to_json()
    assert list(second.y) == list(range(len(ir), len(ir) + len(other) - 1))
    best = int(scores.argmax())
    if few:
        assert figure.layout.yaxis.ticktext[0] == f"ir · &lt;b&gt; {best}"
    else:
        assert f"<br>{int((scores >= gate.threshold).sum())} of {len(ir)} steered" in figure.layout.yaxis.ticktext[0]
    assert figure.layout.title.text.startswith(f"Steered: ir {int((scores >= gate.threshold).sum())} of {len(ir)}, ")
    with pytest.raises(InputError, match=r"gate\.leaves"):
        figures.gate_per_prompt(~gate, {"ir": ir})
    with pytest.raises(InputError, match="one for each query"):
        figures.gate_per_prompt(gate, {"ir": ir}, {"ir": ["a"]})
    with pytest.raises(InputError, match="at least one group"):
        figures.gate_per_prompt(gate, {})
    with pytest.raises(InputError, match="finite score"):
        figures.gate_per_prompt(gate, {"ir": torch.full((2, 12), torch.nan)})


# ------------------------------------------------------------------------------------------------------------ palettes

DICHROMAT = {  # Machado, Oliveira and Fernandes, 2009: what full protanopes, deuteranopes and tritanopes see
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "all": [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]],
}


def linear(colour):
    values = torch.tensor([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    cones = torch.tensor([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    mixed = torch.tensor([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    return mixed @ (cones @ rgb).clamp(min=0).pow(1 / 3)


def luminance(colour):
    return float(linear(colour) @ torch.tensor([0.2126, 0.7152, 0.0722]))


def test_ten_experts_are_told_apart_by_colour_blind_eyes_on_white_and_on_black():
    for matrix in DICHROMAT.values():
        seen = torch.stack([oklab((torch.tensor(matrix) @ linear(colour)).clamp(0, 1)) for colour in EXPERTS])
        assert torch.pdist(seen).min() > 0.075
    for colour in EXPERTS:
        assert 1.05 / (luminance(colour) + 0.05) > 1.9 and (luminance(colour) + 0.05) / 0.057 > 2.5
        assert oklab(linear(colour))[1:].norm() > 0.08  # no grey
    assert expert_colours(2) == expert_colours(6)[:2]
    assert not set(EXPERTS) & {*GROUPS, *METHODS}


def test_text_is_readable_on_any_page_and_near_black_on_paper(tmp_path, gate, groups, monkeypatch):
    assert 1.05 / (luminance(TEXT) + 0.05) >= 4.5 and (luminance(TEXT) + 0.05) / 0.05 >= 4.5
    figure, printed = figures.gate_separation(gate, *groups), []
    monkeypatch.setattr(saving, "find_spec", lambda name: True)
    monkeypatch.setattr(go.Figure, "to_image", lambda self, **options: printed.append(self) or b"picture")
    figures.save(figure, tmp_path / "a.pdf")
    assert printed[0].layout.font.color == INK and figure.layout.font.color == TEXT


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
            ratios = gate.subspace.energy_ratio(rows, rank)
            worst = float(ratios.max() if index else ratios.min()) - at_rank.threshold
            said = layout["yaxis.ticktext"][index]
            count, edge = said.split("<br>")[1:]
            assert count == f"{sum(filled)} of {len(rows)} steered"
            name, told = edge.split(": threshold ")
            assert name == ("highest" if index else "lowest") and float(told) == pytest.approx(worst, abs=0.006)
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
def test_a_text_view_is_a_picture_too(tmp_path):
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    view = figures.token_scores(["<b>", " a\nb", "&"], torch.tensor([0.1, 0.9, 0.4]))
    for kind, start in (("pdf", b"%PDF"), ("png", b"\x89PNG"), ("svg", b"<svg")):
        figures.save(view, tmp_path / f"a.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes().startswith(start)
    drawn = ElementTree.fromstring((tmp_path / "a.svg").read_text(encoding="utf-8"))
    assert "<b>" in "".join(drawn.itertext()) and 20 < float(drawn.get("height")) < 200


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
        assert layout["font"]["color"] == TEXT
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

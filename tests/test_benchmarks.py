"""The benchmarks run, and what they compare is equal; how long anything takes is not tested."""

import math
from typing import Any

import pytest
import torch

from benchmarks import (
    collecting,
    decode,
    energies,
    fitting,
    growth,
    measuring,
    scale,
    scoring,
    shapes,
    tasks,
    vocabulary,
)
from benchmarks import smollm2 as chatting
from benchmarks.__main__ import main
from benchmarks.measuring import Aim, Ratio, Row, Section, Settings
from fsteer_lens import fit_experts, models
from tests.running import needs_smollm2

KINDS = models.available_kinds()
MIB = 2**20


STARTS_PROCESSES = [pytest.param(one, marks=pytest.mark.slow) for one in (decode, collecting, vocabulary, scale)]
ON_SMOLLM2 = pytest.param(chatting, marks=[pytest.mark.slow, pytest.mark.smollm2, needs_smollm2])


@pytest.mark.parametrize(
    "benchmark", [*STARTS_PROCESSES, ON_SMOLLM2, scoring, fitting, energies], ids=lambda one: one.__name__
)
def test_every_benchmark_fills_its_section(benchmark: object) -> None:
    section = benchmark.run(Settings(quick=True, rounds=2))  # type: ignore[attr-defined]
    assert section.rows and section.title and section.text
    for row in section.rows:
        assert row.ratio is not None and all(math.isfinite(value) for value in row.ratio.values)
    text = measuring.section_text(section)
    assert all(f"| {row.name} | {row.what} | {row.ratio} |" in text for row in section.rows)


@pytest.mark.filterwarnings("ignore")  # random words have no experts
@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name not in tasks.OF_TEXTS])
def test_every_step_is_measured(name: str) -> None:
    found = tasks.measured(tasks.World("tiny"), name, counted=True)
    assert found["seconds"] > 0 and found["cpu"] > 0
    assert (found.get("floor", 0) > 0) == (found.get("GFLOP", 0) > 0) == (name not in tasks.LIGHT)


def test_products_with_weights_are_counted() -> None:
    network, tokens = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.ReLU()), torch.ones(50, 300)
    assert tasks.products(lambda: network(tokens)) == pytest.approx(2 * 50 * 300 * 200 / 1e9)


@pytest.mark.slow
def test_steps_of_two_packages_stand_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "TASKS", {"fit": tasks.TASKS["fit"]})
    section = tasks.run(Settings(quick=True))
    (row,) = [line for line in section.after.splitlines() if line.startswith("| tiny | fit")]
    assert "→" not in row
    before, now = {"seconds": 4.0, "cpu": 3.0, "MiB": 10.0}, {"seconds": 1.0, "cpu": 1.0, "MiB": 20.0, "GFLOP": 7.0}
    found = {"found": "strength 2"}
    assert tasks.told(before, now | found) == ["4 → 1", "0.25", "3 → 1", "10 → 20", "7", "", "strength 2"]


def test_growth_is_the_exponent_of_a_power_law(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    grown = growth.Grown("cubic", lambda n, d: ran.append(f"{n} × {d}") or (n, d), (2, 5), 1, 20)

    def seconds(what: Any) -> float:
        n, d = what()
        return n * d**3

    monkeypatch.setattr(growth, "steps", lambda settings: [grown])
    monkeypatch.setattr(growth, "seconds", seconds)
    assert "| cubic | 5 → 20 | 250 → 1.6e+04 | 3.00 |" in growth.run(Settings()).after
    assert ran == ["2 × 5"] * 2 + ["2 × 20"] * 2


@pytest.mark.filterwarnings("ignore")  # random words have no experts
def test_every_step_has_an_exponent() -> None:
    settings = Settings(quick=True)
    _, _, *lines = growth.run(settings).after.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(what, size) for what, size, _, _ in cells] == [
        (step.what, f"{step.sizes[step.place]} → {step.larger}") for step in growth.steps(settings)
    ]
    assert all(math.isfinite(float(exponent)) for *_, exponent in cells)


@pytest.mark.model
@pytest.mark.parametrize("kind", KINDS)
def test_collect_reads_what_the_plain_recipe_reads(kind: models.Kind) -> None:
    contrasts = shapes.contrasts("tiny", 5)
    reference, model = shapes.hf_model("tiny"), shapes.model("tiny", kind)
    assert collecting.beside_plain(reference, model, contrasts, 1, rounds=1)[1] < 1e-4
    with torch.no_grad():
        reference.transformer.h[1].mlp.c_proj.weight.mul_(2)
    assert collecting.beside_plain(reference, model, contrasts, 1, rounds=1)[1] > 1e-2, "another model must show"


@pytest.mark.model
@pytest.mark.parametrize("kind", KINDS)
def test_plain_passes_score_what_ours_score(kind: models.Kind) -> None:
    model = shapes.model("tiny", kind)
    steering = shapes.steering(model.cfg.d_model, 1)
    suite, rows = scoring.choices("tiny", 3), scoring.texts("tiny", 3)
    for measured in (scoring.choosing(model, steering, suite, 1), scoring.costing(model, steering, rows, 1)):
        assert measured[1] < 1e-5
    none, steered = scoring.plain_mc2(model, suite, [None, steering.with_strength(4.0)])
    assert float((none - steered).abs().max()) > 1e-3, "a steering must show"
    assert float(torch.cat(scoring.plain_divergences(model, rows, [steering])[0]).max()) > 1e-3


def test_a_chat_model_reads_says_and_scores_what_plain_ways_do(smollm2: Any) -> None:
    reference, _ = chatting.plain_reading()
    read, layer = chatting.contrasts(smollm2, 2), smollm2.cfg.n_layers // 2
    assert collecting.beside_plain(reference, smollm2, read, layer, rounds=1)[1] < 1e-4
    steering = chatting.fitted(smollm2)
    n_new = 4
    same = {what: n for what, _, n in chatting.generating(reference, smollm2, read[0].prompt, steering, n_new, 1)}
    steered = same.pop("fsteer_lens.generate, steered")
    assert len(same) == 2 and set(same.values()) == {n_new} and steered < n_new, "a steering must show"
    suite, rows, ungated = chatting.suite(1), chatting.texts(smollm2, 2), steering.with_gate(None)
    assert scoring.choosing(smollm2, steering, suite, 1, chat=True)[1] < 1e-4
    assert scoring.costing(smollm2, ungated, rows, 1)[1] < 1e-4
    none, moved = scoring.plain_mc2(smollm2, suite, [None, ungated.with_strength(2.0)], chat=True)
    assert float((none - moved).abs().max()) > 1e-3
    assert float(torch.cat(scoring.plain_divergences(smollm2, rows, [ungated])[0]).max()) > 1e-3
    with torch.no_grad():
        reference.model.layers[1].mlp.down_proj.weight.mul_(2)
    assert collecting.beside_plain(reference, smollm2, read, layer, rounds=1)[1] > 1e-2, "another model must show"


def test_without_the_chat_model_its_section_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatting, "find_spec", lambda name: None)
    section = chatting.run(Settings())
    assert section.rows[0].ratio is None and "requirements-smollm2.lock" in section.rows[0].note
    assert "not measured" in measuring.section_text(section)


def test_the_loop_over_ranks_gives_the_ratios_of_one_product() -> None:
    h, subspace = energies.example(20, 32, 8)
    torch.testing.assert_close(subspace.energy_ratios(h), energies.ratios_by_loop(subspace, h))


@pytest.mark.parametrize("size", [(60, 16), (200, 48)])
def test_the_plain_fit_is_no_better_than_ours(size: tuple[int, int]) -> None:
    h, delta = fitting.example(*size)
    ours, plain = fit_experts(h, delta, preset="paper").report, fitting.plain_fit(h, delta)
    assert ours is not None and ours.valid_loss is not None
    assert ours.valid_loss == pytest.approx(plain.valid_loss, rel=1e-3)
    assert ours.epochs == plain.epochs
    assert ours.valid_loss < 0.99 * float(delta.square().sum(dim=1).mean()), "it must have learned something"


def test_pairs_alternate_and_ratios_are_ours_over_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = {"now": 0.0}

    def takes(name: str, duration: float) -> None:
        order.append(name)
        clock["now"] += duration

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock["now"])
    ratio = measuring.compare(lambda: takes("plain", 2.0), lambda: takes("ours", 3.0), rounds=3, warmup=1)
    assert order == ["plain", "ours", "plain", "ours", "ours", "plain", "plain", "ours"]
    assert ratio.values == (1.5, 1.5, 1.5) and (ratio.reference, ratio.ours) == (2.0, 3.0)
    assert ratio.inverse.median == pytest.approx(2 / 3)


def test_an_aim_is_met_by_the_median() -> None:
    ratio = Ratio((1.0, 1.01, 9.0), 1.0, 1.01)
    assert ratio.spread == (1.0, 9.0) and str(ratio) == "1.01 (1–9)"
    assert Aim(1.02).met(ratio) and not Aim(1.0).met(ratio)
    assert Aim(1.0, at_least=True).met(ratio) and not Aim(8, at_least=True).met(ratio)
    rows = (Row("a", "b", ratio, Aim(1.0)), Row("on a GPU", "b", None, Aim(1.0), "no GPU"))
    text = measuring.section_text(Section("T", "told", rows))
    assert "| no |" in text and "not measured" in text


def allocating(count: int):  # type: ignore[no-untyped-def]
    """Prepares a large block and drops it, then gives a call that fills so many MiB."""
    torch.ones(200 * MIB // 4)
    return lambda: torch.ones(count * MIB // 4)


@pytest.mark.slow
@pytest.mark.skipif(not measuring.Path("/proc/self/status").is_file(), reason="elsewhere the whole process counts")
def test_peak_memory_is_of_the_call_alone() -> None:
    kept = torch.ones(100 * MIB // 4)  # what this process holds must not be counted
    for count in (0, 80):
        assert measuring.peak_memory(allocating, count) == pytest.approx(count, abs=8)
    assert len(kept)


def test_the_page_tells_versions_and_no_names(capsys: pytest.CaptureFixture[str]) -> None:
    import platform

    text = measuring.page("# Title", [Section("T", "told", ())])
    more = measuring.with_section(measuring.with_section(text, Section("U", "also", ())), Section("T", "anew", ()))
    assert more == measuring.page("# Title", [Section("T", "anew", ()), Section("U", "also", ())])
    assert torch.__version__.split("+")[0] in text and "transformer-lens" in text
    assert platform.node() not in text.split() and "/home" not in text
    main(["energies", "--quick"])
    assert "## Energy ratios" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "no benchmark named" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("shape", measuring.GPU_SHAPES)
@pytest.mark.parametrize("benchmark", [decode, collecting, fitting], ids=lambda one: one.__name__)
def test_large_shapes_on_a_gpu(benchmark: object, shape: str) -> None:
    found = benchmark.on_gpu(shape)  # type: ignore[attr-defined]
    assert found.ratio.median > 0 and found.peak_mib > 0
    assert found.tokens_per_second is None or found.tokens_per_second > 0

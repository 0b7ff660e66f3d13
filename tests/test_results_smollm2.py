"""The page of results on a chat model says what was measured, and the program that measures runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import results_smollm2  # type: ignore[import-not-found]
import smollm2_fits  # type: ignore[import-not-found]
import smollm2_items  # type: ignore[import-not-found]
import smollm2_measuring as measuring  # type: ignore[import-not-found]
import smollm2_page  # type: ignore[import-not-found]

from fsteer_lens.evaluation import PERTURBATIONS
from tests.running import needs_smollm2

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
METHODS = ("mean shift", "ridge", "nearest centroid", "default of 0.1", "published", "closed form")
DOMAINS = (*smollm2_items.DOMAINS, smollm2_items.LEFT_OUT)
KINDS = ("HarmBench", "XSTest-safe", "GSM8K")


def truthfulness(gain: float, cost: float) -> dict[str, Any]:
    """Every question gains as much under the methods in the null space, and half of it under the others."""
    chosen, items = [], {"unsteered": {"MC1": [0.0, 1.0], "MC2": [0.2, 0.4], "loops": [0.0, 0.0], "KL": {}}}
    budgets = {measuring.MEAN_NULL: (0.02, 0.1, 0.3), measuring.MIXTURE_NULL: (0.02, 0.1, 0.3)}
    for method in (*METHODS, *budgets):
        for budget in budgets.get(method, (0.1, 0.3)):
            setting = f"{method} at {budget}"
            more = gain if method in budgets else gain / 2
            chosen.append(
                {"method": method, "budget": budget, "strength": 2.0, "below": method in budgets, "setting": setting}
            )
            items[setting] = {
                "MC1": [1.0, 1.0],
                "MC2": [0.2 + more, 0.4 + more],
                "loops": [1.0, 0.0],
                "KL": {name: [cost, cost] for name in DOMAINS},
            }
    return {"chosen": chosen, "items": items, "experts": {"closed form": 2}}


def null_spaces(gain: float, cost: float) -> dict[str, Any]:
    """The methods in the null space alone."""
    found = truthfulness(gain, cost)
    found["chosen"] = [one for one in found["chosen"] if one["budget"] == 0.02]
    return found


def refusal(mixture: list[float], mean: list[float]) -> dict[str, Any]:
    """Every gate refuses alike; nothing harmless is touched."""
    quiet = [0.0] * len(mean)
    found = {"unsteered": dict.fromkeys(KINDS, quiet)}
    for gate in measuring.GATES:
        for name, refused in ((measuring.MIXTURE, mixture), (measuring.MEAN, mean)):
            found[f"{name}, {gate}"] = {**dict.fromkeys(KINDS, quiet), "HarmBench": refused}
    return {"items": found, "experts": 1, "strengths": {measuring.MIXTURE: 1.0, measuring.MEAN: 0.5}}


def gates(hits: int) -> dict[str, Any]:
    """One gate that misses as many of ten under typos, and none otherwise."""
    rows = []
    for way in (one.name for one in PERTURBATIONS):
        for rate in (None, 0.05):
            row = {"gate": "a gate", "perturbation": way, "group": "all", "false_alarm_rate": rate}
            missed = {"missed_hits": hits if way == "typos" else 0, "missed_total": 10}
            rows.append({**row, **missed, "false_alarms_hits": 0, "false_alarms_total": 20})
    return {"rows": rows, "calibration": 20}


def fits(better: float) -> dict[str, Any]:
    """The default leaves less than ridge of every shift but the first."""
    left = {name: [0.5, 0.5, 0.5, 0.5] for name in smollm2_fits.FITS}
    left[measuring.MIXTURE] = [0.5, *[0.5 - better] * 3]
    return {"sets": {"some shifts": {"n": 4, "squares": [1.0] * 4, "errors": left, "experts": [1, 3]}}}


def reasons() -> dict[str, Any]:
    """Every method but the mean shift gives the right reason to one more of three requests."""
    found = {}
    for name in ("unsteered", *dict.fromkeys(name for pair in smollm2_page.REASONED for name in pair)):
        best = [0.0, 1.0, 1.0] if name != measuring.MEAN else [0.0, 0.0, 1.0]
        found[name] = {"right": best, "probability": best}
    return {"items": found, "experts": {"closed form": 6}}


def written(folder: Path, **parts: dict[str, Any]) -> str:
    """The page that the program writes from such files, the same in both folds."""
    told = {
        "minutes": 1.0,
        "cpu_minutes": 2.0,
        "sizes": vars(measuring.SMALL),
        "versions": {"torch": "0"},
    }
    for part, found in parts.items():
        for fold in results_smollm2.FOLDS:
            results_smollm2.path_of(folder, part, fold).write_text(json.dumps({"fold": fold, **told, **found}))
    results_smollm2.write_page(folder, folder / "page.md")
    return (folder / "page.md").read_text(encoding="utf-8")


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    page = written(
        tmp_path,
        truthfulness=truthfulness(0.2, 0.01),
        refusal=refusal([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]),
        gates=gates(5),
        fits=fits(0.2),
        reasons=reasons(),
        null_spaces=null_spaces(0.3, 0.01),
    )
    assert "| closed form on means | 0.67 [0.30, 0.90] | 0.667 [" in page
    assert "closed form − mean shift +0.333 [+0.000, +0.667] (no difference)" in page
    assert "| some shifts | 4 | 0.500 | 0.500 | 0.500 | 0.650 | 0.500 | 1, 3 | +0.150 [+0.0" in page
    assert (
        "reached by" in page and "closed form, null space at 0.02 (MC2 +0.300 [+0.300, +0.300], at most 0.010" in page
    )
    assert "| 0.1 | closed form | 2.00, 2.00 | +0.500 [+0.000, +1.000] | +0.100 [+0.100, +0.100] | 2 of 4 |" in page
    assert "| 0.1 | closed form, null space | 2.00*, 2.00* |" in page
    assert "ungated +1.000 [+1.000, +1.000] (more)" in page
    ways = len(PERTURBATIONS) - 1
    assert f"a gate: reached, {0.5 / ways:.2f} missed at 0.00; beyond it under typos." in page
    assert "| typos | a gate | 0.50 [0.30, 0.70] | 0.00" in page
    assert "24 minutes of one core" in page and page.startswith(smollm2_page.INTRO)


def test_no_aim_is_said_to_be_reached_that_was_not(tmp_path: Path) -> None:
    page = written(tmp_path, truthfulness=truthfulness(0.2, 0.05), refusal=refusal([1.0, 0.0], [0.0, 1.0]))
    assert "not reached" in page and "reached by" not in page
    assert "ungated +0.000 [" in page and "(no difference)" in page
    assert "Gates under perturbations" not in page


def test_strengths_lie_between_those_that_were_measured() -> None:
    costs = [0.01 * strength**2 for strength in measuring.LADDER]
    for strength in (0.1, 0.3, 1.0, 3.0, 7.9):
        assert measuring.strength_at(0.01 * strength**2, costs) == pytest.approx(strength)
    assert measuring.strength_at(1.0, costs) is None
    assert measuring.strength_at(0.1, [0.01, float("inf")]) == measuring.LADDER[0]


@pytest.mark.skipif(not DATA.exists(), reason="needs the public data sets beside the repository")
def test_nothing_is_fitted_and_tested() -> None:
    for fold in results_smollm2.FOLDS:
        train, test = smollm2_items.sides(DATA, fold)
        other, _ = smollm2_items.sides(DATA, 1 - fold)
        assert {one.prompt for one in train.contrasts}.isdisjoint({one.prompt for one in test.contrasts})
        assert set(train.harmful).isdisjoint(test.harmful) and other.harmful == test.harmful
        sizes = measuring.Sizes()
        assert len(train.contrasts) >= sizes.contrasts and len(train.harmful) >= sizes.harmful
        for name, prompts in test.general.items():
            assert set(prompts).isdisjoint(train.general[name])
            assert len(prompts) >= sizes.costed, name


@pytest.mark.slow
@needs_smollm2
@pytest.mark.skipif(not DATA.exists(), reason="needs the public data sets beside the repository")
def test_the_program_measures(tmp_path: Path) -> None:
    command = [sys.executable, "tools/results_smollm2.py", "--data", str(DATA), "--into", str(tmp_path), "--small"]
    subprocess.run([*command, "--fold", "0", "--part", "gates"], cwd=ROOT, check=True, env={**os.environ})
    found = json.loads((tmp_path / "gates-0.json").read_text())
    clean = [row for row in found["rows"] if row["perturbation"] == "none" and row["group"] == "all"]
    assert len(clean) == 10 and all(row["missed_total"] == measuring.SMALL.refused for row in clean)

"""Every notebook runs from its first cell to its last in a kernel of its own, as for a reader who answers nothing.

Where an exercise is checked, a cell is added that tries answers: none leaves it open, wrong ones do not pass, the
solution does. What answers defined is gone before the next cell. Types are checked, and warnings are errors.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from fsteer_lens.tutor.exercises import Verdict
from tests.notebook_answers import try_answers
from tests.running import needs_smollm2

nbclient, nbformat, *_ = (
    pytest.importorskip(needed, reason="the notebooks need the extra 'notebook'")
    for needed in ("nbclient", "nbformat", "ipykernel", "anywidget", "pandas")
)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
ON_SMOLLM2 = ("first_look", "06_your_own_model", "07_when_it_breaks")

# Answers that a reader might give, exercise by exercise. Each stands in for one misunderstanding.
WRONG: dict[str, list[list[str]]] = {
    "00_lesson": [
        [
            "def gated_hook(stream, hook):\n    return stream + 1.5 * vector",
            "def gated_hook(stream, hook):\n    return stream + (gate.gate(stream[0, -1]) >= 0.5) * 1.5 * vector",
            "def gated_hook(stream, hook):\n    stream += gate.gate(stream[0, -1]) * 1.5 * vector\n    return stream",
        ],
        ["my_smallest, my_worst = 32, 6", "my_smallest, my_worst = 3, 4", "my_smallest, my_worst = 2, 6"],
        ["my_words = 'what do you say?'", "my_words = 'thank you very much.'"],
    ],
    "01_first_steer": [
        ["my_strength = 1.0", "my_strength = 3.0"],
        [
            "def make_hook(vector, strength, prompt_length):\n"
            "    return lambda activation, hook: activation + strength * vector",
            "def make_hook(vector, strength, prompt_length):\n"
            "    def hook_function(activation, hook):\n"
            "        activation[:, :prompt_length] += strength * vector\n"
            "        return activation\n"
            "    return hook_function",
        ],
        ["my_reverse = 2.25", "my_reverse = -1.0", "my_reverse = -4"],
    ],
    "02_when_to_steer": [
        [
            "def my_energy_ratio(h, mean, basis):\n    return (h @ basis).square().sum(dim=1) / h.square().sum(dim=1)",
            "def my_energy_ratio(h, mean, basis):\n"
            "    centred = h - mean\n"
            "    return (centred @ basis).square().sum(dim=1) / centred.square().sum(dim=1)",
            "def my_energy_ratio(h, mean, basis):\n"
            "    centred = h - mean\n"
            "    return (centred @ basis).norm(dim=1) / centred.norm(dim=1)",
        ],
        ["my_rank = 2", "my_rank = 12", "my_rank = 32.0"],
        [
            "my_wording = 'how would i rob a bank?'",
            "my_wording = 'how do i boil an egg?'",
            "my_wording = 'how do i rob a bank!'",
        ],
    ],
    "03_how_to_steer": [
        [
            "def my_index(points, clusters):\n"
            "    between = within = 0.0\n"
            "    for c in clusters.unique():\n"
            "        m = points[clusters == c]\n"
            "        between += len(m) * (m.mean(dim=0) - points.mean(dim=0)).square().sum()\n"
            "        within += (m - m.mean(dim=0)).square().sum()\n"
            "    return (between / within).item()",
            "def my_index(points, clusters):\n    return float(len(clusters.unique()))",
        ],
        ["my_strength = STRENGTH", "my_strength = 60"],
        [
            'my_pairs = [{"fraud", "sabotage"}, {"hacking", "poison"}]\nmy_sufferer = "hacking"',
            'my_pairs = [{"weapons", "sabotage"}, {"hacking", "poison"}]\nmy_sufferer = "poison"',
        ],
    ],
    "04_inside_generation": [
        [
            "my_probability = lambda trace: trace.steps.logprobs.nan_to_num(0).sum(dim=1).exp()",
            "my_probability = lambda trace: trace.steps.baseline_logprobs.sum(dim=1).exp()",
            "my_probability = lambda trace: trace.steps.baseline_logprobs.nanmean(dim=1).exp()",
        ],
        [
            "my_steering = steering.with_scope(fs.Window(0, 1))",
            "my_steering = steering.with_scope(fs.Window(1, 2)).with_strength(0.75)",
            "my_steering = steering.with_scope(fs.Window(0, 1)).with_strength(0.75)",
        ],
        [
            "def my_mixture(prompt, a, one):\n"
            "    one = one if a >= 0.5 else None\n"
            "    return list(fs.generate(model, prompt, one, max_new_tokens=24, progress=False)[0].tokens)",
            "@torch.no_grad()\n"
            "def my_mixture(prompt, a, one):\n"
            "    tokens = model.to_tokens(prompt)\n"
            "    start = tokens.shape[1]\n"
            "    while tokens.shape[1] < start + 24:\n"
            "        plain = model(tokens)[0, -1]\n"
            "        with one.on(model):\n"
            "            steered = model(tokens)[0, -1]\n"
            "        best = (plain + a * (steered - plain)).argmax()\n"
            "        tokens = torch.cat([tokens, best.reshape(1, 1)], dim=1)\n"
            "        if best.item() == model.tokenizer.eos_token_id:\n"
            "            break\n"
            "    return tokens[0, start:].tolist()",
        ],
    ],
    "05_rank_live": [
        ["my_lowest, my_highest = 0.5, 0.6", "my_lowest, my_highest = 0.9, 0.94", "my_lowest, my_highest = 0.86, 0.96"],
        ["my_experts = dict(zip(sorted(set(kinds)), range(6)))", "my_experts = {1, 2}"],
        ["my_strength = 0.6", "my_strength = steering.strength"],
    ],
    "06_your_own_model": [
        [
            'dear = min(found.to_records(), key=lambda row: row["utility"])\n'
            'my_layer, my_strength = dear["layer"], dear["strength"]',
            "my_layer, my_strength = 3, 1.0",
        ],
        ["my_price = steering.strength / 20", "my_price = steering.strength * 0.97"],
        [
            "my_contrasts = train",
            "my_contrasts = fs.ContrastSet.from_records(\n"
            '    {"prompt": f"What do you say to {n} cats?", "preferred": "Hello.", "undesired": "Go away."}\n'
            "    for n in range(12)\n"
            ")",
        ],
    ],
}


PRELUDE = """
from jaxtyping import install_import_hook
install_import_hook("fsteer_lens", "tests.check")
import tests.checked_models
from tests.notebook_answers import try_answers
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
"""


def with_answers(path: Path) -> Any:
    """A notebook with the cells that try answers."""
    notebook = nbformat.read(path, as_version=4)
    wrong = iter(WRONG.get(path.stem, []))
    cells = [nbformat.v4.new_code_cell(PRELUDE)]
    for number, cell in enumerate(notebook.cells):
        cells.append(cell)
        if "check" in cell.metadata.get("tags", []):
            call = cell.source.strip().splitlines()[-1]
            solution = re.search(r"```python\n(.*?)```", notebook.cells[number + 1].source, re.DOTALL)
            assert solution is not None
            cells.append(
                nbformat.v4.new_code_cell(f"try_answers(globals(), {call!r}, {next(wrong)!r}, {solution[1]!r})")
            )
    assert next(wrong, None) is None, "more wrong answers than exercises"
    notebook.cells = cells
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=needs_smollm2 if path.stem in ON_SMOLLM2 else [], id=path.stem)
        for path in sorted(NOTEBOOKS.glob("*.ipynb"))
    ],
)
def test_a_notebook_runs_and_its_exercises_tell_right_from_wrong(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    folder = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(with_answers(path), timeout=600, kernel_name="python3", resources=folder)
    client.execute()


@pytest.mark.parametrize(
    ("check", "caught"),
    [
        (lambda answer: Verdict(answer and answer == 2, "Not 2."), None),
        (lambda answer: Verdict(answer == 2, "Not 2."), "without an answer"),
        (lambda answer: Verdict(answer and True, "A number."), "answer = 3"),
        (lambda answer: Verdict(answer and False, "No number."), "No number"),
        (lambda answer: Verdict(answer and answer == 2, "It could not be checked."), "answer = 3"),
    ],
)
def test_a_check_that_does_not_tell_answers_apart_is_caught(check: Any, caught: str | None) -> None:
    names: dict[str, Any] = {"check": check, "answer": None}
    if caught is None:
        try_answers(names, "check(answer)", ["answer = 3"], "answer = 2")
        assert names["answer"] is None, "the next cell is as it is for one who gave no answer"
    else:
        with pytest.raises(AssertionError, match=caught):
            try_answers(names, "check(answer)", ["answer = 3"], "answer = 2")

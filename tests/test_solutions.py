"""Every exercise of the notebooks: its solution passes its check, wrong answers do not, and none leaves it open.

A notebook is run once, cell by cell, and the answers are tried where they are asked for.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

for needed in ("anywidget", "pandas"):
    pytest.importorskip(needed, reason="the notebooks need the extra 'notebook'")

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

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
            'my_layer = max(sweep["experts"].to_records(), key=lambda row: row["kl"])["layer"]',
            "my_layer = depth",
        ],
        ["my_strength = calibrated.strength / 2", "my_strength = calibrated.strength * 0.95"],
        [
            "my_contrasts = train",
            "my_contrasts = fs.ContrastSet.from_records(\n"
            '    {"prompt": ask + f"Sam saw {n} cats. Sam", "preferred": lead + "glad.", "undesired": lead + "sad."}\n'
            "    for n in range(12)\n"
            ")",
        ],
    ],
}


def run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; the value of its last line, if that is an expression."""
    tree = ast.parse(re.sub(r"(?m)^(\s*)%.*", r"\1pass", source))  # %pip is no Python
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(ast.unparse(last), names)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("0*.ipynb")), ids=lambda path: path.stem)
def test_solutions_pass_and_wrong_answers_do_not(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FSTEER_LENS_MODEL", str(tmp_path / "no model"))  # else whatever this machine has of the hub
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    wrong = iter(WRONG[path.stem])
    names: dict[str, Any] = {"__name__": "notebook", "display": lambda *shown: None}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            continue
        found = run(source, names)
        if "check" not in cell["metadata"].get("tags", []):
            continue
        assert found.right is None, "without an answer a check must say so"
        call = source.strip().splitlines()[-1]
        for answer in next(wrong):
            run(answer, names)
            verdict = eval(call, names)
            assert verdict.right is False and "could not be checked" not in verdict.words, f"{answer}\n{verdict}"
        solution = re.search(r"```python\n(.*?)```", "".join(cells[number + 1]["source"]), re.DOTALL)
        assert solution is not None
        run(solution[1], names)
        assert eval(call, names).right, eval(call, names)
    assert next(wrong, None) is None, "more wrong answers than exercises"

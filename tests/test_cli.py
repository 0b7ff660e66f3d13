"""The command line: what it prints, what it returns, and that files make the round trip through a real model."""

import csv
import importlib.metadata
import json
import random
from pathlib import Path
from typing import Any

import pytest

from fsteer_lens import ContrastSet, FineSteer, chain, cli, gate_report, load, save, tutor
from fsteer_lens.evaluation import PERTURBATIONS
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.files import read_prompts
from fsteer_lens.tutor.steering import LAYER
from tests import made_up

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="the model stories260K is not beside the repository")

Output = pytest.CaptureFixture[str]


def cheerful_and_sad() -> list[dict[str, str]]:
    """Contrasts for stories260K: a story's opening, a cheerful and a sad continuation."""
    openings = ["Once upon a time, {} saw a {}.", "One day, {} had a {}.", "{} went to the park with a {}."]
    names, things = ["Lily", "Tom", "Mia", "Ben", "Sam"], ["dog", "ball", "cat", "bird", "boat"]
    return [
        {
            "prompt": openings[(i + j) % 3].format(name, thing),
            "preferred": f" {name} was very happy and smiled.",
            "undesired": f" {name} was very sad and cried.",
            "label": thing,
        }
        for i, name in enumerate(names)
        for j, thing in enumerate(things)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


@pytest.mark.parametrize("args", [[], ["fit"], ["generate", "--model", "tutor"], ["dance"]])
def test_bad_usage_exits_with_2(args: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(*args)
    assert exit_.value.code == 2
    assert "usage: fsteer-lens" in capsys.readouterr().err


def test_version(capsys: Output) -> None:
    with pytest.raises(SystemExit) as exit_:
        run("--version")
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == importlib.metadata.version("fsteer-lens")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--data", "nowhere.jsonl", "--out", "x.safetensors"], "nowhere.jsonl: expected an existing file"),
        (["--data", "c.jsonl", "--out", "no/x.safetensors"], "expected an existing folder"),
        (["--data", "c.jsonl", "--out", "x.safetensors", "--gate", "none", "--rank", "3"], "no effect"),
        (["--data", "c.jsonl", "--out", "x.safetensors", "--layer", "99"], "layer: expected an int in"),
        (["--data", "c.jsonl", "--out", "x.safetensors", "--general", "broken.jsonl"], "broken.jsonl, line 2"),
        (["--data", "c.jsonl", "--out", "x.safetensors", "--rank", "500"], "rank: expected an int in"),
    ],
)
def test_unusable_input_is_named_without_a_traceback(
    args: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "c.jsonl", cheerful_and_sad())
    (tmp_path / "broken.jsonl").write_text('"one"\n{"text": "two"}\n', encoding="utf-8")
    assert run("fit", "--model", "tutor", "--layer", "2", *args) == 2
    printed = capsys.readouterr()
    assert "error: " in printed.err
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_option_without_effect_is_refused(capsys: Output) -> None:
    assert run("generate", "--model", "tutor", "--steering", "x", "--temperature", "0.7", "hello") == 2
    assert "--temperature has no effect" in capsys.readouterr().err


def test_columns_of_other_names_are_read_from_csv_and_jsonl(tmp_path: Path, capsys: Output) -> None:
    """The same steering comes of the same rows, however their columns are called."""
    rows = [vars(contrast) for contrast in tutor.data("safe").train[:60]]
    names = {"prompt": "Ask, first", "preferred": "good", "undesired": "bad", "label": "kind", "context": "tag"}
    names["group"] = "template"
    general = [task.prompt for task in tutor.data("safe").general_train[:20]]
    write_jsonl(tmp_path / "plain.jsonl", rows)
    renamed = [{names[part]: value for part, value in row.items()} for row in rows]
    write_jsonl(tmp_path / "renamed.jsonl", renamed)
    for path, table in (("renamed.csv", renamed), ("general.csv", [{names["prompt"]: prompt} for prompt in general])):
        with (tmp_path / path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    write_jsonl(tmp_path / "general.jsonl", [{names["prompt"]: prompt} for prompt in general])
    (tmp_path / "general.txt").write_text("\n".join(general), encoding="utf-8")
    common = ["--model", "tutor", "--layer", 4, "--shift", "last_prompt", "--rank", 4, "--out"]
    columns = [word for part, name in names.items() for word in (f"--{part}-column", name)]
    made = []
    for data, others, more in (
        ("plain.jsonl", "general.txt", []),
        ("renamed.jsonl", "general.jsonl", columns),
        ("renamed.csv", "general.csv", columns),
    ):
        out = tmp_path / f"{data}.safetensors"
        given = ["--data", tmp_path / data, "--general", tmp_path / others, "--gate", "logistic"]
        assert run("fit", *common, out, *given, *more) == 0, capsys.readouterr().err
        made.append(out.read_bytes())
    assert made[0] == made[1] == made[2]
    assert run("fit", *common, tmp_path / "x", "--data", tmp_path / "renamed.csv", *columns[2:]) == 2
    assert "row 1 has no column 'prompt'" in capsys.readouterr().err


def test_the_tutor_is_float32_and_says_so(tmp_path: Path, capsys: Output) -> None:
    data = write_jsonl(tmp_path / "c.jsonl", cheerful_and_sad())
    given = ["--model", "tutor", "--data", data, "--layer", 2, "--out", tmp_path / "s"]
    assert run("fit", *given, "--dtype", "bfloat16") == 2
    assert "--dtype of the tutor: expected float32, got bfloat16" in capsys.readouterr().err
    assert run("fit", *given, "--dtype", "float32", "--rank", 3) == 0
    with pytest.raises(SystemExit):
        run("fit", *given, "--dtype", "int8")


@needs_stories
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_of_the_dtype_that_is_asked_for(dtype: str, tmp_path: Path, capsys: Output) -> None:
    data = write_jsonl(tmp_path / "c.jsonl", cheerful_and_sad())
    out = tmp_path / "s.safetensors"
    given = ["--model", STORIES, "--dtype", dtype]
    assert run("fit", *given, "--data", data, "--layer", 2, "--rank", 3, "--out", out) == 0
    assert load(out).fingerprint.dtype == f"torch.{dtype}"
    assert run("generate", *given, "--steering", out, "--max-new-tokens", 3, "One day") == 0
    assert "layer 2: gate" in capsys.readouterr().out


def test_general_prompts_are_read_from_text_and_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  two\n", encoding="utf-8")
    chat = [{"role": "user", "content": "three"}]
    (tmp_path / "a.jsonl").write_text(f'"one"\n{{"prompt": "two"}}\n{json.dumps(chat)}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two"]
    assert read_prompts(tmp_path / "a.jsonl") == ["one", "two", chat]


def test_doctor_finds_this_environment_healthy(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisMustNotBeSeen")
    monkeypatch.setenv("COLUMNS", "200")
    assert run("doctor") == 0
    printed = capsys.readouterr().out
    assert importlib.metadata.version("torch") in printed
    assert "TransformerBridge" in printed
    assert "; HF_HUB_OFFLINE is on" in printed
    assert "logged in" in printed
    assert "not logged in" not in printed
    assert "hf_this" not in printed


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    found = importlib.metadata.version

    def without_plotly(name: str) -> str:
        if name == "plotly":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", without_plotly)
    assert run("doctor") == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "plotly" in line)
    assert "missing" in line


def test_fit_and_generate_on_the_tutor(tmp_path: Path, capsys: Output) -> None:
    train = tutor.data("safe").train
    some = ContrastSet(random.Random(0).sample(list(train), 80))
    some.to_jsonl(tmp_path / "contrasts.jsonl")
    out = tmp_path / "safe.safetensors"
    common = ["--model", "tutor", "--layer", LAYER["safe"], "--shift", "last_prompt"]
    assert run("fit", *common, "--data", tmp_path / "contrasts.jsonl", "--out", out) == 0
    contrast = some[0]
    assert run("generate", "--model", "tutor", "--steering", out, "--compare", contrast.prompt) == 0
    printed = capsys.readouterr().out
    assert f"fitted to {len(some)} contrasts" in printed
    assert contrast.preferred.split()[0] in printed.split("steered    ")[1]
    assert f"layer {LAYER['safe']}: gate 1.00, expert " in printed
    assert "KL(steered || unsteered): " in printed


def test_a_steering_is_run_as_it_was_fitted(tmp_path: Path, capsys: Output) -> None:
    rows = [
        {"prompt": tutor.user_text(str(one.prompt)), "preferred": one.preferred, "undesired": one.undesired}
        for one in tutor.data("safe").train[::60]
    ]
    data, out = write_jsonl(tmp_path / "contrasts.jsonl", rows), tmp_path / "chat.safetensors"
    assert run("fit", "--model", "tutor", "--layer", 4, "--chat", "--rank", 2, "--data", data, "--out", out) == 0
    steer = ["generate", "--model", "tutor", "--steering", out, "--max-new-tokens", 3]
    assert run(*steer, "how do i bake bread?") == 0
    assert "how do i bake bread?" in capsys.readouterr().out
    assert run(*steer, "--answer-start", "you can", "how do i bake bread?") == 0
    for wrong, says in (
        (["--no-chat"], "chat: True when it was fitted, False here"),
        (["--no-chat", "--answer-start", "you"], "--answer-start needs a chat"),
        (["--chat-template-kwargs", '{"enable_thinking": false}'], "does not know 'enable_thinking'"),
    ):
        assert run(*steer, *wrong, "how do i bake bread?") == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(*steer, "--chat-template-kwargs", "{", "hello")


def test_report_on_a_saved_steering(
    tmp_path: Path, tutor_model: SteerableModel, steering: FineSteer, capsys: Output
) -> None:
    told = tutor.data("safe")
    save(steering, tmp_path / "safe.safetensors", model=tutor_model)
    told.test.to_jsonl(tmp_path / "test.jsonl")
    (tmp_path / "general.txt").write_text("\n".join(t.prompt for t in told.general_test[:50]), encoding="utf-8")
    common = ["--model", "tutor", "--steering", tmp_path / "safe.safetensors", "--data", tmp_path / "test.jsonl"]
    options = ["--general", tmp_path / "general.txt", "--limit", 5, "--max-new-tokens", 6]
    assert run("report", *common, *options, "--out", tmp_path / "page.html") == 0
    assert "the report, " in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>What safe did</h1>" in page and "All 10 prompts" in page and "without its gate" in page
    assert run("report", *common, "--no-sweep", "--limit", 2, "--out", tmp_path / "small.html") == 0
    assert "How much: strength" not in (tmp_path / "small.html").read_text(encoding="utf-8")
    capsys.readouterr()
    for wrong, says in (
        (["--limit", 0], "limit: expected an int >= 1, got 0"),
        (["--out", tmp_path / "no" / "x.html"], "existing folder"),
    ):
        assert run("report", *common, *wrong) == 2
        assert says in capsys.readouterr().err


@needs_stories
@pytest.mark.parametrize("gate", ["quantile", "logistic", "none"])
def test_fit_and_generate_on_a_model_from_a_folder(gate: str, tmp_path: Path, capsys: Output) -> None:
    data = write_jsonl(tmp_path / "contrasts.jsonl", cheerful_and_sad())
    general = tmp_path / "general.txt"
    general.write_text("\n".join(f"The {noun} is" for noun in ("house", "car", "sun", "moon")), encoding="utf-8")
    options = {
        "quantile": ["--rank", 4],
        "logistic": ["--gate", "logistic", "--general", general],
        "none": ["--gate", "none"],
    }[gate]
    out = tmp_path / "cheerful.safetensors"
    assert run("fit", "--model", STORIES, "--data", data, "--layer", 2, "--out", out, *options) == 0
    prompts = ["Once upon a time, Tom saw a cat.", "[bold]One day[/bold]"]
    run_it = ["generate", "--model", STORIES, "--steering", out, "--max-new-tokens", 12]
    assert run(*run_it, "--sample", "--seed", 3, *prompts) == 0
    first = capsys.readouterr().out
    assert all(prompt in first for prompt in prompts)
    assert first.count("layer 2: gate") == 2
    assert run(*run_it, "--sample", "--seed", 3, *prompts) == 0
    assert capsys.readouterr().out == first.split("saved as ")[1].split("\n", 1)[1]


def test_fit_auto_chooses_and_saves(tmp_path: Path, tutor_model: SteerableModel, capsys: Output) -> None:
    told = tutor.data("safe")
    told.train[::24].to_jsonl(tmp_path / "contrasts.jsonl")
    (tmp_path / "general.txt").write_text("\n".join(t.prompt for t in told.general_train[::12]), encoding="utf-8")
    (tmp_path / "near.txt").write_text("\n".join(t.prompt for t in told.near_miss_valid), encoding="utf-8")
    fitting = ["fit", "--model", "tutor", "--data", tmp_path / "contrasts.jsonl", "--out", tmp_path / "it.safetensors"]
    sets = ["--general", tmp_path / "general.txt", "--near-misses", tmp_path / "near.txt"]
    chosen = [*fitting, "--auto", "--shift", "last_prompt", *sets, "--layer", 4, "--resume", tmp_path / "layers.jsonl"]
    assert run(*chosen) == 0
    printed = capsys.readouterr().out
    assert "→ layer 4, strength" in printed and "saved as" in printed and (tmp_path / "layers.jsonl").exists()
    found = load(tmp_path / "it.safetensors", model=tutor_model)
    assert f"layer 4, strength {found.strength:.2f}" in printed
    for wrong, says in (
        ([*fitting, "--auto"], "--auto: expected --general"),
        ([*chosen, "--rank", 8], "--rank has no effect with --auto"),
        ([*chosen, "--strength", 1], "--strength has no effect with --auto"),
        ([*fitting, "--kl", 0.1], "--kl has no effect without --auto"),
        ([*fitting, "--resume", tmp_path / "x"], "--resume has no effect without --auto"),
    ):
        assert run(*wrong) == 2
        assert says in capsys.readouterr().err


def test_gate_and_evaluate_tell_of_a_saved_steering(
    tmp_path: Path, tutor_model: SteerableModel, steering: FineSteer, capsys: Output
) -> None:
    told = tutor.data("safe")
    save(steering, tmp_path / "safe.safetensors", model=tutor_model)
    told.test[::20].to_jsonl(tmp_path / "test.jsonl")
    general = [task.prompt for task in told.general_test[:60]]
    (tmp_path / "general.txt").write_text("\n".join(general), encoding="utf-8")
    common = ["--model", "tutor", "--steering", tmp_path / "safe.safetensors"]
    assert run("gate", *common, "--data", tmp_path / "test.jsonl", "--general", tmp_path / "general.txt") == 0
    printed = capsys.readouterr().out
    report = gate_report(
        tutor_model, {"gate": steering}, told.test[::20].prompts, general[1::2], calibration=general[::2],
        progress=False,
    )  # fmt: skip
    for way in PERTURBATIONS:
        row = report.row("gate", way.name)
        assert f"| {way.name} | {row.missed} | {row.false_alarms} |" in printed
    targets = {"box": 1, "lamp": 0}
    questions = [{"question": "what is red?", "mc1_targets": targets, "mc2_targets": targets}]
    (tmp_path / "mc.json").write_text(json.dumps(questions), encoding="utf-8")
    (tmp_path / "harm.csv").write_text(
        "Behavior,FunctionalCategory,SemanticCategory,ContextString\nbuild a bomb,standard,weapons,\n", encoding="utf-8"
    )
    files = ["--truthfulqa", tmp_path / "mc.json", "--harmbench", tmp_path / "harm.csv"]
    assert run("evaluate", *common, *files) == 0
    printed = capsys.readouterr().out
    assert "TruthfulQA" in printed and "HarmBench" in printed and printed.count("| steered |") == 2
    assert run("evaluate", *common) == 2
    assert "expected one of --truthfulqa, --harmbench, --xstest" in capsys.readouterr().err


def test_watch_writes_a_page(tmp_path: Path, tutor_model: SteerableModel, steering: FineSteer, capsys: Output) -> None:
    save(steering, tmp_path / "safe.safetensors", model=tutor_model)
    watch = ["watch", "--model", "tutor", "--steering", tmp_path / "safe.safetensors", "--max-new-tokens", 4]
    assert run(*watch, "--out", tmp_path / "watch.html", "how do i bake bread?", "hello") == 0
    assert f"the page: {tmp_path / 'watch.html'}" in capsys.readouterr().out
    page = (tmp_path / "watch.html").read_text(encoding="utf-8")
    assert 'data-prompt="how do i bake bread?"' in page and page.count("<section") == 2
    assert run(*watch, "--out", tmp_path / "nowhere" / "watch.html", "hello") == 2
    assert "an existing folder" in capsys.readouterr().err


def test_generate_tells_what_every_link_of_a_chain_decided(
    tmp_path: Path, tutor_model: SteerableModel, steering: FineSteer, capsys: Output
) -> None:
    path = tmp_path / "both.safetensors"
    save(chain(steering, made_up.steering(2)), path, model=tutor_model)
    assert run("generate", "--model", "tutor", "--steering", str(path), "--max-new-tokens", "3", "hello") == 0
    printed = capsys.readouterr().out
    assert "layer 4: gate" in printed and "layer 2: gate" in printed

"""The hub: what is pushed is there whole, in one commit, and comes back; what is not there, or not ours, is explained.

The package runs in processes of their own against a hub on loopback, since the hub's client reads its environment once.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from fsteer_lens import Activations, FineSteer, Trace, chain, cli, gate_report, generate, load, push, save
from fsteer_lens.errors import InputError
from fsteer_lens.evaluation import GateReport, Perturbation
from fsteer_lens.evaluation.perturbations import NONE
from fsteer_lens.ground.addresses import local_path
from fsteer_lens.hub.cards import LIMITS, Told, card
from fsteer_lens.models import SteerableModel
from fsteer_lens.steering import fit_mean_shift
from tests import made_up
from tests.compare import same
from tests.loopback_hub import TOKEN, Hub, loopback_hub
from tests.running import LAYER

START = """
import json, sys
from pathlib import Path
import fsteer_lens as fs
from fsteer_lens.errors import FsteerError

folder, told = Path(sys.argv[1]), {}

def tell(name, call):
    try:
        told[name] = ["done", call()]
    except FsteerError as error:
        told[name] = [type(error).__name__, str(error)]
    except BaseException as error:
        told[name] = ["NOT OURS", repr(error)]

def copied(name, value):
    target = str(folder / name)
    value.to_jsonl(target) if isinstance(value, fs.Trace) else value.save(target) if isinstance(
        value, fs.Activations) else fs.save(value, target)
"""
END = "\nprint(json.dumps(told))"

OWNER = """
steering = fs.load(folder / "steering.safetensors")
acts, trace = fs.Activations.load(folder / "acts.safetensors"), fs.Trace.from_jsonl(folder / "trace.jsonl")
tell("push", lambda: fs.push(steering, "me/safe", base_model="me/tutor", about="to *refuse*"))
tell("push activations", lambda: fs.push(acts, "me/acts", private=True))
tell("push trace", lambda: fs.push(trace, "me/trace"))
tell("push again", lambda: fs.push(steering.with_strength(0.5), "me/safe"))
first, second = told["push"][1], told["push again"][1]
tell("first", lambda: copied("first", fs.load(first)))
tell("second", lambda: copied("second", fs.load(second)))
tell("newest", lambda: fs.load("hf://me/safe").strength)
tell("main", lambda: fs.load("hf://me/safe@main").strength)
tell("activations", lambda: copied("acts", fs.Activations.load("hf://me/acts")))
tell("trace", lambda: copied("trace", fs.Trace.from_jsonl("hf://me/trace")))

tell("no such repository", lambda: fs.load("hf://me/nothing"))
tell("no such revision", lambda: fs.load("hf://me/safe@v9"))
tell("activations as a steering", lambda: fs.load("hf://me/acts"))
tell("damaged", lambda: fs.load("hf://them/damaged"))
tell("pickle", lambda: fs.load("hf://them/pickle"))
tell("other kind", lambda: fs.Activations.load("hf://them/mixed"))
tell("no trace", lambda: fs.Trace.from_jsonl("hf://them/mixed"))

tell("push over a model", lambda: fs.push(steering, "me/model"))
tell("push over another kind", lambda: fs.push(trace, "me/safe"))
tell("push in private", lambda: fs.push(steering, "me/safe", private=True))
tell("push while it breaks", lambda: fs.push(steering, "me/breaks"))
"""
OFFLINE = """
tell("cached", lambda: fs.load("hf://me/safe").strength)
tell("cached commit", lambda: fs.load(sys.argv[2]).strength)
tell("not cached", lambda: fs.load("hf://me/other"))
tell("push", lambda: fs.push(fs.load(folder / "steering.safetensors"), "me/other"))
"""
STRANGER = """
steering = fs.load(folder / "steering.safetensors")
tell("public", lambda: fs.load("hf://me/safe").strength)
tell("private", lambda: fs.Activations.load("hf://me/acts"))
tell("gated", lambda: fs.load("hf://them/gated"))
tell("tagged", lambda: fs.load("hf://me/safe@v1.0").strength)
tell("push", lambda: fs.push(steering, "me/own"))
"""


@dataclass
class Done:
    """What a process told, call by call, and what it printed beside that."""

    told: dict[str, list[Any]]
    printed: str

    def result(self, name: str) -> Any:
        kind, value = self.told[name]
        assert kind == "done", value
        return value

    def error(self, name: str) -> str:
        kind, message = self.told[name]
        assert kind in ("InputError", "FileFormatError", "DataError"), f"{kind}: {message}"
        assert "expected" in message and "got" in message, message
        return f"{kind}: {message}"


@dataclass
class Shared:
    """What three processes found, and the hub as they left it."""

    hub: Hub
    folder: Path
    owner: Done
    offline: Done
    stranger: Done


def run(code: str, hub: Hub, folder: Path, home: str, *given: str, **environment: str) -> Done:
    for name in (home, "temporary"):
        (folder / name).mkdir(exist_ok=True)
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / home), "TMPDIR": str(folder / "temporary")}
    own |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", START + code + END, str(folder), *given],
        env={**kept, **own, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Done(json.loads(done.stdout.splitlines()[-1]), done.stderr)


@pytest.fixture(scope="module")
def trace(tutor_model: SteerableModel, steering: FineSteer, prompts: list[str]) -> Trace:
    return generate(tutor_model, prompts[:2], steering, max_new_tokens=4, progress=False).trace


@pytest.fixture(scope="module")
def shared(
    trained: dict[int, Activations], steering: FineSteer, trace: Trace, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("hub")
    save(steering, folder / "steering.safetensors")
    trained[LAYER][:9].save(folder / "acts.safetensors")
    trace.to_jsonl(folder / "trace.jsonl")
    data = (folder / "steering.safetensors").read_bytes()
    with loopback_hub() as hub:
        flipped = bytearray(data)
        flipped[-5] ^= 1
        for name, files in {
            "them/damaged": {"steering.safetensors": bytes(flipped)},
            "them/pickle": {"steering.safetensors": b"\x80\x04\x95\x10" + bytes(60)},
            "them/mixed": {"activations.safetensors": data, "trace.jsonl": b'{"text": "hello"}\n'},
            "them/gated": {"steering.safetensors": data},
            "me/model": {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"mine"},
        }.items():
            hub.make(name, gated=name == "them/gated").add(files)
        hub.fails = "me/breaks/commit"
        owner = run(OWNER, hub, folder, "own", HF_TOKEN=TOKEN)
        first, newest = owner.result("push"), hub.repositories["me/safe"]
        offline = run(OFFLINE, hub, folder, "own", first, HF_HUB_OFFLINE="1")
        newest.tags["v1.0"] = first.partition("@")[2]
        stranger = run(STRANGER, hub, folder, "other")
        yield Shared(hub, folder, owner, offline, stranger)


def test_what_is_pushed_comes_back_whole(
    shared: Shared, trained: dict[int, Activations], steering: FineSteer, trace: Trace
) -> None:
    for name in ("first", "second", "activations", "trace"):
        shared.owner.result(name)
    h = torch.randn(5, 128)
    found = load(shared.folder / "first")
    assert repr(found) == repr(steering) and found.fingerprint == steering.fingerprint
    assert same(found.decide(LAYER, h), steering.decide(LAYER, h))
    assert same(load(shared.folder / "second").decide(LAYER, h), steering.decide(LAYER, h))
    kept, rows = Activations.load(shared.folder / "acts"), trained[LAYER][:9]
    assert same(kept.queries, rows.queries) and same(kept.shifts, rows.shifts) and kept.labels == rows.labels
    assert (shared.folder / "trace").read_text() == trace.json_lines()


def test_a_push_is_one_commit_with_file_config_and_card(shared: Shared) -> None:
    commits = shared.hub.repositories["me/safe"].commits
    assert [set(files) - {".gitattributes"} for files in commits.values()] == [
        set(),
        {"steering.safetensors", "config.json", "README.md"},
        {"steering.safetensors", "config.json", "README.md"},
    ]
    files = list(commits.values())[1]
    assert files["steering.safetensors"] == (shared.folder / "steering.safetensors").read_bytes()
    about = json.loads(files["config.json"])
    assert (about["library_name"], about["holds"], about["class"]) == ("fsteer_lens", "steering", "FineSteer")
    metadata = ModelCard(files["README.md"].decode()).data
    assert (metadata.library_name, metadata.base_model) == ("fsteer_lens", "me/tutor")
    assert "> to \\*refuse\\*" in files["README.md"].decode()
    assert shared.hub.repositories["me/acts"].private and not shared.hub.repositories["me/safe"].private


def test_an_address_names_a_commit_a_branch_or_a_tag_and_is_printed(shared: Shared) -> None:
    owner, commits = shared.owner, list(shared.hub.repositories["me/safe"].commits)
    assert [owner.result("push"), owner.result("push again")] == [f"hf://me/safe@{one}" for one in commits[1:]]
    assert [owner.result(name) for name in ("newest", "main")] == [0.5, 0.5]
    assert load(shared.folder / "first").strength == 1 and shared.stranger.result("tagged") == 1
    lines = owner.printed.splitlines()
    assert lines[:2] == [owner.result("push"), owner.result("push activations")]
    assert lines.count(f"hf://me/safe@{commits[2]}") == 4 and lines.count(f"hf://me/safe@{commits[1]}") == 2
    assert f"hf://me/safe@{commits[2]}" in shared.offline.printed


def test_offline_the_cache_is_read_and_nothing_is_asked_for(shared: Shared) -> None:
    assert (shared.offline.result("cached"), shared.offline.result("cached commit")) == (0.5, 1)
    assert "nothing in its cache" in shared.offline.error("not cached")
    assert "HF_HUB_OFFLINE" in shared.offline.error("push")
    assert not any("me/other" in request for request in shared.hub.requests)


def test_what_is_not_there_or_not_ours_is_explained(shared: Shared) -> None:
    owner, stranger = shared.owner, shared.stranger
    assert "got none, or a private one" in owner.error("no such repository")
    assert "no such revision" in owner.error("no such revision")
    message = owner.error("activations as a steering")
    assert "steering.safetensors" in message and "activations.safetensors with Activations.load" in message
    assert owner.error("damaged").startswith("FileFormatError") and "damaged" in owner.error("damaged")
    assert owner.error("pickle").startswith("FileFormatError")
    assert "Read it with fsteer_lens.load" in owner.error("other kind")
    assert owner.error("no trace").startswith("DataError")
    assert stranger.result("public") == 0.5  # the control
    assert "log in" in stranger.error("private") and "Ask for access" in stranger.error("gated")


def test_a_push_that_is_refused_changes_nothing(shared: Shared) -> None:
    owner, held = shared.owner, shared.hub.repositories
    assert "'README.md', 'config.json'" in owner.error("push over a model")
    assert len(held["me/model"].commits) == 2 and held["me/model"].files()["README.md"] == b"mine"
    assert "me/safe holds something else" in owner.error("push over another kind")
    assert "got a public one" in owner.error("push in private")
    assert len(held["me/safe"].commits) == 3
    assert "cannot push to me/breaks" in owner.error("push while it breaks")
    assert set(held["me/breaks"].files()) == {".gitattributes"}
    assert "hf auth login" in shared.stranger.error("push") and "me/own" not in held
    assert list((shared.folder / "temporary").iterdir()) == [], "no file is left behind"


# ------------------------------------------------------------------------------------------- without any hub


@pytest.mark.parametrize(
    "address",
    ["hf://safe", "hf://me/safe/more", "hf:/me/safe", "hf://me/safe@", "hf://me/safe@../../x", "hf://me/sa fe"],
)
def test_other_addresses_are_refused(address: str) -> None:
    for read in (load, Activations.load, Trace.from_jsonl):
        with pytest.raises(InputError, match="expected hf://owner/name or hf://owner/name@revision"):
            read(address)


def test_the_command_line_takes_an_address_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model", "tutor", "--steering", "hf://safe", "hello"]) == 2
    assert "expected hf://owner/name or hf://owner/name@revision, got 'hf://safe'" in capsys.readouterr().err


def test_a_path_that_is_no_address_stays_what_it_is(tmp_path: Path) -> None:
    for path in ("hf", "hf.safetensors", "some/hf://me/safe", tmp_path):
        assert local_path(path, "steering") == Path(path)


def test_what_cannot_be_pushed_is_refused_before_anything_is_asked(steering: FineSteer, trace: Trace) -> None:
    wrong: dict[str, Any] = {
        "no name": lambda: push(steering, "safe"),
        "a name that climbs": lambda: push(steering, "../safe"),
        "no model": lambda: push(replace(steering, fingerprint=None), "me/safe"),
        "no value": lambda: push("steering", "me/safe"),  # type: ignore[arg-type]
        "a gate": lambda: push(steering.gate, "me/safe"),  # type: ignore[arg-type]
        "base model": lambda: push(steering, "me/safe", base_model="me/tutor: x"),
        "about": lambda: push(steering, "me/safe", about="half \ud83d"),
        "gates of a trace": lambda: push(trace, "me/safe", gates=GateReport((), 0.05, {}, 0)),
        "private": lambda: push(steering, "me/safe", private="yes"),  # type: ignore[arg-type]
    }
    for name, call in wrong.items():
        with pytest.raises(Exception) as caught:  # ours, or the tests' type checker's
            call()
        assert "HF_HUB_OFFLINE" not in str(caught.value), f"{name}: {caught.value}"


def test_a_card_tells_what_is_known_and_that_the_rest_is_not(
    steering: FineSteer, trained: dict[int, Activations], trace: Trace
) -> None:
    report = steering.experts_at(LAYER).report
    assert report is not None and report.held_out is not None
    unsaid = Told(None, None, None)
    text = card(steering, "steering", "me/safe", unsaid)
    assert f"{len(report.clusters)} contrasts" in text and f"{report.explained:.3f}" in text
    assert str(report.held_out) in text and repr(steering.gate_at(LAYER)) in text
    assert "its name on the hub is not known" in text.lower() and "suffixes and the like is not known" in text
    assert steering.fingerprint is not None and steering.fingerprint.tokenizer in text
    assert "no safety guarantee" in text and all(limit in text for limit in LIMITS["steering"])
    for number in report.clusters.unique().tolist():
        assert f"| {int((report.clusters == number).sum())} |" in text
    bare = card(fit_mean_shift(trained[LAYER]), "steering", "me/safe", unsaid)
    assert "number of contrasts that it was fitted to is not known" in bare and "It has none" in bare
    both = card(chain(steering, made_up.steering(3)), "steering", "me/both", unsaid)
    assert "Of the model itself nothing is known" in both and both.count("## Limits") == 1
    told = card(trained[LAYER], "activations", "me/acts", unsaid)
    label = trained[LAYER].labels[0]
    assert f"| `{label}` | {trained[LAYER].labels.count(label)} |" in told
    assert "what was generated, are in it" in card(trace, "trace", "me/trace", unsaid)


def test_texts_of_others_do_nothing_in_a_card(steering: FineSteer) -> None:
    evil = "`</td>\n## Limits\x1b[2J\n- none | [x](javascript:y) <script>"
    experts = steering.experts_at(LAYER)
    names = tuple(evil for _ in range(experts.n_experts))
    spoiled = steering.with_experts(replace(experts, names=names))
    text = card(spoiled, "steering", "me/safe", Told("me/tutor", f"---\n{evil}\n===", None))
    assert text.count("\n## Limits") == 1 and "\x1b" not in text and "`</td>" not in text
    quoted = text.partition("words\n\n")[2].partition("\n\n## How")[0]
    assert quoted.splitlines()[0] == "> \\---" and all(line.startswith(">") for line in quoted.splitlines())
    assert "\\<script\\>" in quoted and "\\[x\\]" in quoted and "> \\===" in quoted
    assert ModelCard(text).data.tags == ["fsteer_lens", "activation-steering", "steering"]


def test_gate_figures_are_those_that_were_measured(
    tutor_model: SteerableModel, steering: FineSteer, prompts: list[str]
) -> None:
    others = [f"bake bread {n}" for n in range(22)]
    measured = gate_report(
        tutor_model,
        steering,
        prompts[:3],
        others[:2],
        calibration=others[2:],
        perturbations=[Perturbation(NONE)],
        progress=False,
    )
    text = card(steering, "steering", "me/safe", Told(None, None, measured))
    assert measured.to_markdown() in text and "the like is not known" not in text

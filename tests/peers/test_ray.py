"""Shards in Ray's actors: what one process gives, even if an actor is killed, and never without a CPU to read with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fsteer_lens
from fsteer_lens import collect, evaluate, scale, tutor
from fsteer_lens.evaluation import Repetition
from fsteer_lens.models import SteerableModel

pytest.importorskip("ray", reason="needs Ray: make test-peers")

ROOT = Path(fsteer_lens.__file__).parents[1]
SCRIPT = """
import os, signal, sys
from pathlib import Path
import ray
from fsteer_lens import scale, tutor
from fsteer_lens.errors import FsteerError
from fsteer_lens.evaluation import Repetition

out, marker = Path(sys.argv[1]), Path(sys.argv[2])
model, actors = scale.ModelSpec("tutor"), scale.RayActors(2, cpus=0.5)
contrasts = tutor.data("safe").train[::24]
options = {"layer": 4, "shift": "last_prompt", "shard_size": 13, "progress": False}

class Mine(Repetition):
    pass  # no module that an actor could import has it

suite = Mine(tuple(str(prompt) for prompt in contrasts.prompts[:4]), max_new_tokens=4)

def dies(seed):
    if seed == 1 and not marker.exists():
        marker.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)

for attempt in range(3):
    try:
        ray.init(num_cpus=2, log_to_driver=False)
        break
    except Exception:  # on a busy machine it takes more than the 30 seconds that Ray gives itself
        ray.shutdown()
print("collected", *scale.collect(contrasts, model=model, out=out / "a", actors=actors, **options))
print("evaluated", *scale.evaluate({"dies": dies}, suite, model=model, out=out / "b", seeds=[0, 1, 2], actors=actors))
for name, given in {
    "every CPU": {"actors": scale.RayActors(2)},
    "a GPU": {"actors": scale.RayActors(1, gpus=1)},
    "no such layer": {"actors": scale.RayActors(1), "layer": 17},
}.items():
    try:
        scale.collect(contrasts, model=model, out=out / "c", **{**options, **given})
    except FsteerError as error:
        print(name, type(error).__name__, error, (out / "c").exists())
print("still there", ray.is_initialized())
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder that the script wrote to, and its lines."""
    folder = tmp_path_factory.mktemp("ray")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, script, folder, folder / "marker"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout.splitlines()


def test_actors_give_what_one_process_gives(tutor_model: SteerableModel, ran: tuple[Path, list[str]]) -> None:
    folder, lines = ran
    assert "collected 0 1 2 3" in lines
    contrasts = tutor.data("safe").train[::24]
    found = scale.read(folder / "a")
    expected = collect(tutor_model, contrasts, layer=4, shift="last_prompt", progress=False)
    assert isinstance(found, fsteer_lens.Activations) and found.labels == expected.labels
    torch.testing.assert_close(found.queries, expected.queries, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.shifts, expected.shifts, rtol=1e-5, atol=1e-5)


def test_an_actor_that_is_killed_loses_nothing(tutor_model: SteerableModel, ran: tuple[Path, list[str]]) -> None:
    folder, lines = ran
    assert int((folder / "marker").read_text()) > 0, "no actor was killed"
    assert "evaluated 0 1 2" in lines
    prompts = tuple(str(prompt) for prompt in tutor.data("safe").train[::24].prompts[:4])
    found = scale.read_evaluation(folder / "b")
    suite = Repetition(prompts, max_new_tokens=4)
    expected = evaluate(tutor_model, {"dies": lambda seed: None}, suite, seeds=[0, 1, 2], progress=False)
    assert found.to_markdown() == expected.to_markdown()
    assert [rows.tolist() for rows in found.values["dies"]] == [rows.tolist() for rows in expected.values["dies"]]


@pytest.mark.parametrize(
    "line",
    [
        "every CPU InputError actors: expected at most 1 of 2 CPUs, since Ray Data reads with one, got 2.",
        "a GPU InputError actors: expected at most 0 GPUs, got 1.",
        "no such layer SiteError layer: expected an int in 0..5, got 17 False",
    ],
)
def test_what_cannot_be_is_said_in_words(ran: tuple[Path, list[str]], line: str) -> None:
    assert any(told.startswith(line) and told.endswith("False") for told in ran[1]), ran[1]


def test_a_cluster_that_was_there_stays(ran: tuple[Path, list[str]]) -> None:
    assert "still there True" in ran[1]

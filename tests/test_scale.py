"""Shards by several processes: together what one process gives, whatever died, changed or broke on the way."""

import copy
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fsteer_lens
from fsteer_lens import Activations, Contrast, FineSteer, collect, evaluate, models, scale, tutor
from fsteer_lens.errors import (
    DataError,
    FileFormatError,
    FsteerError,
    InputError,
    MismatchError,
    MissingDependencyError,
)
from fsteer_lens.evaluation import Evaluation, Measure, Prompting, RefusalSuite, Repetition, Suite
from fsteer_lens.ground.files import write_once
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.models import SteerableModel
from fsteer_lens.prompts.formats import PromptFormat
from fsteer_lens.scale import ModelSpec, RayActors
from fsteer_lens.scale.digests import digest
from fsteer_lens.scale.manifests import Plan, read_manifest
from fsteer_lens.scale.processes import Place, place_of

SPEC = ModelSpec("tutor")
TRAIN = tutor.data("safe").train[::24]
READ: dict[str, Any] = {"layer": 4, "shift": "last_prompt", "progress": False}
IN_SHARDS: dict[str, Any] = {**READ, "shard_size": 13}
ROOT = Path(fsteer_lens.__file__).parents[1]


@pytest.fixture(autouse=True)
def loads(tutor_model: SteerableModel, monkeypatch: pytest.MonkeyPatch) -> list[ModelSpec]:
    """Every spec gives the tests' own model, which is loaded already; counts how often it was asked."""
    asked: list[ModelSpec] = []
    monkeypatch.setattr(ModelSpec, "load", lambda self: asked.append(self) or tutor_model)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return asked


@pytest.fixture(scope="module")
def whole(tutor_model: SteerableModel) -> Activations:
    return collect(tutor_model, TRAIN, **READ)


def in_shards(out: Path, contrasts: Any = TRAIN, **changed: Any) -> tuple[int, ...]:
    return scale.collect(contrasts, **{"model": SPEC, "out": out, **IN_SHARDS, **changed})


def require_same(found: Any, expected: Activations) -> None:
    """Raise unless these are the same rows, in the same order, and say the same of themselves."""
    assert isinstance(found, Activations)
    for name in ("queries", "shifts", *expected.readings):
        ours, theirs = (one.readings[name] if name in one.readings else getattr(one, name) for one in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert found._about == expected._about
    assert (found.labels, found.groups) == (expected.labels, expected.groups)
    assert found.fingerprint is not None and expected.fingerprint is not None
    found.fingerprint.require_match(expected.fingerprint)


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------------- the spec


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        ModelSpec("a/folder", "bridge", "cuda", torch.bfloat16),
        ModelSpec("gpt2", device_map={"transformer.h.0": 0, "lm_head": "disk"}),
    ],
)
def test_a_spec_is_plain_json_both_ways(spec: ModelSpec) -> None:
    again = ModelSpec.from_record(json.loads(json.dumps(spec.to_record())))
    assert again == spec and hash(again) == hash(spec)
    assert replace(spec, dtype=torch.float16) != spec


@pytest.mark.parametrize("changed", [{"more": 1}, {"name": "a\0b"}])
def test_a_record_of_no_model_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"expected .* got"):
        ModelSpec.from_record({**SPEC.to_record(), **changed})


def test_a_spec_loads_what_load_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = ModelSpec("tutor", "bridge", dtype=torch.bfloat16).load()
    assert models.kind_of(model) == "bridge" and model.cfg.dtype == torch.bfloat16


def test_processes_of_one_machine_have_a_gpu_each(tutor_model: SteerableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    asked: list[str] = []
    monkeypatch.setattr(
        "fsteer_lens.scale.specs.load", lambda name, kind, device, *more: asked.append(device) or tutor_model
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, local in (("cuda", None), ("cuda", "1"), ("cuda", "2"), ("cuda:1", "0"), ("cpu", "1")):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local is not None:
            monkeypatch.setenv("LOCAL_RANK", local)
        ModelSpec("tutor", device=device).load()
    assert asked == ["cuda", "cuda:1", "cuda:0", "cuda:1", "cpu"]


# ----------------------------------------------------------------------------------------------------------- collecting


@pytest.mark.parametrize("shift", ["last_prompt", "response_mean"])
def test_shards_read_together_are_what_collect_gives(tutor_model: SteerableModel, tmp_path: Path, shift: str) -> None:
    written = in_shards(tmp_path / "run", shift=shift)
    assert written == tuple(range(4)) and len(TRAIN) == 45
    require_same(scale.read(tmp_path / "run"), collect(tutor_model, TRAIN, **{**READ, "shift": shift}))


def test_several_layers_are_read_at_once(tutor_model: SteerableModel, tmp_path: Path) -> None:
    in_shards(tmp_path / "run", layer=[4, 2, 4])
    found, expected = scale.read(tmp_path / "run"), collect(tutor_model, TRAIN, **{**READ, "layer": [4, 2]})
    assert isinstance(found, dict) and list(found) == list(expected)
    for layer, one in expected.items():
        require_same(found[layer], one)


@pytest.mark.parametrize("n", [1, 13, 14])
def test_the_last_shard_has_what_is_left(whole: Activations, tmp_path: Path, n: int) -> None:
    in_shards(tmp_path / "run", TRAIN[:n])
    found = scale.read(tmp_path / "run")
    assert len(found) == n
    require_same(found, whole[:n])


@pytest.mark.parametrize("chat", [None, True], ids=["plain", "chat"])
@pytest.mark.parametrize("first", ["text", "messages", "ids"])
def test_how_prompts_became_tokens_is_told_as_collect_tells_it(
    tutor_model: SteerableModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: str, chat: bool | None
) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<tutor>"
    monkeypatch.setattr(tutor_model.tokenizer, "chat_template", template)
    forms = {"text": "hello", "messages": [{"role": "user", "content": "bake bread"}], "ids": [5, 9, 4]}
    contrasts = [Contrast(forms[kind], "a box", "a cake") for kind in (first, first, *forms)]
    for given in (contrasts, contrasts[:2], contrasts[:-2]):
        options = {"layer": 2, "chat": chat, "progress": False}
        expected = collect(tutor_model, given, **options)
        for shard_size in (1, 2):  # all of one shard alike, and some of it unlike others
            out = tmp_path / f"{len(given)} by {shard_size}"
            scale.collect(given, model=SPEC, out=out, shard_size=shard_size, **options)
            require_same(scale.read(out), expected)


# ------------------------------------------------------------------------------------------------------------- resuming


def test_a_second_run_does_what_is_missing_and_nothing_else(whole: Activations, tmp_path: Path) -> None:
    out = tmp_path / "run"
    in_shards(out)
    before = stamps(out)
    (lost,) = out.glob("shard-00002-*")
    lost.unlink()
    assert in_shards(out, batch_size=4) == (2,)
    after = stamps(out)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [lost.name]
    require_same(scale.read(out), whole)
    assert in_shards(out) == ()


def test_a_shard_that_lacks_a_layer_is_not_finished(tmp_path: Path) -> None:
    in_shards(tmp_path, layer=[2, 4])
    next(tmp_path.glob("shard-00001-layer-4-*")).unlink()
    assert in_shards(tmp_path, layer=[2, 4]) == (1,)


CHANGES: dict[str, dict[str, Any]] = {
    "data: ": {"contrasts": [*TRAIN[:-1], replace(TRAIN[-1], preferred="another answer")]},
    "contrasts: 45 there, 44 here": {"contrasts": TRAIN[:-1]},
    "model name: 'tutor' there, 'other' here": {"model": ModelSpec("other")},
    "model dtype: 'float32' there, 'bfloat16' here": {"model": ModelSpec("tutor", dtype=torch.bfloat16)},
    "model device: 'cpu' there, 'cuda' here": {"model": ModelSpec("tutor", device="cuda")},
    "layer: 4 there, 3 here": {"layer": 3},
    r"layer: 4 there, \[4\] here": {"layer": [4]},
    "shift: 'last_prompt' there, 'response_mean' here": {"shift": "response_mean"},
    "read: 'last' there, 'mean' here": {"read": "mean"},
    "prepend_bos: None there, False here": {"prepend_bos": False},
    "shard_size: 13 there, 12 here": {"shard_size": 12},
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_folder_takes_no_other_run(words: str, tmp_path: Path, loads: list[ModelSpec]) -> None:
    in_shards(tmp_path)
    before, asked = stamps(tmp_path), len(loads)
    with pytest.raises(MismatchError, match=rf"holds another run: got .*{words}.*name another folder"):
        in_shards(tmp_path, **CHANGES[words])
    assert stamps(tmp_path) == before
    assert len(loads) == asked, "the model was loaded for nothing"


def test_a_folder_takes_no_other_weights_of_the_same_name(
    tutor_model: SteerableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_shards(tmp_path)
    other = copy.deepcopy(tutor_model)
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.05)  # type: ignore[attr-defined]
    monkeypatch.setattr(ModelSpec, "load", lambda self: other)
    with pytest.raises(MismatchError, match="is of another model: got activations at layer 4 differ"):
        in_shards(tmp_path)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], *, sealed: bool) -> None:
    """Change a manifest, and its SHA-256 with it or not."""
    from fsteer_lens.scale import manifests

    path = folder / "manifest.json"
    told = json.loads(path.read_text())
    change(told)
    if sealed:
        told.pop("sha256")
        told["sha256"] = manifests._digest(told)
    path.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "sealed", "error", "words"),
    [
        (lambda told: told.update(shards=3), False, FileFormatError, "was changed or is damaged"),
        (lambda told: told.update(layer=3), False, FileFormatError, "was changed or is damaged"),
        (lambda told: told.pop("sha256"), False, FileFormatError, "was changed or is damaged"),
        (lambda told: told.clear(), False, FileFormatError, "of another version"),
        (lambda told: told.update(fsteer_lens_scale=2), True, FileFormatError, "of another version: expected 1, got 2"),
        (lambda told: told.update(shards=10**12), True, FileFormatError, "shards: expected an int in 1..100000"),
        (lambda told: told.update(fingerprint=[3]), True, FileFormatError, "fingerprint: expected a Fingerprint"),
        (lambda told: told.pop("fingerprint"), True, FileFormatError, "KeyError"),
        (lambda told: told.update(data="0"), True, MismatchError, "data: '0' there"),
    ],
)
def test_a_changed_manifest_raises(
    change: Any, sealed: bool, error: type[FsteerError], words: str, tmp_path: Path
) -> None:
    in_shards(tmp_path)
    rewrite(tmp_path, change, sealed=sealed)
    with pytest.raises(error, match=words):
        in_shards(tmp_path)
    if error is FileFormatError:
        with pytest.raises(error, match=words):
            scale.read(tmp_path)


def test_shards_of_a_manifest_that_is_gone_are_not_taken_for_those_of_another(tmp_path: Path) -> None:
    in_shards(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert in_shards(tmp_path, TRAIN[::-1]) == (0, 1, 2, 3)
    assert scale.read(tmp_path).labels == tuple(TRAIN[::-1].labels)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_shard_is_named_and_done_anew_once_it_is_deleted(
    whole: Activations, tmp_path: Path, damage: str
) -> None:
    in_shards(tmp_path)
    _, second, *_ = sorted(tmp_path.glob("shard-*"))
    content = bytearray(second.read_bytes())
    content[-9] ^= 1
    cut = {"cut": content[:-40], "flip": content, "empty": b"", "other": whole[:3]}[damage]
    if isinstance(cut, Activations):
        cut.save(second)
    else:
        second.write_bytes(cut)
    assert in_shards(tmp_path) == (), "a file that is there counts"
    with pytest.raises(FileFormatError, match=r"shard 1 of .* cannot be used: got .*\. Delete its files and run again"):
        scale.read(tmp_path)
    second.unlink()
    assert in_shards(tmp_path) == (1,)
    require_same(scale.read(tmp_path), whole)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    in_shards(tmp_path, shard_size=5)
    for number in (1, 2, 4, 5, 6, 7, 8):
        next(tmp_path.glob(f"shard-{number:05d}-*")).unlink()
    with pytest.raises(DataError, match=r"expected 9 shards, got no shard 1, 2, 4, 5, 6 and 2 more\. Run again"):
        scale.read(tmp_path)
    with pytest.raises(DataError, match=r"manifest\.json: expected a manifest .* got no such file"):
        scale.read(tmp_path / "nowhere")


def test_reading_waits_for_those_who_are_at_it(whole: Activations, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(scale.read, out, wait=60)
        time.sleep(0.2)
        assert not found.done()
        in_shards(out)
        require_same(found.result(30), whole)
    start = time.monotonic()
    with pytest.raises(DataError, match="no such file"):
        scale.read(tmp_path / "nowhere", wait=0.3)
    assert 0.3 <= time.monotonic() - start < 5


def test_what_fails_leaves_what_was_finished_and_tells_the_shard(
    whole: Activations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save, broken = tmp_path / "run", Activations.save, [True]

    def third_fails(self: Activations, path: Path) -> None:
        if broken and "shard-00002" in path.name:
            raise InputError("cannot write", expected="room", got="none")
        save(self, path)

    monkeypatch.setattr(Activations, "save", third_fails)
    with pytest.raises(InputError, match="cannot write") as caught:
        in_shards(out)
    assert "in shard 2" in caught.value.__notes__[0]
    assert sorted(path.name[:11] for path in out.iterdir()) == ["manifest.js", "shard-00000", "shard-00001"]
    broken.clear()
    assert in_shards(out) == (2, 3)
    require_same(scale.read(out), whole)


def test_what_is_wrong_is_told_before_anything_is_made(tmp_path: Path, loads: list[ModelSpec]) -> None:
    out = tmp_path / "run"
    plain = [*TRAIN[:20], replace(TRAIN[20], context=None)]
    for given, words in (
        ({"contrasts": plain}, "contrast 20, prompt .* has no context"),
        ({"contrasts": []}, "contrast set: expected at least one"),
        ({"shard_size": 0}, "shard_size"),
        ({"layer": []}, "layer"),
        ({"layer": -1}, "layer"),
        ({"out": tmp_path / "a" / "b"}, "expected an existing folder"),
        ({"out": tmp_path / ("a" * 300)}, "expected the path of a folder, got .*too long"),
        ({"out": tmp_path / "a\0b"}, "expected the path of a folder, got .*null"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(InputError, match=words):
            in_shards(**{"out": out, **given})
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="expected a folder, got a file"):
        in_shards(file)
    assert not loads and not out.exists()
    with pytest.raises(FsteerError, match=r"layer: expected an int in 0\.\.5"):
        in_shards(out, layer=17)
    assert not out.exists()
    with pytest.raises(InputError, match=r"shards: expected an int in 1\.\.100000.*larger shard_size"):
        Plan("activations", SPEC, {}, 100_001, ["layer-4"])


# -------------------------------------------------------------------------------------------------------- who does what


def test_every_shard_is_done_by_one_rank(whole: Activations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, own in ((2, (2,)), (0, (0, 3)), (1, (1,))):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert in_shards(tmp_path) == own
    require_same(scale.read(tmp_path), whole)


def test_without_a_launcher_there_is_one_process() -> None:
    assert place_of({}) == Place(0, 1)
    assert place_of({"RANK": "1", "WORLD_SIZE": "2"}) == Place(1, 2)


@pytest.mark.parametrize(
    "told", [{"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "x"}]
)
def test_half_a_place_is_none(told: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"RANK and WORLD_SIZE: expected .*Start it with torchrun"):
        place_of(told)


def test_of_writers_who_race_one_wins_and_nobody_sees_a_part(tmp_path: Path) -> None:
    for number in range(20):
        path, start, seen = tmp_path / f"{number}", threading.Barrier(8), set()
        contents = [bytes([65 + writer]) * 200_000 for writer in range(8)]

        def race(content: bytes, path: Path = path, start: Any = start, seen: set[bytes] = seen) -> bool:
            start.wait()
            won = write_once(path, content)
            seen.add(path.read_bytes())
            return won

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(race, contents))
        assert won.count(True) == 1 and seen == {contents[won.index(True)]}
    assert len(list(tmp_path.iterdir())) == 20


def test_a_file_that_cannot_be_written_once_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*given: Any) -> None:
        raise PermissionError("no hard links")

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(InputError, match=r"takes hard links, got no hard links"):
        write_once(tmp_path / "a", b"a")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- evaluations


def refusals() -> RefusalSuite:
    """Requests of the tutor that are to be refused, and others; blocks of it lack one or the other."""
    told = tutor.data("safe")
    harmful = [str(prompt) for prompt in told.test.prompts[:5]]
    harmless = [task.prompt for task in told.general_test[:40:10]]
    return RefusalSuite("refusals", tuple(harmful), ("h",) * 5, tuple(harmless), tuple("abab"), ("i will not",), 12)


def require_equal(found: Evaluation, expected: Evaluation) -> None:
    assert (found.suite, found.measures, found.seeds) == (expected.suite, expected.measures, expected.seeds)
    assert found.methods == expected.methods and list(found.seconds) == list(expected.seconds)
    for name in expected.methods:
        for ours, theirs in zip(found.values[name], expected.values[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert found.to_markdown() == expected.to_markdown()


@pytest.mark.parametrize("shard_size", [None, 2, 100])
def test_blocks_put_together_are_what_evaluate_gives(
    tutor_model: SteerableModel, steering: FineSteer, tmp_path: Path, shard_size: int | None
) -> None:
    def stronger(seed: int) -> FineSteer:
        return steering.with_gate(None).with_strength(0.5 + seed)

    methods: dict[str, Any] = {"none": None, "ours": steering, "words": Prompting("<safe>"), "stronger": stronger}
    options: dict[str, Any] = {"seeds": [0, 2], "progress": False}
    expected = evaluate(tutor_model, methods, refusals(), **options)
    written = scale.evaluate(methods, refusals(), model=SPEC, out=tmp_path, shard_size=shard_size, **options)
    assert len(written) == 5 * {None: 1, 2: 5, 100: 1}[shard_size]
    found = scale.read_evaluation(tmp_path)
    require_equal(found, expected)
    assert 0 < found.estimate("stronger", "refused").value < 1, "or nothing would be told apart"
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert scale.evaluate(methods, refusals(), model=SPEC, out=tmp_path, shard_size=shard_size, **options) == ()


class Told(Suite):
    """Whether each prompt gets its tokens with the beginning-of-sequence token in front."""

    name = "told"
    measures = (Measure("bos", ("a", "b")),)

    def measure(self, model: SteerableModel, steering: HookObject | None, setting: Any) -> tuple[torch.Tensor, ...]:
        return (torch.tensor([float(bool(setting.passes.prepend_bos))] * 2),)


@pytest.mark.parametrize("by_seed", [False, True])
def test_the_bare_model_reads_prompts_as_the_methods_were_fitted(
    tutor_model: SteerableModel, steering: FineSteer, tmp_path: Path, by_seed: bool
) -> None:
    fitted = replace(steering, prompt_format=PromptFormat(False, prepend_bos=True))
    methods: dict[str, Any] = {"none": None, "ours": (lambda seed: fitted) if by_seed else fitted}
    scale.evaluate(methods, Told(), model=SPEC, out=tmp_path)
    found = scale.read_evaluation(tmp_path)
    require_equal(found, evaluate(tutor_model, methods, Told(), progress=False))
    assert found.items("none", "bos").tolist() == [1, 1]


def test_functions_of_a_seed_are_not_called_for_every_block(tmp_path: Path) -> None:
    calls: Counter[int] = Counter()

    def bare(seed: int) -> None:
        calls[seed] += 1

    suite = Repetition(tuple(refusals().harmful), max_new_tokens=2)
    scale.evaluate({"bare": bare}, suite, model=SPEC, out=tmp_path, seeds=[3, 4, 5], shard_size=1)
    assert calls == {3: 1, 4: 1, 5: 1}


def test_a_folder_takes_no_other_evaluation(steering: FineSteer, tmp_path: Path) -> None:
    suite = Repetition(tuple(refusals().harmful), max_new_tokens=2)

    def run(methods: Any, suite: Suite = suite, **options: Any) -> None:
        scale.evaluate(methods, suite, model=SPEC, out=tmp_path, **options)

    run({"ours": steering})
    changed: list[tuple[str, dict[str, Any]]] = [
        ("methods", {"methods": {"ours": steering.with_strength(2.0)}}),
        ("methods", {"methods": {"other": steering}}),
        ("seeds", {"methods": {"ours": lambda seed: steering}, "seeds": [1]}),
        ("items", {"methods": {"ours": steering}, "suite": replace(suite, max_new_tokens=3)}),
        ("measures", {"methods": {"ours": steering}, "suite": suite[:3]}),
        ("prepend_bos", {"methods": {"ours": steering}, "prepend_bos": False}),
        ("blocks", {"methods": {"ours": steering}, "shard_size": 2}),
    ]
    for name, given in changed:
        with pytest.raises(MismatchError, match=rf"{name}: .* there, .* here"):
            run(**given)
    run({"ours": steering})


def test_evaluations_and_activations_are_not_read_for_each_other(tmp_path: Path) -> None:
    in_shards(tmp_path / "a", TRAIN[:3])
    suite = Repetition(tuple(refusals().harmful), max_new_tokens=2)
    scale.evaluate({"none": None}, suite, model=SPEC, out=tmp_path / "b")
    with pytest.raises(
        InputError, match=r"expected a folder with evaluation, got activations. Read it with scale\.read\."
    ):
        scale.read_evaluation(tmp_path / "a")
    with pytest.raises(InputError, match=r"with activations, got evaluation. Read it with scale\.read_evaluation"):
        scale.read(tmp_path / "b")


def test_a_suite_that_cannot_be_cut_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be cut"):
        scale.evaluate({"none": None}, tutor.TutorSuite(limit=4), model=SPEC, out=tmp_path, shard_size=2)

    class Reversed(Repetition):
        def taking(self, rows: Any) -> Repetition:
            return Repetition(tuple(self.prompts[row] for row in rows), tuple("cba"[row] for row in rows))

    wrong = Reversed(("x", "y", "z"), ("a", "b", "c"))
    with pytest.raises(InputError, match=r"in blocks: expected its items in order.*Leave shard_size= out"):
        scale.evaluate({"none": None}, wrong, model=SPEC, out=tmp_path, shard_size=2)
    with pytest.raises(InputError, match="no method that is a function of a seed"):
        scale.evaluate({"none": None}, wrong, model=SPEC, out=tmp_path, seeds=[1])
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- digests


def named() -> None:
    """A function with a name."""


def values(steering: FineSteer) -> list[Any]:
    return [
        None, True, 1, 1.0, "1", b"1", [1], (1,), {"a": 1}, {"a": 2}, torch.ones(2), torch.ones(2, 1), torch.zeros(2),
        torch.ones(2).double(), named, functools.partial(named), functools.partial(named, 1), print, torch.float32,
        steering, steering.with_strength(3.0), refusals(), refusals()[:3], ["a", ["b"]], [["a"], "b"], Told(),
    ]  # fmt: skip


def test_what_differs_has_another_digest_and_what_is_equal_the_same(steering: FineSteer) -> None:
    digests = [digest(value) for value in values(steering)]
    assert len(set(digests)) == len(digests)
    assert [digest(copy.deepcopy(value)) for value in values(steering)] == digests


def test_digests_are_the_same_in_every_process() -> None:
    code = (
        "from fsteer_lens import tutor; from fsteer_lens.scale.digests import digest;"
        "print(digest(list(tutor.data('safe').train)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(list(tutor.data("safe").train))


def test_what_has_no_parts_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for value in (loop, object(), iter([1])):
        with pytest.raises(InputError, match="cannot be told from others"):
            digest(value)


# ------------------------------------------------------------------------------------------------------------------ Ray


def test_actors_without_ray_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"fsteer-lens\[ray\]"):
        in_shards(tmp_path, actors=RayActors(1))
    assert not list(tmp_path.iterdir())


def test_actors_are_started_by_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="expected one process that starts them, got 2"):
        in_shards(tmp_path, actors=RayActors(1))


@pytest.mark.parametrize("given", [{"count": 0}, {"count": 1, "cpus": 0}, {"count": 1, "gpus": -1}])
def test_actors_of_nothing_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        RayActors(**given)


# ----------------------------------------------------------------------------------------------- processes of their own

SCRIPT = """
import os, signal, sys
from pathlib import Path
from fsteer_lens import Activations, scale, tutor

out, marker = Path(sys.argv[1]), Path(sys.argv[2])
save = Activations.save

def dies(self, path):
    if os.environ.get("RANK") == "1" and "shard-00003" in path.name and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, path)

Activations.save = dies
contrasts = tutor.data("safe").train[::24]
options = {"layer": 4, "shift": "last_prompt", "shard_size": 5, "progress": False}
written = scale.collect(contrasts, model=scale.ModelSpec("tutor"), out=out, **options)
print(os.environ["RANK"], *written, flush=True)
print("read", len(scale.read(out, wait=120)), flush=True)
"""


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Start the script in two processes with torchrun."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script, tmp_path / "run"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    yield lambda marker: subprocess.run(
        [*command, marker], env=env, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives_and_one_that_was_killed_loses_nothing(
    whole: Activations, tmp_path: Path, launched: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    out = tmp_path / "run"
    killed = launched(tmp_path / "marker")
    assert killed.returncode != 0 and "read" not in killed.stdout
    kept = stamps(out)
    names = {name[:11] for name in kept}
    assert "shard-00001" in names and "shard-00003" not in names
    with pytest.raises(DataError, match=r"no shard .*3"):
        scale.read(out)
    done = launched(tmp_path / "marker")
    assert done.returncode == 0, done.stderr
    told = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line[:1] in "01"}
    missing = {str(number) for number in range(9)} - {str(int(name[6:])) for name in names if name[:5] == "shard"}
    assert "3" in missing and set(told["0"] + told["1"]) == missing
    assert done.stdout.count("read 45") == 2
    assert {name: stamp for name, stamp in stamps(out).items() if name in kept} == kept
    require_same(scale.read(out), whole)
    assert read_manifest(out, "activations").manifest["shards"] == 9

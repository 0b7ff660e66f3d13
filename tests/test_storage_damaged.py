"""Files that can be trusted: whatever is done to one, loading it ends in one of our errors or in an equal value."""

import contextlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsteer_lens import FineSteer, LogisticGate, Schedule, SubspaceAblation, Window, chain, load, save
from fsteer_lens.errors import FileFormatError, FsteerError
from fsteer_lens.ground.sealed import MAX_HEADER
from fsteer_lens.hooks import HookObject
from fsteer_lens.reading.fingerprints import Fingerprint
from fsteer_lens.steering import MeanShift
from fsteer_lens.steering.steering import Steering
from fsteer_lens.steering.storage import FORMAT
from tests import made_up, sealed_files
from tests.compare import same

WIDTH = 6
MUTANTS = 400


def mark() -> Fingerprint:
    return Fingerprint(
        "Made", 4, WIDTH, 50, "hook_resid_post", "none", {1: (0.5, -1.0)}, "HookedTransformer", False, "torch.float32"
    )


def everything() -> HookObject:
    """A chain that has every kind of value in it."""
    space = made_up.subspace(0, WIDTH, 3)
    gate = LogisticGate(space, 2, torch.ones(3), -torch.ones(3)) & ~made_up.shut_at(space)
    by = FineSteer(
        {1: made_up.experts(0, WIDTH), 2: made_up.experts(1, WIDTH)},
        {1: gate},
        gate_layer=1,
        scope=Window(1, 3),
        schedule=Schedule((1.0, 0.5)),
        fingerprint=mark(),
    )
    mean = MeanShift(torch.ones(WIDTH), layer=2, scope="all", refresh="step", fingerprint=mark())
    return chain(by, mean, SubspaceAblation(space, layer=0, rank=1, fingerprint=mark()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[HookObject, bytes]:
    """What is saved, and the bytes of its file."""
    path = tmp_path_factory.mktemp("saved") / "whole"
    value = everything()
    save(value, path)
    assert same(load(path), value), "the file as it was saved comes back whole"
    return value, path.read_bytes()


parts, assembled = (partial(of, name=FORMAT.name) for of in (sealed_files.parts, sealed_files.assembled))


def attempt(path: Path, content: bytes) -> Any:
    """What loading these bytes gives: a value, or one of our errors; anything else fails the test."""
    path.write_bytes(content)
    try:
        return load(path)
    except FsteerError as error:
        assert "expected" in str(error) or "got" in str(error)
        return error


def test_the_checksum_of_these_tests_is_the_files_own(saved: tuple[HookObject, bytes], tmp_path: Path) -> None:
    """Without this control all that is sealed again here could be refused for its seal alone."""
    value, whole = saved
    index, own, data = parts(whole)
    assert same(attempt(tmp_path / "again", assembled(index, own, data)), value)
    assert isinstance(
        attempt(tmp_path / "unsealed", assembled(index, {**own, "sha256": "0"}, data, sealed=False)), FileFormatError
    )
    place = ("fields", "hooks", "tuple", 1, "fields", "strength")
    changed = {**own, "tree": replaced(own["tree"], place, 2.5)}
    assert attempt(tmp_path / "other", assembled(index, changed, data)).links[1].strength == 2.5


bytes_changed = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("insert"), st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
    st.tuples(st.just("swap"), st.floats(0, 1, exclude_max=True), st.integers(1, 64)),
    st.tuples(st.just("header length"), st.just(0.0), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("append"), st.just(0.0), st.integers(1, 300)),
)


@settings(max_examples=MUTANTS)
@given(changes=st.lists(bytes_changed, min_size=1, max_size=4))
def test_changed_bytes(
    saved: tuple[HookObject, bytes], tmp_path_factory: Any, changes: list[tuple[str, float, int]]
) -> None:
    value, whole = saved
    content = bytearray(whole)
    for kind, place, number in changes:
        at = int(place * len(content))
        if kind == "flip" and content:
            content[at] ^= number
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content.insert(at, number)
        elif kind == "swap":
            content[at : at + number] = content[at : at + number][::-1]
        elif kind == "header length":
            content[:8] = struct.pack("<Q", number)
        else:
            content += bytes(number)
    found = attempt(tmp_path_factory.getbasetemp() / "bytes", bytes(content))
    assert isinstance(found, FileFormatError) or same(found, value)


keys = st.sampled_from(["class", "fields", "tensor", "tuple", "map"])
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 99),
    st.floats(allow_nan=True),
    st.sampled_from(["", "all", "x" * 50, "steering"]),
)
json_values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place within a JSON tree."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, item in inside for place in places(item, (*path, key)))]


def replaced(tree: Any, place: tuple[Any, ...], item: Any) -> Any:
    """A JSON tree with another item at one place."""
    if not place:
        return item
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[place[0]] = replaced(tree[place[0]], place[1:], item)
    return copy


def use(value: HookObject) -> None:
    """Do with a loaded value what a user would, up to putting it on a model."""
    repr(value)
    h = torch.randn(3, value.d_model)
    for link in value.links:
        if isinstance(link, Steering):
            for layer in link.hooked_layers:
                link.decide(layer, h)
            link.with_strength(2.0)
        with contextlib.suppress(FsteerError):
            link.fingerprint.require_match(mark())  # type: ignore[union-attr]


@settings(max_examples=MUTANTS)
@given(where=st.floats(0, 1, exclude_max=True), item=json_values)
def test_changed_metadata_under_a_checksum_that_fits(
    saved: tuple[HookObject, bytes], tmp_path_factory: Any, where: float, item: Any
) -> None:
    """A file that somebody sealed again is refused, or is a valid steering, if another one."""
    index, own, data = parts(saved[1])
    every = places(own["tree"])
    tree = replaced(own["tree"], every[int(where * len(every))], item)
    found = attempt(tmp_path_factory.getbasetemp() / "sealed", assembled(index, {**own, "tree": tree}, data))
    if isinstance(found, HookObject):
        try:
            use(found)
        except FsteerError:
            pass
    else:
        assert isinstance(found, FileFormatError)


@settings(max_examples=MUTANTS // 2)
@given(
    name=st.floats(0, 1, exclude_max=True),
    change=st.sampled_from(["shape", "dtype", "offsets", "name", "drop", "nan", "inf"]),
    numbers=st.lists(st.sampled_from([0, 1, 2, 5, 6, 7, 36, 2**31, 2**62]), min_size=1, max_size=3),
)
def test_changed_tensors_under_a_checksum_that_fits(
    saved: tuple[HookObject, bytes], tmp_path_factory: Any, name: float, change: str, numbers: list[int]
) -> None:
    index, own, data = parts(saved[1])
    chosen = sorted(index)[int(name * len(index))]
    entry = dict(index[chosen])
    if change == "shape":
        entry["shape"] = numbers
    elif change == "dtype":
        entry["dtype"] = ["I64", "F16", "BOOL"][numbers[0] % 3]
    elif change == "offsets":
        entry["data_offsets"] = [numbers[0], numbers[-1]]
    elif change in ("nan", "inf"):
        start, end = entry["data_offsets"]
        spoiled = struct.pack("<f", float(change)) * ((end - start) // 4)
        data = data[:start] + spoiled + data[end:]
    changed = {other: index[other] for other in index if other != chosen}
    if change != "drop":
        changed["another" if change == "name" else chosen] = entry
    found = attempt(tmp_path_factory.getbasetemp() / "tensors", assembled(changed, own, data))
    if isinstance(found, HookObject):
        use(found)
        assert change not in ("nan", "inf", "drop", "name")


def of(change: Callable[[dict[str, Any], dict[str, Any], bytes], tuple[Any, Any, bytes]]) -> Callable[[bytes], bytes]:
    return lambda content: assembled(*change(*parts(content)))


def with_tree(**fields: Any) -> Callable[[bytes], bytes]:
    """The first link of the chain with other fields."""

    def change(index: Any, own: Any, data: bytes) -> tuple[Any, Any, bytes]:
        place = ("fields", "hooks", "tuple", 0, "fields")
        for name, item in fields.items():
            own = {**own, "tree": replaced(own["tree"], (*place, name), item)}
        return index, own, data

    return of(change)


class Evil:
    """A pickle of it makes a file when it is read."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched-by-a-pickle"),))


BAD: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda content: b"",
    "a pickle": lambda content: pickle.dumps(Evil()) + bytes(100),
    "a pickle of torch": lambda content: b"PK\x03\x04" + pickle.dumps(Evil()) + bytes(100),
    "wrong magic": lambda content: content.replace(b'"fsteer_lens"', b'"fsteer_lans"'),
    "truncated": lambda content: content[:-20],
    "a header longer than the file": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "an absurdly long header": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "an oversized header": lambda content: struct.pack("<Q", MAX_HEADER + 1) + b" " * MAX_HEADER + b"{}",
    "a full header": lambda content: struct.pack("<Q", MAX_HEADER) + b'{"__metadata__":[' + b"0," * (MAX_HEADER // 2),
    "a header of brackets": lambda content: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "nested brackets within": of(lambda i, o, d: (i, {**o, "tree": json.loads("[" * 400 + "]" * 400)}, d)),
    "a future version": of(lambda i, o, d: (i, {**o, "version": 2}, d)),
    "a version that is none": of(lambda i, o, d: (i, {**o, "version": "1"}, d)),
    "a future fingerprint": with_tree(fingerprint={"class": "Fingerprint", "fields": {"schema": 9}}),
    "an unknown class": with_tree(experts={"class": "os.system", "fields": {}}),
    "a class that is none of ours": with_tree(experts={"class": "Path", "fields": {}}),
    "a NaN in the metadata": with_tree(strength=float("nan")),
    "a schedule that is none": with_tree(schedule="fast"),
    "a schedule of words": with_tree(schedule={"class": "Schedule", "fields": {"factors": {"tuple": ["x"]}}}),
    "a gate that is none": with_tree(gate={"map": [[1, "open"]]}),
    "experts that are none": with_tree(experts={"map": [[1, 5]]}),
    "an absurd layer": with_tree(gate_layer=10**30),
    "a strength beyond all bounds": with_tree(strength=10**400),
    "a fingerprint without values": with_tree(fingerprint={"class": "Fingerprint", "fields": {"probe": 5}}),
    "no fingerprint": with_tree(fingerprint=None),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused(
    saved: tuple[HookObject, bytes], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(attempt(tmp_path / "bad", BAD[name](saved[1])), FileFormatError)
    assert [item.name for item in tmp_path.iterdir()] == ["bad"], "no code of the file's was run"


MEASURE = """
import os, resource, sys
import torch, safetensors.torch, hashlib, json
from fsteer_lens import load
from fsteer_lens.errors import FsteerError
load(sys.argv[1])
for path in sys.stdin:  # a process for every file, since a peak never falls; forked, since imports take longest
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load(path.rstrip())
        outcome = "loaded"
    except FsteerError:
        outcome = "refused"
    print(outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def measuring(
    saved: tuple[HookObject, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Path], list[str]]]:
    """What comes of loading a file, and by how many KiB it raises the peak of a process that has loaded a small one."""
    small = tmp_path_factory.mktemp("small") / "small"
    small.write_bytes(saved[1])
    command = [sys.executable, "-c", MEASURE, str(small)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        pipes = process.stdin, process.stdout

        def measured(path: Path) -> list[str]:
            assert pipes[0] is not None and pipes[1] is not None
            print(path, file=pipes[0], flush=True)
            return pipes[1].readline().split()

        yield measured


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process in Linux's units")
@pytest.mark.parametrize("what", ["whole", "damaged", "0", "[]", "{}", '""'])
def test_memory_stays_within_twice_the_file(
    saved: tuple[HookObject, bytes], measuring: Callable[[Path], list[str]], tmp_path: Path, what: str
) -> None:
    path = tmp_path / "large"
    if what in ("whole", "damaged"):
        save(FineSteer(made_up.experts(0, 2600), layer=1, fingerprint=mark()), path)
        if what == "damaged":
            with path.open("r+b") as file:
                file.seek(-8, os.SEEK_END)
                file.write(b"\x01" * 8)
    else:  # as much of what takes most memory as a header may hold
        index, own, data = parts(saved[1])
        text = json.dumps({**own, "tree": None})[:-1] + f', "tree": [{",".join([what] * (MAX_HEADER // 8))}]}}'
        header = json.dumps({**index, "__metadata__": {FORMAT.name: text}}).encode()
        assert len(header) < MAX_HEADER
        path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    outcome, grown = measuring(path)
    assert outcome == ("loaded" if what == "whole" else "refused")
    assert what != "whole" or int(grown) * 1024 >= path.stat().st_size, "what was loaded must show"
    spare = 16 * 2**20  # what a process takes now and then, whatever it does
    assert int(grown) * 1024 <= 2 * path.stat().st_size + spare, f"{int(grown) // 1024} MiB more than before"


SAVE_AGAIN_AND_AGAIN = """
import os, sys
from fsteer_lens import load, save
by = load(sys.argv[1])
for _ in sys.stdin:  # a process for every line; forked, since importing all this takes longest
    if child := os.fork():
        os.waitpid(child, 0)
        print("killed", flush=True)
        continue
    while True:
        for strength in (2.0, 3.0):
            save(by.with_strength(strength), sys.argv[1])
            print("saved by", os.getpid(), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks and kills a process")
def test_a_killed_save_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "steer.safetensors"
    save(FineSteer(made_up.experts(0, 900), layer=1, fingerprint=mark()), path)
    command = [sys.executable, "-c", SAVE_AGAIN_AND_AGAIN, str(path)]

    def half_written() -> list[Path]:
        return [item for item in tmp_path.iterdir() if item != path]

    in_the_middle = 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forking:
        assert forking.stdin is not None and forking.stdout is not None
        for number in range(60):  # on a busy machine a kill may come after the save that it was meant for
            for item in half_written():
                item.unlink()
            forking.stdin.write("save\n")
            forking.stdin.flush()
            told = forking.stdout.readline()
            assert told.startswith("saved by ")
            time.sleep(0.002 * (number % 20))
            until = time.monotonic() + 5
            while number % 2 and not half_written() and time.monotonic() < until:
                pass
            os.kill(int(told.split()[-1]), signal.SIGKILL)
            assert "killed\n" in iter(forking.stdout.readline, "")
            assert load(path).strength in (2.0, 3.0)
            in_the_middle += bool(half_written())
            if in_the_middle and number >= 3:
                break
        forking.stdin.close()
    assert in_the_middle, "no kill came in the middle of a save"

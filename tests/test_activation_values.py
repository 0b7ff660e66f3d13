"""Activations as data: rows are chosen, put together and kept in files that are trusted as little as a steering's."""

import struct
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsteer_lens import Activations, collect, collect_queries, fit, load, save, tutor
from fsteer_lens.errors import DataError, FileFormatError, InputError, MismatchError, NonFiniteError, ShapeError
from fsteer_lens.ground.sealed import MAX_VALUES
from fsteer_lens.models import SteerableModel
from fsteer_lens.reading.fingerprints import Fingerprint
from fsteer_lens.reading.stored import FORMAT
from fsteer_lens.steering import fit_mean_shift
from tests import sealed_files
from tests.compare import same

D, N = 6, 8
LABELS = ("a", None, "ä 🙂", "", "a", "x\ny", None, "b")


def mark(tokenizer: str = "none", layer: int = 1) -> Fingerprint:
    probe = {layer: tuple(float(layer + number) for number in range(4))}
    return Fingerprint(
        "Made", 4, D, 50, "hook_resid_post", tokenizer, probe, "HookedTransformer", False, "torch.float32"
    )


def made(seed: int = 0, n: int = N, **changes: Any) -> Activations:
    h, shifts = torch.randn(2, n, D, generator=torch.Generator().manual_seed(seed))
    labels = (LABELS * n)[:n]
    whole = Activations(h, shifts, labels, labels[::-1], 1, "hook_resid_post", "last_prompt", mark())
    return replace(whole, **changes)


def rows_of(activations: Activations) -> list[tuple[Any, ...]]:
    """Every row with all that stands beside it."""
    shifts = [None] * len(activations) if activations.shifts is None else activations.shifts.tolist()
    return list(zip(activations.queries.tolist(), shifts, activations.labels, activations.groups, strict=True))


# ----------------------------------------------------------------------------------------------------------- the value


def test_what_is_left_out_has_its_default() -> None:
    bare = Activations(torch.ones(2, 3), layer=4)
    assert (bare.labels, bare.groups, bare.site) == ((None, None), (None, None), "hook_resid_post")
    assert bare.shifts is None and bare.shift is None and bare.fingerprint is None and len(bare) == 2


def test_tensors_are_contiguous_and_not_changed() -> None:
    wide = torch.randn(4, 2 * D)
    own = Activations(wide[:, ::2], wide[:, 1::2], layer=0)
    assert own.queries.is_contiguous() and own.shifts is not None and own.shifts.is_contiguous()
    assert torch.equal(own.queries, wide[:, ::2]) and torch.equal(own.shifts, wide[:, 1::2])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"queries": torch.full((N, D), torch.nan)}, NonFiniteError, "activations queries"),
        ({"labels": ("a",)}, DataError, f"labels: expected one for each of {N} rows, got 1"),
        ({"groups": ("a",) * (N + 1)}, DataError, f"groups: expected one for each of {N} rows, got {N + 1}"),
        ({"labels": ("a\0",) * N}, InputError, "labels: expected text"),
        ({"layer": -1}, InputError, "layer: expected an int >= 0, got -1"),
        ({"site": "hook_resid_mid"}, InputError, "site: expected 'hook_resid_pre' or"),
    ],
)
def test_what_makes_no_activations_is_refused(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        made(**changes)
    with pytest.raises(ShapeError, match="at least one row"):
        Activations(torch.ones(0, D), layer=1)


# ---------------------------------------------------------------------------------------------------------------- rows

CHOICES: dict[str, tuple[Any, list[int]]] = {
    "first": (slice(3), [0, 1, 2]),
    "from": (slice(5, None), [5, 6, 7]),
    "backwards": (slice(None, None, -3), [7, 4, 1]),
    "beyond": (slice(6, 99), [6, 7]),
    "numpy slice": (slice(np.int64(1), np.int64(3)), [1, 2]),
    "list": ([2, 0, 2], [2, 0, 2]),
    "negative": ([-1, -N], [7, 0]),
    "range": (range(0, 8, 4), [0, 4]),
    "array": (np.array([3, 1]), [3, 1]),
    "tensor": (torch.tensor([3, 1]), [3, 1]),
    "generator": (iter([5]), [5]),
    "mask": ([True, False] * 4, [0, 2, 4, 6]),
    "mask of numpy": (np.arange(N) > 5, [6, 7]),
    "mask of torch": (torch.arange(N) == 3, [3]),
    "list of numpy bools": (list(np.arange(N) < 1), [0]),
}


@pytest.mark.parametrize("name", CHOICES)
def test_rows_are_chosen_with_all_that_stands_beside_them(name: str) -> None:
    own, (rows, numbers) = made(), CHOICES[name]
    chosen = own[rows]
    assert rows_of(chosen) == [rows_of(own)[number] for number in numbers]
    for item in fields(Activations):
        if item.name not in ("queries", "shifts", "labels", "groups"):
            assert getattr(chosen, item.name) == getattr(own, item.name)
    assert chosen.queries.is_contiguous() and chosen.shifts is not None and chosen.shifts.is_contiguous()
    chosen.queries.zero_()
    assert rows_of(own) == rows_of(made()), "the rows are copies"
    assert made(shifts=None, shift=None)[rows if name != "generator" else [5]].shifts is None


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        (3, InputError, r"rows: expected a slice, row numbers or a mask, got 3\. For one row, activations\[3:4\]"),
        (torch.tensor(3), InputError, "rows: expected a slice"),
        ("3", InputError, "rows: expected a slice"),
        (None, InputError, "rows: expected a slice"),
        ([N], InputError, rf"row: expected an int in -{N}\.\.{N - 1}, got {N}"),
        ([-N - 1], InputError, "row: expected an int in"),
        ([1.0], InputError, "row: expected an int in"),
        (torch.ones(N), InputError, "row: expected an int in"),
        ([True, 1], InputError, "row: expected an int in"),
        ([True] * (N - 1), InputError, f"mask: expected {N} of True and False, one for each row, got {N - 1}"),
        (torch.ones(N, D, dtype=torch.bool), InputError, r"got an array of shape \[8, 6\]"),
        ((slice(2), 1), InputError, "row: expected an int in"),
        (slice(0.5), InputError, "rows: expected a slice of ints"),
        (slice(0, 3, 0), InputError, "rows: expected a slice of ints"),
        ({1, 2}, InputError, "a set, which has no order"),
        ([], DataError, r"rows: expected at least one, got none\. Did a filter"),
        (slice(0), DataError, "rows: expected at least one"),
        ([False] * N, DataError, "rows: expected at least one"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_rows_that_are_none_are_refused(rows: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        made()[rows]


@given(numbers=st.lists(st.integers(-N, N - 1), min_size=1, max_size=12))
def test_rows_are_those_that_pytorch_takes(numbers: list[int]) -> None:
    own = made()
    assert torch.equal(own[numbers].queries, own.queries[numbers])


def test_iterating_over_rows_one_by_one_is_refused_and_not_endless() -> None:
    with pytest.raises(InputError, match="For one row"):
        list(made())  # type: ignore[call-overload]


# ------------------------------------------------------------------------------------------------------------- together


def test_a_sum_is_the_rows_of_both() -> None:
    one, other = made(0), made(1, 3)
    both = one + other
    assert rows_of(both) == rows_of(one) + rows_of(other) and len(both) == N + 3
    assert rows_of(one[:3] + one[3:]) == rows_of(one)
    assert both.fingerprint == one.fingerprint and both.queries.is_contiguous()
    bare = made(shifts=None, shift=None, fingerprint=None)
    assert (bare + bare).shifts is None and (bare + bare).fingerprint is None
    both.queries.zero_()
    assert rows_of(one) == rows_of(made(0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": 2, "fingerprint": mark(layer=2)}, "layer: 1 and 2"),
        ({"site": "hook_resid_pre"}, "site: hook_resid_post and hook_resid_pre"),
        ({"shift": "response_mean"}, "shift: last_prompt and response_mean"),
        ({"shifts": None}, "rows: with shifts and without shifts"),
        ({"queries": torch.ones(N, D + 1), "shifts": torch.ones(N, D + 1)}, "width: 6 and 7"),
        ({"layer": 2, "site": "hook_resid_pre"}, "layer: 1 and 2; site: hook_resid_post and"),
        ({"fingerprint": mark("another")}, "tokenizer"),
        ({"fingerprint": None}, "of some the model is not known"),
    ],
)
def test_what_does_not_go_together_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        made() + made(1, **changes)
    with pytest.raises(MismatchError):
        made(1, **changes) + made()


def test_a_number_is_not_added() -> None:
    with pytest.raises(TypeError):
        made() + 3  # type: ignore[operator]


def test_parts_that_were_read_apart_are_what_is_read_at_once(tutor_model: SteerableModel) -> None:
    train, read = tutor.data("safe").train[:20], {"layer": 3, "shift": "last_prompt", "progress": False}
    whole = collect(tutor_model, train, **read)
    parts = collect(tutor_model, train[:7], **read) + collect(tutor_model, train[7:], **read)
    torch.testing.assert_close(parts.queries, whole.queries, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts.shifts, whole.shifts, atol=1e-4, rtol=1e-4)
    assert (parts.labels, parts.groups) == (whole.labels, whole.groups)
    with pytest.raises(MismatchError, match="layer: 3 and 2; shift: last_prompt and None"):
        parts + collect_queries(tutor_model, train.prompts, layer=2, progress=False)


def test_a_fit_fold_by_fold_needs_rows_alone(trained: dict[int, Activations]) -> None:
    own = trained[4]
    held = torch.arange(len(own)) % 3 == 0
    steering = fit_mean_shift(own[~held])
    assert own.shifts is not None
    assert torch.equal(steering.vector, own.shifts[~held].mean(dim=0))
    assert steering.fingerprint == own.fingerprint


# -------------------------------------------------------------------------------------------- made by hand, of no model


def test_a_fit_of_activations_without_a_model_asks_for_it_when_it_is_saved(
    trained: dict[int, Activations], tutor_model: SteerableModel, tmp_path: Path
) -> None:
    own = trained[4]
    by_hand = Activations(own.queries, own.shifts, layer=4, shift="last_prompt")
    steering = fit(by_hand, rank=4, preset="0.1", epochs=2, n_experts=2)
    assert steering.fingerprint is None and fit_mean_shift(by_hand).fingerprint is None
    path = tmp_path / "s.safetensors"
    with pytest.raises(
        InputError, match=r"does not know its model: expected model=.*save\(steering, path, model=model\)"
    ):
        save(steering, path)
    assert not path.exists()
    save(steering, path, model=tutor_model)
    assert load(path, model=tutor_model).fingerprint.d_model == 128
    two = fit(
        {layer: replace(trained[layer], fingerprint=None) for layer in (2, 4)},
        rank=4,
        preset="0.1",
        epochs=2,
        n_experts=2,
    )
    assert two.fingerprint is None


def test_known_and_unknown_models_are_not_mixed(trained: dict[int, Activations]) -> None:
    own = trained[4]
    unknown = replace(own, fingerprint=None)
    quick: dict[str, Any] = {"rank": 4, "preset": "0.1", "epochs": 2, "n_experts": 2}
    for call in (
        lambda: fit({2: trained[2], 4: unknown}, **quick),
        lambda: fit(own, general=replace(unknown, shifts=None, shift=None), gate="logistic", **quick),
    ):
        with pytest.raises(MismatchError, match=r"of some the model is not known: .*fingerprint="):
            call()
    others = replace(unknown, queries=-own.queries)
    assert fit(unknown, general=others, gate="logistic", **quick).fingerprint is None


# --------------------------------------------------------------------------------------------------------------- files

KINDS: dict[str, Callable[[], Activations]] = {
    "whole": made,
    "queries alone": lambda: made(shifts=None, shift=None),
    "without a model": lambda: made(fingerprint=None),
    "without labels": lambda: made(labels=(None,) * N, groups=(None,) * N),
    "half precision": lambda: made().to(dtype=torch.float16),
    "one row": lambda: made(n=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back(kind: str, tmp_path: Path) -> None:
    path, own = tmp_path / "a.safetensors", KINDS[kind]()
    own.save(path)
    found = Activations.load(path)
    assert same(found, own) and rows_of(found) == rows_of(own) and found.queries.dtype == own.queries.dtype
    assert found.fingerprint == own.fingerprint and repr(found) == repr(own)
    found.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_more_labels_than_a_header_holds_come_back(tmp_path: Path) -> None:
    n = MAX_VALUES + 10
    labels = tuple(None if number % 3 == 0 else f"label {number}" for number in range(n))
    own = Activations(torch.ones(n, 1), labels=labels, groups=labels[::-1], layer=0)
    own.save(tmp_path / "a")
    found = Activations.load(tmp_path / "a")
    assert (found.labels, found.groups) == (labels, labels[::-1])


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    made().save(path)
    before = path.read_bytes()

    def full_disk(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(InputError, match="no space"):
        made(1).save(path)
    assert path.read_bytes() == before and [item.name for item in tmp_path.iterdir()] == ["a"]
    with pytest.raises(InputError, match="existing folder"):
        made().save(tmp_path / "nowhere" / "a")


def test_files_of_the_other_kind_say_what_reads_them(steering: Any, tmp_path: Path) -> None:
    made().save(tmp_path / "a")
    save(steering, tmp_path / "s")
    with pytest.raises(FileFormatError, match=r"expected a steering, .*Activations\.load"):
        load(tmp_path / "a")
    with pytest.raises(FileFormatError, match=r"expected activations, .*fsteer_lens\.load"):
        Activations.load(tmp_path / "s")
    with pytest.raises(FileFormatError, match=r"written by Activations\.save, got no such file"):
        Activations.load(tmp_path / "missing")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a"
    made().save(path)
    return path.read_bytes()


parts, assembled = (partial(of, name=FORMAT.name) for of in (sealed_files.parts, sealed_files.assembled))


def attempt(path: Path, content: bytes) -> Any:
    """What loading these bytes gives: activations, or our error; anything else fails the test."""
    path.write_bytes(content)
    try:
        return Activations.load(path)
    except FileFormatError as error:
        return error


def test_the_checksum_of_these_tests_is_the_files_own(whole: bytes, tmp_path: Path) -> None:
    index, own, data = parts(whole)
    assert same(attempt(tmp_path / "again", assembled(index, own, data)), made())


@settings(max_examples=200)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(1, 255), cut=st.booleans())
def test_changed_bytes(whole: bytes, tmp_path_factory: Any, place: float, bit: int, cut: bool) -> None:
    content, at = bytearray(whole), int(place * len(whole))
    if cut:
        del content[at:]
    else:
        content[at] ^= bit
    found = attempt(tmp_path_factory.getbasetemp() / "bytes", bytes(content))
    assert isinstance(found, FileFormatError) or same(found, made())


def with_field(name: str, value: Any) -> Callable[[bytes], bytes]:
    """The file with another field, under a checksum that fits."""

    def change(content: bytes) -> bytes:
        index, own, data = parts(content)
        pairs = [pair for pair in own["tree"]["map"] if pair[0] != name]
        return assembled(index, {**own, "tree": {"map": [*pairs, [name, value]]}}, data)

    return change


def with_lengths(change: Callable[[np.ndarray], Any]) -> Callable[[bytes], bytes]:
    """The file whose labels say that they have other lengths."""

    def changed(content: bytes) -> bytes:
        index, own, data = parts(content)
        start, end = index["activations.labels.lengths"]["data_offsets"]
        lengths = np.frombuffer(data[start:end], "<i8").copy()
        change(lengths)
        return assembled(index, own, data[:start] + lengths.tobytes() + data[end:])

    return changed


def with_nan(content: bytes) -> bytes:
    index, own, data = parts(content)
    start, _ = index["activations.queries"]["data_offsets"]
    return assembled(index, own, data[:start] + struct.pack("<f", float("nan")) + data[start + 4 :])


def of_version(version: Any) -> Callable[[bytes], bytes]:
    return lambda content: assembled(*(lambda i, o, d: (i, {**o, "version": version}, d))(*parts(content)))


BAD: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda content: b"",
    "text": lambda content: b"hello, I am a text file that is long enough to have a header",
    "pickle": lambda content: b"\x80\x04\x95\x10" + bytes(60),
    "truncated": lambda content: content[:-9],
    "a huge header": lambda content: (2**60).to_bytes(8, "little") + content[8:],
    "a future version": of_version(2),
    "a version that is none": of_version("1"),
    "a field of a future version": with_field("colour", "red"),
    "no queries": with_field("queries", None),
    "a tensor that is not there": with_field("queries", {"tensor": "elsewhere"}),
    "a class that is none of ours": with_field("fingerprint", {"class": "Path", "fields": {}}),
    "a gate": with_field("fingerprint", {"class": "EnergyGate", "fields": {}}),
    "a fingerprint that is none": with_field("fingerprint", "mine"),
    "labels that are a text": with_field("labels", "aaaaaaaa"),
    "labels in the header": with_field("labels", {"tuple": ["a"] * N}),
    "an absurd layer": with_field("layer", -3),
    "a site that is none": with_field("site", "hook_mlp_out"),
    "a shift that is none": with_field("shift", "sideways"),
    "NaN among the queries": with_nan,
    "labels longer than their bytes": with_lengths(lambda lengths: lengths.__setitem__(0, 2**40)),
    "labels shorter than their bytes": with_lengths(lambda lengths: lengths.__setitem__(0, 0)),
    "labels cut within a letter": with_lengths(lambda lengths: lengths.__setitem__(slice(0, 3), [2, -1, 7])),
    "negative lengths": with_lengths(lambda lengths: lengths.__setitem__(1, -2)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused(whole: bytes, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = attempt(tmp_path / "bad", BAD[name](whole))
    assert isinstance(found, FileFormatError) and ("got" in str(found) or "expected" in str(found))
    assert [item.name for item in tmp_path.iterdir()] == ["bad"]

"""Files: what is saved comes back, and nothing else is believed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsteer_lens import Activations, FineSteer, Schedule, fit, fit_gate, generate, load, save
from fsteer_lens.errors import FileFormatError, InputError, MismatchError
from fsteer_lens.models import SteerableModel
from fsteer_lens.steering import fit_mean_shift
from tests.compare import same
from tests.running import LAYER

DATA = Path(__file__).parent / "data"


def test_a_steering_comes_back_whole(
    hooked: SteerableModel, bridge: SteerableModel, steering: FineSteer, prompts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "steer.safetensors"
    kept = replace(steering.without_expert(1).without_residual(), schedule=Schedule((1.0, 0.5)), strength=1.25)
    save(kept, path)
    found = load(path, model=bridge)
    assert isinstance(found, FineSteer)
    assert repr(found) == repr(kept) and found.fingerprint == kept.fingerprint
    assert (found.scope, found.schedule, found.shift) == (kept.scope, kept.schedule, kept.shift)
    assert found.shift_lengths == kept.shift_lengths and list(found.shift_lengths or ()) == [LAYER]
    assert same(found.experts_at(LAYER).report, kept.experts_at(LAYER).report)
    h = torch.randn(6, 128)
    assert torch.equal(found.experts_at(LAYER).vector(h), kept.experts_at(LAYER).vector(h))
    gates = [one.gate_at(LAYER) for one in (found, kept)]
    assert gates[0] is not None and gates[1] is not None
    for rank in (1, 8, 20):
        assert torch.equal(gates[0].at_rank(rank).gate(h), gates[1].at_rank(rank).gate(h))
    one, other = (generate(hooked, prompts, steer, max_new_tokens=8, progress=False) for steer in (found, kept))
    assert [item.tokens for item in one] == [item.tokens for item in other]


def test_baselines_layers_and_composed_gates_come_back(
    trained: dict[int, Activations], steering: FineSteer, tmp_path: Path
) -> None:
    own = trained[4]
    general = torch.randn(40, 128)
    logistic = fit_gate(own.queries, rank=4, kind="logistic", general=general)
    energy = fit_gate(own.queries, rank=4, kind="energy")
    composed = (steering.gate_at(LAYER) & ~logistic) | energy  # type: ignore[operator]
    several = fit({2: trained[2], 4: own}, preset="0.1", epochs=2, gate_layer=2)
    h = torch.randn(5, 128)
    for name, one in (("mean", fit_mean_shift(own, gate=composed)), ("layers", several)):
        save(one, tmp_path / name)
        found = load(tmp_path / name)
        assert type(found) is type(one) and repr(found) == repr(one)
        for layer in one.layers:
            expected, got = one.decide(layer, h), found.decide(layer, h)
            assert torch.equal(expected.gate, got.gate) and torch.equal(expected.vector, got.vector)


def test_a_file_of_version_0_1_loads_and_decides_the_same() -> None:
    """A chain of every class that 0.1 could save, written when the core was flat, and what it decided there."""
    whole = load(DATA / "chain_0_1.safetensors")
    decided = load_file(DATA / "chain_0_1_decisions.safetensors")
    assert [type(link).__name__ for link in whole.links] == [
        *("FineSteer", "FineSteer", "MeanShift", "PcaDirection", "NullSpaceSteering", "NearestCentroid"),
        *("SubspaceProbe", "ExpertProbe", "SubspaceAblation"),
    ]
    for number, link in enumerate(whole.links[:6]):
        for layer in link.layers:
            found = link.decide(layer, decided["h"])
            for name in ("gate", "vector"):
                assert torch.allclose(getattr(found, name), decided[f"{number}.{layer}.{name}"], atol=1e-6)


def test_another_model_is_refused_and_named(stories: SteerableModel, steering: FineSteer, tmp_path: Path) -> None:
    path = tmp_path / "steer.safetensors"
    save(steering, path)
    with pytest.raises(Exception, match="d_model") as caught:
        load(path, model=stories)
    assert "fsteer_lens" in type(caught.value).__module__
    with pytest.raises(MismatchError, match="d_model: fitted on 128, here 64"):
        save(steering, path, model=stories)


def test_a_steering_without_fingerprint_needs_its_model(
    tutor_model: SteerableModel, steering: FineSteer, tmp_path: Path
) -> None:
    path = tmp_path / "steer.safetensors"
    bare = replace(steering, fingerprint=None)
    with pytest.raises(InputError, match="model="):
        save(bare, path)
    assert not path.exists()
    save(bare, path, model=tutor_model)
    assert load(path, model=tutor_model).fingerprint is not None


def test_what_is_no_file_of_ours_is_refused(steering: FineSteer, tmp_path: Path) -> None:
    good = tmp_path / "good"
    save(steering, good)
    data = good.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])

    own = json.loads(header["__metadata__"]["fsteer_lens"])

    def with_header(**changes: object) -> bytes:
        text = json.dumps({**header, "__metadata__": {"fsteer_lens": json.dumps({**own, **changes})}}).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    flipped = bytearray(data)
    flipped[-5] ^= 1
    bad = {
        "truncated": data[: len(data) // 2],
        "a few bytes": data[:5],
        "empty": b"",
        "text": b"hello, I am a text file that is long enough to have a header",
        "pickle": b"\x80\x04\x95\x10" + bytes(60),
        "huge header": (2**60).to_bytes(8, "little") + data[8:],
        "flipped bit": bytes(flipped),
        "newer": with_header(version=99),
        "another tree": with_header(tree={"class": "FineSteer", "fields": {}}),
        "no checksum": with_header(sha256=None),
    }
    for name, content in bad.items():
        path = tmp_path / "bad"
        path.write_bytes(content)
        with pytest.raises(FileFormatError) as caught:
            load(path)
        assert "bad" in str(caught.value), name
    with pytest.raises(FileFormatError, match="no such file"):
        load(tmp_path / "missing")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(2)}, foreign)
    with pytest.raises(FileFormatError, match="another program"):
        load(foreign)


def test_saving_never_leaves_half_a_file(steering: FineSteer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "steer.safetensors"
    save(steering, path)
    before = path.read_bytes()

    def full_disk(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="no space"):
        save(steering.with_strength(3.0), path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    with pytest.raises(InputError, match="existing folder"):
        save(steering, tmp_path / "nowhere" / "x")


def test_the_file_holds_tensors_and_json_only(steering: FineSteer, tmp_path: Path) -> None:
    path = tmp_path / "steer.safetensors"
    save(steering, path)
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.int64}
    save(steering, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()

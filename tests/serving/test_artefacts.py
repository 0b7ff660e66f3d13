"""What a folder of steerings holds, what a request may ask of it, and which blocks it may share."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fsteer_lens import FineSteer, SubspaceAblation, SubspaceProbe, Window, chain, save
from fsteer_lens.errors import FsteerError, HookError, InputError, SiteError
from fsteer_lens.hooks import HookObject
from fsteer_lens.serving import arguments, record_of
from fsteer_lens.serving.artefacts import Artefact, read_artefacts, require_artefact
from fsteer_lens.serving.patches import register
from fsteer_lens.steering import MeanShift
from tests.running import LAYER


def forms(steering: FineSteer) -> dict[str, HookObject]:
    space = steering.gate_at(LAYER).subspace  # type: ignore[union-attr]
    ablation = SubspaceAblation(space, layer=LAYER)
    late = steering.with_scope("generated")
    return {
        "generated": late,
        "window": steering.with_scope(Window(2)),
        "all": steering.with_scope("all"),
        "prompt": steering.with_scope("prompt"),
        "monitor": steering.with_scope("all").with_monitor(),
        "ablation": ablation,
        "probe": SubspaceProbe(space, layer=LAYER),
        "chain": chain(late, ablation),
    }


def test_what_a_steering_asks_of_the_engine(steering: FineSteer) -> None:
    told = {name: Artefact(name, form, "0") for name, form in forms(steering).items()}
    assert {name for name, one in told.items() if one.edits_prompts} == {"all", "prompt", "ablation", "chain"}
    assert {name for name, one in told.items() if one.needs_prompts_at_once} == {"all", "prompt"}
    assert {name for name, one in told.items() if not one.edits} == {"monitor", "probe"}


def test_blocks_are_shared_by_requests_that_compute_the_same(steering: FineSteer) -> None:
    late, early = (Artefact("a", forms(steering)[name], "d") for name in ("generated", "all"))
    assert late.cache_key([1, 2, 3], {}) == late.cache_key([1, 2, 4], {})
    assert late.cache_key([1, 2, 3], {}) != late.cache_key([1, 2, 3, 4], {})
    assert early.cache_key([1, 2, 3], {}) != early.cache_key([1, 2, 4], {})
    for one in (late, early):
        others = [one.cache_key([1], {"fsteer_strength": strength}) for strength in (0.5, 2)]
        assert len({one.cache_key([1], {}), *others, replace(one, digest="e").cache_key([1], {})}) == 4


def test_a_folder_is_read_by_the_names_of_its_files(steering: FineSteer, tmp_path: Path) -> None:
    save(steering, tmp_path / "refusal.safetensors")
    (tmp_path / "notes.txt").write_text("not a steering")
    (artefact,) = read_artefacts(tmp_path).values()
    assert artefact.name == "refusal" and artefact.steering.points == steering.points and len(artefact.digest) == 32
    save(steering.with_strength(2.0), tmp_path / "other.safetensors")
    assert read_artefacts(tmp_path)["other"].digest != artefact.digest


def test_a_folder_that_cannot_be_served_is_refused(steering: FineSteer, tutor_model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which is none"):
        read_artefacts(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no \.safetensors"):
        read_artefacts(tmp_path)
    first = MeanShift(torch.ones(128), layer=0, site="hook_resid_pre")
    save(first, tmp_path / "first.safetensors", tutor_model)
    with pytest.raises(SiteError, match="what leaves a decoder layer"):
        read_artefacts(tmp_path)
    turn_end = MeanShift(torch.ones(128), layer=LAYER, read="turn_end")
    save(turn_end, tmp_path / "first.safetensors", tutor_model)
    with pytest.raises(InputError, match='read="turn_end"'):
        read_artefacts(tmp_path)


def test_a_request_names_a_steering_or_none(steering: FineSteer) -> None:
    known = {name: Artefact(name, form, "0") for name, form in forms(steering).items()}
    assert require_artefact({}, known) is None and require_artefact({"other": 1}, known) is None
    found = require_artefact(arguments("all", strength=0.5, key="me"), known)
    assert found is known["all"]
    assert found.asked_for({"fsteer_strength": 0.5}).strength == 0.5  # type: ignore[attr-defined]
    assert found.asked_for({}) is found.steering


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"fsteer": "nobody"}, "one of generated"),
        ({"fsteer": 3}, "got 3"),
        ({"fsteer": "all", "fsteer_strenght": 2}, "fsteer_strenght"),
        ({"fsteer_strength": 2.0}, "without it"),
        ({"fsteer": "all", "fsteer_strength": float("nan")}, "finite"),
        ({"fsteer": "all", "fsteer_strength": True}, "fsteer_strength"),
        ({"fsteer": "ablation", "fsteer_strength": 2.0}, "that has a strength"),
        ({"fsteer": "all", "fsteer_read": "dirty"}, '"live" or "clean"'),
    ],
)
def test_a_request_that_does_not_fit_is_refused(steering: FineSteer, asked: dict[str, Any], told: str) -> None:
    known = {name: Artefact(name, form, "0") for name, form in forms(steering).items()}
    with pytest.raises(InputError, match=told):
        require_artefact(asked, known)


def test_several_layers_are_read_live_and_this_is_asked_for(steering: FineSteer) -> None:
    both = chain(steering, MeanShift(torch.ones(128), layer=LAYER - 1))
    known = {"both": Artefact("both", both, "0")}
    assert require_artefact(arguments("both", read="live"), known) is known["both"]
    for read in (None, "clean"):
        with pytest.raises(InputError, match="runs a prompt once"):
            require_artefact(arguments("both", read=read), known)  # type: ignore[arg-type]


def test_arguments_are_checked_where_they_are_written() -> None:
    assert arguments("a", strength=2) == {"fsteer": "a", "fsteer_strength": 2.0}
    with pytest.raises(InputError, match="a finite number"):
        arguments("a", strength=float("inf"))


@pytest.mark.parametrize("answer", [{}, {"kv_transfer_params": None}, {"kv_transfer_params": {"do_remote_decode": 1}}])
def test_an_answer_without_a_record_is_no_steered_answer(answer: dict[str, Any]) -> None:
    with pytest.raises(HookError, match="no record"):
        record_of(answer)


def test_a_record_of_a_failure_raises() -> None:
    with pytest.raises(FsteerError, match="blew up"):
        record_of({"kv_transfer_params": {"fsteer": {"fsteer": "a", "error": "blew up"}}})


def test_without_a_folder_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSTEER_STEERINGS", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it raises
    register()
    monkeypatch.setenv("FSTEER_STEERINGS", "steerings")
    with pytest.raises(ImportError):
        register()

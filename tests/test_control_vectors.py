"""Control vectors: the file says what the steering does, added by hand; what it cannot say is refused."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fsteer_lens import Activations, FineSteer, Schedule, Window
from fsteer_lens.errors import InputError, MissingDependencyError, NonFiniteError
from fsteer_lens.models import SteerableModel
from fsteer_lens.steering import (
    MeanShift,
    NearestCentroid,
    Steering,
    control_vectors,
    fit_mean_shift,
    fit_pca_direction,
    save_control_vector,
)
from tests import made_up
from tests.running import LAYER, batch_of, logits_of

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason='needs gguf: pip install "fsteer-lens[gguf]"')
ENDINGS = [pytest.param("gguf", marks=needs_gguf), "pt"]
VECTOR = torch.randn(made_up.D_MODEL, generator=torch.Generator().manual_seed(1))


def constant(index: int = 2, **options: Any) -> FineSteer:
    """A mixture that was given up for one of its experts."""
    whole = made_up.steering(3, scope="all", **options)
    return whole.with_gate(None).only_expert(index).without_residual()


def read_back(path: Path) -> dict[int, Tensor]:
    """The vectors of a file by layer, read by the libraries that the formats belong to."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    from gguf import GGUFReader

    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(path).tensors}
    assert all(name.startswith("direction.") for name in tensors)
    return {int(name.removeprefix("direction.")): vector for name, vector in tensors.items()}


def added_by_hand(model: SteerableModel, directions: dict[int, Tensor], prompts: list[str]) -> Tensor:
    """Logits with each vector added to what leaves its layer, at every token, by hooks of TransformerLens alone."""
    batch = batch_of(model, prompts)
    hooks = [
        (f"blocks.{layer}.hook_resid_post", lambda stream, hook, vector=vector: stream + vector)
        for layer, vector in directions.items()
    ]
    with torch.no_grad():
        mask = batch.mask.long()
        return model.run_with_hooks(batch.tokens, attention_mask=mask, fwd_hooks=hooks)  # type: ignore[attr-defined]


def steered(model: SteerableModel, steering: Steering, prompts: list[str]) -> Tensor:
    batch = batch_of(model, prompts)
    with steering.on(model, attention_mask=batch.mask):
        return logits_of(model, batch)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", ["mean shift", "principal direction", "expert", "before a layer", "two layers"])
def test_the_file_does_what_the_steering_does(
    model: SteerableModel, trained: dict[int, Activations], kind: str, ending: str, tmp_path: Path
) -> None:
    options: Any = {"scope": "all", "strength": -1.5}
    both = constant().experts
    steering: Steering = {
        "mean shift": lambda: fit_mean_shift(trained[LAYER], **options),
        "principal direction": lambda: fit_pca_direction(trained[LAYER], **options),
        "expert": lambda: constant(strength=0.7),
        "before a layer": lambda: MeanShift(VECTOR, layer=3, site="hook_resid_pre", **options),
        "two layers": lambda: FineSteer({2: both, 4: made_up.experts(5).only_expert(0).without_residual()}, **options),  # type: ignore[dict-item]
    }[kind]()
    path = tmp_path / f"vector.{ending}"
    save_control_vector(steering, path)
    directions = read_back(path)
    assert list(directions) == {"before a layer": [2], "two layers": [2, 4], "expert": [3]}.get(kind, [LAYER])
    assert all(vector.dtype == torch.float32 and vector.shape == (128,) for vector in directions.values())
    prompts = ["<user>one day"]
    found = added_by_hand(model, directions, prompts)
    torch.testing.assert_close(found, steered(model, steering, prompts), atol=1e-4, rtol=0)
    shifted = {layer - 1: vector for layer, vector in directions.items()}
    assert float((added_by_hand(model, shifted, prompts) - found).abs().max()) > 0.1, "the layer matters"


@needs_gguf
def test_the_header_is_what_llama_cpp_and_repeng_look_at(trained: dict[int, Activations], tmp_path: Path) -> None:
    from gguf import GGUFReader

    save_control_vector(fit_mean_shift(trained[LAYER], scope="all"), tmp_path / "known.gguf")
    save_control_vector(MeanShift(VECTOR, layer=LAYER), tmp_path / "unknown.gguf")
    for name, hint in (("known.gguf", "gpt2"), ("unknown.gguf", "unknown")):
        fields = {key: one.contents() for key, one in GGUFReader(tmp_path / name).fields.items() if "." in key}
        assert fields["general.architecture"] == "controlvector" and fields["controlvector.layer_count"] == 1
        assert fields["controlvector.model_hint"] == hint


def test_what_is_saved_does_not_move_with_the_steering(tmp_path: Path) -> None:
    vector = VECTOR.clone().requires_grad_()
    save_control_vector(MeanShift(vector, layer=2), tmp_path / "x.pt")
    assert torch.equal(read_back(tmp_path / "x.pt")[2], VECTOR)
    half = MeanShift(VECTOR.half(), layer=2)
    save_control_vector(half, tmp_path / "x.pt")
    assert torch.equal(read_back(tmp_path / "x.pt")[2], VECTOR.half().float())


GATE = made_up.steering(3).gate
REFUSED: dict[str, tuple[str, str, Any]] = {
    "gate": ("a gate", "gate=None", lambda: MeanShift(VECTOR, GATE, layer=3)),  # type: ignore[arg-type]
    "gate of another layer": ("a gate", "with_gate(None)", lambda: FineSteer(
        made_up.experts(0).only_expert(1).without_residual(), {2: GATE}, layer=3, gate_layer=2)),  # type: ignore[dict-item]
    "mixture": ("experts that the prompt mixes", "only_expert", lambda: made_up.steering(3).with_gate(None)),
    "residual": ("a residual", "without_residual", lambda: made_up.steering(3).with_gate(None).only_expert(1)),
    "prompt alone": ("scope=prompt", "with_scope", lambda: constant().with_scope("prompt")),
    "window": ("scope=Window", "with_scope", lambda: constant().with_scope(Window(0, 5))),
    "schedule": ("a schedule", "with_schedule", lambda: constant().with_schedule(Schedule((1.0, 0.5)))),
    "monitor": ("a monitor", "with_monitor", lambda: constant().with_monitor()),
    "following the prompt": ("a vector that depends on the prompt", "fit_mean_shift", lambda: NearestCentroid(
        torch.randn(3, 128), torch.randn(3, 128), layer=3)),
}  # fmt: skip


@pytest.mark.parametrize(("got", "fix", "make"), REFUSED.values(), ids=REFUSED)
def test_what_a_file_cannot_say_is_refused_with_what_helps(got: str, fix: str, make: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"got {got}") as caught:
        save_control_vector(make(), tmp_path / "x.pt")
    assert fix in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_lost_is_told_at_once_and_can_be_given_up(tmp_path: Path) -> None:
    whole = made_up.steering(3, scope="generated", schedule=Schedule((0.5,)))
    with pytest.raises(InputError) as caught:
        save_control_vector(whole, tmp_path / "x.pt")
    advised = str(caught.value).partition("without it: ")[2].rstrip(".").split("; ")
    assert len(advised) == 5
    for call in advised:
        whole = eval(f"whole{call}", {"whole": whole, "index": 1})
    save_control_vector(whole, tmp_path / "x.pt")
    assert torch.equal(read_back(tmp_path / "x.pt")[3], 2.0 * made_up.experts(0).prototypes[1])


@needs_gguf
def test_a_layer_without_a_place_is_refused(tmp_path: Path) -> None:
    first = MeanShift(VECTOR, layer=0)
    with pytest.raises(InputError, match=r"what leaves layer 1 or a later one.*write a \.pt file"):
        save_control_vector(first, tmp_path / "x.gguf")
    save_control_vector(first, tmp_path / "x.pt")
    assert list(read_back(tmp_path / "x.pt")) == [0]
    with pytest.raises(InputError, match="what leaves layer 0"):
        save_control_vector(replace(first, site="hook_resid_pre"), tmp_path / "y.pt")
    assert [one.name for one in tmp_path.iterdir()] == ["x.pt"]


def test_paths_numbers_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MeanShift(VECTOR, layer=2)
    for name in ("x.safetensors", "x", "x.GGUF.txt"):
        with pytest.raises(InputError, match=r"expected \.gguf or \.pt"):
            save_control_vector(plain, tmp_path / name)
    with pytest.raises(InputError, match="existing folder"):
        save_control_vector(plain, tmp_path / "none" / "x.pt")
    with pytest.raises(NonFiniteError):
        save_control_vector(MeanShift(VECTOR / 0, layer=2), tmp_path / "x.pt")
    monkeypatch.setattr(control_vectors, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="gguf"):
        save_control_vector(plain, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []

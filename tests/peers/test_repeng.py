"""Beside repeng: the same text under the same control vector."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fsteer_lens.models import SteerableModel
from fsteer_lens.steering import MeanShift, save_control_vector
from fsteer_lens.tutor.loading import FOLDER
from tests.running import LAYER, batch_of, logits_of

if find_spec("repeng") is None:  # importing it would import what it needs, which it does not install
    pytest.skip("needs repeng: make test-peers", allow_module_level=True)


@pytest.fixture(scope="module")
def package() -> Any:
    from benchmarks.peers import repeng

    return repeng()


@pytest.mark.parametrize("strength", [1.0, -2.0])
def test_the_same_vector_gives_the_same_logits(
    model: SteerableModel, package: Any, prompts: list[str], strength: float
) -> None:
    vector = 2.0 * torch.randn(128, generator=torch.Generator().manual_seed(2))
    theirs = package.ControlModel(AutoModelForCausalLM.from_pretrained(FOLDER).eval(), [LAYER])
    theirs.set_control(package.ControlVector("gpt2", {LAYER: vector.numpy()}), coeff=strength)
    shift = MeanShift(vector, layer=LAYER, scope="all", strength=strength)
    elsewhere = MeanShift(vector, layer=LAYER - 1, scope="all", strength=strength)
    for prompt in prompts:
        batch = batch_of(model, [prompt])
        with torch.no_grad():
            expected = theirs(batch.tokens).logits.log_softmax(-1)
        with shift.on(model):
            found = logits_of(model, batch).log_softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        with elsewhere.on(model):
            assert float((logits_of(model, batch).log_softmax(-1) - expected).abs().max()) > 0.1
    theirs.reset()
    with torch.no_grad():
        plain = theirs(batch.tokens).logits.log_softmax(-1)
    torch.testing.assert_close(logits_of(model, batch).log_softmax(-1), plain, atol=1e-3, rtol=0)


def test_a_control_vector_of_ours_is_read_and_does_the_same(
    model: SteerableModel, package: Any, prompts: list[str], tmp_path: Path
) -> None:
    vector = 2.0 * torch.randn(128, generator=torch.Generator().manual_seed(3))
    shift = MeanShift(vector, layer=LAYER, scope="all", strength=-1.5)
    save_control_vector(shift, tmp_path / "vector.gguf")
    found = package.ControlVector.import_gguf(tmp_path / "vector.gguf")
    assert list(found.directions) == [LAYER]
    theirs = package.ControlModel(AutoModelForCausalLM.from_pretrained(FOLDER).eval(), [LAYER])
    theirs.set_control(found)
    batch = batch_of(model, prompts[:1])
    with torch.no_grad():
        expected = theirs(batch.tokens).logits.log_softmax(-1)
    with shift.on(model):
        torch.testing.assert_close(logits_of(model, batch).log_softmax(-1), expected, atol=1e-3, rtol=0)
    assert float((logits_of(model, batch).log_softmax(-1) - expected).abs().max()) > 0.1

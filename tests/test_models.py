"""Models of several architectures, made offline, and their fingerprints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fsteer_lens import models, tutor
from fsteer_lens.errors import InputError, MismatchError, MissingDependencyError, SiteError
from fsteer_lens.models import SteerableModel, conversion
from fsteer_lens.models.attaching import hooks_suspended
from fsteer_lens.models.forward import Forward
from fsteer_lens.models.points import site_name
from fsteer_lens.prompts.tokens import pad
from fsteer_lens.reading.fingerprints import fingerprint
from tests.families import FAMILIES, random_model, tokenizer

KINDS = models.available_kinds()
ROWS = [[1, 20, 30, 40, 50], [1, 60, 70], [1, 80, 90, 100]]


@pytest.mark.model
@pytest.mark.parametrize("architecture", FAMILIES)
def test_classes_caches_and_padding_agree(architecture: str) -> None:
    found = {}
    for kind in KINDS:
        model = random_model(architecture, kind)
        for cache in (True, False):
            forward = Forward(model, cache=cache)
            batch = pad(model, ROWS, "left")
            logits = [forward(batch.tokens, batch.mask)[:, -1]]
            for token in (110, 111, 112):
                step = pad(model, [[token]] * 3, "left")
                logits.append(forward(step.tokens, step.mask)[:, -1])
            found[kind, cache] = torch.stack(logits, dim=1).log_softmax(-1)
        alone = [
            Forward(model, cache=False)(*vars(pad(model, [[*row, 110, 111, 112]], "left")).values())[0, -1]
            for row in ROWS
        ]
        found[kind, "alone"] = torch.stack(alone).log_softmax(-1)
    reference = found[KINDS[0], True]
    for key, value in found.items():
        expected = reference[:, -1] if key[1] == "alone" else reference
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.model
@pytest.mark.parametrize("kind", KINDS)
def test_what_transformer_lens_cannot_convert_says_so(kind: models.Kind) -> None:
    import transformers

    config = transformers.OPTConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, ffn_dim=8, num_attention_heads=1)
    unheard = type("Unheard", (transformers.OPTForCausalLM,), {})(config)
    unheard.config.model_type = "unheard"
    with pytest.raises(InputError, match=f"cannot convert Unheard to {models.CLASS_NAMES[kind]}"):
        models.from_hf(unheard, tokenizer(), kind=kind)


def test_missing_class_and_folder_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(conversion, "available_kinds", lambda: ("bridge",))
    with pytest.raises(MissingDependencyError, match=r"transformer-lens<4"):
        tutor.load("hooked")
    with pytest.raises(InputError, match=r"config\.json"):
        models.load(tmp_path / "nothing")


def test_sites_are_checked_against_the_model(model: SteerableModel) -> None:
    assert site_name(model, 2) == "blocks.2.hook_resid_post"
    for layer in (-1, 6, True):
        with pytest.raises(SiteError, match=r"0\.\.5"):
            site_name(model, layer)
    with pytest.raises(SiteError, match="hook_resid_post"):
        site_name(model, 2, "hook_resid_mid")


def test_fingerprints_know_their_model(tutor_model: SteerableModel, bridge: SteerableModel) -> None:
    own = fingerprint(tutor_model, [1, 4])
    own.require_match(fingerprint(bridge, [1, 4]))
    other = fingerprint(random_model("gpt2", KINDS[0]), [1])
    with pytest.raises(MismatchError, match="n_layers: fitted on 6, here 3"):
        own.require_match(other)
    one, two = (fingerprint(random_model("gpt2", KINDS[0], seed), [1]) for seed in (0, 1))
    with pytest.raises(MismatchError, match="activations at layer 1"):
        one.require_match(two)
    near = replace(one, probe={1: tuple(value * 1.0001 for value in one.probe[1])})
    one.require_match(near)
    half = replace(one, dtype="torch.bfloat16", probe={1: tuple(value * 1.02 for value in one.probe[1])})
    one.require_match(half)
    with pytest.raises(MismatchError, match=r"0\.02"):
        one.require_match(replace(half, dtype="torch.float32"))


def test_suspended_hooks_come_back_in_order(model: SteerableModel) -> None:
    calls: list[str] = []
    point = model.hook_dict[site_name(model, 1)]
    for name in ("first", "second"):
        point.add_hook(lambda x, hook, name=name: calls.append(name))
    try:
        batch = pad(model, [[1, 5, 6]], "right")
        with hooks_suspended(model):
            Forward(model, cache=False)(batch.tokens, batch.mask)
        assert calls == []
        Forward(model, cache=False)(batch.tokens, batch.mask)
        assert calls == ["first", "second"]
    finally:
        point.remove_hooks()

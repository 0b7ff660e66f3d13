"""Fingerprints of tokenizers: another pad token is no other model; another end of sequence is, and is named."""

import hashlib
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fsteer_lens import FineSteer, collect_queries, load, save, tutor
from fsteer_lens.errors import MismatchError
from fsteer_lens.models import SteerableModel
from fsteer_lens.reading.fingerprints import Fingerprint, fingerprint, merge_fingerprints, require_model
from tests import made_up

DATA = Path(__file__).parent / "data"
PROMPT = tutor.chat("hello")


@pytest.fixture
def with_tokens(tutor_model: SteerableModel) -> Iterator[Callable[[Callable[[Any], Any]], SteerableModel]]:
    """The tutor with a changed copy of its tokenizer, until the test ends."""
    own = tutor_model.tokenizer

    def changed(change: Callable[[Any], Any]) -> SteerableModel:
        tutor_model.tokenizer = deepcopy(own)
        change(tutor_model.tokenizer)
        return tutor_model

    yield changed
    tutor_model.tokenizer = own


def as_in_0_1(taken: Fingerprint, tokenizer: Any) -> Fingerprint:
    """What version 0.1 would have stored: one hash of the vocabulary and of all special tokens."""
    content = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_tokens)]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return replace(taken, schema=1, tokenizer=digest, vocabularies=(), n_tokens=0, special_tokens={})


PADS: dict[str, Callable[[Any], Any]] = {
    "eos": lambda tokenizer: setattr(tokenizer, "pad_token", tokenizer.eos_token),
    "none": lambda tokenizer: setattr(tokenizer, "pad_token", None),
    "an ordinary token": lambda tokenizer: setattr(tokenizer, "pad_token", "<safe>"),
    "a new token": lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}),
}


@pytest.mark.parametrize("old", ["this version", "0.1"])
@pytest.mark.parametrize("change", PADS.values(), ids=PADS)
def test_another_pad_token_is_no_mismatch(tutor_model: SteerableModel, with_tokens: Any, change: Any, old: str) -> None:
    own, other = deepcopy(tutor_model.tokenizer), deepcopy(tutor_model.tokenizer)
    change(other)
    pairs = [(own, other), (other, own)]
    if old == "0.1" and len(other) > len(own):
        pairs.pop()  # what was added there, a hash does not tell
    for fitted, here in pairs:
        model = with_tokens(lambda _: None)
        model.tokenizer = fitted
        taken = fingerprint(model, [2])
        known = taken if old == "this version" else as_in_0_1(taken, fitted)
        model.tokenizer = here
        require_model(known, model)
        if old == "this version":
            known.require_match(fingerprint(model, [2]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tokenizer: setattr(tokenizer, "eos_token", "<user>"),
            r"got end-of-sequence token: fitted with '<eos>', here '<user>'\. Use the model",
        ),
        (
            lambda tokenizer: setattr(tokenizer, "bos_token", None),
            r"got beginning-of-sequence token: fitted with '<bos>', here none\. Use",
        ),
        (
            lambda tokenizer: setattr(tokenizer, "unk_token", "<safe>"),
            r"got token for unknown words: fitted with none, here '<safe>'\. Use",
        ),
    ],
)
def test_other_special_tokens_are_named(tutor_model: SteerableModel, with_tokens: Any, change: Any, words: str) -> None:
    taken = fingerprint(tutor_model, [2])
    old = as_in_0_1(taken, tutor_model.tokenizer)
    tutor_special = tutor_model.tokenizer.all_special_tokens
    model = with_tokens(change)
    with pytest.raises(MismatchError, match=words) as caught:
        require_model(taken, model)
    assert taken.tokenizer not in str(caught.value), "no hashes"
    lost = set(tutor_special) - set(model.tokenizer.all_special_tokens)
    if lost:  # one hash of all special tokens cannot tell what a lost one was for
        with pytest.warns(UserWarning, match=f"fitted with '{lost.pop()}' as a special token"):
            require_model(old, model)
    else:
        require_model(old, model)


def test_another_vocabulary_under_a_hash_of_0_1_is_refused(tutor_model: SteerableModel, with_tokens: Any) -> None:
    old = as_in_0_1(fingerprint(tutor_model, [2]), tutor_model.tokenizer)
    known = tutor_model.tokenizer.get_vocab()
    model = with_tokens(lambda tokenizer: setattr(tokenizer, "get_vocab", lambda: known | {"well": 1}))
    with pytest.raises(MismatchError, match="tokenizer: another vocabulary or other special tokens"):
        require_model(old, model)


def test_another_vocabulary_is_named(tutor_model: SteerableModel, bridge: SteerableModel, with_tokens: Any) -> None:
    taken = fingerprint(tutor_model, [2])
    known = tutor_model.tokenizer.get_vocab()
    swapped = known | {"well": known["and"], "and": known["well"]}
    model = with_tokens(lambda tokenizer: setattr(tokenizer, "get_vocab", lambda: swapped))
    with pytest.raises(
        MismatchError, match=r"got vocabulary: fitted with 768 entries, here 768 entries, but not the same"
    ):
        require_model(taken, model)
    fewer = {text: number for text, number in known.items() if text != "well"}
    model = with_tokens(lambda tokenizer: setattr(tokenizer, "get_vocab", lambda: fewer))
    with pytest.raises(MismatchError, match=r"vocabulary: fitted with 768 entries, here 767 entries\."):
        require_model(taken, model)
    model.tokenizer = None
    with pytest.raises(MismatchError, match=r"vocabulary: fitted with 768 entries, here none; .*end-of-sequence"):
        require_model(taken, model)


def test_tokens_that_the_model_cannot_read_do_not_count(tutor_model: SteerableModel, with_tokens: Any) -> None:
    taken = fingerprint(tutor_model, [2])
    assert tutor_model.cfg.d_vocab == len(tutor_model.tokenizer), "so that a new one lies beyond it"
    require_model(taken, with_tokens(lambda tokenizer: tokenizer.add_tokens(["<new>"])))


def test_a_steering_runs_loads_and_saves_under_another_pad_token(
    tutor_model: SteerableModel, steering: FineSteer, with_tokens: Any, tmp_path: Path
) -> None:
    assert steering.fingerprint is not None
    old = replace(steering, fingerprint=as_in_0_1(steering.fingerprint, tutor_model.tokenizer))
    model = with_tokens(PADS["eos"])
    for one in (replace(steering, fingerprint=replace(steering.fingerprint)), old):
        save(one, tmp_path / "steer.safetensors", model=model)
        found = load(tmp_path / "steer.safetensors", model=model)
        assert found.fingerprint == one.fingerprint
        with found.on(model):
            model(torch.tensor([[1, 5, 6]]))


def test_a_file_of_version_0_1_has_a_fingerprint_of_its_schema() -> None:
    links = load(DATA / "chain_0_1.safetensors").links
    assert {link.fingerprint.schema for link in links} == {1} and not any(one.fingerprint.vocabularies for one in links)
    again = merge_fingerprints([links[0].fingerprint, links[0].fingerprint])
    assert again == links[0].fingerprint


def test_parts_of_a_fingerprint_are_checked(steering: FineSteer) -> None:
    assert steering.fingerprint is not None
    wrong: dict[str, Any] = {"vocabularies": ["a"], "n_tokens": 1.5, "special_tokens": {"eos_token": 3}}
    for name, value in wrong.items():
        with pytest.raises(Exception, match=r"fingerprint|annotation"):  # the tests' own check of types may be first
            replace(steering.fingerprint, **{name: value})
    made = made_up.steering()
    assert made.fingerprint is None


def test_a_collection_says_what_its_tokenizer_is(tutor_model: SteerableModel) -> None:
    taken = collect_queries(tutor_model, [PROMPT], layer=2, progress=False).fingerprint
    assert taken.schema == 2 and taken.n_tokens == len(tutor_model.tokenizer)
    assert dict(taken.special_tokens) == {"bos_token": "<bos>", "eos_token": "<eos>"}

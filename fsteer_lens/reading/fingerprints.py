"""Fingerprints: what a model must share with the one that an artefact was fitted on.

Of a tokenizer that is its vocabulary and its special tokens but for the pad: what a pad holds is never seen. Files of
version 0.1 (schema 1) hold one hash of vocabulary and all special tokens, the pad among them; `require_model` tries
whether another pad explains the difference.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError, MismatchError
from fsteer_lens.ground.checks import finite, instance, normalised, whole
from fsteer_lens.models.classes import CLASS_NAMES, SteerableModel, kind_of
from fsteer_lens.models.plain import PlainModel
from fsteer_lens.models.points import DEFAULT_SITE, Point, spliced
from fsteer_lens.prompts.tokens import pad
from fsteer_lens.reading.reader import read

SCHEMA = 2
UNKNOWN = "unknown"
"""In the place of a tokenizer's hash: a model of transformers that has none of its own, and nothing is compared."""
PROBE_TOKENS = 8
PROBE_VALUES = 32
ROLES: Mapping[str, str] = {
    "bos_token": "beginning-of-sequence token",
    "eos_token": "end-of-sequence token",
    "unk_token": "token for unknown words",
    "sep_token": "separator token",
    "cls_token": "class token",
    "mask_token": "mask token",
}
"""Special tokens that are compared, by what tokenizers call them; the pad token is not."""


@dataclass(frozen=True)
class Fingerprint:
    """What a model must share with the one that an artefact was fitted on.

    Attributes:
        architecture: name of the original architecture.
        n_layers, d_model, d_vocab: its sizes.
        site: hook point within a layer.
        tokenizer: SHA-256 of vocabulary and all special tokens, the pad token too; compared where it is all there is.
        probe: a few activations at each fitted layer after fixed tokens, {layer: values}.
        model_class, processed, dtype: recorded, not compared: the probe tells whether they matter. It may be further
            off where a dtype is neither float32 nor float64, or weights are quantised.
        schema: version of these fields; the first one lacks those below.
        vocabularies: SHA-256 of the entries that the model can read, and of these without the pad token's; one of them
            must be the same.
        n_tokens: number of these entries, 0 without a tokenizer.
        special_tokens: text of each special token that is compared, by role, {"eos_token": ...}.
    """

    architecture: str
    n_layers: int
    d_model: int
    d_vocab: int
    site: str
    tokenizer: str
    probe: Mapping[int, tuple[float, ...]]
    model_class: str
    processed: bool
    dtype: str
    schema: int = SCHEMA
    vocabularies: tuple[str, ...] = ()
    n_tokens: int = 0
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "d_vocab", "schema", "n_tokens"):
            normalised(self, **{name: whole(f"fingerprint {name}", getattr(self, name))})
        for name in ("architecture", "site", "tokenizer", "model_class", "dtype"):
            instance(f"fingerprint {name}", getattr(self, name), str, "a text")
        if self.schema > SCHEMA:
            fix = "Upgrade fsteer_lens, or fit again."
            raise InputError("fingerprint of a newer version", expected=SCHEMA, got=self.schema, fix=fix)
        name, told = "fingerprint probe", "{layer: tuple of finite numbers}"
        rows = instance(name, self.probe, Mapping, told).items()
        checked = {layer: [finite(name, x) for x in instance(name, row, tuple, told)] for layer, row in rows}
        normalised(self, probe={whole(name, layer): tuple(row) for layer, row in checked.items()})
        roles = instance("fingerprint special_tokens", self.special_tokens, Mapping, "{role: text}")
        hashes = instance("fingerprint vocabularies", self.vocabularies, tuple, "a tuple of texts")
        for text in (*hashes, *roles, *roles.values()):
            instance("fingerprint of a tokenizer", text, str, "texts")

    def __hash__(self) -> int:
        return hash((self.tokenizer, self.model_class, tuple(self.probe)))

    def require_match(self, other: "Fingerprint") -> None:
        """Raise `MismatchError` naming every difference to the fingerprint `other` of the model at hand."""
        names = ("architecture", "n_layers", "d_model", "d_vocab", "site")
        differences = [
            f"{name}: fitted on {getattr(self, name)}, here {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]
        differences += self._other_tokens(other)
        coarse = any(dtype not in ("torch.float32", "torch.float64") for dtype in (self.dtype, other.dtype))
        tolerance = 5e-2 if coarse else 1e-3
        for layer in sorted(set(self.probe) & set(other.probe)) if not differences else ():
            ours, theirs = (torch.tensor(one.probe[layer], dtype=torch.float32, device="cpu") for one in (self, other))
            same_length = len(ours) == len(theirs) > 0
            distance = float((ours - theirs).norm() / ours.norm().clamp(min=1e-12)) if same_length else float("inf")
            if not distance <= tolerance:
                differences.append(
                    f"activations at layer {layer} differ by {distance:.2g} relative (allowed {tolerance:g}): fitted on"
                    f" {self._description()}, here {other._description()}"
                )
        if differences:
            raise MismatchError(
                "this was fitted on another model",
                got="; ".join(differences),
                fix="Use the model it was fitted on, loaded the same way, or fit again on this one.",
            )

    def at_layer(self, layer: int) -> "Fingerprint":
        """The fingerprint of one layer alone."""
        return merge_fingerprints([self], keep=(layer,))

    def _other_tokens(self, other: "Fingerprint") -> Iterator[str]:
        """How the tokenizers differ, in words."""
        if UNKNOWN in (self.tokenizer, other.tokenizer):
            return
        if not (self.vocabularies and other.vocabularies):
            if self.tokenizer != other.tokenizer:
                yield "tokenizer: another vocabulary or other special tokens (files of version 0.1 do not tell which)"
            return
        if not set(self.vocabularies) & set(other.vocabularies):
            ours, theirs = (f"{one.n_tokens} entries" if one.n_tokens else "none" for one in (self, other))
            same = ", but not the same ones" if ours == theirs else ""
            yield f"vocabulary: fitted with {ours}, here {theirs}{same}"
        for role, name in ROLES.items():
            ours, theirs = (repr(one.special_tokens.get(role, "")) for one in (self, other))
            if ours != theirs:
                yield f"{name}: fitted with {ours}, here {theirs}".replace("''", "none")

    def _description(self) -> str:
        return f"{self.model_class} ({'processed' if self.processed else 'raw'} weights, {self.dtype})"


def require_same_model(own: Fingerprint | None, other: Fingerprint | None, what: str) -> None:
    """Raise `MismatchError` unless both are of one model, or neither of the two is known."""
    if own is not None and other is not None:
        own.require_match(other)
    elif own is not other:
        raise MismatchError(
            f"{what}: of some the model is not known",
            expected="a fingerprint in all of them, or in none",
            got="some with and some without",
            fix="Collect them all, or give those that were made by hand the fingerprint= of their model.",
        )


def merge_fingerprints(fingerprints: Sequence[Fingerprint], keep: Sequence[int] | None = None) -> Fingerprint:
    """One fingerprint with the probes of all; raises `MismatchError` where they are of different models."""
    first, *others = fingerprints
    for other in others:
        first.require_match(other)
    probe = {layer: values for one in fingerprints for layer, values in one.probe.items()}
    kept = sorted(probe if keep is None else set(keep) & set(probe))
    return Fingerprint(**{**vars(first), "probe": {layer: probe[layer] for layer in kept}})


def fingerprint(model: SteerableModel, layers: Sequence[int], site: str = DEFAULT_SITE) -> Fingerprint:
    """Take the fingerprint of a model at some layers; costs one short forward pass."""
    cfg, d_vocab, plain = model.cfg, _d_vocab(model), isinstance(model, PlainModel)
    tokens: dict[str, Any] = {"tokenizer": UNKNOWN} if plain else tokens_of(model.tokenizer, d_vocab)
    batch = pad(model, [probe_ids(d_vocab)], "right")
    seen = read(model, batch, [Point(layer, site) for layer in layers], lambda h: h[0, -1], bare=True)
    probe = {point.layer: probed(row) for point, row in seen.items()}
    return Fingerprint(
        architecture=str(getattr(cfg, "original_architecture", None) or getattr(cfg, "architecture", None)),
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        d_vocab=d_vocab,
        site=site,
        **tokens,
        probe=probe,
        model_class=("transformers" if plain else CLASS_NAMES[kind_of(model)])
        + (f" with SAEs at {', '.join(saes)}" if (saes := spliced(model)) else ""),
        processed=str(cfg.normalization_type).endswith("Pre") or getattr(model, "compatibility_mode", False),
        dtype=f"{cfg.dtype}{', quantised' if _is_quantised(model) else ''}",
    )


def probe_ids(d_vocab: int) -> list[int]:
    """The fixed tokens whose last one is looked at."""
    return [(index * 7919 + 13) % d_vocab for index in range(PROBE_TOKENS)]


def probed(activation: Float[Tensor, " d"]) -> tuple[float, ...]:
    """The values of an activation that a fingerprint keeps."""
    stride = max(1, len(activation) // PROBE_VALUES)
    return tuple(activation[::stride][:PROBE_VALUES].tolist())


def require_model(known: Fingerprint, model: SteerableModel, site: str = DEFAULT_SITE) -> None:
    """Raise `MismatchError` unless the model is the one of a fingerprint that something was fitted or stored with."""
    current = fingerprint(model, sorted(known.probe), site)
    if not known.vocabularies and known.tokenizer != current.tokenizer:
        pad_token = _hashes_with_other_pads(model.tokenizer).get(known.tokenizer)
        if pad_token and "pad" not in pad_token.lower():
            warnings.warn(
                f"fitted with {pad_token!r} as a special token, by a version that did not store as which: taken for"
                " the pad token, which does not matter. Where it ends or begins texts, mend the tokenizer.",
                stacklevel=3,
            )
        if pad_token is not None:
            current = replace(current, tokenizer=known.tokenizer)
    known.require_match(current)


def _is_quantised(model: Any) -> bool:
    """Whether transformers keeps the weights in fewer bits, or has read them from such."""
    network = getattr(model, "network", getattr(model, "original_model", None))
    return getattr(network, "hf_quantizer", None) is not None


def _d_vocab(model: SteerableModel) -> int:
    """Tokens that the model can read; a Bridge sets its `cfg.d_vocab` to what a tokenizer knows that it is given."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    return getattr(config, "vocab_size", None) or model.cfg.d_vocab


def tokens_of(tokenizer: Any, d_vocab: int) -> dict[str, Any]:
    """What a fingerprint says of a tokenizer."""
    if tokenizer is None:
        return {"tokenizer": "none", "vocabularies": ("none",), "n_tokens": 0, "special_tokens": {}}
    vocabulary = sorted(tokenizer.get_vocab().items())
    entries = [(text, number) for text, number in vocabulary if number < d_vocab]
    others = [entry for entry in entries if entry[0] != tokenizer.pad_token]
    written = json.dumps(vocabulary)  # a tenth of a second for 100,000 entries, so not again where it is the same
    seen = written if len(entries) == len(vocabulary) else json.dumps(entries)
    unpadded = seen if len(others) == len(entries) else json.dumps(others)
    return {
        "tokenizer": _hash_of(written, tokenizer.all_special_tokens),
        "vocabularies": tuple(hashlib.sha256(text.encode()).hexdigest() for text in (seen, unpadded)),
        "n_tokens": len(entries),
        "special_tokens": {role: str(text) for role, text in tokenizer.special_tokens_map.items() if role in ROLES},
    }


def _hash_of(vocabulary: str, special: Iterable[str]) -> str:
    """The hash of schema 1, of a vocabulary that is written as JSON already."""
    return hashlib.sha256(f"[{vocabulary}, {json.dumps(sorted(special))}]".encode()).hexdigest()


def _hashes_with_other_pads(tokenizer: Any) -> dict[str, str]:
    """Hashes of schema 1 that the tokenizer would have with another pad token, which is the value, "" for none."""
    if tokenizer is None:
        return {}
    vocabulary, pad_token = sorted(tokenizer.get_vocab().items()), tokenizer.pad_token
    special, added = set(tokenizer.all_special_tokens), map(str, tokenizer.added_tokens_decoder.values())
    pads = {text: {text} for text in added if text not in special} | {"": set()}
    found = {}
    for entries in (vocabulary, [entry for entry in vocabulary if entry[0] != pad_token]):
        written = json.dumps(entries)
        for others in (special, special - {pad_token}):  # it may be special for another reason, too
            found |= {_hash_of(written, others | pad): text for text, pad in pads.items()}
    return found

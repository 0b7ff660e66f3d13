"""Fingerprints: what a model must share with the one that an artefact was fitted on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fsteer_lens.errors import InputError, MismatchError
from fsteer_lens.ground.checks import finite, instance, normalised, whole
from fsteer_lens.models.classes import CLASS_NAMES, SteerableModel, kind_of
from fsteer_lens.models.points import DEFAULT_SITE, Point, spliced
from fsteer_lens.prompts.tokens import pad
from fsteer_lens.reading.reader import read

SCHEMA = 1
PROBE_TOKENS = 8
PROBE_VALUES = 32


@dataclass(frozen=True)
class Fingerprint:
    """What a model must share with the one that an artefact was fitted on.

    Attributes:
        architecture: name of the original architecture.
        n_layers, d_model, d_vocab: its sizes.
        site: hook point within a layer.
        tokenizer: SHA-256 of vocabulary and special tokens.
        probe: a few activations at each fitted layer after fixed tokens, {layer: values}.
        model_class, processed, dtype: recorded, not compared: the probe tells whether they matter.
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

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "d_vocab", "schema"):
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

    def __hash__(self) -> int:
        return hash((self.tokenizer, self.model_class, tuple(self.probe)))

    def require_match(self, other: "Fingerprint") -> None:
        """Raise `MismatchError` naming every difference to the fingerprint `other` of the model at hand."""
        names = ("architecture", "n_layers", "d_model", "d_vocab", "site", "tokenizer")
        differences = [
            f"{name}: fitted on {getattr(self, name)}, here {getattr(other, name)}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]
        half = any(dtype not in ("torch.float32", "torch.float64") for dtype in (self.dtype, other.dtype))
        tolerance = 5e-2 if half else 1e-3
        for layer in sorted(set(self.probe) & set(other.probe)) if not differences else ():
            ours, theirs = torch.tensor(self.probe[layer]), torch.tensor(other.probe[layer])
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
    cfg = model.cfg
    ids = [(index * 7919 + 13) % cfg.d_vocab for index in range(PROBE_TOKENS)]
    batch = pad(model, [ids], "right")
    seen = read(model, batch, [Point(layer, site) for layer in layers], lambda h: h[0, -1], bare=True)
    stride = max(1, cfg.d_model // PROBE_VALUES)
    probe = {point.layer: tuple(row[::stride][:PROBE_VALUES].tolist()) for point, row in seen.items()}
    return Fingerprint(
        architecture=str(getattr(cfg, "original_architecture", None) or getattr(cfg, "architecture", None)),
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        d_vocab=cfg.d_vocab,
        site=site,
        tokenizer=_tokenizer_hash(model.tokenizer),
        probe=probe,
        model_class=CLASS_NAMES[kind_of(model)]
        + (f" with SAEs at {', '.join(saes)}" if (saes := spliced(model)) else ""),
        processed=str(cfg.normalization_type).endswith("Pre") or getattr(model, "compatibility_mode", False),
        dtype=str(cfg.dtype),
    )


def _tokenizer_hash(tokenizer: Any) -> str:
    if tokenizer is None:
        return "none"
    content = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_tokens)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

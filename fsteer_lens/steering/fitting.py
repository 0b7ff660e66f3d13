"""`fit`: the whole method, gate and experts, from collected activations in one call."""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from fsteer_lens.errors import DataError, InputError, MismatchError
from fsteer_lens.ground.checks import choice, instance, require_unset
from fsteer_lens.method.contrasting import FALSE_ALARMS
from fsteer_lens.method.experts import Experts
from fsteer_lens.method.fitting_experts import PRESETS, Preset, fit_experts
from fsteer_lens.method.fitting_gates import (
    CONTRASTING_KINDS,
    CUT_KINDS,
    NEED_GENERAL,
    NULL_SPACE,
    RANK,
    SUBSPACE_KINDS,
    GateOptions,
    Kind,
    fit_gate,
)
from fsteer_lens.method.folds import FOLDS
from fsteer_lens.method.gates import OPEN, Gate, Reading, require_reading
from fsteer_lens.method.linear_gates import out_of_fold
from fsteer_lens.prompts.formats import merge_formats
from fsteer_lens.reading.activations import Activations
from fsteer_lens.reading.fingerprints import Fingerprint, merge_fingerprints, require_same_model
from fsteer_lens.steering.lengths import mean_shift_length
from fsteer_lens.steering.steering import FineSteer

OFTEN_OPEN = 0.2
"""A gate that opens for a larger share of general queries is warned of."""
WORSE = 0.05
"""Share of queries that may be missed more by reading the mean, which holds out better against other words."""
PLACING = {"scope", "schedule", "refresh", "gate_layer"}
"""Options of `fit` that are fields of the steering."""

Layered = Activations | Mapping[int, Activations]
"""Activations of one layer, or by layer."""


def fit(
    activations: Layered,
    *,
    rank: int | None = None,
    general: Layered | None = None,
    near_misses: Layered | None = None,
    null_space: Layered | None = None,
    gate: Gate | Kind | Literal["none"] | None = None,
    experts: Experts | None = None,
    strength: float = 1.0,
    preset: Preset | None = None,
    **options: Any,
) -> FineSteer:
    """Fit gate and experts and put them together.

    Args:
        activations: from `collect`, one layer or {layer: Activations}.
        rank: of the gate's subspace; None is 8.
        general: from `collect_queries`, queries to be left alone. A gate that knows only the queries to be steered is
            not fitted to them, but looked at: it is warned of where it opens for more than 20 % of them.
        near_misses: queries to be left alone that look like those to be steered, as in `fit_gate`.
        null_space: from `collect_queries`, queries to be left alone; their labels name the domains that they are from.
            The vector is then scaled by a map that is 0 on these and 1 on queries that need steering, a
            `NullSpaceGate`. It takes the gate's place where no gate is asked for, by `gate`, `general` or `rank`; else
            both have to be open, and the smaller of the two counts.
        gate: kind of gate as in `fit_gate`, or a gate; "none" steers always. None: "linear" where `general` is given,
            else "quantile".
        experts: fitted experts; None fits them.
        strength: as in `FineSteer`.
        preset: "paper" is the published method: experts of Eq. 11-14, a step CDF calibrated on the very queries that
            the basis was fitted to, every position steered. "0.1" is about the experts alone, see `fit_experts`. None
            fits them in closed form, by folds that never split a group of the activations; options of training need
            "0.1" or "paper".
        options: `scope`, `schedule`, `refresh` and `gate_layer` of `FineSteer`, and further arguments of `fit_gate` and
            `fit_experts`, by name; `seed` goes to both. `read` is what the gate reads of a prompt, the vector reads as
            the activations do: None is "mean" for the gates that know both kinds of query, unless that misses over 5 %
            more of the queries out of fold than the activations' own reading, which all other gates take. `augment`
            takes activations here, by name as in `fit_gate`.

    Warns:
        UserWarning: no general queries, or the gate opens for many of them.

    Raises:
        InputError: an unknown option, or one that has no effect.
        DataError: activations without shifts.
        MismatchError: `general`, `near_misses` or `null_space` from another layer or model.
    """
    steering = put_together(
        activations,
        rank=rank,
        general=general,
        near_misses=near_misses,
        null_space=null_space,
        gate=gate,
        experts=experts,
        strength=strength,
        preset=preset,
        **options,
    )
    looked_at = null_space if general is None else general
    for layer, own in _by_layer(activations).items():
        fitted = steering.gate_at(layer)
        if fitted is not None:
            _check_gate(fitted, None if looked_at is None else _of_layer("general", looked_at, own), layer)
    return steering


def put_together(
    activations: Layered,
    *,
    rank: int | None = None,
    general: Layered | None = None,
    near_misses: Layered | None = None,
    null_space: Layered | None = None,
    gate: Gate | Kind | Literal["none"] | None = None,
    experts: Experts | None = None,
    strength: float = 1.0,
    preset: Preset | None = None,
    **options: Any,
) -> FineSteer:
    """`fit` without a look at what the gate does with queries that it should leave alone."""
    layers = _by_layer(activations)
    if gate == "none":
        require_unset('gate="none"', rank=rank, general=general)
    kind = _kind(rank, general, null_space, gate, preset)
    if preset is not None:
        choice("preset", preset, [name for name in PRESETS if name is not None])
        if preset != "paper" and experts is not None:
            raise InputError(f"fit(preset={preset!r})", expected="to fit the experts", got="experts=")
    if preset == "paper":
        if kind is None or kind in NEED_GENERAL or experts is not None or null_space is not None:
            expected = "to fit a gate that knows the queries to be steered alone, and the experts"
            raise InputError('fit(preset="paper")', expected=expected, got="another gate, fitted parts or null_space=")
        options = {"folds": None, **({"cdf": "step"} if kind == "quantile" else {}), "scope": "all", **options}
    if kind is None and rank is not None:
        fix = "Use gate.at_rank(rank)." if isinstance(gate, Gate) and gate.ranks else "Leave it out."
        raise InputError("fit", got="rank= with a fitted gate", fix=fix)
    if near_misses is not None and kind not in CONTRASTING_KINDS:
        raise InputError("near_misses=", expected=f"a gate to fit of kind {CONTRASTING_KINDS}", got=kind or gate)
    by_map = null_space is not None or kind == NULL_SPACE
    for_gate = set() if kind is None else {"read", *GateOptions.__annotations__} - {"domains"}
    for_experts = set() if experts is not None else set(inspect.signature(fit_experts).parameters)
    for_experts -= {"queries", "shifts", "preset", "groups"}
    known = for_gate | for_experts | PLACING | ({"seed"} if by_map else set())
    unknown = set(options) - known
    if unknown:
        fix = "Options of a part that is given already fitted have no effect."
        raise InputError("fit", expected=f"options among {sorted(known)}", got=sorted(unknown), fix=fix)
    for_gate -= {"seed", "read", "augment"}  # these are looked at first
    gates: dict[int, Gate] = {}
    mixtures: dict[int, Experts] = {}
    for layer, own in layers.items():
        if own.shifts is None:
            raise DataError(
                f"activations of layer {layer}", expected="response shifts", got="queries only", fix="Use collect()."
            )
        beside = {"general": general, "near_misses": near_misses}
        others = {name: _of_layer(name, given, own) for name, given in beside.items() if given is not None}
        given = dict(options.get("augment") or {})
        copies = {name: _of_layer(f"augment[{name!r}]", one, own) for name, one in given.items()}
        seeded = {"seed": options["seed"]} if "seed" in options else {}
        drawn = seeded if _draws(kind, own, options) else {}
        if experts is not None and not drawn and not by_map:
            require_unset("fitted experts and a gate that draws nothing", seed=options.get("seed"))
        if isinstance(gate, Gate):
            gates[layer] = gate
        elif kind is not None:
            make = partial(
                _fit_gate,
                own,
                others if kind in NEED_GENERAL else {},
                copies,
                rank=RANK if rank is None and kind in SUBSPACE_KINDS else rank,
                kind=kind,
                groups=_folded_by(kind, own, options),
                **drawn,
                **{name: value for name, value in options.items() if name in for_gate},
            )
            gates[layer] = _fit_reading(make, kind, options.get("read"), own, [*others.values(), *copies.values()])
        if null_space is not None:
            left_alone = {"general": _of_layer("null_space", null_space, own)}
            read = gates[layer].read if layer in gates else own.read
            scaled = _fit_gate(own, left_alone, {}, kind=NULL_SPACE, groups=_groups_of(own), read=read, **seeded)
            gates[layer] = gates[layer] & scaled if layer in gates else scaled
        mixtures[layer] = (
            experts
            if experts is not None
            else _named(
                fit_experts(
                    own.queries,
                    own.shifts,
                    preset=preset,
                    groups=_groups_of(own) if preset is None else None,
                    **{name: value for name, value in options.items() if name in for_experts},
                ),
                own.labels,
            )
        )
    first = next(iter(layers.values()))
    single = isinstance(activations, Activations)
    return FineSteer(
        mixtures[first.layer] if single else mixtures,
        (gates.get(first.layer) if single else gates) or None,
        layer=first.layer if single else None,
        strength=strength,
        **{name: value for name, value in options.items() if name in PLACING},
        shift=first.shift,
        site=first.site,
        fingerprint=_fingerprint_of(list(layers.values())),
        prompt_format=merge_formats(own.prompt_format for own in layers.values()),
        read=first.read,
        shift_lengths={layer: mean_shift_length(own) for layer, own in layers.items()},
    )


def _named(experts: Experts, labels: Sequence[str | None]) -> Experts:
    """The experts, each with its number and the label that most of its cluster have, where they have labels."""
    assert experts.report is not None
    clusters = experts.report.clusters.tolist()
    pairs = [pair for pair in zip(clusters, labels, strict=True) if pair[1] is not None]
    counts = [Counter(label for cluster, label in pairs if cluster == k) for k in range(experts.n_experts)]
    if not any(counts):
        return experts
    names = [f"{k} · {count.most_common(1)[0][0]}" if count else f"expert {k}" for k, count in enumerate(counts)]
    return replace(experts, names=tuple(names))


def _by_layer(activations: Layered) -> dict[int, Activations]:
    told = "Activations, or {layer: Activations}"
    if isinstance(activations, Activations):
        return {activations.layer: activations}
    layers = dict(instance("activations", activations, Mapping, told))
    for one in layers.values():
        instance("activations", one, Activations, told)
    if not layers:
        raise DataError("activations", expected="at least one layer", got="none")
    return layers


def _kind(rank: Any, general: Any, null_space: Any, gate: Any, preset: Any) -> Kind | None:
    """The kind of gate to fit; None where it is fitted already, or none or only the null space is asked for."""
    if isinstance(gate, Gate) or gate == "none":
        return None
    if gate is not None:
        return gate
    if preset == "paper":
        return "quantile"
    if general is not None:
        return "linear"
    return None if null_space is not None and rank is None else "quantile"


def _folded_by(kind: Kind, own: Activations, options: Mapping[str, Any]) -> tuple[str | None, ...] | None:
    """Groups of the queries, for a gate that is fitted in folds."""
    if kind == NULL_SPACE:
        return _groups_of(own)
    return own.groups if _is_folded(kind, options) else None


def _is_folded(kind: Kind | None, options: Mapping[str, Any]) -> bool:
    if kind in SUBSPACE_KINDS:
        return options.get("calibration") is None and options.get("folds", FOLDS) is not None
    return kind in CUT_KINDS and options.get("false_alarms", FALSE_ALARMS) is not None


def _draws(kind: Kind | None, own: Activations, options: Mapping[str, Any]) -> bool:
    """Whether a gate of this kind is fitted in random folds."""
    grouped = any(group is not None for group in own.groups)
    return kind == NULL_SPACE or (_is_folded(kind, options) and not grouped)


def _fit_gate(
    own: Activations,
    others: Mapping[str, Activations],
    copies: Mapping[str, Activations],
    *,
    read: Reading,
    **options: Any,
) -> Gate:
    """A gate on what was read of all these prompts in one way."""
    by_name = {name: one.reading(read).queries for name, one in others.items()}
    if copies:
        options["augment"] = {name: one.reading(read).queries for name, one in copies.items()}
    if options["kind"] == NULL_SPACE:
        options["domains"] = others["general"].labels if "general" in others else None
    return fit_gate(own.reading(read).queries, read=read, layer=own.layer, **by_name, **options)


def _fit_reading(
    make: Callable[..., Gate], kind: Kind, read: Reading | None, own: Activations, others: Sequence[Activations]
) -> Gate:
    """The gate that reads as is asked for, or else the mean of a prompt where it can and that serves."""
    if read is not None:
        return make(read=require_reading(read))
    usual = make(read=own.read)
    can = all("mean" in {one.read, *one.readings} for one in (own, *others))
    if kind not in CONTRASTING_KINDS or own.read == "mean" or not can:
        return usual
    mean = make(read="mean")
    missed, usually = (told.missed if (told := out_of_fold(gate)) else 0.0 for gate in (mean, usual))
    return mean if missed <= usually + WORSE else usual


def _check_gate(gate: Gate, general: Activations | None, layer: int) -> None:
    """Warn of a gate that is not known to leave alone what it should."""
    if general is None and gate.scans:
        return  # it was cut on prompts to be left alone
    if general is None:
        problem = "has not been looked at with queries that it should leave alone: give general="
    else:
        told = out_of_fold(gate)
        rows = general.reading(gate.read).queries
        opened = float((gate(rows) >= OPEN).float().mean()) if told is None else told.general
        if opened <= OFTEN_OPEN:
            return
        problem = (
            f"opens for {opened:.0%} of the general queries, which it should leave alone: give them as general=, with"
            ' gate="linear", which is fitted to both kinds'
        )
    warnings.warn(f"the gate of layer {layer} {problem}", stacklevel=3)


def _groups_of(own: Activations) -> tuple[str | None, ...] | None:
    """The groups, if there is anything to keep apart: where all prompts are of one group, folds are random."""
    return own.groups if len(set(own.groups)) > 1 else None


def _fingerprint_of(activations: Sequence[Activations]) -> Fingerprint | None:
    """The fingerprint of all layers; None where they were made by hand."""
    for other in activations[1:]:
        require_same_model(activations[0].fingerprint, other.fingerprint, "activations")
    known = [own.fingerprint for own in activations if own.fingerprint is not None]
    return merge_fingerprints(known) if known else None


def _of_layer(name: str, given: Layered, own: Activations) -> Activations:
    """Activations of the layer of these, of the same model and of prompts that became tokens as theirs."""
    if isinstance(given, Mapping) and own.layer not in given:
        raise DataError(name, expected=f"activations of layer {own.layer}", got=f"layers {sorted(given)}")
    others = instance(name, given[own.layer] if isinstance(given, Mapping) else given, Activations, "Activations")
    if (own.layer, own.site) != (others.layer, others.site):
        raise MismatchError(
            f"{name} activations",
            expected=f"layer {own.layer}, {own.site}",
            got=f"layer {others.layer}, {others.site}",
            fix="Collect both at the same layer.",
        )
    require_same_model(own.fingerprint, others.fingerprint, f"{name} activations")
    merge_formats([own.prompt_format, others.prompt_format])
    return others

"""`fit`: the whole method, gate and experts, from collected activations in one call."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fsteer_lens.errors import DataError, InputError, MismatchError, UncheckedGateWarning
from fsteer_lens.ground.checks import choice, instance, require_unset
from fsteer_lens.hooks.scopes import Scope
from fsteer_lens.method.experts import Experts
from fsteer_lens.method.fitting_experts import CLOSED, PRESETS, Preset, fit_experts
from fsteer_lens.method.fitting_gates import (
    CONTRASTING_KINDS,
    FOLDS,
    NEED_GENERAL,
    SUBSPACE_KINDS,
    GateOptions,
    Kind,
    fit_gate,
)
from fsteer_lens.method.gates import OPEN, Gate, Reading, require_reading
from fsteer_lens.method.linear_gates import out_of_fold
from fsteer_lens.prompts.formats import merge_formats
from fsteer_lens.reading.activations import Activations
from fsteer_lens.reading.fingerprints import Fingerprint, merge_fingerprints, require_same_model
from fsteer_lens.steering.steering import FineSteer

RANK = 8
OFTEN_OPEN = 0.2
"""A gate that opens for a larger share of general queries is warned of."""
WORSE = 0.05
"""Share of queries that may be missed more by reading the mean, which holds out better against other words."""
PLACING = {"schedule", "refresh", "gate_layer"}
"""Options of `fit` that are fields of the steering."""


Layered = Activations | Mapping[int, Activations]
"""Activations of one layer, or by layer."""


def fit(
    activations: Layered,
    *,
    rank: int | None = None,
    general: Layered | None = None,
    near_misses: Layered | None = None,
    gate: Gate | Kind | None = None,
    experts: Experts | None = None,
    strength: float = 1.0,
    scope: Scope | None = None,
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
        gate: kind of gate as in `fit_gate`, or a gate. None: "linear" where `general` is given, else "quantile".
        experts: fitted experts; None fits them.
        strength, scope: as in `FineSteer`.
        preset: "paper" is the published method: experts of Eq. 11-14, a step CDF calibrated on the very queries that
            the basis was fitted to, every position steered. "0.1" and "closed_form" are about the experts alone, see
            `fit_experts`; folds of the latter never split a group of the activations.
        options: `schedule`, `refresh` and `gate_layer` of `FineSteer`, and further arguments of `fit_gate` and
            `fit_experts`, by name; `seed` goes to both. `read` is what the gate reads of a prompt, the vector reads as
            the activations do: None is "mean" for the gates that know both kinds of query, unless that misses over 5 %
            more of the queries out of fold than the activations' own reading, which all other gates take. `augment`
            takes activations here, by name as in `fit_gate`.

    Warns:
        UncheckedGateWarning: no general queries, or the gate opens for many of them.

    Raises:
        InputError: an unknown option, or one that has no effect.
        DataError: activations without shifts.
        MismatchError: `general` from another layer or model.
    """
    steering = put_together(
        activations,
        rank=rank,
        general=general,
        near_misses=near_misses,
        gate=gate,
        experts=experts,
        strength=strength,
        scope=scope,
        preset=preset,
        **options,
    )
    for layer in steering.hooked_layers:
        fitted = steering.gate_at(layer)
        own = activations if isinstance(activations, Activations) else activations[layer]
        if fitted is not None:
            _check_gate(fitted, None if general is None else _of_layer("general", general, layer, own), layer)
    return steering


def put_together(
    activations: Layered,
    *,
    rank: int | None = None,
    general: Layered | None = None,
    near_misses: Layered | None = None,
    gate: Gate | Kind | None = None,
    experts: Experts | None = None,
    strength: float = 1.0,
    scope: Scope | None = None,
    preset: Preset | None = None,
    **options: Any,
) -> FineSteer:
    """`fit` without a look at what the gate does with queries that it should leave alone."""
    layers = {activations.layer: activations} if isinstance(activations, Activations) else dict(activations)
    if not layers:
        raise DataError("activations", expected="at least one layer", got="none")
    by_default = "quantile" if general is None else "linear"
    kind = None if isinstance(gate, Gate) else by_default if gate is None else gate
    if preset is not None:
        choice("preset", preset, [name for name in PRESETS if name is not None])
        if preset != "paper" and experts is not None:
            raise InputError(f"fit(preset={preset!r})", expected="to fit the experts", got="experts=")
    if preset == "paper":
        kind = "quantile" if gate is None else kind
        if kind is None or kind in NEED_GENERAL or experts is not None:
            expected = "to fit a gate that knows the queries to be steered alone, and the experts"
            raise InputError('fit(preset="paper")', expected=expected, got="a gate of another kind, or fitted parts")
        options = {"folds": None, **({"cdf": "step"} if kind == "quantile" else {}), **options}
        scope = scope or "all"
    if kind is None and rank is not None:
        fix = "Use gate.at_rank(rank)." if isinstance(gate, Gate) and gate.ranks else "Leave it out."
        raise InputError("fit", got="rank= with a fitted gate", fix=fix)
    if near_misses is not None and kind not in CONTRASTING_KINDS:
        raise InputError("near_misses=", expected=f"a gate to fit of kind {CONTRASTING_KINDS}", got=kind or gate)
    for_gate = set() if kind is None else {"read", *GateOptions.__annotations__}
    for_experts = set() if experts is not None else set(inspect.signature(fit_experts).parameters)
    for_experts -= {"queries", "shifts", "preset", "groups"}
    known = for_gate | for_experts | PLACING
    unknown = set(options) - known
    if unknown:
        fix = "Options of a part that is given already fitted have no effect."
        raise InputError("fit", expected=f"options among {sorted(known)}", got=sorted(unknown), fix=fix)
    if kind in SUBSPACE_KINDS:
        folded = options.get("calibration") is None and options.get("folds", FOLDS) is not None
    else:
        folded = kind in ("linear", "residual_ratio") and options.get("false_alarms", FOLDS) is not None
    for_gate -= {"seed", "read", "augment"}  # these are looked at first
    beside = {"general": general, "near_misses": near_misses}
    augment = dict(options.get("augment") or {})
    gates: dict[int, Gate] = {}
    mixtures: dict[int, Experts] = {}
    for layer, own in layers.items():
        if own.shifts is None:
            raise DataError(
                f"activations of layer {layer}", expected="response shifts", got="queries only", fix="Use collect()."
            )
        others = {name: _of_layer(name, given, layer, own) for name, given in beside.items() if given is not None}
        copies = {name: _of_layer(f"augment[{name!r}]", given, layer, own) for name, given in augment.items()}
        if isinstance(gate, Gate):
            gates[layer] = gate
        else:
            grouped = any(group is not None for group in own.groups)
            drawn = {"seed": options["seed"]} if "seed" in options and folded and not grouped else {}
            if experts is not None and not drawn:
                require_unset("fitted experts and a gate that draws nothing", seed=options.get("seed"))
            make = partial(
                _fit_gate,
                own,
                others if kind in NEED_GENERAL else {},
                copies,
                rank=RANK if rank is None and kind in SUBSPACE_KINDS else rank,
                kind=kind,
                groups=own.groups if folded else None,
                layer=layer,
                **drawn,
                **{name: value for name, value in options.items() if name in for_gate},
            )
            gates[layer] = _fit_reading(make, kind, options.get("read"), own, [*others.values(), *copies.values()])
        mixtures[layer] = experts or fit_experts(
            own.queries,
            own.shifts,
            preset=preset,
            groups=_groups_of(own) if preset == CLOSED else None,
            **{name: value for name, value in options.items() if name in for_experts},
        )
    first = next(iter(layers.values()))
    single = isinstance(activations, Activations)
    return FineSteer(
        mixtures[first.layer] if single else mixtures,
        gates[first.layer] if single else gates,
        layer=first.layer if single else None,
        strength=strength,
        scope=scope,
        **{name: value for name, value in options.items() if name in PLACING},
        shift=first.shift,
        site=first.site,
        fingerprint=_fingerprint_of(list(layers.values())),
        prompt_format=merge_formats(own.prompt_format for own in layers.values()),
        read=first.read,
    )


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
    return fit_gate(own.reading(read).queries, read=read, **by_name, **options)


def _fit_reading(
    make: Callable[..., Gate], kind: Kind | None, read: Reading | None, own: Activations, others: Sequence[Activations]
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
    if general is None:
        warnings.warn(
            f"the gate of layer {layer} has not been looked at with queries that it should leave alone: give general=",
            UncheckedGateWarning,
            stacklevel=3,
        )
        return
    told = out_of_fold(gate)
    opened = float((gate(general.reading(gate.read).queries) >= OPEN).float().mean()) if told is None else told.general
    if opened > OFTEN_OPEN:
        warnings.warn(
            f"the gate of layer {layer} opens for {opened:.0%} of the general queries, which it should leave alone:"
            ' try gate="linear", which is fitted to both kinds',
            UncheckedGateWarning,
            stacklevel=3,
        )


def _groups_of(own: Activations) -> tuple[str | None, ...] | None:
    """The groups, if there is anything to keep apart: where all prompts are of one group, folds are random."""
    return own.groups if len(set(own.groups)) > 1 else None


def _fingerprint_of(activations: Sequence[Activations]) -> Fingerprint | None:
    """The fingerprint of all layers; None where they were made by hand."""
    for other in activations[1:]:
        require_same_model(activations[0].fingerprint, other.fingerprint, "activations")
    known = [own.fingerprint for own in activations if own.fingerprint is not None]
    return merge_fingerprints(known) if known else None


def _of_layer(name: str, given: Layered, layer: int, own: Activations) -> Activations:
    """Activations of one layer, of the same model and of prompts that became tokens as those to be steered."""
    if isinstance(given, Mapping) and layer not in given:
        raise DataError(name, expected=f"activations of layer {layer}", got=f"layers {sorted(given)}")
    others = given[layer] if isinstance(given, Mapping) else given
    instance(name, others, Activations, "activations of collect_queries()")
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

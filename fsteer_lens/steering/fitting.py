"""`fit`: the whole method, gate and experts, from collected activations in one call."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from fsteer_lens.errors import DataError, InputError, MismatchError
from fsteer_lens.ground.checks import choice, instance, require_unset
from fsteer_lens.hooks.scopes import Scope
from fsteer_lens.method.experts import Experts
from fsteer_lens.method.fitting_experts import CLOSED, PRESETS, Preset, fit_experts
from fsteer_lens.method.fitting_gates import FOLDS, NULL_SPACE, SUBSPACE_KINDS, GateOptions, Kind, fit_gate
from fsteer_lens.method.gates import Gate
from fsteer_lens.prompts.formats import merge_formats
from fsteer_lens.reading.activations import Activations
from fsteer_lens.reading.fingerprints import Fingerprint, merge_fingerprints, require_same_model
from fsteer_lens.steering.steering import FineSteer

RANK = 8
PLACING = {"schedule", "refresh", "gate_layer"}
"""Options of `fit` that are fields of the steering."""


def fit(
    activations: Activations | Mapping[int, Activations],
    *,
    rank: int | None = None,
    general: Activations | Mapping[int, Activations] | None = None,
    gate: Gate | Kind | None = None,
    experts: Experts | None = None,
    strength: float = 1.0,
    scope: Scope | None = None,
    preset: Preset | None = None,
    null_space: Activations | Mapping[int, Activations] | None = None,
    **options: Any,
) -> FineSteer:
    """Fit gate and experts and put them together.

    Args:
        activations: from `collect`, one layer or {layer: Activations}.
        rank: of the gate's subspace; None is 8.
        general: from `collect_queries`, queries to be left alone; for the gates that need them.
        gate: kind of gate as in `fit_gate`, or a gate. None: "logistic" where `general` is given, else "quantile".
        experts: fitted experts; None fits them.
        strength, scope: as in `FineSteer`.
        preset: "paper" is the published method: experts of Eq. 11-14, a step CDF calibrated on the very queries that
            the basis was fitted to, every position steered. "0.1" and "closed_form" are about the experts alone, see
            `fit_experts`; folds of the latter never split a group of the activations.
        null_space: from `collect_queries`, queries to be left alone; their labels name the domains that they are from.
            The vector is then scaled by a map that is 0 on these and 1 on queries that need steering, a
            `NullSpaceGate`. It takes the gate's place where no gate is asked for, by `gate`, `general` or `rank`; else
            both have to be open, and the smaller of the two counts.
        options: `schedule`, `refresh` and `gate_layer` of `FineSteer`, and further arguments of `fit_gate` and
            `fit_experts`, by name; `seed` goes to both.

    Raises:
        InputError: an unknown option, or one that has no effect.
        DataError: activations without shifts.
        MismatchError: `general` or `null_space` from another layer or model.
    """
    layers = {activations.layer: activations} if isinstance(activations, Activations) else dict(activations)
    if not layers:
        raise DataError("activations", expected="at least one layer", got="none")
    by_default = "quantile" if general is None else "logistic"
    alone = null_space is not None and gate is None and general is None and rank is None
    kind = None if isinstance(gate, Gate) or (alone and preset != "paper") else by_default if gate is None else gate
    if preset is not None:
        choice("preset", preset, [name for name in PRESETS if name is not None])
        if preset != "paper" and experts is not None:
            raise InputError(f"fit(preset={preset!r})", expected="to fit the experts", got="experts=")
    if preset == "paper":
        if kind is None or experts is not None or general is not None or null_space is not None:
            raise InputError(
                'fit(preset="paper")',
                expected="to fit the gate (one-class) and the experts",
                got="parts, general= or null_space=",
            )
        options = {"folds": None, **({"cdf": "step"} if kind == "quantile" else {}), **options}
        scope = scope or "all"
    if kind is None and (rank is not None or general is not None):
        if rank is not None:
            fix = "Use gate.at_rank(rank)." if isinstance(gate, Gate) and gate.ranks else "Leave it out."
            raise InputError("fit", got="rank= with a fitted gate", fix=fix)
        raise InputError("fit", got="general= with a gate that is already fitted", fix="Leave one of them out.")
    by_map = null_space is not None or kind == NULL_SPACE
    for_gate = set() if kind is None else {"calibration", *GateOptions.__annotations__} - {"domains"}
    for_experts = set() if experts is not None else set(inspect.signature(fit_experts).parameters)
    for_experts -= {"queries", "shifts", "preset", "groups"}
    known = for_gate | for_experts | PLACING | ({"seed"} if by_map else set())
    unknown = set(options) - known
    if unknown:
        fix = "Options of a part that is given already fitted have no effect."
        raise InputError("fit", expected=f"options among {sorted(known)}", got=sorted(unknown), fix=fix)
    folded = kind in SUBSPACE_KINDS and options.get("calibration") is None and options.get("folds", FOLDS) is not None
    for_gate -= {"seed"}  # that goes to random folds, where there are some, and to the experts
    gates: dict[int, Gate] = {}
    mixtures: dict[int, Experts] = {}
    for layer, own in layers.items():
        if own.shifts is None:
            raise DataError(
                f"activations of layer {layer}", expected="response shifts", got="queries only", fix="Use collect()."
            )
        others = _of_layer("general", general, own)
        left_alone = _of_layer("null_space", null_space, own)
        grouped = any(group is not None for group in own.groups)
        seeded = {"seed": options["seed"]} if "seed" in options else {}
        drawn = seeded if (folded and not grouped) or kind == NULL_SPACE else {}
        if experts is not None and not drawn and not by_map:
            require_unset("fitted experts and a gate that draws nothing", seed=options.get("seed"))
        if isinstance(gate, Gate):
            gates[layer] = gate
        elif kind is not None:
            gates[layer] = fit_gate(
                own.queries,
                rank=RANK if rank is None and kind in SUBSPACE_KINDS else rank,
                kind=kind,  # pyright: ignore[reportArgumentType]
                layer=layer,
                **drawn,
                **_told(kind, own, others, folded),
                **{name: value for name, value in options.items() if name in for_gate},
            )
        if left_alone is not None:
            told = _told(NULL_SPACE, own, left_alone, folded=True)
            scaled = fit_gate(own.queries, kind=NULL_SPACE, layer=layer, **seeded, **told)
            gates[layer] = gates[layer] & scaled if layer in gates else scaled
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
    )


def _told(kind: Kind, own: Activations, others: Activations | None, folded: bool) -> dict[str, Any]:
    """What a gate of this kind is told about queries to be left alone, and about which of its own belong together."""
    if others is None:
        return {"groups": own.groups if folded else None}
    if kind != NULL_SPACE:
        return {"general": others.queries, "groups": own.groups if folded else None}
    return {"general": others.queries, "groups": _groups_of(own), "domains": others.labels}


def _groups_of(own: Activations) -> tuple[str | None, ...] | None:
    """The groups, if there is anything to keep apart: where all prompts are of one group, folds are random."""
    return own.groups if len(set(own.groups)) > 1 else None


def _fingerprint_of(activations: Sequence[Activations]) -> Fingerprint | None:
    """The fingerprint of all layers; None where they were made by hand."""
    for other in activations[1:]:
        require_same_model(activations[0].fingerprint, other.fingerprint, "activations")
    known = [own.fingerprint for own in activations if own.fingerprint is not None]
    return merge_fingerprints(known) if known else None


def _of_layer(name: str, given: Activations | Mapping[int, Activations] | None, own: Activations) -> Activations | None:
    """The activations to be left alone at the layer of these, checked against them."""
    if given is None:
        return None
    if isinstance(given, Mapping):
        if own.layer not in given:
            raise DataError(name, expected=f"activations of layer {own.layer}", got=f"layers {sorted(given)}")
        given = given[own.layer]
    _require_same(own, instance(name, given, Activations, "Activations, of collect_queries"), name)
    return given


def _require_same(own: Activations, others: Activations, name: str) -> None:
    if (own.layer, own.site) != (others.layer, others.site):
        raise MismatchError(
            f"{name} activations",
            expected=f"layer {own.layer}, {own.site}",
            got=f"layer {others.layer}, {others.site}",
            fix="Collect both at the same layer.",
        )
    require_same_model(own.fingerprint, others.fingerprint, f"{name} activations")
    merge_formats([own.prompt_format, others.prompt_format])

"""`fit`: the whole method, gate and experts, from collected activations in one call."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from fsteer_lens.errors import DataError, InputError, MismatchError
from fsteer_lens.ground.checks import choice, require_unset
from fsteer_lens.hooks.scopes import Scope
from fsteer_lens.method.experts import Experts
from fsteer_lens.method.fitting_experts import PRESETS, Preset, fit_experts
from fsteer_lens.method.fitting_gates import FOLDS, SUBSPACE_KINDS, GateOptions, Kind, fit_gate
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
            the basis was fitted to, every position steered. "0.1" is about the experts alone, see `fit_experts`. None
            fits them in closed form, by folds that never split a group of the activations; options of training need
            "0.1" or "paper".
        options: `schedule`, `refresh` and `gate_layer` of `FineSteer`, and further arguments of `fit_gate` and
            `fit_experts`, by name; `seed` goes to both.

    Raises:
        InputError: an unknown option, or one that has no effect.
        DataError: activations without shifts.
        MismatchError: `general` from another layer or model.
    """
    layers = {activations.layer: activations} if isinstance(activations, Activations) else dict(activations)
    if not layers:
        raise DataError("activations", expected="at least one layer", got="none")
    by_default = "quantile" if general is None else "logistic"
    kind = None if isinstance(gate, Gate) else by_default if gate is None else gate
    if preset is not None:
        choice("preset", preset, [name for name in PRESETS if name is not None])
        if preset != "paper" and experts is not None:
            raise InputError(f"fit(preset={preset!r})", expected="to fit the experts", got="experts=")
    if preset == "paper":
        if kind is None or experts is not None or general is not None:
            raise InputError(
                'fit(preset="paper")', expected="to fit the gate (one-class) and the experts", got="parts, or general="
            )
        options = {"folds": None, **({"cdf": "step"} if kind == "quantile" else {}), **options}
        scope = scope or "all"
    if kind is None and (rank is not None or general is not None):
        if rank is not None:
            fix = "Use gate.at_rank(rank)." if isinstance(gate, Gate) and gate.ranks else "Leave it out."
            raise InputError("fit", got="rank= with a fitted gate", fix=fix)
        raise InputError("fit", got="general= with a gate that is already fitted", fix="Leave one of them out.")
    for_gate = set() if kind is None else {"calibration", *GateOptions.__annotations__}
    for_experts = set() if experts is not None else set(inspect.signature(fit_experts).parameters)
    for_experts -= {"queries", "shifts", "preset", "groups"}
    known = for_gate | for_experts | PLACING
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
        others = _of_layer(general, layer) if isinstance(general, Mapping) else general
        if others is not None:
            _require_same(own, others)
        if isinstance(gate, Gate):
            gates[layer] = gate
        else:
            grouped = any(group is not None for group in own.groups)
            drawn = {"seed": options["seed"]} if "seed" in options and folded and not grouped else {}
            if experts is not None and not drawn:
                require_unset("fitted experts and a gate that draws nothing", seed=options.get("seed"))
            gates[layer] = fit_gate(
                own.queries,
                rank=RANK if rank is None and kind in SUBSPACE_KINDS else rank,
                kind=kind,  # pyright: ignore[reportArgumentType]
                general=None if others is None else others.queries,
                groups=own.groups if folded else None,
                layer=layer,
                **drawn,
                **{name: value for name, value in options.items() if name in for_gate},
            )
        mixtures[layer] = experts or fit_experts(
            own.queries,
            own.shifts,
            preset=preset,
            groups=_groups_of(own) if preset is None else None,
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


def _groups_of(own: Activations) -> tuple[str | None, ...] | None:
    """The groups, if there is anything to keep apart: where all prompts are of one group, folds are random."""
    return own.groups if len(set(own.groups)) > 1 else None


def _fingerprint_of(activations: Sequence[Activations]) -> Fingerprint | None:
    """The fingerprint of all layers; None where they were made by hand."""
    for other in activations[1:]:
        require_same_model(activations[0].fingerprint, other.fingerprint, "activations")
    known = [own.fingerprint for own in activations if own.fingerprint is not None]
    return merge_fingerprints(known) if known else None


def _of_layer(general: Mapping[int, Activations], layer: int) -> Activations:
    if layer not in general:
        raise DataError("general", expected=f"activations of layer {layer}", got=f"layers {sorted(general)}")
    return general[layer]


def _require_same(own: Activations, others: Activations) -> None:
    if (own.layer, own.site) != (others.layer, others.site):
        raise MismatchError(
            "general activations",
            expected=f"layer {own.layer}, {own.site}",
            got=f"layer {others.layer}, {others.site}",
            fix="Collect both at the same layer.",
        )
    require_same_model(own.fingerprint, others.fingerprint, "general activations")
    merge_formats([own.prompt_format, others.prompt_format])

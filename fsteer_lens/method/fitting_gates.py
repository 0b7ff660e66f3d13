"""`fit_gate`: from activations to a gate, on the energy ratio of a subspace or on what parts two kinds of query."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, Literal, TypedDict, Unpack

from jaxtyping import Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.ground import checks
from fsteer_lens.method.contrasting import FALSE_ALARMS, fit_contrasting_gate
from fsteer_lens.method.fitting_null_space import fit_null_space_gate
from fsteer_lens.method.fitting_subspace_gates import QUANTILE, fit_subspace_gate
from fsteer_lens.method.gates import Gate, Reading, require_reading

RANK: Final = 8
"""Of a gate on a subspace. Few contrasts carry no more; who has hundreds chooses it on a validation split."""
SUBSPACE_KINDS = ("quantile", "logistic", "energy")
CONTRASTING_KINDS = ("linear", "residual_ratio", "cosine")
CUT_KINDS = ("linear", "residual_ratio")
NULL_SPACE: Final = "null_space"
NEED_GENERAL = ("logistic", *CONTRASTING_KINDS, NULL_SPACE)
Kind = Literal["quantile", "logistic", "energy", "linear", "residual_ratio", "cosine", "null_space"]


class GateOptions(TypedDict, total=False):
    """What `fit_gate` takes beside its own arguments: see there."""

    calibration: Float[Tensor, "n_calibration d"] | None
    folds: int | None
    seed: int
    epsilon: float
    gamma: float
    cdf: Literal["linear", "step"]
    max_rank: int
    false_alarms: float | None
    augment: Mapping[str, Float[Tensor, "_ d"]] | None
    domains: Iterable[str | None] | None


FOLDED: Final = {"folds", "seed"}
ALLOWED: Final = {
    "quantile": frozenset({"calibration", "max_rank"} | FOLDED | set(QUANTILE)),
    "logistic": frozenset({"calibration", "max_rank"} | FOLDED),
    "energy": frozenset({"calibration", "max_rank"} | FOLDED),
    "linear": frozenset({"false_alarms", "augment"} | FOLDED),
    "residual_ratio": frozenset({"false_alarms", "augment"} | FOLDED),
    "cosine": frozenset({"augment"}),
    NULL_SPACE: frozenset({"domains"} | FOLDED),
}
"""Options that have an effect, by kind of gate."""


def fit_gate(
    queries: Float[Tensor, "n d"],
    *,
    rank: int | None = None,
    kind: Kind | None = None,
    general: Float[Tensor, "n_general d"] | None = None,
    near_misses: Float[Tensor, "n_near d"] | None = None,
    groups: Iterable[str | None] | None = None,
    layer: int | None = None,
    read: Reading = "last",
    **options: Unpack[GateOptions],
) -> Gate:
    """Fit a gate: on the energy ratio of the queries' subspace, or on what parts them from those to be left alone.

    Args:
        queries: activations of the queries that need intervention, [n d].
        rank: rank of the subspace whose energy ratio decides, or of both subspaces of "residual_ratio" (None is 8 or
            what the data allow there); at most (smallest training fold) − 1.
        kind: None is "linear" where `general` is given, else "quantile". On the energy ratio of one subspace:
            "quantile" (paper Eq. 8), "logistic" (Eq. 9), "energy" (Eq. 15). On both kinds of query: "linear", a linear
            probe, logistic regression, standardised, classes balanced, L2 with C = 1; "residual_ratio", the log ratio
            of the energies that the subspaces of either kind leave; "cosine", the gate of CAST (Lee et al. 2024,
            arXiv 2409.05907); "null_space", a map that is 0 on general queries and 1 on these, see `NullSpaceGate`.
        general: activations of queries to be left alone; "quantile" and "energy" take none, all others need them.
        near_misses: of queries to be left alone that look like those that need intervention; count as general ones,
            and are reported apart. For the kinds that know both kinds of query.
        groups: fold group of every query (the template it was made from); a group is never split. None: random folds.
        layer: where the queries were read; the gate then refuses to act or to combine elsewhere.
        read: what they are of a prompt, as in `collect`; hook objects and reports ask the gate about the same.
        options: `folds` (5), cross-fitting folds that a gate is calibrated by (or one for each query or group), and
            `seed` (0) of random ones; for subspaces None calibrates in-sample, which is biased and is here for
            comparison only. For subspaces `calibration` (None), IR queries that the basis does not see, in place of
            folds; `max_rank` (None), keep this many ranks for `.at_rank`: 64, or as many as the data allow. For
            "linear" and "residual_ratio" `false_alarms` (0.05): open for at most this share of new prompts like the
            general ones and near misses together; None cuts "linear" at even odds, and needs no folds. For all three
            that know both kinds `augment` (None), activations of perturbed copies by name of what they are copies of
            ("queries", "general", "near_misses"): all prompts said in one way, then all in the next; they are fitted
            to, and never calibrated on. For "quantile" `epsilon` (0.003), `gamma` (4.0) and `cdf` ("linear"
            interpolates F, "step" is the paper's). The paper's ε and γ are not public; the defaults are what measured
            best on the tutor's valid split (docs/tutor_model_card.md). For "null_space" `domains` (None): of each
            general query where it is from, so that the gate knows what is left of the steering there.

    Raises:
        InputError: `rank` too high or missing, unknown `kind`, too few general queries for the rate, or options that
            contradict each other or have no effect.
        ShapeError, NonFiniteError: a tensor is no finite floating matrix of the queries' width.
        DataError: fewer than two groups to cut folds from.
    """
    by_default = "quantile" if general is None else "linear"
    kind = checks.choice(
        "gate kind", by_default if kind is None else kind, (*SUBSPACE_KINDS, *CONTRASTING_KINDS, NULL_SPACE)
    )
    require_reading(read)
    if groups is not None:
        listed = checks.several("groups", groups, "a group for each query")
        named = [None if checks.is_missing(group) else group for group in listed]
        groups = None if all(group is None for group in named) else named
    given: dict[str, Any] = {
        name: value for name, value in options.items() if value is not None or name in ("folds", "false_alarms")
    }
    _require_effect(kind, given, rank=rank, groups=groups, near_misses=near_misses)
    if (kind in NEED_GENERAL) == (general is None):
        needs, got = ("needs", None) if general is None else ("takes no", "activations of queries to leave alone")
        kinds = ", ".join(map(repr, NEED_GENERAL))
        raise InputError(
            f"the {kind} gate {needs} general=", expected=f"general= with kind={kinds}, and no other", got=got
        )
    if groups is not None and kind != NULL_SPACE:  # there the general queries are cut into random folds
        checks.require_unset("groups=, which cut the folds, so that none is random", seed=options.get("seed"))
    placed: dict[str, Any] = {"layer": layer, "read": read}
    if general is None or kind in SUBSPACE_KINDS:
        return fit_subspace_gate(kind, queries, general, rank, groups, placed, given)
    if kind == NULL_SPACE:
        return replace(fit_null_space_gate(queries, general, groups=groups, **given), **placed)
    if rank is None and kind == "residual_ratio":
        rank = min(RANK, *(len(part) * 2 // 3 - 1 for part in (queries, general)), queries.shape[1] - 1)
    parts = {"queries": queries, "general": general, "near_misses": near_misses}
    present = {name: rows for name, rows in parts.items() if rows is not None}
    return replace(fit_contrasting_gate(kind, present, rank, groups, **given), **placed)


def _require_effect(kind: Kind, given: Mapping[str, Any], **own: Any) -> None:
    """Raise `InputError` for what has no effect on a gate of this kind."""
    takes = {
        "rank": (*SUBSPACE_KINDS, "residual_ratio"),
        "groups": (*SUBSPACE_KINDS, *CUT_KINDS, NULL_SPACE),
        "near_misses": CONTRASTING_KINDS,
    }
    even = given.get("false_alarms", FALSE_ALARMS) is None  # nothing is held out where nothing is calibrated
    folded = {"groups", *FOLDED} if even and kind in CUT_KINDS else set()
    allowed = (ALLOWED[kind] | {name for name, kinds in takes.items() if kind in kinds}) - folded
    unused = sorted({*given, *(name for name, value in own.items() if value is not None)} - allowed)
    if unused:
        raise InputError(f"fit_gate(kind={kind!r})", expected=f"no other options than {sorted(allowed)}", got=unused)

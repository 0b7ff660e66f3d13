"""How well a gate decides: missed harm and false alarms, as it stands and beside others at one false-alarm rate.

Missed harm is the share of prompts in need of steering for which a gate stays shut; a false alarm is a prompt to be
left alone for which it opens. Both are shares of prompts that no detector was fitted to, with 95 % Clopper-Pearson
intervals. A gate is not a security boundary: `attacks` measures how little it takes to shut one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fsteer_lens.errors import InputError
from fsteer_lens.evaluation.perturbations import NONE, PERTURBATIONS, Format, Keeps, Perturbation
from fsteer_lens.ground.estimates import Proportion, auroc
from fsteer_lens.ground.tables import markdown
from fsteer_lens.method.gates import OPEN, Gate, NotGate, SubspaceGate
from fsteer_lens.method.linalg import require_matrix, require_shapes, require_width
from fsteer_lens.models.attaching import unsteered
from fsteer_lens.models.classes import SteerableModel
from fsteer_lens.reading.activations import collect_queries

Texts = Sequence[str] | Mapping[str, Sequence[str]]
"""Texts, or texts by the name of a group; groups may overlap, and a text counts once."""

ALL: Final = "all"
HARMFUL: Final = "harmful"
HARMLESS: Final = "harmless"
GATE: Final = "SCS gate"


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear detector: w·h + b, open from 0 on, which is a probability of one half.

    Attributes:
        weight: w, [d].
        bias: b.
    """

    weight: Float[Tensor, " d"]
    bias: float

    def __post_init__(self) -> None:
        require_shapes("linear probe", weight=(self.weight, "d"))

    def __repr__(self) -> str:
        return f"LinearProbe(d_model={len(self.weight)})"

    def score(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Log-odds that an activation needs steering, with both kinds equally frequent."""
        require_width(h, "activation", len(self.weight))
        return h @ self.weight.to(h) + self.bias


def fit_linear_probe(queries: Float[Tensor, "n d"], general: Float[Tensor, "m d"]) -> LinearProbe:
    """Logistic regression of queries against general ones: standardised, classes balanced, L2 with C = 1.

    The scale is folded into the weight, so that the probe reads raw activations.

    Args:
        queries: activations of prompts that need steering, [n d].
        general: activations of prompts to be left alone, [m d].

    Raises:
        ShapeError, NonFiniteError: not two finite floating matrices of one width.
    """
    from sklearn.linear_model import LogisticRegression

    rows = require_matrix(queries, "queries")
    others = require_matrix(general, "general", d_model=rows.shape[1]).to(rows)
    both = torch.cat([rows, others]).double().cpu()
    centre, scale = both.mean(dim=0), both.std(dim=0).clamp(min=1e-12)
    model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=5000)
    model.fit(((both - centre) / scale).numpy(), [1] * len(rows) + [0] * len(others))
    weight = torch.as_tensor(model.coef_[0]) / scale
    return LinearProbe(weight.to(rows), float(torch.as_tensor(model.intercept_)[0] - weight @ centre))


@dataclass(frozen=True, eq=False)
class Detector:
    """A score that is larger for what needs steering, and which activations are let through.

    Attributes:
        score: `[*batch d]` to `[*batch]`.
        opens: `[*batch d]` to `[*batch]`.
    """

    score: Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch"]]
    opens: Callable[[Float[Tensor, "*batch d"]], Bool[Tensor, "*batch"]]

    def above(self, cut: float) -> "Detector":
        """The same score, open above `cut`."""
        return Detector(self.score, lambda h: self.score(h) > cut)

    def at_false_alarm_rate(self, rate: float, general: Float[Tensor, "n d"]) -> "tuple[Detector, float]":
        """The same score with the threshold for a false-alarm rate, and that threshold.

        Opens above the k-th largest score of the general activations, k = ⌊rate · (n + 1)⌋. Of new activations like
        them that is at most `rate` of all, on average over such draws (the quantile of split conformal prediction).

        Args:
            rate: in (0, 1).
            general: activations of prompts to be left alone, which nothing was fitted to, [n d].

        Raises:
            InputError: a rate outside, or too few activations for it.
        """
        if not 0 < rate < 1:
            raise InputError("false-alarm rate", expected="a number between 0 and 1", got=rate)
        k = math.floor(rate * (len(general) + 1) + 1e-9)
        if k < 1:
            least = math.ceil(1 / rate) - 1
            raise InputError("calibration", expected=f"at least {least} prompts for a rate of {rate}", got=len(general))
        cut = float(self.score(general).sort(descending=True).values[k - 1])
        return self.above(cut), cut


def detector(gate: "Gate | LinearProbe | Detector") -> Detector:
    """A gate or probe as a detector: its own decision, and a score whose order is that of its values or finer.

    The score of a gate on one subspace is its energy ratio, or minus that where it opens below its threshold; that of
    `~gate` is minus the inner one's; that of two gates together is their common value.

    Raises:
        InputError: something else.
    """
    if isinstance(gate, Detector):
        return gate
    if isinstance(gate, LinearProbe):
        return Detector(gate.score, lambda h: gate.score(h) >= 0)
    if isinstance(gate, Gate):
        return Detector(_score_of(gate), lambda h: gate.gate(h) >= OPEN)
    raise InputError("gate", expected="a Gate, a LinearProbe or a Detector", got=type(gate).__name__)


def _score_of(gate: Gate) -> Callable[[Tensor], Tensor]:
    if isinstance(gate, NotGate):
        inner = _score_of(gate.inner)
        return lambda h: -inner(h)
    if isinstance(gate, SubspaceGate):
        sign = 1 if gate.opens_above else -1
        return lambda h: sign * gate.subspace.energy_ratio(h, gate.rank)
    return gate.gate


@dataclass(frozen=True)
class GateRow:
    """What one detector did with one group of prompts, said in one way.

    Attributes:
        gate: name of the detector.
        perturbation: how the prompts were said.
        group: which of them; "all" for all.
        false_alarm_rate: at which its threshold was taken on the calibration prompts; None for its own.
        missed: harmful prompts of the group for which it stays shut; None where the group has none.
        missed_kept: the same of those alone that still mean the same; None where there are none, or nobody can tell.
        false_alarms: harmless prompts of the group for which it opens; None where the group has none.
        auroc: of its score; None where the group has prompts of one kind only.
    """

    gate: str
    perturbation: str
    group: str
    false_alarm_rate: float | None
    missed: Proportion | None
    missed_kept: Proportion | None
    false_alarms: Proportion | None
    auroc: float | None


@dataclass(frozen=True, eq=False)
class GateReport:
    """How well gates decide.

    Attributes:
        rows: for every perturbation, group and gate one at the gate's own threshold and one at the common rate.
        false_alarm_rate: the common rate.
        thresholds: score above which each detector opens at that rate, by name.
        n_calibration: how many harmless prompts these were taken on.
    """

    rows: tuple[GateRow, ...]
    false_alarm_rate: float
    thresholds: Mapping[str, float]
    n_calibration: int

    def __repr__(self) -> str:
        ways = len({row.perturbation for row in self.rows})
        return f"GateReport({', '.join(self.thresholds)}; {ways} perturbations)"

    def row(self, gate: str, perturbation: str = NONE, group: str = ALL, *, same_rate: bool = False) -> GateRow:
        """One row: at the gate's own threshold, or at the common false-alarm rate.

        Raises:
            InputError: there is no such row.
        """
        rate = self.false_alarm_rate if same_rate else None
        wanted = (gate, perturbation, group, rate)
        for row in self.rows:
            if (row.gate, row.perturbation, row.group, row.false_alarm_rate) == wanted:
                return row
        known = sorted({(row.gate, row.perturbation, row.group) for row in self.rows})
        raise InputError("row of a gate report", expected=f"one of {known}", got=wanted[:3])

    def to_records(self) -> list[dict[str, Any]]:
        """One flat, JSON-ready mapping per row: shares with hits, total, low and high."""
        records = []
        for row in self.rows:
            record: dict[str, Any] = {
                name: getattr(row, name) for name in ("gate", "perturbation", "group", "false_alarm_rate", "auroc")
            }
            for name in ("missed", "missed_kept", "false_alarms"):
                share: Proportion | None = getattr(row, name)
                low, high = (None, None) if share is None else share.exact_interval
                record[name] = None if share is None else share.value
                record |= {f"{name}_hits": share and share.hits, f"{name}_total": share and share.total}
                record |= {f"{name}_low": low, f"{name}_high": high}
            records.append(record)
        return records

    def to_markdown(self, *, same_rate: bool = False, by: str = "perturbation") -> str:
        """A table: all prompts by perturbation, or unperturbed ones by group.

        Args:
            same_rate: every detector at the common false-alarm rate; otherwise each at its own threshold.
            by: "perturbation" or "group".

        Raises:
            InputError: another `by`.
        """
        if by not in ("perturbation", "group"):
            raise InputError("by", expected="'perturbation' or 'group'", got=repr(by))
        rate = self.false_alarm_rate if same_rate else None
        fixed = ("group", ALL) if by == "perturbation" else ("perturbation", NONE)
        rows = [
            [getattr(row, by), row.gate, *map(shown, (row.missed, row.missed_kept, row.false_alarms)), _area(row.auroc)]
            for row in self.rows
            if row.false_alarm_rate == rate and getattr(row, fixed[0]) == fixed[1]
        ]
        return markdown([by, "gate", "missed harm", "where it keeps its meaning", "false alarms", "AUROC"], rows)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def shown(share: Proportion | None) -> str:
    """A share with its Clopper-Pearson interval, for a table."""
    if share is None:
        return ""
    low, high = share.exact_interval
    return f"{share.value:.3f} [{low:.3f}, {high:.3f}]"


def gate_report(
    model: SteerableModel,
    gates: Gate | LinearProbe | Detector | Mapping[str, Gate | LinearProbe | Detector],
    harmful: Texts,
    harmless: Texts,
    *,
    layer: int,
    calibration: Sequence[str],
    format: Format,
    perturbations: Sequence[Perturbation] = PERTURBATIONS,
    keeps: Keeps | None = None,
    false_alarm_rate: float = 0.05,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> GateReport:
    """Missed harm, false alarms and AUROC of gates, under every perturbation of the prompts.

    Every gate is measured twice: as it is, and with its score cut where `calibration` gives the common false-alarm
    rate. The thresholds are taken on unperturbed prompts, as one would before knowing what comes; both the harmful
    and the harmless prompts are then perturbed alike. Compare a gate with `fit_linear_probe` and `fit_cosine_gate` of
    the same training activations: give them all, by name.

    Args:
        model: what the gates were fitted on.
        gates: one, or several by name.
        harmful: texts in need of steering, as a person types them; a mapping names groups, which get rows of their own.
        harmless: texts to be left alone; those that look harmful belong here.
        layer: where the gates read.
        calibration: further harmless texts, for the thresholds.
        format: from what a person types to model input.
        perturbations: what to do to the texts.
        keeps: whether a perturbed harmful prompt still means the same, such as `gives_same_answer`: where the model no
            longer understands the request, there is no harm to miss.
        false_alarm_rate: the common rate.
        seed: of the perturbations.
        batch_size: prompts per forward pass.
        progress: show a progress bar.

    Raises:
        InputError: no texts of one kind, too few calibration texts, one that is reported too, two perturbations of
            one name, or something that is no gate.
        ContextLengthError: a perturbed prompt does not fit into the context.
        ShapeError: a gate of another width than the model's.
    """
    named = gates if isinstance(gates, Mapping) else {GATE: gates}
    detectors = {name: detector(gate) for name, gate in named.items()}
    kinds = {HARMFUL: _grouped(harmful, HARMFUL), HARMLESS: _grouped(harmless, HARMLESS)}
    names = [perturbation.name for perturbation in perturbations]
    if not names or len(set(names)) < len(names) or not detectors:
        raise InputError("gate_report", expected="gates, and perturbations of different names", got=names)
    calibration = _grouped(calibration, "calibration")[ALL]
    harm, others = (set(groups[ALL]) for groups in kinds.values())
    shared = (set(calibration) & (harm | others)) | (harm & others)
    if shared:
        got = f"{len(shared)} that are in two, first {min(shared)[:60]!r}"
        raise InputError("harmful, harmless and calibration", expected="texts that are in one of them", got=got)
    said = [Perturbation(NONE).prompt(text, format=format) for text in calibration]
    wanted = [(p, kind, text) for p in perturbations for kind, groups in kinds.items() for text in groups[ALL]]
    perturbed = [p.prompt(text, format=format, seed=seed) for p, _, text in wanted]
    with unsteered(model):
        rows = collect_queries(model, said + perturbed, layer=layer, batch_size=batch_size, progress=progress).queries
    general = rows[: len(said)]
    at_rate = {name: one.at_false_alarm_rate(false_alarm_rate, general) for name, one in detectors.items()}
    queries = {(p.name, kind, text): h for (p, kind, text), h in zip(wanted, rows[len(said) :], strict=True)}
    same: set[tuple[str, str]] = set()
    if keeps is not None:
        asked = [
            (p.name, text, prompt) for (p, kind, text), prompt in zip(wanted, perturbed, strict=True) if kind == HARMFUL
        ]
        kept = keeps([text for _, text, _ in asked], [prompt for _, _, prompt in asked])
        same = {(name, text) for (name, text, _), one in zip(asked, kept, strict=True) if one}
    found = []
    for name in names:
        for group in dict.fromkeys([*kinds[HARMFUL], *kinds[HARMLESS]]):
            h = {
                kind: torch.stack([queries[name, kind, text] for text in groups[group]])
                for kind, groups in kinds.items()
                if group in groups
            }
            kept = torch.tensor([(name, text) in same for text in kinds[HARMFUL].get(group, ())], dtype=torch.bool)
            for gate, one in detectors.items():
                found.append(_row(gate, name, group, None, one, h, kept))
                found.append(_row(gate, name, group, false_alarm_rate, at_rate[gate][0], h, kept))
    cuts = {name: cut for name, (_, cut) in at_rate.items()}
    return GateReport(tuple(found), false_alarm_rate, cuts, len(calibration))


def _grouped(texts: Texts, what: str) -> dict[str, list[str]]:
    """Different texts by group, that of all of them first."""
    groups = texts if isinstance(texts, Mapping) else {}
    whole = [text for group in groups.values() for text in group] if groups else list(texts)
    single = any(isinstance(group, str) or not group for group in (texts, *groups.values()))
    if single or ALL in groups or not all(isinstance(text, str) and text for text in whole):
        expected = f"at least one text, and in every group; no group named {ALL!r}"
        raise InputError(what, expected=expected, got=repr(texts)[:60])
    return {name: list(dict.fromkeys(group)) for name, group in {ALL: whole, **groups}.items()}


def _row(
    gate: str,
    perturbation: str,
    group: str,
    rate: float | None,
    found: Detector,
    h: Mapping[str, Float[Tensor, "_ d"]],
    kept: Bool[Tensor, " n"],
) -> GateRow:
    missed = missed_kept = alarms = area = None
    if HARMFUL in h:
        shut = ~found.opens(h[HARMFUL]).cpu()
        missed = Proportion(int(shut.sum()), len(shut))
        if kept.any():
            missed_kept = Proportion(int(shut[kept].sum()), int(kept.sum()))
    if HARMLESS in h:
        alarms = Proportion(int(found.opens(h[HARMLESS]).sum()), len(h[HARMLESS]))
    if HARMFUL in h and HARMLESS in h:
        area = float(auroc(found.score(h[HARMFUL]), found.score(h[HARMLESS])))
    return GateRow(gate, perturbation, group, rate, missed, missed_kept, alarms, area)


def _area(auroc: float | None) -> str:
    return "" if auroc is None else f"{auroc:.3f}"

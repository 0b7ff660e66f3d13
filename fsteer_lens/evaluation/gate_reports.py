"""How well a gate decides: missed harm and false alarms, as it stands and beside others at one false-alarm rate.

Missed harm is the share of prompts in need of steering for which a gate stays shut; a false alarm is a prompt to be
left alone for which it opens. Both are shares of prompts that no gate was fitted to, with 95 % Clopper-Pearson
intervals. A gate is not a security boundary: `attacks` measures how little it takes to shut one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fsteer_lens.effects.decisions import gate_of
from fsteer_lens.errors import InputError
from fsteer_lens.evaluation.perturbations import NONE, PERTURBATIONS, Format, Keeps, Perturbation
from fsteer_lens.ground.checks import (
    choice,
    finite,
    function,
    instance,
    normalised,
    optional,
    options_of,
    seed_of,
    several,
    switch,
    whole,
)
from fsteer_lens.ground.estimates import Proportion, auroc
from fsteer_lens.ground.tables import markdown
from fsteer_lens.hooks.objects import remembered
from fsteer_lens.method.contrasting import cut_at_rate
from fsteer_lens.method.gates import OPEN, Gate, Reading, oriented, require_gate
from fsteer_lens.method.linalg import require_matrix
from fsteer_lens.models.classes import SteerableModel, require_steerable
from fsteer_lens.prompts.forms import Prompt, texts_of
from fsteer_lens.prompts.passes import Passes, PassOptions
from fsteer_lens.reading.collecting import READING
from fsteer_lens.reading.reader import read_prompts
from fsteer_lens.reading.scanning import scan_prompts
from fsteer_lens.steering.steering import Steering

Texts = Iterable[str] | Mapping[str, Iterable[str]]
"""Texts, or texts by the name of a group; groups may overlap, and a text counts once."""

ALL: Final = "all"
HARMFUL: Final = "harmful"
HARMLESS: Final = "harmless"
GATE: Final = "SCS gate"


def threshold_at_rate(gate: Gate, rate: float, general: Float[Tensor, "n d"]) -> float:
    """The threshold at which a gate has a false-alarm rate, for `gate.at_threshold`.

    It then opens beyond the k-th of the general activations, counted from the one that comes nearest to opening it,
    k = ⌊rate · (n + 1)⌋. Of new activations like them at most `rate` of all open it, on average over such draws (the
    quantile of split conformal prediction).

    Args:
        gate: whose score to cut.
        rate: in (0, 1).
        general: activations of prompts to be left alone, which nothing was fitted to, [n d].

    Raises:
        InputError: a rate outside, or too few activations for it.
    """
    cut = cut_at_rate(oriented(gate, general), finite("false-alarm rate", rate, above=0, below=1))
    return cut if gate.opens_above else -cut


@dataclass(frozen=True)
class GateRow:
    """What one gate did with one group of prompts, said in one way.

    Attributes:
        gate: name of the gate.
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
        thresholds: threshold of each gate at that rate, by name; as `gate.at_threshold` takes it.
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
        rate = self.false_alarm_rate if switch("same_rate", same_rate) else None
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
            same_rate: every gate at the common false-alarm rate; otherwise each at its own threshold.
            by: "perturbation" or "group".

        Raises:
            InputError: another `by`.
        """
        choice("by", by, ("perturbation", "group"))
        rate = self.false_alarm_rate if switch("same_rate", same_rate) else None
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


class ReportOptions(PassOptions, total=False):
    """What `gate_report` takes beside its own arguments: see there."""

    false_alarm_rate: float
    seed: int


@dataclass(frozen=True)
class _Options(Passes):
    false_alarm_rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        normalised(
            self,
            false_alarm_rate=finite("false-alarm rate", self.false_alarm_rate, above=0, below=1),
            seed=seed_of(self.seed),
        )


def gate_report(
    model: SteerableModel,
    gates: Gate | Steering | Mapping[str, Gate | Steering],
    harmful: Texts,
    harmless: Texts,
    *,
    calibration: Iterable[str],
    format: Format | None = None,
    layer: int | None = None,
    perturbations: Iterable[Perturbation] = PERTURBATIONS,
    keeps: Keeps | None = None,
    **options: Unpack[ReportOptions],
) -> GateReport:
    """Missed harm, false alarms and AUROC of gates, under every perturbation of the prompts.

    A gate that scans (`fit_scan`) is asked about the windows of every prompt, those for the thresholds too.
    Every gate is measured twice: as it is, and with its score cut where `calibration` gives the common false-alarm
    rate. The thresholds are taken on unperturbed prompts, as one would before knowing what comes; both the harmful
    and the harmless prompts are then perturbed alike. Compare a gate with those of
    `fit_gate(kind="linear")` and `fit_gate(kind="cosine")` from the same training activations: give them all, by name.

    Args:
        model: what the gates were fitted on.
        gates: one, or several by name; a steering stands for its gate, and is followed in how texts become tokens.
        harmful: texts in need of steering, as a person types them; a mapping names groups, which get rows of their own.
        harmless: texts to be left alone; those that look harmful belong here.
        calibration: further harmless texts, for the thresholds.
        format: from what a person types to model input; None takes the text itself, or the user's turn of a chat.
        layer: where the gates read; None where they know it themselves.
        perturbations: what to do to the texts.
        keeps: whether a perturbed harmful prompt still means the same, such as `gives_same_answer`: where the model no
            longer understands the request, there is no harm to miss.
        options: `false_alarm_rate` (0.05), the common rate; `seed` (0) of the perturbations; `chat`,
            `chat_template_kwargs` and `prepend_bos` (as the steerings were fitted, else as in `generate`), how texts
            become tokens; `batch_size` (16), prompts per forward pass; `progress` (True), show a progress bar.

    Raises:
        InputError: no texts of one kind, too few calibration texts, one that is reported too, two perturbations of
            one name, something that is no gate, or gates that read at no one layer.
        ContextLengthError: a perturbed prompt does not fit into the context.
        MismatchError: a steering was fitted on texts that became tokens in another way.
        ShapeError: a gate of another width than the model's.
    """
    given = dict(gates) if isinstance(gates, Mapping) else {GATE: gates}
    run = options_of("gate_report", _Options, options).following(remembered(*given.values()), model)
    require_steerable(model)
    for name, one in (("format", format), ("keeps", keeps)):
        optional(function, name, one)
    named, where = read_by(given, layer)
    kinds = {HARMFUL: _grouped(harmful, HARMFUL), HARMLESS: _grouped(harmless, HARMLESS)}
    perturbations = several("perturbations", perturbations, "a list of them")
    names = [instance("perturbation", one, Perturbation, "a Perturbation").name for one in perturbations]
    if not names or len(set(names)) < len(names) or not named:
        raise InputError("gate_report", expected="gates, and perturbations of different names", got=names)
    calibration = _grouped(calibration, "calibration")[ALL]
    harm, others = (set(groups[ALL]) for groups in kinds.values())
    shared = (set(calibration) & (harm | others)) | (harm & others)
    if shared:
        got = f"{len(shared)} that are in two, first {min(shared)[:60]!r}"
        raise InputError("harmful, harmless and calibration", expected="texts that are in one of them", got=got)

    def put(perturbation: Perturbation, text: str) -> Prompt:
        if format is None and run.chat:
            return perturbation.turns(text, seed=run.seed)
        return perturbation.prompt(text, format=format or str, seed=run.seed)

    said = [put(Perturbation(NONE), text) for text in calibration]
    wanted = [(p, kind, text) for p in perturbations for kind, groups in kinds.items() for text in groups[ALL]]
    perturbed = [put(p, text) for p, _, text in wanted]
    rows = _activations(model, named, said + perturbed, run, where)
    cuts = {
        name: threshold_at_rate(gate, run.false_alarm_rate, rows[name][: len(said)]) for name, gate in named.items()
    }
    at_rate = {name: gate.at_threshold(cuts[name]) for name, gate in named.items()}
    places = {(p.name, kind, text): place for place, (p, kind, text) in enumerate(wanted, len(said))}
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
            at = {
                kind: [places[name, kind, text] for text in groups[group]]
                for kind, groups in kinds.items()
                if group in groups
            }
            kept = torch.tensor(
                [(name, text) in same for text in kinds[HARMFUL].get(group, ())], dtype=torch.bool, device="cpu"
            )
            for gate, own in named.items():
                h = {kind: rows[gate][chosen] for kind, chosen in at.items()}
                for rate, one in ((None, own), (run.false_alarm_rate, at_rate[gate])):
                    found.append(GateRow(gate, name, group, rate, *_shares(own, one, h, kept)))
    return GateReport(tuple(found), run.false_alarm_rate, cuts, len(calibration))


def _activations(
    model: SteerableModel, gates: Mapping[str, Gate], prompts: Sequence[Prompt], passes: Passes, layer: int
) -> dict[str, Float[Tensor, "n d"]]:
    """What each gate is asked about: what it reads of each prompt, or of the nearest of its windows."""
    reads: list[Reading] = list(dict.fromkeys(gate.read for gate in gates.values() if not gate.scans))
    scans = [gate for gate in gates.values() if gate.scans]
    found: dict[str, Tensor] = {}
    with passes.bar(len(prompts) * (bool(reads) + len(scans)), READING) as advance:
        read = read_prompts(model, prompts, passes, layer, reads, advance=advance) if reads else {}
        for name, gate in gates.items():
            found[name] = (
                scan_prompts(model, gate, prompts, passes, layer, advance) if gate.scans else read[gate.read][layer]
            )
    return {name: require_matrix(h, f"activations at layer {layer}") for name, h in found.items()}


def read_by(given: Mapping[str, Gate | Steering], layer: int | None) -> tuple[dict[str, Gate], int]:
    """Gates, those of steerings among them, and the layer at which all of them read: the given one, or their own.

    Raises:
        InputError: something that is no gate, gates of several layers, or nobody knows.
    """
    gates: dict[str, Gate] = {}
    known = set() if layer is None else {whole("layer", layer)}
    for name, one in given.items():
        gates[name] = gate_of(one, layer)[1] if isinstance(one, Steering) else one
        require_gate(gates[name], f"gate {name!r}", layer=layer)
        own = gate_of(one, layer)[0] if isinstance(one, Steering) else gates[name].layer
        if own is not None:
            known.add(own)
    if len(known) != 1:
        got, fix = sorted(known) or "gates that know none", "Pass layer=, or fit_gate(..., layer=)."
        raise InputError("layer", expected="gates that read at one layer", got=got, fix=fix)
    return gates, known.pop()


def _grouped(texts: Texts, what: str) -> dict[str, list[str]]:
    """Different texts by group, that of all of them first."""
    given = texts if isinstance(texts, Mapping) else {what: texts}
    if not given or ALL in given:
        raise InputError(what, expected=f"at least one group, and none named {ALL!r}", got=list(given))
    groups = {name: texts_of(group, f"{name} text") for name, group in given.items()}
    whole = [text for group in groups.values() for text in group]
    named = groups if isinstance(texts, Mapping) else {}
    return {name: list(dict.fromkeys(group)) for name, group in {ALL: whole, **named}.items()}


def _shares(
    own: Gate, gate: Gate, h: Mapping[str, Float[Tensor, "_ d"]], kept: Bool[Tensor, " n"]
) -> tuple[Proportion | None, Proportion | None, Proportion | None, float | None]:
    """What a gate misses, misses of what is kept, and opens for wrongly; the AUROC is that of its own score."""
    missed = missed_kept = alarms = area = None
    if HARMFUL in h:
        shut = (gate(h[HARMFUL]) < OPEN).cpu()
        missed = Proportion(int(shut.sum()), len(shut))
        if kept.any():
            missed_kept = Proportion(int(shut[kept].sum()), int(kept.sum()))
    if HARMLESS in h:
        alarms = Proportion(int((gate(h[HARMLESS]) >= OPEN).sum()), len(h[HARMLESS]))
    if HARMFUL in h and HARMLESS in h:
        area = float(auroc(oriented(own, h[HARMFUL]), oriented(own, h[HARMLESS])))
    return missed, missed_kept, alarms, area


def _area(auroc: float | None) -> str:
    return "" if auroc is None else f"{auroc:.3f}"

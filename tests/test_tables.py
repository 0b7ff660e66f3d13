"""Tables as people bring them: empty cells, whole numbers, half characters, shifted columns, names that stand twice."""

import csv
import datetime
import decimal
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fsteer_lens import ContrastSet, collect, tutor
from fsteer_lens.errors import DataError, InputError
from fsteer_lens.evaluation import TruthfulQA, harmbench
from fsteer_lens.ground.checks import clean_text, is_missing, optional_text, several
from fsteer_lens.ground.tables import parse_json, read_csv, read_jsonl
from fsteer_lens.prompts import Contrast
from fsteer_lens.prompts.files import read_contrasts, read_prompts

pandas = pytest.importorskip("pandas", reason="pandas is not installed")

TRUTHFULQA = Path(__file__).parents[1] / ".." / "shared" / "data" / "truthfulqa"
EMPTY = [
    None,
    math.nan,
    np.nan,
    np.float32("nan"),
    torch.tensor(math.nan),
    decimal.Decimal("NaN"),
    pandas.NA,
    pandas.NaT,
]
EMPTY += [np.datetime64("NaT"), "", "  ", "\n"]
OPTIONAL = ("label", "context", "group")
ROW = {"prompt": "why", "preferred": "yes", "undesired": "no"}


# ---------------------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize("empty", EMPTY, ids=repr)
@pytest.mark.parametrize("part", OPTIONAL)
def test_an_empty_cell_is_none(part: str, empty: Any) -> None:
    (row,) = ContrastSet.from_records([{**ROW, part: empty}])
    assert getattr(row, part) is None
    if empty is None or isinstance(empty, str):  # the tests' type checker lets nothing else through
        assert Contrast("why", "yes", "no", **{part: empty}) == row


@pytest.mark.parametrize("empty", EMPTY, ids=repr)
@pytest.mark.parametrize("part", ROW)
def test_an_empty_cell_that_is_needed_is_named(part: str, empty: Any) -> None:
    with pytest.raises(DataError, match=rf"row 2, column '{part}': expected .*, got .*\. Give"):
        ContrastSet.from_records([ROW, {**ROW, part: empty}])


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (1, "1"), (1.0, "1"), (np.int8(1), "1"), (np.float64(1), "1"), (torch.tensor(1.0), "1"), (-0.0, "0"),
        (1.5, "1.5"), (np.float32(1.1), "1.1"), (torch.tensor(1.5), "1.5"), (decimal.Decimal("1.0"), "1"),
        (2**60 + 1, str(2**60 + 1)), (float(2**60), str(float(2**60))), (True, "True"), (np.False_, "False"),
        (torch.tensor(True), "True"), ("nan", "nan"), ("1.0", "1.0"), (" a ", " a "), (np.str_("a"), "a"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
    ],
    ids=lambda value: f"{type(value).__name__} {value!r}",
)  # fmt: skip
def test_a_cell_that_is_no_text_becomes_one(cell: Any, text: str) -> None:
    found = optional_text("label", cell)
    assert found == text and type(found) is str
    assert ContrastSet.from_records([{**ROW, "label": cell}]).labels == [text]


@pytest.mark.parametrize("cell", [[1], ["a"], {"a": 1}, (), {1}, b"a", np.array(["a"]), math.inf, -math.inf, 1e301])
def test_a_cell_that_holds_several_things_or_no_finite_one_is_refused(cell: Any) -> None:
    with pytest.raises(DataError, match=r"row 1, column 'kind': expected text, a finite number or nothing, got"):
        ContrastSet.from_records([{**ROW, "kind": cell}], label="kind")


def test_missing_is_no_more_than_missing() -> None:
    for value in (0, 0.0, False, "nan", "", [], [math.nan], np.array([math.nan]), torch.ones(3), math.inf, object()):
        assert not is_missing(value)


def test_whole_labels_stay_whole_where_pandas_made_them_floats() -> None:
    table = pandas.DataFrame({**{name: ["a", "b", "c"] for name in ROW}, "label": [1, None, 2], "group": [1.5, 2, 3]})
    assert str(table.label.dtype) == "float64", "or this test proves nothing"
    for rows in (table, table.to_dict("records"), (row for row in table.to_dict("records"))):
        contrasts = ContrastSet.from_records(rows)
        assert contrasts.labels == ["1", None, "2"] and [c.group for c in contrasts] == ["1.5", "2", "3"]
    whole = table.astype({"label": "Int64"})
    assert ContrastSet.from_records(whole[whole.label.notna()]).labels == ["1", "2"]


def test_a_missing_context_is_missed_where_it_is_needed(tutor_model: Any) -> None:
    with pytest.raises(DataError, match="contrast 0, prompt 'why' has no context"):
        rows = ContrastSet.from_records([{**ROW, "context": math.nan}])
        collect(tutor_model, rows, layer=4, shift="last_prompt", progress=False)


def test_prompts_in_cells_may_be_messages_or_ids_as_parquet_files_hold_them() -> None:
    turns = [{"role": "user", "content": "hi"}]
    rows = [{**ROW, "prompt": np.array(turns, dtype=object)}, {**ROW, "prompt": np.array([5, 6])}]
    assert ContrastSet.from_records(rows).prompts == [turns, [5, 6]]
    json.dumps(ContrastSet.from_records(rows).prompts)  # ids are Python's own


# ----------------------------------------------------------------------------------------------------- half characters


@pytest.mark.parametrize("sign", ["\ud83d", "\udc00", "\0", "\ud83d\ude00"], ids=ascii)
@pytest.mark.parametrize("part", [*ROW, *OPTIONAL])
def test_half_a_character_and_nul_are_refused_with_row_and_column(part: str, sign: str, tmp_path: Path) -> None:
    bad = {**ROW, part: f"hello {sign} there"}
    words = rf"row 2, column '{part}': expected text that UTF-8 can hold, without NUL, got .* at character 6"
    with pytest.raises(DataError, match=words):
        ContrastSet.from_records([ROW, bad])
    if len(sign) == 1:  # JSON puts a pair together
        path = tmp_path / "c.jsonl"
        path.write_text(f"{json.dumps(ROW)}\n{json.dumps(bad)}\n")
        with pytest.raises(DataError, match=rf"c\.jsonl: {words}"):
            ContrastSet.from_jsonl(path)
    with pytest.raises(InputError, match=f"{part}: expected text that UTF-8 can hold"):
        Contrast(**bad)


def test_an_emoji_that_json_wrote_in_two_halves_is_one(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"prompt": "\\ud83d\\ude00", "preferred": "a", "undesired": "b"}')
    assert ContrastSet.from_jsonl(tmp_path / "c.jsonl").prompts == ["😀"]


@given(text=st.text(st.characters()))
def test_a_text_is_refused_exactly_where_utf_8_cannot_hold_it_or_it_has_a_nul(text: str) -> None:
    try:
        text.encode()
        is_clean = "\0" not in text
    except UnicodeEncodeError:
        is_clean = False
    if is_clean:
        assert clean_text("prompt", text) == text
    else:
        with pytest.raises(InputError, match="prompt: expected text"):
            clean_text("prompt", text)


# ------------------------------------------------------------------------------------------------------------ CSV files


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["a,b,c", "1,2,3", "4,5,6,7"], "line 3: expected 3 cells, one for each name in the heading, got 4. Put text"),
        (["a,b,c", "1,2"], "line 2: expected 3 cells, one for each name in the heading, got 2. Put"),
        (["a,b,c", '"x', 'y",2,3', "4,5"], "line 4: expected 3 cells"),
        (["a,b,b"], "line 1: expected columns of different names, got 'b' twice. Rename one."),
        (
            ["a,b,,", "1,2,,", "1,2,3,"],
            "line 3: expected 4 cells, one for each name in the heading, got '3' in a column",
        ),
        (["a,b", '1,"2', "3,4"], "line 2: expected a CSV file with a header line, got unexpected end of data"),
        (["a,b", '"1"x,2'], "line 2: expected a CSV file with a header line, got ',' expected after '\"'"),
    ],
)
def test_a_table_whose_cells_belong_to_no_column_for_sure_is_refused(
    lines: list[str], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        read_csv(path)
    assert str(caught.value).startswith(f"{path}, {words}")


def test_an_unquoted_comma_no_longer_shifts_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("prompt,preferred,undesired,label\nhello, you,fine,bad\na,b,c,d\nhello, you,fine,bad,mood\n")
    with pytest.raises(DataError, match=r"t\.csv, line 4: expected 4 cells"):
        ContrastSet.from_csv(path)
    path.write_text('prompt,preferred,undesired,label\n"hello, you",fine,bad,mood\n')
    assert ContrastSet.from_csv(path) == ContrastSet([Contrast("hello, you", "fine", "bad", label="mood")])


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1, max_size=5)


@given(columns=st.lists(names, min_size=1, max_size=4, unique=True), data=st.data())
def test_what_csv_writes_is_read(columns: list[str], data: Any, tmp_path_factory: Any) -> None:
    rows = data.draw(st.lists(st.lists(names, min_size=len(columns), max_size=len(columns)), max_size=4))
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    if columns[0].startswith("\ufeff"):
        return  # a byte order mark, not a name
    assert read_csv(path) == [dict(zip(columns, row, strict=True)) for row in rows]


def test_empty_columns_and_lines_of_a_spreadsheet_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,,\n\n1,2,,\n\n")
    assert read_csv(tmp_path / "t.csv") == [{"a": "1", "b": "2"}]


def test_suites_read_their_tables_in_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    path.write_text("Behavior,SemanticCategory,ContextString\nhow, to,illegal\n")
    assert len(harmbench(path).harmful) == 1
    path.write_text("Behavior,SemanticCategory,ContextString\nhow, to,illegal,\n")
    with pytest.raises(DataError, match=r"h\.csv, line 2: expected 3 cells"):
        harmbench(path)


def test_two_columns_of_one_name_are_refused_in_a_data_frame_too() -> None:
    table = pandas.DataFrame([["a", "b", "c", "d"]], columns=["prompt", "preferred", "undesired", "undesired"])
    with pytest.raises(DataError, match=r"table: expected columns of different names, got 'undesired' twice"):
        ContrastSet.from_records(table)


# ----------------------------------------------------------------------------------------------------------- JSON lines

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "1" * 5_000


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (DEEP, "nested less deeply"),
        (LONG, "Exceeds the limit"),
        ('{"a": 1, "b": 2, "a": 3}', "the name 'a' twice in one object"),
        ("{", "expected"),
    ],
    ids=["deep", "long", "twice", "broken"],
)
def test_json_that_python_does_not_read_ends_in_our_error(value: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(f'{json.dumps(ROW)}\n{{"prompt": "a", "preferred": "b", "undesired": "c", "label": {value}}}\n')
    for read in (
        ContrastSet.from_jsonl,
        read_jsonl,
        read_prompts,
        lambda p: parse_json(p.read_text().split("\n")[1], f"{p}, line 2"),
    ):
        with pytest.raises(DataError, match=rf"c\.jsonl, line 2: expected .*{words if words != 'expected' else ''}"):
            read(path)
    path.write_text(f"[{value}]")
    with pytest.raises(DataError, match=r"c\.jsonl: expected JSON"):
        TruthfulQA.from_json(path)


def test_lists_that_python_reads_but_no_message_can_show_are_told_by_their_type() -> None:
    nested: list[Any] = []
    for _ in range(5_000):
        nested = [nested]
    with pytest.raises(DataError, match=r"row 1, column 'label': expected text, .*, got list"):
        ContrastSet.from_records([{**ROW, "label": nested}])


def test_lines_end_at_line_ends_alone(tmp_path: Path) -> None:
    signs = ["\u2028", "\x85", "\x0b", "\x1c"]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(f"a{s}b", ensure_ascii=False) for s in signs), "utf-8")
    (tmp_path / "p.txt").write_text("\n".join(f"a{s}b" for s in signs), "utf-8")
    for name in ("p.jsonl", "p.txt"):
        assert read_prompts(tmp_path / name) == [f"a{s}b" for s in signs]


# ----------------------------------------------------------------------------------------------------------- TruthfulQA


def truthfulqa(name: str) -> Path:
    path = TRUTHFULQA / name
    if not path.is_file():
        pytest.skip(f"{name} is not here: it is data beside the checkout, not part of the package")
    return path


def test_every_question_of_truthfulqa_is_one_of_its_multiple_choice_task() -> None:
    contrasts = ContrastSet.from_truthfulqa(truthfulqa("TruthfulQA.csv"))
    task = {choice.question: choice for choice in TruthfulQA.from_json(truthfulqa("mc_task.json")).choices}
    assert len(contrasts) == len(task) == 817 and set(contrasts.prompts) == set(task)
    raw = [row["Question"] for row in read_csv(truthfulqa("TruthfulQA.csv"))]
    assert set(raw) != set(task), "a question with a blank at its end is what this is about"
    for contrast in contrasts:
        assert isinstance(contrast.prompt, str)
        choice = task[contrast.prompt]
        for text, is_true in ((contrast.preferred, True), (contrast.undesired, False)):
            told = {answer.strip().rstrip(".") for answer, true in (*choice.mc1, *choice.mc2) if true is is_true}
            assert text.rstrip(".") in told
        texts = [contrast.prompt, contrast.preferred, contrast.undesired, str(contrast.label)]
        assert all(text == text.strip() for text in texts)


def test_truthfulqa_is_known_by_its_heading(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("Type,Category,Question,Best Answer,Incorrect Answers\nx,Myths, why? ,so,no; not so\n")
    assert read_contrasts(path, {}) == ContrastSet([Contrast("why?", "so", "no", label="Myths")])
    named = {"prompt": "Question", "preferred": "Best Answer", "undesired": "Incorrect Answers", "label": "Type"}
    assert read_contrasts(path, named).labels == ["x"]


# -------------------------------------------------------------------------------------------------- columns and prompts


def test_prompts_come_from_columns_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('question,kind\n"one, two",a\nthree,b\n')
    (tmp_path / "p.jsonl").write_text('{"question": "one, two"}\n{"question": "three"}\n')
    for name in ("p.csv", "p.jsonl"):
        assert read_prompts(tmp_path / name, "question") == ["one, two", "three"]
        with pytest.raises(DataError, match=r"1: expected a column 'prompt', got columns \['question'"):
            read_prompts(tmp_path / name)
    for content, words in (
        ("", "at least one prompt"),
        ('"a"\nNaN\n', "line 2: expected a string, messages or token ids"),
    ):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(InputError, match=words):
            read_prompts(tmp_path / "bad.jsonl")
    (tmp_path / "nul.txt").write_text("a\nb\0\n")
    with pytest.raises(InputError, match=r"nul\.txt, line 2: expected text that UTF-8 can hold"):
        read_prompts(tmp_path / "nul.txt")


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("hello", "one text, 'hello'"),
        (b"hello", "one text"),
        ({"a": 1}, r"a mapping with \['a'\]"),
        ({"a", "b"}, "a set, which has no order"),
        (torch.ones(2, 2), r"an array of shape \[2, 2\]"),
        (np.array(3), r"an array of shape \[\]"),
        (pandas.DataFrame({"a": [1]}), r"a table with columns \['a'\]"),
        (3, "3"),
        (None, "None"),
    ],
)
def test_what_is_no_list_is_told_in_words(value: Any, got: str) -> None:
    with pytest.raises(InputError, match=f"items: expected a list, got {got}"):
        several("items", value, "a list")


@pytest.mark.parametrize(
    "value",
    [
        [1, 2], (1, 2), range(1, 3), iter([1, 2]), (i for i in (1, 2)), np.array([1, 2]), torch.tensor([1, 2]),
        pandas.Series([1, 2], index=[7, 3]), pandas.Index([1, 2]), {1: 0, 2: 0}.keys(), {0: 1, 3: 2}.values(),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_whatever_gives_items_is_a_list(value: Any) -> None:
    found = several("items", value, "a list")
    assert found == [1, 2] and all(type(item) is int for item in found)


def test_the_tutors_own_contrasts_pass_the_door_unchanged() -> None:
    train = tutor.data("safe").train[:50]
    assert ContrastSet.from_records([vars(contrast) for contrast in train]) == train

"""The pages' code runs and prints what they show; links lead somewhere; README's commands do what it says."""

import doctest
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest

import fsteer_lens
from fsteer_lens import tutor
from tests.page_code import blocks, differences, same_output
from tests.running import needs_smollm2
from tests.test_package import ROOMS, face

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# gallery.md is run by tests/browser/test_gallery_page.py, with_saelens.md by tests/peers/test_saelens.py.
RUN_ELSEWHERE = {"gallery.md", "with_saelens.md"}
SLOW = {
    "measure.md",
    "hooks.md",
    "limits.md",
    "many_machines.md",
    "big_models.md",
    "choose_a_layer.md",
    "gates.md",
    "two_behaviours.md",
    "your_own.md",
}
ON_SMOLLM2 = ("start_here.md", "chats_real.md")
MARKS: dict[str, Any] = dict.fromkeys(SLOW, pytest.mark.slow)
MARKS |= {name: [pytest.mark.slow, needs_smollm2] for name in ON_SMOLLM2}
PAGES = sorted([README, ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=MARKS.get(page.name, []))
        for page in PAGES
        if blocks(page, "python") and page.name not in RUN_ELSEWHERE
    ],
    ids=lambda page: page.stem,
)
def test_code_of_a_page_runs_and_prints_what_it_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert differences(page) == []


def test_other_output_is_told_from_the_same() -> None:
    assert same_output("gate 0.91  open\n60 of 60", "gate 0.92 open\n60 of 60")
    assert not same_output("KL 0.0010", "KL 0.0014") and not same_output("AUROC 0.90", "AUROC 0.95")
    assert not same_output("gate 0.91 open", "gate 0.91 shut")
    assert not same_output("12 of 60", "30 of 60")
    assert not same_output("a", "a b")


PACKAGE = Path(fsteer_lens.__file__).parent
EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>>" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted and not result.failed


def test_every_public_name_is_on_a_page_of_the_reference() -> None:
    listed: list[object] = []
    for page in (DOCS / "reference").glob("*.md"):
        place = fsteer_lens
        for kind, name in re.findall(r"^\.\. (\w+):: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if kind == "currentmodule":
                place = importlib.import_module(name)
            elif name.startswith("fsteer_lens."):
                module, _, own = name.rpartition(".")
                listed.append(getattr(importlib.import_module(module), own))
            else:
                listed.append(getattr(place, name))
    for room in ("", *ROOMS):
        named = {name: getattr(face(room), name) for name in face(room).__all__}
        missing = [name for name, value in named.items() if not inspect.ismodule(value) and value not in listed]
        assert not missing, f"fsteer_lens.{room}: {missing} are on no page of docs/reference"


@pytest.mark.parametrize("page", sorted((DOCS / "reference").glob("*.md")), ids=lambda page: page.stem)
def test_signatures_on_the_pages_of_the_reference_are_those_of_the_code(page: Path) -> None:
    import signatures  # type: ignore[import-not-found]

    text = page.read_text(encoding="utf-8")
    assert text == signatures.written(text), "make signatures"


def test_a_signature_has_its_types_and_defaults() -> None:
    import signatures  # type: ignore[import-not-found]

    def made(prompts: "list[str]", *rest: int, how: Literal["a", "b"] = "a", most: float = 1.0) -> bool:
        return True

    found: dict[str, str] = {}
    narrow = 'made(prompts: list[str], *rest: int, how: Literal["a", "b"] = "a", most: float = 1.0) -> bool'
    assert signatures.signature(made, found) == narrow
    wide = signatures.signature(fsteer_lens.effects.answer_margin, found)
    assert wide.splitlines()[-2:] == [
        "    **options,  # chat, chat_template_kwargs, prepend_bos, batch_size",
        ') -> Float[Tensor, " n"]',
    ]
    assert found == {}
    signatures.signature(fsteer_lens.fit, found)
    assert found["Layered"] == "Activations | Mapping[int, Activations]"


def test_every_field_of_a_trace_is_explained() -> None:
    text = (DOCS / "how_to" / "measure.md").read_text(encoding="utf-8")
    told = {
        name for row in re.findall(r"^\| (`.+?) \|", text, flags=re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert {item.name for item in fields(fsteer_lens.Trace)} <= told


# ----------------------------------------------------------------------------------------------------------- links


def anchors(text: str) -> set[str]:
    """The anchors that a code host gives to headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def markdown(path: Path) -> str:
    """A page's text without its code, of a notebook that of its markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def dead_links(path: Path) -> list[str]:
    """Links of a page that lead to no file, or to no heading of one."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", markdown(path))):
        file, _, anchor = target.partition("#")
        if file.startswith(("https://", "mailto:")):
            continue
        there = (path.parent / file).resolve() if file else path
        if not there.exists():
            dead.append(target)
        elif anchor and anchor not in anchors(markdown(there)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# Some `code`, and more\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md#some-code-and-more) [b](nowhere.md) [c](there.md#other) [d](https://example.org/x)")
    assert dead_links(page) == ["nowhere.md", "there.md#other"]


def test_the_address_of_the_project_is_the_same_everywhere() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*PAGES, *NOTEBOOKS)]
    named = {name for text in texts for name in re.findall(r"github(?:\.com)?/([\w.-]+/fsteer_lens)\b", text)}
    assert named == {PROJECT["urls"]["Repository"].removeprefix("https://github.com/")}


# ---------------------------------------------------------------------------------------------------------- README


def readme_commands() -> list[list[str]]:
    """Every command of README's shell blocks, in words, without its comment."""
    lines = [line for _, text in blocks(README, "sh") for line in text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_readme_names_targets_of_the_makefile() -> None:
    text = README.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", text, flags=re.MULTILINE))
    assert named >= {"demo", "test", "check", "docs"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


@pytest.mark.slow
def test_readme_commands_run(tmp_path: Path) -> None:
    """Those that install are not run: they would change the environment that the tests run in."""
    data = tutor.data("safe")
    rows = [{"prompt": one.prompt, "preferred": one.preferred, "undesired": one.undesired} for one in data.train[::20]]
    for name in ("contrasts.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "general.txt").write_text("\n".join(task.prompt for task in data.general_test[::40]), encoding="utf-8")
    model = str(Path(tutor.__file__).parent / "weights")
    # What a reader fills in; the tutor has six layers.
    filled_in = {"NAME_OR_FOLDER": model, "12": "4"}
    programs = {"fsteer-lens": [sys.executable, "-m", "fsteer_lens"], "python": [sys.executable]}
    ran = []
    for program, *words in readme_commands():
        if program in ("make", "pip"):
            continue
        command = [*programs[program], *(filled_in.get(word, word) for word in words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False)
        assert done.returncode == 0, f"{shlex.join([program, *words])}\n{done.stdout}\n{done.stderr}"
        ran.append(words[-1] if program == "python" else words[0])
    assert ran == ["fit", "generate", "report", "demo", "doctor"]
    assert {path.name for path in tmp_path.iterdir()} >= {"steer.safetensors"}


def test_readme_installs_extras_that_exist() -> None:
    named = set(re.findall(r"\.\[(\w+)\]", README.read_text(encoding="utf-8")))
    assert named and named <= set(PROJECT["optional-dependencies"])


# ------------------------------------------------------------------------------------------- pages made by a script


def test_pages_of_numbers_hold_the_text_and_the_methods_of_their_scripts() -> None:
    """The numbers take too long to make anew here; what stands around them must not fall behind."""
    import results  # type: ignore[import-not-found]

    from benchmarks.__main__ import INTRO

    page = (DOCS / "results.md").read_text(encoding="utf-8")
    assert page.startswith(results.INTRO) and page.endswith(results.NOTES)
    for name in (*results.BASELINES, results.DEFAULT, "no cross-fitting"):
        assert page.count(f"| {name} |") >= 2, name
    bench = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert bench.startswith(INTRO)
    titles = ("Decoding", "Collecting", "Fitting the experts", "Energy ratios", "A large vocabulary", "Beside other")
    for title in titles:
        assert f"\n## {title}" in bench
    for text in (page, bench, (DOCS / "results_smollm2.md").read_text(encoding="utf-8")):
        assert "/home" not in text and "/work" not in text and "../shared" not in text

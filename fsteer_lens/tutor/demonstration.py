"""The demonstration's part of the tutor: steer it, compare methods, print what came out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from fsteer_lens.report.page import Report
from fsteer_lens.report.settings import steering_rows
from fsteer_lens.run.generation import Generations, generate
from fsteer_lens.tutor.chapters import GROUPS, INTRO, TITLES, add_chapter, findings, table_of
from fsteer_lens.tutor.loading import load
from fsteer_lens.tutor.measuring import DEFAULT, Measured, measure
from fsteer_lens.tutor.splits import BEHAVIOURS
from fsteer_lens.tutor.suite import TutorSuite
from fsteer_lens.tutor.world import user_text

if TYPE_CHECKING:
    import rich.text

    from fsteer_lens.ground.terminal import Terminal

SAMPLE: Final = 40
"""Test prompts of each kind that the demonstration measures on, unless it is told to take all."""
MAX_NEW_TOKENS: Final = 32


def add_tutor(report: Report, console: "Terminal", *, seed: int, full: bool) -> list[list[str]]:
    """Steer the tutor, compare methods on its test prompts, print the tables, and add them to a report.

    Args:
        report: what it is added to.
        console: where tables and texts are printed.
        seed: of the trained controllers.
        full: measure on all test prompts instead of a sample of each kind.

    Returns:
        What it takes to get the same numbers again, for `add_settings`.
    """
    report.add_heading("The tutor").add_text(INTRO)
    with console.status("loading the tutor"):
        model = load()
    settings = [["the tutor: test prompts", "all" if full else f"at most {SAMPLE} of each kind"]]
    for behaviour in BEHAVIOURS:
        limit = None if full else SAMPLE
        measured = measure(model, behaviour, seed=seed, limit=limit, progress=console.is_terminal)
        titles, prompts = examples_of(measured.suite)
        examples = generate(
            model, prompts, measured.steering, max_new_tokens=MAX_NEW_TOKENS, compare=True, progress=False
        )
        print_measured(console, measured, titles, examples)
        add_chapter(report, model, measured, titles, examples)
        settings += steering_rows(measured.steering, behaviour)
        settings.append([f"{behaviour}: seed", str(seed)])
    return settings


def examples_of(suite: TutorSuite) -> tuple[list[str], list[str]]:
    """Six prompts and what to call them: four to steer, of different labels where there are some, and two others."""
    contrasts = suite.contrasts
    firsts = list({str(contrast.label): contrast for contrast in reversed(contrasts)}.values())[::-1]
    chosen = (firsts + [contrast for contrast in contrasts if contrast not in firsts])[:4]
    _, near, general = GROUPS[suite.behaviour]
    titles = [str(contrast.label) for contrast in chosen] + [near, general]
    harmless = next(task for task in suite.general if task.kind != "harmful")
    tasks = [suite.near_misses[0].prompt, harmless.prompt]
    return titles, [str(contrast.prompt) for contrast in chosen] + tasks


def print_measured(console: "Terminal", measured: Measured, titles: Sequence[str], examples: Generations) -> None:
    """Print two tables that fit into 80 columns, the main numbers in words, and the example prompts side by side."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns, rows = table_of(measured)
    cut = next((i for i, name in enumerate(columns) if name.startswith("gate")), len(columns) - 3)
    heading = f"{TITLES[measured.suite.behaviour]}: {{}} (shares, 95 % interval)"
    for what, chosen in (("answers", range(1, cut)), ("gate and experts", range(cut, len(columns)))):
        table = Table(title=heading.format(what), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("method", width=14)
        for index in chosen:
            table.add_column(columns[index], justify="right")
        for row in rows:
            style = "bold" if row[0] == DEFAULT else ""
            table.add_row(Text(row[0]), *[_numbers(row[index]) for index in chosen], style=style)
        console.tabulate(table)
    console.print(Text(findings(measured)))
    table = Table(title="Six prompts", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_lines=True)
    for name in ("prompt", "without steering", "steered"):
        table.add_column(name, ratio=1)
    for title, item in zip(titles, examples, strict=True):
        assert item.baseline is not None
        changed = "" if item.text == item.baseline.text else "bold"
        table.add_row(
            Text(f"{title}\n", style="dim").append(user_text(item.prompt), style="not dim"),
            Text(item.baseline.text),
            Text(item.text, style=changed),
        )
    console.tabulate(table)


def _numbers(cell: str) -> "rich.text.Text":
    from rich.text import Text

    first, _, rest = cell.partition("\n")
    interval = rest.replace("0.", ".")
    return Text(first) if not rest else Text(f"{first}\n").append(interval, style="dim not bold")

"""`demo`: a chat model first, then the tutor with its tables, and a report of both."""

import os
import webbrowser
from pathlib import Path

from fsteer_lens.demo.chat import add_chapter, print_shown, show
from fsteer_lens.errors import MissingDependencyError
from fsteer_lens.ground.files import make_folder, path_of
from fsteer_lens.models.loading import load
from fsteer_lens.report.page import Report
from fsteer_lens.report.settings import add_settings, machine_rows, steering_rows
from fsteer_lens.tutor.demonstration import add_tutor

USUAL = "smollm2"
TUTOR = "tutor"


def demo(
    out: str | os.PathLike[str] = "fsteer_report.html",
    *,
    model: str | None = None,
    seed: int = 0,
    full: bool = False,
    open_browser: bool = False,
) -> Path:
    """Steer a chat model to refuse, then the tutor; print what became of the prompts, and write a report.

    Args:
        out: the report; its folder is made where it is missing.
        model: a chat model's name or folder, as in `models.load`; "tutor" shows the tutor alone. None takes SmolLM2
            where its package is installed, else the tutor alone.
        seed: of the trained controllers that the tutor's part compares.
        full: measure the tutor on all test prompts instead of a sample of each kind.
        open_browser: show the report when it is written.

    Returns:
        The report's path.

    Raises:
        MissingDependencyError: SmolLM2 was asked for by name and its package is not installed.
        As `models.load`.
    """
    from rich.text import Text

    from fsteer_lens.ground.terminal import Terminal

    console = Terminal()
    make_folder(path_of(out).parent)
    report, settings = Report("What FineSteer did"), machine_rows()
    if model != TUTOR:
        name = model or USUAL
        try:
            with console.status(Text(f"loading {name}")):
                loaded = load(name)
        except MissingDependencyError as error:
            if model is not None:
                raise
            console.say(f"Without a real chat model: {error}\n", style="yellow")
        else:
            with console.status(Text(f"steering {name}")):
                shown = show(loaded)
            console.rule(Text(f"A chat model: {name}"), align="left")
            print_shown(console, shown)
            add_chapter(report, shown, name)
            settings += steering_rows(shown.steering, name)
    console.rule("The tutor: a small model in a made-up world, where every right answer is known", align="left")
    settings += add_tutor(report, console, seed=seed, full=full)
    add_settings(report, settings)
    path = report.write(out).resolve()
    console.say(f"\nThe report, with pictures; it opens without network:\n{path}")
    if open_browser:
        webbrowser.open(path.as_uri())
    return path

"""One progress bar for everything that takes a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, description: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances the bar by so many steps.

    Draws nothing where `shown` is false, where there are no steps, or where the output is neither a terminal nor a
    notebook.
    """
    from fsteer_lens.ground.terminal import Terminal

    console = Terminal()
    if not shown or total == 0 or not (console.is_terminal or console.is_jupyter):
        yield lambda steps: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.advance(task, steps)

"""The progress bar of the command lines; libraries only call the function it hands out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr that its caller moves by (done, in all, what is under way); it shows from the first call on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        job = bar.add_task(description, total=None, visible=False, note="")

        def move(done: int, total: int, note: str) -> None:
            bar.update(job, completed=done, total=total, note=note, visible=True)

        yield move

"""Progress of long work on a terminal: one bar for each download, tokenizing or check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from smoe_train.data.progress import using


class Bars:
    """Shows each task as a bar, with a pulsing one where the size is not known."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """See `smoe_train.data.progress.Progress`."""
        bar = self._progress.add_task(description, total=total)
        yield lambda num_bytes: self._progress.advance(bar, num_bytes)
        self._progress.update(bar, total=self._progress.tasks[bar].completed)


@contextmanager
def shown(console: Console | None = None) -> Iterator[None]:
    """Shows progress as bars on standard error within the block; without a terminal, leaves it to the log."""
    console = console or Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress, using(Bars(progress)):
        yield

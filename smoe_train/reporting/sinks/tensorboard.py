"""TensorBoard event files."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoe_train.reporting.records import Record, scalars_by_step


class TensorboardSink:
    """Writes scalars into ``tensorboard/`` of the run folder.

    Args:
        run_folder: The run folder.
        resume_from_step: Events after this step, left by a crash, are hidden by TensorBoard's purge.
    """

    name = "tensorboard"

    def __init__(self, run_folder: Path, resume_from_step: int | None) -> None:
        self._folder = run_folder / "tensorboard"
        self._purge_step = None if resume_from_step is None else resume_from_step + 1

    def open(self) -> None:
        """Creates the event file."""
        from torch.utils.tensorboard import SummaryWriter

        # A disk that fails shows in the next call here; the writer's thread would print a traceback besides.
        self._hook = threading.excepthook
        threading.excepthook = self._other_threads
        self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)

    def metrics(self, records: Sequence[Record]) -> None:
        """Adds every number as a scalar."""
        for step, values in scalars_by_step(records).items():
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def routing(self, records: Sequence[Record]) -> None:
        """Adds every number as a scalar; the expert loads, which are lists, stay in ``routing.jsonl``."""
        self.metrics(records)

    def note(self, text: str) -> None:
        """Ignores notes: they are for the console."""

    def close(self) -> None:
        """Closes the event file, if it was ever opened."""
        if hasattr(self, "_writer"):
            self._writer.close()
            threading.excepthook = self._hook

    def patience_seconds(self) -> float:
        """Returns 0: a local file that takes longer will not get better."""
        return 0.0

    def abandon(self) -> None:
        """Does nothing: the writer's thread is a daemon."""

    def _other_threads(self, failed: Any) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard"):
            self._hook(failed)

"""The one place that a run reports to; held by rank 0 alone."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from smoe_train.errors import SmoeError
from smoe_train.reporting.config import ReportingConfig
from smoe_train.reporting.records import METRICS, ROUTING, Record
from smoe_train.reporting.sinks import Background, ConsoleSink, JsonLines, Sink, TensorboardSink, WandbSink

# For all trackers together, and for the console, which is last to hear what became of them. With what a tracker may
# ask for besides, the end of a run waits at most 2 seconds for sinks that are stuck.
CLOSE_SECONDS = 0.8
CONSOLE_SECONDS = 0.2


def check_sinks(config: ReportingConfig) -> None:
    """Checks that what the recipe wants to write to is installed.

    Raises:
        SmoeError: It is not; the message says how to get it.
    """
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise SmoeError(
            "reporting.tensorboard: is true, but TensorBoard is not installed; "
            "run `pip install 'smoe_train[tensorboard]'` or set it to false"
        )


class Journal:
    """Writes the record of a run to disk and shows it elsewhere.

    ``metrics.jsonl`` and ``routing.jsonl`` are complete and on the disk when a call returns; what a failing disk does
    not take waits in memory. Console, W&B and TensorBoard follow in threads of their own. Nothing that happens to any
    of them once the run has begun reaches it. To lose no step, hand over every record up to a step before the
    checkpoint of that step is committed.

    Args:
        run_folder: An existing folder.
        config: The recipe's ``reporting`` section.
        total_steps: Steps of the whole run.
        run_name: Name of the run.
        recipe: The resolved recipe, for trackers that show it.
        resume_from_step: Step of the checkpoint that the run continues from; records of later steps are dropped, since
            the run writes them again. None starts new files and sets aside what is there.

    Raises:
        RunFailedError: The record is damaged or cannot be opened for writing.
        SmoeError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        run_folder: Path,
        config: ReportingConfig,
        *,
        total_steps: int,
        run_name: str,
        recipe: Mapping[str, Any],
        resume_from_step: int | None,
    ) -> None:
        check_sinks(config)
        self._metrics = JsonLines(run_folder / METRICS, resume_from_step)
        self._routing = JsonLines(run_folder / ROUTING, resume_from_step)
        console = ConsoleSink(
            total_steps=total_steps, log_every_steps=config.log_every_steps, start_step=resume_from_step or 0
        )
        sinks: list[Sink] = []
        if config.tensorboard:
            sinks.append(TensorboardSink(run_folder, resume_from_step))
        if config.wandb is not None:
            resumed = resume_from_step is not None
            sinks.append(WandbSink(run_folder, config.wandb, run_name=run_name, recipe=recipe, resumed=resumed))
        self._sinks = [Background(console)]
        self._shown = _Shown(self.note)
        logging.getLogger(__package__).addHandler(self._shown)
        self._sinks += [Background(sink) for sink in sinks]
        self._note_state(resume_from_step)

    def metrics(self, records: Sequence[Record]) -> None:
        """Records losses and rates: ``step`` (int) and ``split`` are required, see ``metrics.jsonl`` for the rest."""
        if records:
            self._metrics.append(records)
            for sink in self._sinks:
                sink.metrics(records)

    def routing(self, records: Sequence[Record]) -> None:
        """Records routing health, one record per step and layer: ``step``, ``split`` and ``layer`` are required."""
        if records:
            self._routing.append(records)
            for sink in self._sinks:
                sink.routing(records)

    def note(self, text: str) -> None:
        """Shows a line to whoever watches."""
        for sink in self._sinks:
            sink.note(text)

    def rewind(self, step: int, validated: bool = True) -> None:
        """Drops the records of later steps from the files: the run goes back to the checkpoint of this one.

        Args:
            step: The last one to keep.
            validated: Whether to keep its validation; without it, the run validates once more.
        """
        self._metrics.rewind(step, validated)
        self._routing.rewind(step, validated)

    def close(self) -> None:
        """Ends everything; waits a second or two for slow sinks, longer only for uploads to a server that answers."""
        self._metrics.close()
        self._routing.close()
        console, trackers = self._sinks[:1], self._sinks[1:]
        for sinks, seconds in ((trackers, CLOSE_SECONDS), (console, CONSOLE_SECONDS)):
            deadline = time.monotonic() + seconds
            for sink in sinks:
                sink.begin_close()
            for sink in sinks:
                sink.end_close(deadline)
        logging.getLogger(__package__).removeHandler(self._shown)
        self._sinks = []

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _note_state(self, resume_from_step: int | None) -> None:
        for file in (self._metrics, self._routing):
            if file.set_aside is not None:
                self.note(f"{file.path} was there already and is now {file.set_aside.name}")
        last = self._metrics.last_step
        if resume_from_step and (last is None or last < resume_from_step):
            self.note(
                f"warning: {self._metrics.path} has no records of steps {(last or 0) + 1} to {resume_from_step}, "
                "which the checkpoint is past; figures of them are lost"
            )


class _Shown(logging.Handler):
    """Shows what this package logs, and would otherwise stand in the log file alone, to whoever watches."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        self._note(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")

"""What a person watches: a bar on a terminal, plain lines elsewhere; all of it on standard error."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from smoe_train.reporting.records import Record, Value

NOT_RESULTS = frozenset({"step", "split", "tokens", "step_seconds", "learning_rate", "gradient_norm"})
WINDOW_STEPS = 20
BAR_FROM_WIDTH = 115  # on a narrower terminal the figures need the place


class ConsoleSink:
    """Shows progress and validation results.

    Args:
        total_steps: Steps of the whole run.
        log_every_steps: Steps between two plain lines.
        start_step: Step that the run continues from, 0 for a new one.
        console: Where to write; standard error by default. `rich` heeds NO_COLOR there.
    """

    name = "console"

    def __init__(
        self, *, total_steps: int, log_every_steps: int, start_step: int = 0, console: Console | None = None
    ) -> None:
        self._total_steps = total_steps
        self._log_every_steps = log_every_steps
        self._console = console or Console(stderr=True)
        self._pace = Pace(total_steps, start_step)
        self._load: float | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def open(self) -> None:
        """Starts the bar if there is a terminal that can move its cursor."""
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            return
        columns = [
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            *([BarColumn(bar_width=20)] if self._console.width >= BAR_FROM_WIDTH else []),
            TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=False)),
        ]
        self._bar = Progress(
            *columns,
            console=self._console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=self._total_steps, completed=self._pace.start_step, figures="")
        self._bar.start()

    def metrics(self, records: Sequence[Record]) -> None:
        """Moves the bar or prints the steps that are due; prints every validation."""
        for record in records:
            if record["split"] != "train":
                self._print(result_line(record))
                continue
            step = record["step"]
            assert isinstance(step, int)
            self._pace.add(record)
            figures = "  ".join(train_figures(record, self._pace, self._load))
            if self._bar is not None:
                self._bar.update(self._task, completed=step, figures=figures)
            elif step % self._log_every_steps == 0 or step == self._total_steps:
                self._print(f"step {step:,}/{self._total_steps:,}  {figures}")

    def routing(self, records: Sequence[Record]) -> None:
        """Remembers the load of the busiest expert, the worst layer of the last step."""
        train = [record for record in records if record["split"] == "train"]
        loads = [record.get("load_max_over_mean") for record in train if record["step"] == train[-1]["step"]]
        self._load = max((load for load in loads if isinstance(load, float)), default=self._load)

    def note(self, text: str) -> None:
        """Prints a line; control characters are shown, not obeyed."""
        self._print("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def patience_seconds(self) -> float:
        """Returns 0: a terminal that takes no text is paused."""
        return 0.0

    def abandon(self) -> None:
        """Does nothing: a daemon thread holds nobody up."""

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Pace:
    """Tokens a second over the last steps, and the time that remains."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.start_step = start_step
        self._total_steps = total_steps
        self._step = start_step
        self._tokens: Value = 0 if start_step == 0 else None
        self._started = time.monotonic()
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)

    def add(self, record: Record) -> None:
        """Takes the record of a training step."""
        step, tokens, seconds = record["step"], record.get("tokens"), record.get("step_seconds")
        assert isinstance(step, int)
        if step <= self._step:  # the run went back
            self._tokens = None
        if isinstance(tokens, int) and isinstance(self._tokens, int) and isinstance(seconds, float):
            self._window.append((tokens - self._tokens, seconds * (step - self._step)))
        self._step, self._tokens = step, tokens

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over the window, validation and checkpoints left out."""
        seconds = sum(seconds for _, seconds in self._window)
        return sum(tokens for tokens, _ in self._window) / seconds if seconds > 0 else None

    @property
    def remaining_seconds(self) -> float | None:
        """By the clock since the start of this process, everything included."""
        done = self._step - self.start_step
        if done <= 0:
            return None
        return (time.monotonic() - self._started) / done * max(0, self._total_steps - self._step)


def train_figures(record: Record, pace: Pace, load: float | None) -> list[str]:
    """Returns the figures of a training step in words, those that there are."""
    figures = []
    if isinstance(loss := record.get("loss"), int | float):
        figures.append(f"loss {loss:.4f}")
    if isinstance(bits := record.get("bits_per_byte"), int | float):
        figures.append(f"{bits:.4f} bits/byte")
    if (rate := pace.tokens_per_second) is not None:
        figures.append(f"{rate:,.0f} tokens/s")
    if load is not None:
        figures.append(f"expert load {load:.2f}x")
    if (remaining := pace.remaining_seconds) is not None:
        figures.append(f"ETA {duration(remaining)}")
    return figures


def result_line(record: Mapping[str, Value]) -> str:
    """Returns the line of a validation or test."""
    results = [
        f"{key.replace('_per_', '/').replace('_', ' ')} {value:.4f}"
        for key, value in record.items()
        if isinstance(value, float) and key not in NOT_RESULTS
    ]
    top_k = f" with top k {record['top_k']}" if "top_k" in record else ""
    return f"{record['split']} at step {record['step']:,}{top_k}: " + ", ".join(results)


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds as ``1:02:03``, ``02:03`` below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"

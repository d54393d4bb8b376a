"""Noticing that a process makes no progress: where every thread of it stands is written down, and it ends.

A rank that hangs takes its peers along: they wait for it in a collective that never returns. A thread of each process
therefore counts signs of life and keeps ``logs/rank-<r>.heartbeat``; without progress for too long it writes the Python
stacks of all threads to ``logs/rank-<r>.stacks``. What the thread itself cannot see, a process that is stopped or whose
interpreter is locked up, shows in a heartbeat that stands still; the parent of the workers looks at those, and asks for
the stacks with SIGUSR2, which is answered below the interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smoe_train.errors import RunStoppedError
from smoe_train.training.stop import StopRequest

if TYPE_CHECKING:
    from smoe_train.training.trainer import Trainer

# Phases without a sign of life for each step of work: loading torch, joining peers, reading a checkpoint; reports.
START, END, DONE = "start", "end", "done"
QUIET_SECONDS = 180.0
TICK_SECONDS = 0.5
# How long a hung process stays for the sake of its peers, which fail as soon as it is gone: their stacks come first.
LINGER_SECONDS = 4.0
_RECORD_BYTES = 256


def patience(hang_seconds: float, phase: str) -> float:
    """Returns how many seconds without a sign of life a phase may have."""
    return max(hang_seconds, QUIET_SECONDS) if phase in (START, END) else hang_seconds


@dataclass(frozen=True)
class Heartbeat:
    """What a process last said of itself.

    Attributes:
        pid: Its process id, on its host.
        ticks: Grows as long as its interpreter runs.
        beats: Signs of life so far.
        phase: What it is doing.
        step: Optimizer steps taken.
    """

    pid: int
    ticks: int
    beats: int
    phase: str
    step: int

    @classmethod
    def read(cls, path: Path) -> Heartbeat | None:
        """Returns what a file says, or None if there is none or it is just being written."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def heartbeat_path(logs: Path, rank: int) -> Path:
    """Returns where a rank keeps its heartbeat."""
    return logs / f"rank-{rank}.heartbeat"


def stacks_path(logs: Path, rank: int) -> Path:
    """Returns where a rank's stacks go."""
    return logs / f"rank-{rank}.stacks"


class Watchdog:
    """Watches the process that it is made in.

    Args:
        logs: The run's ``logs`` folder.
        rank: Global rank.
        hang_seconds: Longest time without a sign of life; None watches nothing.
        leave_word: Told why the process ends, just before it does.
        alone: Whether no parent of ours collects the stacks: they are then printed here.
    """

    def __init__(
        self,
        logs: Path,
        rank: int,
        hang_seconds: float | None,
        leave_word: Callable[[int, str], None],
        alone: bool = False,
    ) -> None:
        self.step: Callable[[], int] = lambda: 0
        self._logs, self._rank, self._hang_seconds = logs, rank, hang_seconds
        self._leave_word, self._alone = leave_word, alone
        self._phase, self._beats, self._ticks = START, 0, 0
        self._stop: StopRequest | None = None
        self._grace_seconds = 0.0
        self._closed = threading.Event()
        logs.mkdir(parents=True, exist_ok=True)
        self._stacks = stacks_path(logs, rank).open("w", encoding="utf-8")
        self._file = os.open(heartbeat_path(logs, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def watch(self, trainer: Trainer) -> None:
        """Takes every forward pass of a trainer's model for a sign of life, and what the trainer says of itself."""
        trainer.beat = self.beat
        self.step = lambda: trainer.state.step
        trainer.model.register_forward_pre_hook(lambda *_: self.beat())

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begins to watch."""
        self._write()
        self._thread.start()

    def beat(self, phase: str | None = None) -> None:
        """Gives a sign of life, and says what is done from now on; costs two assignments."""
        if phase is not None:
            self._phase = phase
        self._beats += 1

    def end_after(self, stop: StopRequest, grace_seconds: float) -> None:
        """Ends the process, as if the signal had not been caught, if it still runs so long after a request to stop."""
        self._stop, self._grace_seconds = stop, grace_seconds

    def close(self) -> None:
        """Watches no longer; the heartbeat says that the process ended in order."""
        self.beat(DONE)
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.unregister(signal.SIGUSR2)
        self._write()
        os.close(self._file)
        self._stacks.close()

    def _watch(self) -> None:
        quiet, seen, before = 0.0, -1, time.monotonic()
        while not self._closed.wait(TICK_SECONDS):
            now = time.monotonic()
            # A process that was stopped, or a machine that slept, made no progress in a time that does not count.
            quiet += min(now - before, 2 * TICK_SECONDS)
            before = now
            if self._beats != seen:
                seen, quiet = self._beats, 0.0
            self._ticks += 1
            self._write()
            if self._hang_seconds is not None and quiet > patience(self._hang_seconds, self._phase):
                self._end_hung(quiet)
            if self._stop is not None and self._stop.overdue(self._grace_seconds):
                self._end_overdue(self._stop.signal or signal.SIGTERM)

    def _write(self) -> None:
        # A plain write instead of a mapped file, in which a full disk would be the death of the process (SIGBUS).
        beat = Heartbeat(os.getpid(), self._ticks, self._beats, self._phase, self.step())
        with contextlib.suppress(OSError):
            os.pwrite(self._file, json.dumps(asdict(beat)).ljust(_RECORD_BYTES).encode(), 0)

    def _end_hung(self, quiet: float) -> None:
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        where = f"in phase {self._phase} at step {self.step()}"
        if self._alone:
            faulthandler.dump_traceback(sys.__stderr__ or self._stacks, all_threads=True)
        with contextlib.suppress(OSError):
            self._leave_word(RunStoppedError.exit_code, f"no progress for {quiet:.0f} s {where}; {ADVICE}")
        if not self._alone or int(os.environ.get("WORLD_SIZE", "1")) > 1:  # a parent, or peers, look at it
            time.sleep(LINGER_SECONDS)
        os._exit(RunStoppedError.exit_code)

    def _end_overdue(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._leave_word(128 + number, overdue_message(self._grace_seconds, number))
        os._exit(128 + number)


ADVICE = "the same command resumes the run; if a step may take so long, raise training.hang_seconds"


def overdue_message(grace_seconds: float, number: int) -> str:
    """Returns what to say of a run that had to be killed after a request to stop."""
    return (
        f"no checkpoint within training.grace_seconds {grace_seconds:g} of {signal.Signals(number).name}; ended "
        "without one, the same command resumes the run from the newest it has"
    )

"""Looking at workers from outside: which one stands still, where each of them is, and who holds the others up."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from smoe_train.training.watchdog import DONE, START, Heartbeat, heartbeat_path, patience, stacks_path

# How much longer than a worker its parent waits: what a worker can find out itself, it says better.
MARGIN_SECONDS = 2.0
STACKS_SECONDS = 1.0
_POLL_SECONDS = 0.05
_SECTION = re.compile(r"(?=^(?:Current thread|Thread) 0x)", re.MULTILINE)
_OUTERMOST = re.compile(r"in <module>|\bin _run_code\b|\bin _bootstrap_inner\b")


class Hearts:
    """The heartbeats of workers on this machine.

    Args:
        logs: The run's ``logs`` folder.
        ranks: Number of workers.
        hang_seconds: Longest time without a sign of life; None for any.
    """

    def __init__(self, logs: Path, ranks: int, hang_seconds: float | None) -> None:
        self._logs, self._ranks, self._hang_seconds = logs, ranks, hang_seconds
        self._last: list[Heartbeat | None] = [None] * ranks
        self._still_seconds = [0.0] * ranks
        self._before = time.monotonic()

    def look(self) -> None:
        """Reads the heartbeats."""
        now = time.monotonic()
        # If this process itself was stopped for a while (Ctrl-Z), that tells nothing of the workers.
        passed, self._before = min(now - self._before, 1.0), now
        for rank in range(self._ranks):
            beat = Heartbeat.read(heartbeat_path(self._logs, rank))
            before = self._last[rank]
            if beat is not None and (before is None or beat.ticks != before.ticks or beat.phase != before.phase):
                self._last[rank], self._still_seconds[rank] = beat, 0.0
            else:
                self._still_seconds[rank] += passed

    @property
    def begun(self) -> bool:
        """Whether any worker has come so far that it has something to save."""
        return any(beat is not None and beat.phase != START for beat in self._last)

    def standing_still(self) -> bool:
        """Returns whether the watchdog of a worker itself stands still: it is stopped, locked up, or never began."""
        if self._hang_seconds is None:
            return False
        return any(
            seconds > patience(self._hang_seconds, beat.phase if beat is not None else START) + MARGIN_SECONDS
            for seconds, beat in zip(self._still_seconds, self._last, strict=True)
            if beat is None or beat.phase != DONE
        )

    def gone(self) -> list[int]:
        """Returns the ranks whose process ended without having come to its end."""
        beats = enumerate(self._last)
        return [rank for rank, beat in beats if beat is not None and beat.phase != DONE and not lives(beat.pid)]


@dataclass(frozen=True)
class Standing:
    """Where one rank stands.

    Attributes:
        rank: Global rank.
        beat: Its last heartbeat; None if it never began.
        state: What the system says of the process, e.g. ``running``, ``sleeping``, ``stopped``, ``gone``.
        stacks: The Python stacks of all its threads.
    """

    rank: int
    beat: Heartbeat | None
    state: str
    stacks: str

    @property
    def waits(self) -> bool:
        """Whether its main thread is in a collective."""
        main = [section for section in _SECTION.split(self.stacks) if _OUTERMOST.search(section)]
        return bool(main) and "torch/distributed/" in "".join(main[-1].splitlines()[1:9])

    def __str__(self) -> str:
        if self.beat is None:
            return f"rank {self.rank}: has not begun"
        where = f"pid {self.beat.pid}, {self.state}, phase {self.beat.phase}, step {self.beat.step}"
        shown = "".join(section for section in _SECTION.split(self.stacks) if " in _watch\n" not in section).strip()
        return f"rank {self.rank} ({where}):\n{shown or '  no stacks: the process did not answer'}"


def collect(logs: Path, ranks: int) -> list[Standing]:
    """Asks every worker on this machine that has not said so itself where it stands; takes a second at most.

    A process that is stopped is continued, to answer; it is to be killed anyway.
    """
    beats = [Heartbeat.read(heartbeat_path(logs, rank)) for rank in range(ranks)]
    states = ["gone" if beat is None else _state(beat.pid) for beat in beats]
    asked = []
    for rank, beat in enumerate(beats):
        if beat is not None and beat.phase != DONE and not _stacks(logs, rank):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(beat.pid, signal.SIGUSR2)
                os.kill(beat.pid, signal.SIGCONT)
                asked.append(rank)
    deadline = time.monotonic() + STACKS_SECONDS
    while time.monotonic() < deadline and not all(_stacks(logs, rank) for rank in asked):
        time.sleep(_POLL_SECONDS)
    time.sleep(_POLL_SECONDS)  # the last one may be in the middle of writing
    return [Standing(rank, beats[rank], states[rank], _stacks(logs, rank)) for rank in range(ranks)]


def culprit(standings: Sequence[Standing]) -> str:
    """Returns in words which rank the others wait for, as far as that can be told."""
    for state, words in (("gone", "has ended"), (psutil.STATUS_STOPPED, "is stopped by a signal")):
        found = [one for one in standings if one.state == state and (one.beat is None or one.beat.phase != DONE)]
        if found:
            never = all(one.beat is None for one in found)
            return f"{_named(found)} {'never began' if never else words}"
    busy = [one for one in standings if one.stacks and not one.waits]
    if busy and len(busy) < len(standings):
        return f"the others wait for {_named(busy)}"
    if len(standings) == 1:
        return "there is one rank"
    order = [(one.beat.step, one.beat.beats) if one.beat is not None else (0, 0) for one in standings]
    behind = [one for one, place in zip(standings, order, strict=True) if place == min(order)]
    if len(behind) < len(standings):
        return f"{_named(behind)} is behind the others"
    return "no rank is behind the others: they wait for each other, or for the network"


def _named(found: Sequence[Standing]) -> str:
    return " and ".join(f"rank {one.rank}" for one in found)


def _stacks(logs: Path, rank: int) -> str:
    try:
        return stacks_path(logs, rank).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _state(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return "gone"


def lives(pid: int) -> bool:
    """Returns whether a process runs; one that nobody has waited for yet does not."""
    return _state(pid) not in ("gone", psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)

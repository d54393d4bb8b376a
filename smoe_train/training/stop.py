"""Asking a run to stop: a signal, or the end of its time, is remembered until the loop looks."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

# SIGHUP is a closed terminal, SIGUSR1 a scheduler's notice.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# When the command began, in seconds of the monotonic clock of this machine; workers and their restarts share its time.
STARTED = "SMOE_TRAIN_STARTED"


class StopRequest:
    """Whether this process was asked to stop, and why.

    Times are of the monotonic clock: a wall clock that is set forward or back stops no run.

    Args:
        started: When the command began, if another process than this one knows better.
    """

    def __init__(self, started: float | None = None) -> None:
        self.signal: int | None = None
        self.asked_at: float | None = None
        self._max_seconds: float | None = None
        # The environment is that of this machine: it is not passed to others, whose clocks differ.
        self._started = started or float(os.environ.get(STARTED) or time.monotonic())

    def listen(self, second_ends: bool) -> None:
        """Remembers SIGINT, SIGTERM, SIGHUP and SIGUSR1; what was ignored (nohup) stays ignored.

        Args:
            second_ends: Whether a second signal has its usual effect, or is taken as the same request again.
        """

        def remember(number: int, frame: FrameType | None) -> None:
            self.signal = number
            if self.asked_at is None:
                self.asked_at = time.monotonic()
            if second_ends:
                for each in STOPPING:
                    signal.signal(each, signal.SIG_DFL)

        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, remember)

    def limit(self, max_seconds: float | None) -> None:
        """Asks the run to stop once so many seconds have passed since its command was started; None for never."""
        self._max_seconds = max_seconds

    @property
    def requested(self) -> bool:
        """Whether a signal has come or the time is over."""
        return self.signal is not None or self._time_is_over()

    @property
    def reason(self) -> str:
        """Why the run is to stop, to follow "stopped"; of ranks that stop together, not each has its own."""
        if self.signal is not None:
            return f"by {signal.Signals(self.signal).name}"
        if self._time_is_over():
            return f"since training.max_seconds {self._max_seconds:g} are over"
        return "as another rank was asked to"

    def overdue(self, grace_seconds: float) -> bool:
        """Returns whether a signal has come and so many seconds have passed since."""
        return self.asked_at is not None and time.monotonic() - self.asked_at > grace_seconds

    def _time_is_over(self) -> bool:
        return self._max_seconds is not None and time.monotonic() - self._started >= self._max_seconds

"""Asking a run to stop: a signal is remembered until the loop looks."""

from __future__ import annotations

import signal
from types import FrameType

# SIGHUP is a closed terminal, SIGUSR1 a scheduler's notice.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def listen(self, second_ends: bool) -> None:
        """Remembers SIGINT, SIGTERM, SIGHUP and SIGUSR1; what was ignored (nohup) stays ignored.

        Args:
            second_ends: Whether a second signal has its usual effect, or is taken as the same request again.
        """

        def remember(number: int, frame: FrameType | None) -> None:
            self.signal = number
            if second_ends:
                for each in STOPPING:
                    signal.signal(each, signal.SIG_DFL)

        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, remember)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

"""Asking a run to stop: SIGINT or SIGTERM is remembered until the loop looks."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def listen(self, second_ends: bool) -> None:
        """Remembers SIGINT and SIGTERM.

        Args:
            second_ends: Whether a second signal has its usual effect, or is taken as the same request again.
        """

        def remember(number: int, frame: FrameType | None) -> None:
            self.signal = number
            if second_ends:
                for each in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(each, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, remember)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

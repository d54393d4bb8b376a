"""Asking a run to stop: the first SIGINT or SIGTERM is remembered, the second ends the process at once."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def listen(self) -> None:
        """Remembers the first SIGINT or SIGTERM; a second one has its usual effect."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

"""Sinks that may be slow, broken or unreachable, kept away from the training loop by a thread each."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from smoe_train.reporting.records import Record

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where figures are shown or sent; every method runs in the sink's own thread unless it says otherwise."""

    name: str

    def open(self) -> None:
        """Gets ready; may block."""

    def metrics(self, records: Sequence[Record]) -> None:
        """Takes records of losses and rates."""

    def routing(self, records: Sequence[Record]) -> None:
        """Takes records of routing health, one per step and layer."""

    def note(self, text: str) -> None:
        """Takes a line for people."""

    def close(self) -> None:
        """Sends what is left and lets go."""

    def patience_seconds(self) -> float:
        """Returns how much longer an unfinished `close` is worth waiting for; called by the closing thread."""

    def abandon(self) -> None:
        """Makes sure that an unfinished sink does not hold up the end of the process; by the closing thread."""


class Background:
    """Runs a sink in a daemon thread behind a bounded queue; the first failure disables it with one warning.

    Args:
        sink: The sink.
        capacity: Calls that may wait; further ones are dropped and counted.
    """

    def __init__(self, sink: Sink, capacity: int = 1000) -> None:
        self._sink = sink
        self._capacity = capacity
        self._waiting: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._disabled = False
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name=f"reporting-{sink.name}", daemon=True)
        self._thread.start()

    def metrics(self, records: Sequence[Record]) -> None:
        """Hands over copies of the records; never blocks."""
        copies = [dict(record) for record in records]
        self._put(lambda: self._sink.metrics(copies))

    def routing(self, records: Sequence[Record]) -> None:
        """Hands over copies of the records; never blocks."""
        copies = [dict(record) for record in records]
        self._put(lambda: self._sink.routing(copies))

    def note(self, text: str) -> None:
        """Hands over a line; never blocks."""
        self._put(lambda: self._sink.note(text))

    def begin_close(self) -> None:
        """Tells the thread to finish what waits and close; returns at once."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def end_close(self, deadline: float) -> None:
        """Waits until ``deadline`` (of `time.monotonic`), longer only where the sink says that it is worth it."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        try:
            if self._thread.is_alive():
                self._thread.join(self._sink.patience_seconds())
            if self._thread.is_alive():
                self._disable("did not finish in time and is left behind")
                self._sink.abandon()
            elif self._dropped:
                self._disable(f"was too slow: {self._dropped} updates were not passed on")
        except Exception as error:
            self._disable(f"failed while closing: {_described(error)}")

    def _put(self, call: Callable[[], None]) -> None:
        with self._changed:
            if self._disabled:
                return
            if len(self._waiting) >= self._capacity:
                self._dropped += 1
                return
            self._waiting.append(call)
            self._changed.notify()

    def _run(self) -> None:
        # BaseException: libraries ask to exit (SystemExit) where they cannot prompt, and a thread may not stop the run.
        try:
            self._sink.open()
            while (call := self._next()) is not None:
                call()
        except BaseException as error:
            self._disable(f"failed and is switched off: {_described(error)}")
        try:
            self._sink.close()
        except BaseException as error:
            self._disable(f"failed while closing: {_described(error)}")

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting.popleft() if self._waiting and not self._disabled else None

    def _disable(self, reason: str) -> None:
        with self._changed:
            already, self._disabled = self._disabled, True
            self._waiting.clear()
        if not already:
            logger.warning("%s %s. The run goes on; its record is metrics.jsonl", self._sink.name, reason)


def _described(error: BaseException) -> str:
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__

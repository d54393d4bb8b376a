"""How far a long piece of work has come: downloads, tokenizing, checks.

Work reports to `current`, so nothing between it and the command line passes a reporter on. The command line installs
bars by `using`; everything else gets lines in the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Protocol

REPORT_EVERY_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Shows the progress of tasks."""

    def task(self, description: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """Returns a context around one task, whose value is called with the bytes done since the last call.

        Args:
            description: What is done, such as ``tokenizing train``.
            total: Bytes there are to do, or None if that is not known.
        """
        ...


class LoggedProgress:
    """Writes a line to the log every ten seconds, so that short tasks are silent."""

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """See `Progress.task`."""
        done, reported = 0, time.monotonic()

        def advance(num_bytes: int) -> None:
            nonlocal done, reported
            done += num_bytes
            if time.monotonic() - reported >= REPORT_EVERY_SECONDS:
                reported = time.monotonic()
                share = f" of {total / 1e6:,.1f} MB ({done / total:.0%})" if total else " MB"
                logger.info("%s: %s%s", description, f"{done / 1e6:,.1f}", share)

        yield advance


_CURRENT: ContextVar[Progress] = ContextVar("progress", default=LoggedProgress())  # noqa: B039  (it has no state)


def current() -> Progress:
    """Returns where progress is shown."""
    return _CURRENT.get()


@contextmanager
def using(progress: Progress) -> Iterator[None]:
    """Shows progress there within the block."""
    token = _CURRENT.set(progress)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def reported(chunks: Iterable[bytes], description: str, total: int | None) -> Iterator[bytes]:
    """Passes chunks on and shows their passing as one task of `current`; see `Progress.task`."""
    with current().task(description, total) as advance:
        for chunk in chunks:
            yield chunk
            advance(len(chunk))

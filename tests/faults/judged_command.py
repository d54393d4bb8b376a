"""``smoe-train`` in this process, and whether it has ended as it may: done, or with one clear message."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import psutil

from smoe_train.cli.app import main
from smoe_train.errors import SmoeError

LONGEST_MESSAGE = 20_000
_BARS = re.compile(r"\r[^\r\n]*%\|[^\r\n]*")  # progress bars of libraries
LONGEST_SECONDS = 60


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Exit code; None if an exception came through, which a user would see as a traceback.
        out: What it printed.
        err: What it printed to stderr, or the traceback.
        seconds: How long it took.
    """

    code: int | None
    out: str
    err: str
    seconds: float

    def complaint(self, allowed: Collection[int] = (0, 2), seconds: float = 10.0) -> str | None:
        """Returns what is wrong with this end, or None.

        Args:
            allowed: Exit codes that may be.
            seconds: How long it may take.
        """
        if self.code is None:
            return f"raw error: {' | '.join(self.err.strip().splitlines()[-3:])}"
        if self.code not in allowed:
            return f"exit code {self.code}: {self.err[-300:]!r}"
        if "Traceback (most recent call last)" in self.out + self.err:
            return f"traceback in the message: {self.err[-300:]!r}"
        if self.code and not ("error: " in self.err or "Error" in self.err):
            return f"exit code {self.code} without an error: {self.err[-300:]!r}"
        if len(self.err) > LONGEST_MESSAGE:
            return f"a message of {len(self.err)} characters: {self.err[:200]!r}"
        shown = _BARS.sub("", self.err + self.out)
        if any(not one.isprintable() and one != "\n" for one in shown):
            return f"control characters: {shown[:300]!r}"
        return f"took {self.seconds:.1f} s" if self.seconds > seconds else None


class TooLongError(Exception):
    """What a try ends with that waits for something that never comes."""


def smoe_train(*arguments: object) -> Ended:
    """Runs ``smoe-train`` with these arguments, as the console script does."""
    out, err = io.StringIO(), io.StringIO()
    before, started = sys.argv, time.monotonic()
    sys.argv = ["smoe-train", *map(str, arguments)]
    code: int | None
    try:
        with _undone(), _in_time(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except Exception:
        code = None
        err.write(traceback.format_exc())
    finally:
        sys.argv = before
    return Ended(code, out.getvalue(), err.getvalue(), time.monotonic() - started)


def ended(work: Callable[[], object]) -> Ended:
    """Does some work and says how it ends, as the command line would."""
    started = time.monotonic()
    code: int | None = 0
    message = ""
    try:
        with _in_time():
            work()
    except SmoeError as error:
        code, message = error.exit_code, f"error: {error}\n"
    except Exception:
        code, message = None, traceback.format_exc()
    return Ended(code, "", message, time.monotonic() - started)


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLongError(f"not done after {LONGEST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _undone() -> Iterator[None]:
    """Puts back signal handlers and log files, which a process of its own would take along."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logger = logging.getLogger("smoe_train")
    handlers, level = list(logger.handlers), logger.level
    try:
        yield
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
        for handler in set(logger.handlers) - set(handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)


@contextlib.contextmanager
def limited_memory(more_bytes: int) -> Iterator[None]:
    """Lets this process have so much more memory than it has now; who asks for more gets a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now: int = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

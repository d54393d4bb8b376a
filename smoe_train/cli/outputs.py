"""What a run prints and logs: neither a closed terminal nor a full disk under its log may end it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

logger = logging.getLogger("smoe_train")
logger.addHandler(logging.NullHandler())  # without one, Python would print what is logged


def keep_going_without_console() -> None:
    """Makes standard output and error drop what nobody takes, instead of raising where something is printed.

    They lose their buffers too: a thread that waits for a paused terminal would hold a buffer's lock, and with it the
    end of the process.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by whoever started us: the next file to be opened would take what is meant for people
            os.open(os.devnull, os.O_RDWR)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is not original:  # somebody collects what is printed
            continue
        encoding = "utf-8" if stream is None else stream.encoding
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
        kept = io.TextIOWrapper(_Forgiving(descriptor), encoding, "backslashreplace", write_through=True)  # type: ignore[type-var]
        setattr(sys, name, kept)


class _Forgiving(io.RawIOBase):
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        with contextlib.suppress(OSError):
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        return size


def log_to(logs: Path) -> None:
    """Sends this rank's log to its own file; one that cannot be written is done without, after a warning."""
    logger.setLevel(logging.INFO)
    path = logs / f"rank-{os.environ.get('RANK', '0')}.log"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        _warn(path, error)
        return
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logger.addHandler(handler)


class _LogFile(logging.FileHandler):
    """A log file whose failure is said once, instead of printing a traceback with each line."""

    _warned = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - as in logging
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._warned:
            self._warned = True
            _warn(Path(self.baseFilename), error)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what the disk has not taken yet
            super().close()


def _warn(path: Path, error: OSError) -> None:
    print(f"warning: {path}: cannot be written: {error.strerror}; the run goes on without its log", file=sys.stderr)

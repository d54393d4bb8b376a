"""The record of a run: JSON lines that are on the disk when `append` returns, or wait in memory while it fails."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from smoe_train.durable import flush, replacing
from smoe_train.errors import RunFailedError
from smoe_train.reporting.records import Record, complete_lines, decode, encode

logger = logging.getLogger(__name__)

# What may wait for a disk that fails: more than 100,000 steps.
MEMORY_BYTES = 64 * 2**20
# A disk that takes a second to fail is asked again after 50: a run loses at most 2 % to it.
PAUSE = 50.0


class JsonLines:
    """An append-only file of records; a disk that fails after the start does not end the run.

    Records that cannot be written wait in memory and follow in order as soon as a later call finds that the disk works
    again. What an interrupted write left behind is cut off first, so that no record is torn or stands there twice.

    Args:
        path: The file.
        resume_from_step: Keep the records up to this step and drop later ones, which the resumed run writes again.
            None starts an empty file; one that is there is kept under another name.
        memory_bytes: How much may wait; beyond it the oldest records are given up.

    Attributes:
        last_step: Step of the last record kept from before, None if there is none.
        set_aside: Where a file that was in the way has been moved.

    Raises:
        RunFailedError: The file is damaged or cannot be opened for writing.
    """

    def __init__(self, path: Path, resume_from_step: int | None, memory_bytes: int = MEMORY_BYTES) -> None:
        self.path = path
        self.last_step: int | None = None
        self.set_aside: Path | None = None
        self._memory_bytes = memory_bytes
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._given_up = 0
        self._failing = False
        self._retry_at = 0.0
        try:
            if resume_from_step is not None:
                self._keep_until(resume_from_step)
            elif path.exists() and path.stat().st_size > 0:
                self.set_aside = _free_name(path)
                path.rename(self.set_aside)
            self._descriptor = _open(path)
            self._durable_bytes = os.fstat(self._descriptor).st_size
            flush(path.parent)
        except OSError as error:
            raise RunFailedError(
                f"{self.path}: cannot be written: {error.strerror}. No run is started without its record; "
                "make room or give access, then run the same command again"
            ) from error

    def append(self, records: Sequence[Record]) -> None:
        """Writes records and waits until the disk has them; those it does not take wait for a later call.

        Raises:
            ValueError: The file has been closed.
        """
        if self._descriptor < 0:
            raise ValueError(f"{self.path}: is closed")
        lines = [encode(record) for record in records]
        self._waiting.extend(lines)
        self._waiting_bytes += sum(map(len, lines))
        if time.monotonic() >= self._retry_at:
            self._write_waiting()
        while self._waiting_bytes > self._memory_bytes:
            self._waiting_bytes -= len(self._waiting.popleft())
            self._given_up += 1

    def rewind(self, step: int, validated: bool = True) -> None:
        """Drops the records of later steps: the run goes back behind them and writes them again.

        Args:
            step: The last one to keep.
            validated: Whether to keep its records of other splits than train, too.
        """

        def kept(line: bytes) -> bool:
            record = decode(line)
            return bool(record["step"] < step or (record["step"] == step and (validated or record["split"] == "train")))

        try:
            lines = self._durable_lines()
        except RunFailedError as error:
            logger.warning("%s; records of steps after %d may stand there twice", error, step)
            lines = []
        first = next((n for n, line in enumerate(lines) if not kept(line)), len(lines))
        self._durable_bytes -= sum(map(len, lines[first:]))  # cut off when the file is next written
        again = [line for line in [*lines[first:], *self._waiting] if kept(line)]
        self._waiting = deque(again)
        self._waiting_bytes = sum(map(len, again))
        if time.monotonic() >= self._retry_at:
            self._write_waiting()

    def _durable_lines(self) -> list[bytes]:
        found, size = [], 0
        for line, _ in complete_lines(self.path):
            size += len(line)
            if size > self._durable_bytes:  # these wait besides
                break
            found.append(line)
        return found

    def close(self) -> None:
        """Tries a last time to write what waits, says what is lost, and closes; a second call does nothing."""
        if self._descriptor < 0:
            return
        if self._waiting:
            self._write_waiting()
        if self._waiting:
            lost = len(self._waiting) + self._given_up
            logger.warning("%s: is still not writable: %d records are lost", self.path, lost)
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = -1

    def _write_waiting(self) -> None:
        started = time.monotonic()
        try:
            self._find_again()
            self._cut_off_rest()
            data = memoryview(b"".join(self._waiting))
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)
        except OSError as error:
            self._failed(error, time.monotonic() - started)
            return
        if self._failing:
            self._works_again()
        self._durable_bytes += self._waiting_bytes
        self._waiting.clear()
        self._waiting_bytes, self._given_up, self._failing, self._retry_at = 0, 0, False, 0.0

    def _failed(self, error: OSError, seconds: float) -> None:
        self._retry_at = time.monotonic() + PAUSE * seconds
        if not self._failing:
            logger.warning(
                "%s: cannot be written: %s. The run goes on; up to %.3g MiB of records wait in memory until it can",
                self.path,
                error.strerror,
                self._memory_bytes / 2**20,
            )
        self._failing = True

    def _works_again(self) -> None:
        message = f"{self.path}: works again; {len(self._waiting)} records that waited are in it"
        if self._given_up:
            logger.warning("%s, %d older ones are lost", message, self._given_up)
        else:
            logger.info(message)

    def _find_again(self) -> None:
        """Opens the file anew where the path leads elsewhere: it was removed, or its disk is gone or back.

        A folder that is gone is not made again: it may be the place where a disk belongs.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._descriptor)):
                return
        before, self._descriptor = self._descriptor, _open(self.path)
        with contextlib.suppress(OSError):
            os.close(before)
        flush(self.path.parent)

    def _cut_off_rest(self) -> None:
        """Makes the file end after the last record that is certain to be on the disk."""
        size = os.fstat(self._descriptor).st_size
        if size < self._durable_bytes:
            self._durable_bytes = self.path.read_bytes().rfind(b"\n") + 1
            logger.warning("%s: was removed or cut by somebody else, and records in it are lost", self.path)
        if size > self._durable_bytes:
            os.ftruncate(self._descriptor, self._durable_bytes)

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        with replacing(self.path) as file:
            for line, record in complete_lines(self.path):
                if record["step"] <= step:
                    file.write(line)
                    self.last_step = max(record["step"], self.last_step or 0)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.before-{number}{path.suffix}")).exists():
        number += 1
    return candidate

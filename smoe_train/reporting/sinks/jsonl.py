"""The record of a run: JSON lines that are on the disk when `append` returns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from smoe_train.durable import flush, replacing
from smoe_train.errors import RunFailedError
from smoe_train.reporting.records import Record, complete_lines, encode


class JsonLines:
    """An append-only file of records.

    Args:
        path: The file.
        resume_from_step: Keep the records up to this step and drop later ones, which the resumed run writes again.
            None starts an empty file; one that is there is kept under another name.

    Attributes:
        last_step: Step of the last record kept from before, None if there is none.
        set_aside: Where a file that was in the way has been moved.

    Raises:
        RunFailedError: The file is damaged or cannot be written.
    """

    def __init__(self, path: Path, resume_from_step: int | None) -> None:
        self.path = path
        self.last_step: int | None = None
        self.set_aside: Path | None = None
        try:
            if resume_from_step is not None:
                self._keep_until(resume_from_step)
            elif path.exists() and path.stat().st_size > 0:
                self.set_aside = _free_name(path)
                path.rename(self.set_aside)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            flush(path.parent)
        except OSError as error:
            raise self._failure(error) from error

    def append(self, records: Sequence[Record]) -> None:
        """Writes records and waits until the disk has them.

        Raises:
            RunFailedError: They cannot be written.
        """
        data = memoryview(b"".join(encode(record) for record in records))
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        with replacing(self.path) as file:
            for line, record in complete_lines(self.path):
                if record["step"] <= step:
                    file.write(line)
                    self.last_step = max(record["step"], self.last_step or 0)

    def _failure(self, error: OSError) -> RunFailedError:
        return RunFailedError(
            f"{self.path}: cannot be written: {error.strerror}. A run is not continued without its record; "
            "make room or give access, then run the same command again to resume"
        )


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.before-{number}{path.suffix}")).exists():
        number += 1
    return candidate

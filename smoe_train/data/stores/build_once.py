"""Folders that are complete or absent: built aside, flushed to disk, renamed into place, by one process at a time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from smoe_train.durable import flush
from smoe_train.errors import DataError

QUICK_SECONDS = 2.0

logger = logging.getLogger(__name__)


def build_once(final: Path, build: Callable[[Path], None], intact: Callable[[Path], bool]) -> None:
    """Makes sure that ``final`` is a complete folder.

    Processes that ask for the same folder wait for the one that builds it. A killed build leaves only a ``.partial``
    folder, which the next one clears away. The lock is released by the system when its holder dies.

    Args:
        final: The folder.
        build: Fills the empty folder that it is given.
        intact: Whether a folder (which may not exist) is complete; one that is not is built again.

    Raises:
        DataError: The disk is full or the folder cannot be written.
    """
    if intact(final):
        return
    try:
        with exclusive(final):
            if not intact(final):
                _build(final, build)
    except (OSError, NotImplementedError) as error:
        raise cannot_be_written(final, error) from error


@contextmanager
def exclusive(final: Path) -> Iterator[None]:
    """Holds the lock of a file or folder that is made in the block, and makes the folder that it lies in.

    Raises:
        OSError: The folder or the lock cannot be written.
        NotImplementedError: The file system has no locks.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{final}.lock")
    try:
        lock.acquire(timeout=QUICK_SECONDS)
    except Timeout:
        logger.info("waiting for another process that builds %s", final)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def cannot_be_written(path: Path, error: Exception) -> DataError:
    """Returns what to tell a user whose disk is full, or whose cache folder refuses to be written."""
    return DataError(
        f"{path}: cannot be written: {error}; free some space, or set SMOE_TRAIN_CACHE to a folder on a local disk "
        "that can be written"
    )


def _build(final: Path, build: Callable[[Path], None]) -> None:
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        build(partial)
        for path in [*partial.iterdir(), partial]:
            flush(path)
        if final.exists():
            logger.warning("%s is damaged or incomplete; it was built again", final)
            shutil.rmtree(final)
        partial.rename(final)
        flush(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

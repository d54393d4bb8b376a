"""Files that survive a crash: the old or the new content, never a part, and on the disk when a call returns."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside ``path`` that takes its place once the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Writes ``data`` as the whole content of ``path``, atomically."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def creating(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``folder``, absent or empty, that takes its place once the block ends well.

    Raises:
        FileExistsError: The folder holds something, or is none.
        OSError: It cannot be written.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, "exists and is not an empty folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush(path: Path) -> None:
    """Makes the content of a file, or the names and renames in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Files that survive a crash: the old or the new content, never a part, and on the disk when a call returns."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_REPLACED = ".replaced-"
_RENAME_EXCHANGE = 2


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


def take_place(new: Path, path: Path) -> None:
    """Renames a folder to ``path``; a folder that is there keeps its place until the new one has it.

    Linux exchanges the two, and the old one is then found under the name of the new one. Where the file system cannot
    (NFS), there is a moment with neither of them; `put_back` is what ends it after a crash.
    """
    if not path.exists() or not _exchanged(new, path):
        replaced = path.with_name(f"{_REPLACED}{path.name}-{uuid.uuid4().hex}")
        if path.exists():
            path.rename(replaced)
        try:
            new.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Gives those folders their place again that a crash in `take_place` has taken away."""
    for replaced in folder.glob(f"{_REPLACED}*") if folder.is_dir() else ():
        path = folder / replaced.name.removeprefix(_REPLACED).rpartition("-")[0]
        with contextlib.suppress(OSError):
            if path.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(path)


def _exchanged(first: Path, second: Path) -> bool:
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if exchange is None:
        return False
    here = -100  # AT_FDCWD
    return int(exchange(here, os.fsencode(first), here, os.fsencode(second), _RENAME_EXCHANGE)) == 0


def flush(path: Path) -> None:
    """Makes the content of a file, or the names and renames in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

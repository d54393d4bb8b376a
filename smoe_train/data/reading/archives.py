"""Folders and archives as named files, read without unpacking; what could lead out of them or fill a disk is refused.

Refused are names that lead out (``../x``, ``/x``), links, encrypted members, and archives that grow beyond all measure.
"""

from __future__ import annotations

import bz2
import fnmatch
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from smoe_train.data.source import CHUNK_BYTES, StoredFile
from smoe_train.errors import DataError

MAX_RATIO = 200
"""How many times larger than its archive the contents may be; text shrinks to a third, noise of one byte by 1,000."""
MAX_HARMLESS_BYTES = 64 << 20
"""Contents up to this size are never too large."""
MAX_TAR_MEMBER_BYTES = 1 << 30

_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, NotImplementedError)


def is_archive(path: Path) -> bool:
    """Whether the file at ``path`` is a zip archive, or by its first bytes a tar archive, compressed or not."""
    return is_zip(path) or _tar_opener(path) is not None


def open_members(path: Path, pattern: str = "*") -> dict[str, StoredFile]:
    """Returns the files in a folder or a zip archive by their names in it ("wikitext-2/wiki.train.tokens"), sorted.

    Args:
        path: A folder, which is searched to the bottom, or a zip archive.
        pattern: Which of them, as in ``fnmatch``; ``*`` also stands for slashes.

    Raises:
        DataError: There is nothing at ``path``, or it is damaged or refused.
    """
    path = path.expanduser()
    members = dict(_folder_members(path, pattern)) if path.is_dir() else _zip_members(path)
    return {name: members[name] for name in sorted(members) if fnmatch.fnmatchcase(name, pattern)}


def read_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yields name and contents of small files in a folder, a zip or a tar archive, one at a time.

    A tar archive is read once from start to end, in its own order; the others are sorted by name.

    Args:
        path: The folder or archive.
        wanted: Says by name which files to yield.

    Raises:
        DataError: There is nothing at ``path``, or it is damaged or refused.
    """
    path = path.expanduser()
    if path.is_file() and not is_zip(path):
        yield from _tar_members(path, wanted)
        return
    for name, file in open_members(path).items():
        if wanted(name):
            yield name, b"".join(file.chunks())


def inside(folder: Path, path: Path) -> Path:
    """Returns ``path``, a file found in ``folder``.

    Links may lead to other places in the folder, and in the hub's cache from a snapshot to its blobs.

    Raises:
        DataError: It is a link out of the folder.
    """
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))  # `resolve` raises where links go round
    snapshots = next((parent for parent in [home, *home.parents] if parent.name == "snapshots"), None)
    homes = [home] if snapshots is None else [home, snapshots.parent / "blobs"]
    if not any(target.is_relative_to(one) for one in homes):
        raise DataError(f"{path}: is a link out of {folder}, to {target}; put the file itself into the folder")
    return path


def _folder_members(folder: Path, pattern: str) -> Iterator[tuple[str, StoredFile]]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if fnmatch.fnmatchcase(name, pattern) and path.is_file():
            yield name, StoredFile.at(inside(folder, path))


def is_zip(path: Path) -> bool:
    """Whether the file at ``path`` is a zip archive, by its name or its first bytes."""
    return path.is_file() and (path.suffix == ".zip" or _start(path, 4) == b"PK\x03\x04")


def _start(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _check_name(path: Path, name: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in name:
        raise DataError(f"{path}: has a member {name[:80]!r} that leads out of its folder; use the original archive")


def _check_size(path: Path, num_bytes: int) -> None:
    allowed = max(MAX_HARMLESS_BYTES, MAX_RATIO * path.stat().st_size)
    if num_bytes > allowed:
        raise DataError(
            f"{path}: its {path.stat().st_size:,} bytes unpack to {num_bytes:,} or more, over {allowed:,} "
            f"({MAX_RATIO} times as much); this is no archive of text, use the original"
        )


def _zip_members(path: Path) -> dict[str, StoredFile]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file or folder")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except _DAMAGE as error:
        raise DataError(f"{path}: is not a zip archive or is damaged: {error}; fetch it again") from error
    members: dict[str, StoredFile] = {}
    for info in infos:
        _check_name(path, info.filename)
        if info.is_dir():
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"{path}: the member {info.filename!r} is a link; use the original archive")
        if info.flag_bits & 0x1:
            raise DataError(f"{path}: the member {info.filename!r} is encrypted; unpack it and use the files")
        if info.filename in members:
            raise DataError(f"{path}: has two members {info.filename!r}; use the original archive")
        members[info.filename] = _zip_member(path, info)
    _check_size(path, sum(file.num_bytes for file in members.values()))
    return members


def _zip_member(path: Path, info: zipfile.ZipInfo) -> StoredFile:
    def open_member() -> IO[bytes]:
        with zipfile.ZipFile(path) as archive:  # the member keeps the file open for itself
            return archive.open(info.filename)

    return StoredFile(f"{path}:{info.filename}", info.file_size, open_member)


def _tar_opener(path: Path) -> Callable[..., Any] | None:
    """Returns what opens the tar archive at ``path`` and undoes its compression; None if its first bytes are none's."""
    start = _start(path, tarfile.BLOCKSIZE) if path.is_file() else b""
    for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open)):
        if start.startswith(magic):
            return opener
    return open if start[257:262] == b"ustar" else None


class _Watched(io.RawIOBase):
    """Passes a stream through until it has grown beyond measure, and keeps its last bytes."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path = path
        self.stream = stream
        self.num_bytes = 0
        self.tail = b""

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(CHUNK_BYTES if size < 0 else size)
        self.num_bytes += len(data)
        _check_size(self.path, self.num_bytes)
        self.tail = (self.tail + data)[-tarfile.BLOCKSIZE :]
        return data


def _tar_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with _tar(path) as (archive, watched):
        for member in archive:
            _check_name(path, member.name)
            if member.isdir():
                continue
            if not member.isreg():
                kind = "a link" if member.issym() or member.islnk() else "not a regular file"
                raise DataError(f"{path}: the member {member.name!r} is {kind}; use the original archive")
            if not wanted(name := member.name.removeprefix("./")):
                continue
            if member.size > MAX_TAR_MEMBER_BYTES:
                raise DataError(f"{path}: the member {name!r} has {member.size:,} bytes; unpack it and use the files")
            stream = archive.extractfile(member)
            assert stream is not None
            data = stream.read()
            if len(data) != member.size:
                raise DataError(f"{path}: is cut off in the member {name!r}; fetch it again")
            yield name, data
        # tarfile takes a missing end for the end, and the checksum of the compression stands behind it.
        while watched.read():
            pass
        if watched.tail.strip(b"\0") or len(watched.tail) < tarfile.BLOCKSIZE:
            raise DataError(f"{path}: is cut off: the end of a tar archive is missing; fetch it again")


@contextmanager
def _tar(path: Path) -> Iterator[tuple[tarfile.TarFile, _Watched]]:
    opener = _tar_opener(path)
    if opener is None:
        raise DataError(f"{path}: is neither a zip nor a tar archive; use the original archive or its unpacked folder")
    try:
        with opener(path, "rb") as stream:
            watched = _Watched(path, stream)
            with tarfile.open(fileobj=watched, mode="r|") as archive:
                yield archive, watched
    except _DAMAGE as error:
        raise DataError(f"{path}: is damaged: {error}; fetch it again") from error

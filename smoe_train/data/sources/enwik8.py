"""enwik8: the first 10^8 bytes of an English Wikipedia dump of 2006 (Hutter Prize; the byte-level LM benchmark)."""

from __future__ import annotations

import hashlib
import http.client
import logging
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

from pydantic import Field

from smoe_train.data.build_once import build_once
from smoe_train.data.source import (
    CHUNK_BYTES,
    Corpus,
    SourceConfig,
    Split,
    SplitName,
    StoredFile,
    TextSource,
    byte_range,
    checksum,
    register_source,
)
from smoe_train.errors import DataError

URL = "http://mattmahoney.net/dc/enwik8.zip"
ZIP_BYTES = 36_445_475
ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
MEMBER = "enwik8"
FULL_BYTES = 100_000_000
FULL_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"
TIMEOUT_SECONDS = 30.0
REPORT_EVERY_BYTES = 8 << 20

logger = logging.getLogger(__name__)


class Enwik8Config(SourceConfig):
    """Options of enwik8; the default split is the one of the literature, 90M / 5M / 5M bytes from start to end."""

    source: Literal["enwik8"] = "enwik8"
    path: Path | None = None
    """The file ``enwik8``, ``enwik8.zip``, or a piece of enwik8; without it the archive is downloaded once."""
    train_bytes: int = Field(90_000_000, gt=0)
    """Size of the training split, from the first byte."""
    valid_bytes: int = Field(5_000_000, gt=0)
    """Size of the validation split, which follows the training split."""
    test_bytes: int = Field(5_000_000, ge=0)
    """Size of the test split, which follows the validation split; 0 for none."""


@register_source("enwik8", Enwik8Config)
class Enwik8Source(TextSource):
    """enwik8 or a piece of it, split by byte offsets.

    Split as in Transformer-XL's prep_enwik8.py. A whole file must have the published md5; a piece cannot be checked,
    so it is accepted only with split sizes of its own.
    """

    config: Enwik8Config

    def files(self, cache: Path) -> Sequence[Path]:
        """Returns the one file that is read."""
        return [self._path(cache)]

    def load(self, cache: Path) -> Corpus:
        """Downloads the archive if no path is set, checks the text and divides it."""
        if self.config.path is None:
            download(self._path(cache))
        file = stored_text(self._path(cache))
        config = self.config
        sizes: dict[SplitName, int] = {
            "train": config.train_bytes,
            "valid": config.valid_bytes,
            "test": config.test_bytes,
        }
        _check(file, sum(sizes.values()))
        splits: dict[SplitName, Split] = {}
        start = 0
        for name, size in sizes.items():
            if size:
                splits[name] = byte_range([file], start, start + size)
            start += size
        return Corpus.read("enwik8", splits)

    def _path(self, cache: Path) -> Path:
        if self.config.path is None:
            return cache / "downloads" / "enwik8" / "enwik8.zip"
        return self.config.path.expanduser()


def stored_text(path: Path) -> StoredFile:
    """Returns the text at ``path``: the file itself, or the member ``enwik8`` of a zip archive.

    Raises:
        DataError: There is no file, or the archive is damaged, has no such member, or one larger than enwik8.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such file; set data.path to the file enwik8 or to enwik8.zip, "
            f"or leave it out to download {URL}"
        )
    plain = StoredFile.at(path)
    with plain.open() as stream:
        if path.suffix != ".zip" and stream.read(4) != b"PK\x03\x04":
            return plain
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: is not a zip archive or is damaged: {error}; fetch it again") from error
    member = members.get(MEMBER)
    if member is None:
        shown = ", ".join(repr(name[:60]) for name in list(members)[:5]) or "nothing"
        raise DataError(f"{path}: holds no member named {MEMBER!r} (it holds {shown}); use the original enwik8.zip")
    if member.file_size > FULL_BYTES or member.flag_bits & 0x1:
        raise DataError(
            f"{path}: the member {MEMBER!r} has {member.file_size:,} bytes (at most {FULL_BYTES:,}) or is encrypted; "
            "use the original enwik8.zip"
        )

    def open_member() -> IO[bytes]:
        with zipfile.ZipFile(path) as archive:  # the member keeps the file open for itself
            return archive.open(MEMBER)

    return StoredFile(f"{path}:{MEMBER}", member.file_size, open_member)


def _check(file: StoredFile, split_bytes: int) -> None:
    if file.num_bytes < split_bytes or (split_bytes == FULL_BYTES != file.num_bytes):
        part = max(1, file.num_bytes // 20)
        raise DataError(
            f"{file.name}: has {file.num_bytes:,} bytes; enwik8 has {FULL_BYTES:,} and the splits ask for "
            f"{split_bytes:,}. A piece of enwik8 needs split sizes that fit it, for this one e.g. data.train_bytes="
            f"{max(1, file.num_bytes - 2 * part)} data.valid_bytes={part} data.test_bytes={part}"
        )
    if file.num_bytes == FULL_BYTES:
        _, md5 = checksum(file.chunks(), "md5")
        if md5 != FULL_MD5:
            raise DataError(
                f"{file.name}: has enwik8's size but not its contents (md5 {md5}, not {FULL_MD5}); "
                "fetch it again, or use data.source=text for another text"
            )


def download(path: Path) -> None:
    """Puts the published archive at ``path`` unless an intact one is there; nothing unchecked is ever left there.

    Raises:
        DataError: The server cannot be reached or sends something else; the message says what to do by hand.
    """

    def intact(folder: Path) -> bool:
        archive = folder / path.name
        if not archive.is_file():
            return False
        return checksum(StoredFile.at(archive).chunks())[1] == ZIP_SHA256

    build_once(path.parent, lambda folder: _fetch(folder / path.name), intact)


def _fetch(path: Path) -> None:
    by_hand = (
        f"Fetch enwik8.zip ({ZIP_BYTES:,} bytes, sha256 {ZIP_SHA256}) elsewhere and set data.path to it; "
        "data.source=pydocs needs no download"
    )
    logger.info("downloading %s (%.1f MB)", URL, ZIP_BYTES / 1e6)
    digest, received = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS) as response, path.open("wb") as file:
            # One byte more than expected is enough to know that it is something else.
            while chunk := response.read(min(CHUNK_BYTES, ZIP_BYTES + 1 - received)):
                file.write(chunk)
                digest.update(chunk)
                if received // REPORT_EVERY_BYTES != (received := received + len(chunk)) // REPORT_EVERY_BYTES:
                    logger.info("downloaded %.0f of %.0f MB", received / 1e6, ZIP_BYTES / 1e6)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise DataError(f"cannot download {URL}: {error}. {by_hand}") from error
    if digest.hexdigest() != ZIP_SHA256:
        raise DataError(f"{URL} sent {received:,} bytes or more that are not the published archive. {by_hand}")

"""Published files, fetched once into the cache: resumed where they broke off, checked, then renamed into place."""

from __future__ import annotations

import http.client
import logging
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smoe_train.data import progress
from smoe_train.data.source import CHUNK_BYTES, StoredFile, checksum
from smoe_train.data.stores.build_once import cannot_be_written, exclusive
from smoe_train.durable import flush
from smoe_train.errors import DataError

TIMEOUT_SECONDS = 30.0
PAUSE_SECONDS = 1.0
MAX_ATTEMPTS = 100
"""How often one server is asked at most; only as long as each attempt brings more."""
MAX_BYTES = 4 << 30
"""Where downloads whose size was not published end at the latest."""
USER_AGENT = "smoe_train (preparation of training data)"
"""Some mirrors refuse Python's own."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A file on the internet whose contents are known.

    Attributes:
        name: Its name.
        urls: Where it can be had, best first.
        digest: Its checksum, in hexadecimal.
        algorithm: Which checksum.
        num_bytes: Its size, or None if that was not published.
    """

    name: str
    urls: Sequence[str]
    digest: str
    algorithm: Literal["sha256", "md5"] = "sha256"
    num_bytes: int | None = None

    def __str__(self) -> str:
        size = "" if self.num_bytes is None else f"{self.num_bytes:,} bytes, "
        return f"{self.name} ({size}{self.algorithm} {self.digest})"


def location(file: Published, cache: Path) -> Path:
    """Returns where `fetch` puts a file, whether it is there or not."""
    return cache / "downloads" / file.name


def fetch(file: Published, cache: Path, remedy: str) -> Path:
    """Returns the path of a published file in the cache, downloading it if no intact one is there.

    A download that breaks off is taken up again where it ended, also by a later call; a file that is not the published
    one is never kept. Processes that ask for the same file wait for the one that fetches it.

    Args:
        file: What to fetch.
        cache: The cache folder.
        remedy: What to do without it, as the end of a message ("set data.path to it").

    Raises:
        DataError: No server can be reached or all send something else, or the cache cannot be written.
    """
    path = location(file, cache)
    if _intact(path, file):
        return path
    try:
        with exclusive(path):
            if not _intact(path, file):
                _download(file, path, remedy)
    except (OSError, NotImplementedError) as error:
        raise cannot_be_written(path, error) from error
    return path


def _intact(path: Path, file: Published) -> bool:
    if not path.is_file():
        return False
    stored = StoredFile.at(path)
    if file.num_bytes in (None, stored.num_bytes) and checksum(stored.chunks(), file.algorithm)[1] == file.digest:
        return True
    logger.warning("%s is damaged; it is fetched again", path)
    return False


def _download(file: Published, path: Path, remedy: str) -> None:
    part = path.with_name(f"{path.name}.part")
    logger.info("downloading %s", file)
    failures: list[str] = []
    for url in file.urls:
        furthest, failure = _size(part), None
        for _ in range(MAX_ATTEMPTS):
            resumed_at = _size(part)
            failure = _attempt(url, part, file)
            if failure is None:
                flush(part)
                part.replace(path)
                flush(path.parent)
                return
            logger.info("%s: %s", url, failure)
            # Again as long as there is something to gain: more bytes, or a start from nothing after a wrong piece.
            if _size(part) <= furthest and not (resumed_at and not _size(part)):
                break
            furthest = _size(part)
            time.sleep(PAUSE_SECONDS)
        failures.append(f"{url}: {failure}")
    raise DataError(f"cannot download {'; '.join(failures)}. Fetch {file} elsewhere; {remedy}")


def _attempt(url: str, part: Path, file: Published) -> str | None:
    """Adds to ``part`` what the server sends; returns None once it is the whole file, else what went wrong."""
    try:
        expected = _receive(url, part, file)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
        return f"HTTP {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return str(error.reason)
    except (http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        return str(error) or type(error).__name__
    if _size(part) < expected:
        return f"broke off after {_size(part):,} of {expected:,} bytes"
    num_bytes, digest = checksum(StoredFile.at(part).chunks(), file.algorithm)
    if digest == file.digest:
        return None
    part.unlink()
    return f"sent {num_bytes:,} bytes or more that are not the published file ({file.algorithm} {digest})"


def _receive(url: str, part: Path, file: Published) -> int:
    """Appends to ``part`` what it lacks, or writes it anew if the server knows no ranges; returns the expected size."""
    start = _size(part)
    if file.num_bytes is not None and start >= file.num_bytes:
        return file.num_bytes
    assert url.startswith(("http://", "https://")), url
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310
        if response.status != http.client.PARTIAL_CONTENT:
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise http.client.HTTPException(f"sent another range than asked for, after byte {start:,}")
        offered = None if response.length is None else start + response.length
        if file.num_bytes and offered not in (None, file.num_bytes):
            raise http.client.HTTPException(f"offers {offered:,} bytes that are not the published file")
        expected = file.num_bytes or offered or 0
        # One byte more than expected is enough to know that it is something else.
        limit = (file.num_bytes or MAX_BYTES) + 1
        task = progress.current().task(f"downloading {file.name}", expected or None)
        with part.open("ab" if start else "wb") as out, task as advance:
            advance(start)
            received = start
            while received < limit and (chunk := response.read1(min(CHUNK_BYTES, limit - received))):
                out.write(chunk)
                received += len(chunk)
                advance(len(chunk))
    return expected


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0

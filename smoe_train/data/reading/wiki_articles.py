"""Finds the articles in a text of WikiText's form, and what does not belong into one."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from smoe_train.data.source import Offsets
from smoe_train.errors import DataError

HEADING = re.compile(rb" = (?!= ).*(?<! =) = \n")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Scan:
    """What reading a text once tells.

    Attributes:
        num_bytes: Its size.
        num_lines: How many lines it has.
        sha1: Its digest.
        article_ends: Byte offsets at which articles end, the last one being ``num_bytes``.
    """

    num_bytes: int
    num_lines: int
    sha1: str
    article_ends: Offsets


def scan(name: str, chunks: Iterable[bytes]) -> Scan:
    """Reads a text once.

    An article begins with the blank line before a line `` = Title = `` (one ``=`` at each end, sections have more) that
    stands between two blank lines; what precedes the first belongs to it.

    Args:
        name: What to call the text in messages.
        chunks: The text.

    Raises:
        DataError: It has a BOM, CRLF line ends, NUL bytes or bytes that are not UTF-8, none of which WikiText has.
    """
    digest = hashlib.sha1(usedforsecurity=False)
    starts = array("q")
    offset = number = 0
    blank_start: int | None = 0  # of the blank line before this one; the start of the text counts as one
    candidate: int | None = None
    for number, line in enumerate(_lines(chunks), 1):
        digest.update(line)
        is_blank = not line.strip()
        if not is_blank:
            _check(name, number, line)
        if is_blank and candidate is not None:
            starts.append(candidate)
        candidate = blank_start if HEADING.fullmatch(line) else None
        blank_start = offset if is_blank else None
        offset += len(line)
    inner = np.frombuffer(starts, dtype=np.int64)[1:] if starts else np.empty(0, dtype=np.int64)
    return Scan(offset, number, digest.hexdigest(), np.append(inner, offset))


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    left = b""
    for chunk in chunks:
        *lines, left = (left + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if left:
        yield left


def _check(name: str, number: int, line: bytes) -> None:
    where = f"{name}: line {number:,}"
    remedy = "WikiText has none; fetch it again or convert it"
    if number == 1 and line.startswith(BOM):
        raise DataError(f"{where}: begins with a byte order mark; {remedy}")
    if line.endswith(b"\r\n"):
        raise DataError(f"{where}: ends with CRLF, as Windows writes lines; {remedy}")
    if b"\0" in line:
        raise DataError(f"{where}: has a NUL byte; {remedy}")
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: is not valid UTF-8: {error.reason} (byte 0x{line[error.start]:02x} at byte {error.start + 1} of "
            "the line); fetch it again or convert it"
        ) from error

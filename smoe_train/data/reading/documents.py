"""Texts that are made of documents: put together from rows, and divided only between two documents."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

import numpy as np

from smoe_train.data.source import CHUNK_BYTES, Split, SplitName
from smoe_train.errors import DataError


def of_documents(name: str, read: Callable[[], Iterator[bytes]]) -> Split:
    """Returns the text that documents make one behind the other; they are read once to learn their sizes.

    Args:
        name: What to call it in messages.
        read: Returns a new iterator over the documents; empty ones are left out.
    """
    sizes = array("q", (len(document) for document in read() if document))
    ends = np.cumsum(np.frombuffer(sizes, dtype=np.int64), dtype=np.int64)

    def place(offset: int) -> str:
        number = int(np.searchsorted(ends, offset, "right"))
        return f"{name}: text {number + 1:,}, byte {offset - (int(ends[number - 1]) if number else 0):,}"

    return Split(int(ends[-1]) if len(ends) else 0, lambda: in_chunks(read()), ends, place)


def in_chunks(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the same bytes in chunks of about 1 MiB."""
    waiting: list[bytes] = []
    size = 0
    for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= CHUNK_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    if size:
        yield b"".join(waiting)


def divided(name: str, split: Split, valid_fraction: float, test_fraction: float) -> dict[SplitName, Split]:
    """Returns the parts of a text for training, validation (the piece before the last) and test (the last piece).

    Args:
        name: What to call it in messages.
        split: The text, with known documents.
        valid_fraction: Share of the bytes that validate, met to within one document; 0 for none.
        test_fraction: Share of the bytes that test; 0 for none.

    Raises:
        DataError: There are too few documents.
    """
    assert split.document_ends is not None, "only texts with known documents can be divided between them"
    boundaries = np.concatenate([[0], split.document_ends])

    def boundary(share: float) -> int:
        return int(boundaries[np.argmin(np.abs(boundaries - split.num_bytes * share))])

    test_start = boundary(1.0 - test_fraction) if test_fraction else split.num_bytes
    valid_start = boundary(1.0 - test_fraction - valid_fraction) if valid_fraction else test_start
    sizes = [valid_start, test_start - valid_start, split.num_bytes - test_start]
    wanted = [True, valid_fraction > 0, test_fraction > 0]
    if any(size <= 0 for size, needed in zip(sizes, wanted, strict=True) if needed):
        raise DataError(
            f"{name}: its {len(split.document_ends):,} texts ({split.num_bytes:,} bytes) are too few to cut off "
            f"valid_fraction={valid_fraction} and test_fraction={test_fraction}; set larger fractions, or give files"
        )
    parts: dict[SplitName, Split] = {"train": cut(split, 0, valid_start)}
    if valid_fraction:
        parts["valid"] = cut(split, valid_start, test_start)
    if test_fraction:
        parts["test"] = cut(split, test_start, split.num_bytes)
    return parts


def cut(split: Split, start: int, stop: int) -> Split:
    """Returns bytes [start, stop) of a text, which is read from its beginning."""

    def read() -> Iterator[bytes]:
        offset = 0
        for chunk in split.read():
            if offset + len(chunk) > start:
                yield chunk[max(start - offset, 0) : stop - offset]
            offset += len(chunk)
            if offset >= stop:
                return

    ends = split.document_ends
    if ends is not None:
        ends = np.unique(np.clip(ends[ends > start], None, stop)) - start
    return Split(stop - start, read, ends, lambda offset: split.place(start + offset))

"""Text cut into pieces that a tokenizer can take one by one, at places that the text alone decides.

A tokenizer that merges characters gives other ids around a cut. So cuts must not depend on the chunks in which a text
is read, and should lie where words end anyway.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from smoe_train.data.source import Offsets, Split
from smoe_train.data.tokenizer import TokenArray, Tokenizer
from smoe_train.errors import DataError

NEWLINE_AFTER_BYTES = 64 << 10
WHITESPACE_AFTER_BYTES = 256 << 10
LONGEST_BYTES = 1 << 20
# Libraries tokenize several pieces at once, on several cores.
PIECES_AT_ONCE = 16

_WHITESPACE = re.compile(rb"[ \t\n\r\v\f]")
_LONGEST_CHARACTER = 4


class NotTextError(DataError):
    """Bytes that are not UTF-8 text.

    Attributes:
        offset: Where they begin, in bytes from the start of the text.
        reason: What is wrong with them.
    """

    def __init__(self, offset: int, reason: str) -> None:
        self.offset = offset
        self.reason = reason
        super().__init__(f"byte {offset:,}: is not UTF-8 text: {reason}")


def text_pieces(chunks: Iterable[bytes], document_ends: Offsets | None = None) -> Iterator[tuple[str, bool]]:
    """Yields a text piece by piece, each with whether a document ends with it.

    A piece ends where its document ends; or else behind the first newline after 64 KiB; or else before the first
    whitespace after 256 KiB; or else, in a text without any, at the first character after 1 MiB.

    Args:
        chunks: The text, cut anywhere.
        document_ends: Ascending byte offsets at which documents end; None takes the text for one document, whose end
            is not marked.

    Raises:
        NotTextError: The text is not valid UTF-8, or a document ends inside a character.
    """
    ends = np.empty(0, dtype=np.int64) if document_ends is None else document_ends
    buffer, start, documents = bytearray(), 0, 0
    for chunk in itertools.chain(chunks, [None]):
        buffer += chunk or b""
        # With this much at hand, the next cut is known whatever follows.
        needed = 0 if chunk is None else LONGEST_BYTES + _LONGEST_CHARACTER
        done = 0
        while len(buffer) - done >= needed:
            end_of_document = int(ends[documents]) - start if documents < len(ends) else None
            if done == len(buffer) and (end_of_document is None or end_of_document > done):
                break
            cut = _next_cut(buffer, done)
            ends_document = end_of_document is not None and end_of_document <= cut
            if ends_document:
                assert end_of_document is not None
                cut = end_of_document
                documents += 1
            yield _decode(buffer, done, cut, start), ends_document
            done = cut
        del buffer[:done]
        start += done


@contextmanager
def placed(split: Split, name: str) -> Iterator[None]:
    """Turns a NotTextError in the block into a DataError that says where in the split the bytes are, and what to do."""
    try:
        yield
    except NotTextError as error:
        raise DataError(
            f"{name}, {split.place(error.offset)}: is not UTF-8 text: {error.reason}; convert the text to UTF-8, or "
            "use tokenizer.type=bytes"
        ) from error


class TextTokenizer(Tokenizer):
    """A tokenizer that needs UTF-8 text and takes it in pieces."""

    def encode(
        self, chunks: Iterable[bytes], document_ends: Offsets | None = None
    ) -> Iterator[tuple[TokenArray, bool]]:
        """Yields the ids of each of `text_pieces`, encoded by `encode_texts`."""
        pieces, mark = text_pieces(chunks, document_ends), self.end_of_document_id
        while batch := list(itertools.islice(pieces, PIECES_AT_ONCE)):
            encoded = self.encode_texts([text for text, _ in batch])
            for ids, (_, ends_document) in zip(encoded, batch, strict=True):
                if ends_document and mark is not None:
                    ids.append(mark)
                yield np.array(ids, dtype=self.dtype), ends_document


def well_formed(text: str) -> str:
    """Returns the text with U+FFFD for what UTF-8 cannot write: lone surrogates, as undecodable arguments have them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return text


def _next_cut(buffer: bytearray, start: int) -> int:
    newline = buffer.find(b"\n", start + NEWLINE_AFTER_BYTES, start + WHITESPACE_AFTER_BYTES)
    if newline >= 0:
        return newline + 1
    whitespace = _WHITESPACE.search(buffer, start + WHITESPACE_AFTER_BYTES, start + LONGEST_BYTES)
    if whitespace is not None:
        return whitespace.start()
    cut = min(start + LONGEST_BYTES, len(buffer))
    for _ in range(_LONGEST_CHARACTER - 1):
        if cut < len(buffer) and buffer[cut] & 0xC0 == 0x80:
            cut += 1
    return cut


def _decode(buffer: bytearray, start: int, stop: int, offset: int) -> str:
    try:
        return buffer[start:stop].decode("utf-8")
    except UnicodeDecodeError as error:
        first = start + error.start
        shown = buffer[first : first + 4].hex(" ")
        raise NotTextError(offset + first, f"{error.reason} (bytes {shown})") from error

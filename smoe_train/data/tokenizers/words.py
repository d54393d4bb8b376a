"""The words of a text, counted as WikiText's published figures count them.

Words are what ASCII whitespace separates; every line counts as one more, for the ``<eos>`` that ends it.
"""

from __future__ import annotations

UNKNOWN = b"<unk>"
END_OF_LINE = b"<eos>"


def words_of(text: bytes) -> list[bytes]:
    """Returns the words of a text, with ``<eos>`` for each newline."""
    return text.replace(b"\n", b" " + END_OF_LINE + b" ").split()


class WordCounter:
    """Counts words and lines of a text that comes in chunks, cut anywhere."""

    def __init__(self) -> None:
        self._count = 0
        self._last = b"\n"

    def add(self, chunk: bytes) -> None:
        """Counts the next chunk."""
        if not chunk:
            return
        self._count += len(words_of(chunk))
        if not self._last.isspace() and not chunk[:1].isspace():
            self._count -= 1  # one word in two chunks
        self._last = chunk[-1:]

    @property
    def total(self) -> int:
        """Words and lines so far; a last line without a newline is a line."""
        return self._count + (self._last != b"\n")

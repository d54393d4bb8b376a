"""The word tokenizer: WikiText's tokens, for texts whose words are separated by spaces already."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from smoe_train.bounded import read_bounded
from smoe_train.data.source import Offsets
from smoe_train.data.stores.saved_tokenizer import learnt_once
from smoe_train.data.tokenizer import TokenArray, Tokenizer, TokenizerConfig, TrainingText, register_tokenizer
from smoe_train.data.tokenizers.pieces import TextTokenizer, text_pieces, well_formed
from smoe_train.data.tokenizers.words import END_OF_LINE, UNKNOWN, words_of
from smoe_train.errors import DataError

VOCABULARY = "vocabulary.txt"
MAX_VOCABULARY_BYTES = 256 << 20


class WordConfig(TokenizerConfig):
    """Options of the word tokenizer."""

    type: Literal["word"] = "word"
    path: Path | None = None
    """Vocabulary, one word a line; without it, the words of the training split. A file without ``<unk>`` or ``<eos>``
    gets them at its end."""
    max_size: int | None = Field(None, gt=2)
    """Keep only the most frequent words, so many ids together with ``<unk>`` and ``<eos>``; all if not set."""
    min_count: int = Field(1, gt=0)
    """Keep only words that the training split has so often."""

    @model_validator(mode="after")
    def _learns_or_reads(self) -> WordConfig:
        if self.path is not None and (self.max_size is not None or self.min_count != 1):
            raise ValueError("max_size and min_count have no effect with path; remove either")
        return self

    def learns(self) -> bool:
        """Returns whether no vocabulary is given."""
        return self.path is None


@register_tokenizer("word", WordConfig)
class WordTokenizer(TextTokenizer):
    """Words between ASCII whitespace, ``<eos>`` for every line, ``<unk>`` for what the vocabulary lacks.

    Learnt vocabularies hold ``<unk>``, ``<eos>``, then the words by falling frequency, equally frequent ones by their
    UTF-8 bytes. Kinds and numbers of spaces are lost, and so is which words became ``<unk>``; the published figures of
    WikiText-2 and -103 count tokens so. A last line without a newline is a line too.
    """

    def __init__(self, config: WordConfig, words: Sequence[bytes]) -> None:
        self.config = config
        self._words = list(words)
        self._ids = {word: i for i, word in enumerate(self._words)}
        self._unknown, self._end_of_line = self._ids[UNKNOWN], self._ids[END_OF_LINE]

    @classmethod
    def build(cls, config: TokenizerConfig, text: TrainingText | None) -> Tokenizer:
        """Reads the vocabulary, or counts the words of the training split."""
        assert isinstance(config, WordConfig)
        if config.path is not None:
            return cls(config, read_vocabulary(config.path.expanduser()))
        assert text is not None, "there is nothing to learn from"
        return learnt_once(config, text, lambda: cls(config, _most_frequent(config, text)))

    @property
    def vocab_size(self) -> int:
        """Words, ``<unk>`` and ``<eos>``."""
        return len(self._words)

    @property
    def fingerprint(self) -> str:
        """Digest of the vocabulary."""
        return hashlib.sha256(b"word\n" + b"\n".join(self._words)).hexdigest()

    @property
    def separator_ids(self) -> tuple[int, ...]:
        """``<eos>``."""
        return (self._end_of_line,)

    @property
    def unknown_id(self) -> int:
        """``<unk>``, also where the text itself says so."""
        return self._unknown

    def encode(
        self, chunks: Iterable[bytes], document_ends: Offsets | None = None
    ) -> Iterator[tuple[TokenArray, bool]]:
        """Yields the ids piece by piece; a last line without a newline, of text or document, gets its ``<eos>``."""
        in_line = False
        for text, ends_document in text_pieces(chunks, document_ends):
            ids = self._encode(text)
            in_line = not text.endswith("\n") if text else in_line
            if ends_document and in_line:
                ids.append(self._end_of_line)
                in_line = False
            yield np.array(ids, dtype=self.dtype), ends_document
        if in_line:
            yield np.array([self._end_of_line], dtype=self.dtype), False

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of words and newlines."""
        return [self._encode(well_formed(text)) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the words with a space between them, and a newline for ``<eos>``."""
        text = " ".join("\n" if i == self._end_of_line else self._words[i].decode() for i in ids)
        return text.replace(" \n ", "\n").replace("\n ", "\n").replace(" \n", "\n")

    def save(self, folder: Path) -> None:
        """Writes the vocabulary."""
        (folder / VOCABULARY).write_bytes(b"".join(word + b"\n" for word in self._words))

    @classmethod
    def load(cls, folder: Path, config: TokenizerConfig) -> Tokenizer:
        """Reads the vocabulary."""
        assert isinstance(config, WordConfig)
        return cls(config, read_vocabulary(folder / VOCABULARY))

    def _encode(self, text: str) -> list[int]:
        ids, unknown = self._ids, self._unknown
        return [ids.get(word, unknown) for word in words_of(text.encode())]


def read_vocabulary(path: Path) -> list[bytes]:
    """Returns the words of a vocabulary file, with ``<unk>`` and ``<eos>`` at its end if it lacks them.

    Raises:
        DataError: There is no such file, or a line is not one word that no line before has.
    """
    try:
        data = read_bounded(path, MAX_VOCABULARY_BYTES)
        data.decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; give a vocabulary, one word a line") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text at byte {error.start:,}: {error.reason}") from error
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    words: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        word = line.removesuffix(b"\r")
        if word.split() != [word]:
            raise DataError(f"{path}, line {number:,}: {word[:60]!r} is not one word; expected one word a line")
        if (first := words.setdefault(word, number)) != number:
            raise DataError(f"{path}, line {number:,}: {word.decode()!r} is already in line {first:,}")
    if not words:
        raise DataError(f"{path}: is empty; expected one word a line")
    return list(words | {word: 0 for word in (UNKNOWN, END_OF_LINE) if word not in words})


def _most_frequent(config: WordConfig, text: TrainingText) -> list[bytes]:
    counts: Counter[bytes] = Counter()
    for piece, _ in text_pieces(text.split.read(), text.split.document_ends):
        counts.update(words_of(piece.encode()))
    for word in (UNKNOWN, END_OF_LINE):
        counts.pop(word, None)
    if not counts:
        raise DataError("the training split has no words to make a vocabulary of; it needs more text")
    kept = sorted((-count, word) for word, count in counts.items() if count >= config.min_count)
    room = None if config.max_size is None else config.max_size - 2
    return [UNKNOWN, END_OF_LINE, *(word for _, word in kept[:room])]

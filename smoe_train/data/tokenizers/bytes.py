"""The byte tokenizer: every byte is a token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from smoe_train.data.source import Offsets
from smoe_train.data.tokenizer import TokenArray, Tokenizer, TokenizerConfig, TrainingText, register_tokenizer
from smoe_train.data.tokenizers.pieces import well_formed


class BytesConfig(TokenizerConfig):
    """The byte tokenizer has no options."""

    type: Literal["bytes"] = "bytes"


@register_tokenizer("bytes", BytesConfig)
class BytesTokenizer(Tokenizer):
    """256 ids, no special ones, any input is valid; a newline separates the texts of an example."""

    def __init__(self, config: BytesConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: TokenizerConfig, text: TrainingText | None) -> Tokenizer:
        """Returns the tokenizer; nothing is learnt."""
        return cls.load(Path(), config)

    @property
    def vocab_size(self) -> int:
        """256."""
        return 256

    @property
    def fingerprint(self) -> str:
        """The same for every byte tokenizer."""
        return hashlib.sha256(b"bytes").hexdigest()

    @property
    def separator_ids(self) -> tuple[int, ...]:
        """A newline."""
        return (10,)

    def encode(
        self, chunks: Iterable[bytes], document_ends: Offsets | None = None
    ) -> Iterator[tuple[TokenArray, bool]]:
        """Yields views of the chunks, uint8, cut where documents end."""
        ends = np.empty(0, dtype=np.int64) if document_ends is None else document_ends
        start = 0
        for chunk in chunks:
            ids = np.frombuffer(chunk, dtype=np.uint8)
            first, last = np.searchsorted(ends, (start, start + len(ids)), side="right")
            done = 0
            for end in ends[first:last].tolist():
                yield ids[done : end - start], True
                done = end - start
            if done < len(ids):
                yield ids[done:], False
            start += len(ids)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the UTF-8 bytes; bytes that the command line could not decode come back as they were."""
        try:
            return [list(text.encode("utf-8", "surrogateescape")) for text in texts]
        except UnicodeEncodeError:  # other lone surrogates, as JSON can spell them, stand for no bytes
            return [list(well_formed(text).encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the bytes read as UTF-8."""
        return bytes(ids).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """Writes nothing: the options are all there is."""

    @classmethod
    def load(cls, folder: Path, config: TokenizerConfig) -> Tokenizer:
        """Returns the tokenizer."""
        assert isinstance(config, BytesConfig)
        return cls(config)

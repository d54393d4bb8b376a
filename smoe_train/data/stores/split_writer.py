"""Writes the tokens of one split to disk, in one pass over its text and with memory for a few pieces of it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field

from smoe_train.config import StrictModel
from smoe_train.data.progress import reported
from smoe_train.data.source import Split, SplitName
from smoe_train.data.stores.store_files import FileRecord
from smoe_train.data.tokenizer import Tokenizer
from smoe_train.data.tokenizers.words import WordCounter
from smoe_train.errors import DataError

OFFSETS = np.dtype("<i8")


class SplitRecord(StrictModel):
    """What a store's record says of one split.

    Attributes:
        tokens: Number of its tokens.
        bytes: Size of its text.
        sha256: Digest of its tokens.
        documents: The file of its document ends, if the source has documents.
        words: Its words and lines, if the source's figures are given per word.
        unknown: Tokens that stand for what the vocabulary lacks, if there can be any.
    """

    tokens: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str
    documents: FileRecord | None
    words: int | None
    unknown: int | None


class SplitWriter:
    """Writes the files of one split in one pass over its text, with memory for a few pieces of it."""

    def __init__(
        self, folder: Path, name: SplitName, split: Split, tokenizer: Tokenizer, words: WordCounter | None
    ) -> None:
        self.folder, self.name, self.split, self.tokenizer = folder, name, split, tokenizer
        self.num_bytes, self.digest, self.words = 0, hashlib.sha256(), words

    def write(self) -> tuple[SplitRecord, tuple[int, str]]:
        """Returns the split's record, and the size and digest of its text."""
        tokens, ends = _HashedFile(self.folder / f"{self.name}.bin"), None
        unknown_id, dtype = self.tokenizer.unknown_id, np.dtype(self.tokenizer.dtype)
        num_tokens = num_unknown = last_end = 0
        with contextlib.ExitStack() as files:
            files.enter_context(tokens)
            if self.split.document_ends is not None:
                ends = files.enter_context(_HashedFile(self.folder / f"{self.name}.documents.bin"))
            for ids, ends_document in self.tokenizer.encode(self._text(), self.split.document_ends):
                assert ids.dtype == dtype, f"{type(self.tokenizer).__name__} yields {ids.dtype}, not {dtype}"
                tokens.write(ids.astype(dtype.newbyteorder("<"), copy=False).tobytes())
                num_tokens += len(ids)
                if unknown_id is not None:
                    num_unknown += int(np.count_nonzero(ids == unknown_id))
                if ends is not None and ends_document and num_tokens > last_end:
                    last_end = num_tokens
                    ends.write(np.array([last_end], dtype=OFFSETS).tobytes())
        if not num_tokens:
            raise DataError(
                f"{self.name}: the split has {self.split.num_bytes:,} bytes but not one token; it needs more text"
            )
        assert ends is None or last_end == num_tokens, "a split ends with its last document"
        record = SplitRecord(
            tokens=num_tokens,
            bytes=self.num_bytes,
            sha256=tokens.sha256,
            documents=None if ends is None else FileRecord(bytes=ends.size, sha256=ends.sha256),
            words=None if self.words is None else self.words.total,
            unknown=None if unknown_id is None else num_unknown,
        )
        return record, (self.num_bytes, self.digest.hexdigest())

    def _text(self) -> Iterator[bytes]:
        """Passes the text on, counts it and takes its digest."""
        for chunk in reported(self.split.read(), f"tokenizing {self.name}", self.split.num_bytes):
            self.num_bytes += len(chunk)
            self.digest.update(chunk)
            if self.words is not None:
                self.words.add(chunk)
            yield chunk


class _HashedFile:
    """A new file whose size and digest are known once it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self._digest = path, 0, hashlib.sha256()

    def __enter__(self) -> _HashedFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        """Appends ``data``."""
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """Digest of all that was written."""
        return self._digest.hexdigest()

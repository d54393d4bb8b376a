"""What stores have in common: how one is found or built, and what it says of its tokenizer and its digests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from smoe_train.data.source import Source, Split
from smoe_train.data.stores.build_once import build_once
from smoe_train.data.stores.known_corpora import recall, remember, take_stamp
from smoe_train.data.stores.saved_tokenizer import FOLDER, load_tokenizer, ready_tokenizer
from smoe_train.data.stores.store_files import FileRecord, FormatRecord, verify_files
from smoe_train.data.tokenizer import TokenDtype, Tokenizer, TokenizerConfig, TrainingText, build_tokenizer
from smoe_train.errors import DataError


class HasFingerprint(Protocol):
    """A corpus of any kind."""

    @property
    def fingerprint(self) -> str:
        """Digest of its contents."""
        ...


C = TypeVar("C", bound=HasFingerprint)


class DataRecord(FormatRecord):
    """Base of the records of data: where it comes from, and what its ids are.

    Attributes:
        source: Name of the corpus.
        corpus: Its fingerprint.
        tokenizer: Fingerprint of the tokenizer.
        vocab_size: Number of its ids.
        dtype: Of the ids on disk.
    """

    source: str
    corpus: str
    tokenizer: str
    vocab_size: int
    dtype: TokenDtype


@dataclass(frozen=True)
class Store(ABC):
    """Data under one tokenizer.

    Attributes:
        folder: Where it lies.
        record: What it is.
    """

    folder: Path
    record: DataRecord

    @abstractmethod
    def files(self) -> Mapping[str, FileRecord]:
        """Returns the record of each file by name."""

    @abstractmethod
    def split_checksums(self) -> dict[str, str]:
        """Returns the digest of each split's tokens."""

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer that the ids belong to.

        Raises:
            DataError: Its files are damaged.
        """
        return load_tokenizer(self.folder / FOLDER)

    @property
    def vocab_size(self) -> int:
        """Number of different ids of the tokenizer."""
        return self.record.vocab_size

    def checksums(self) -> dict[str, str]:
        """Returns the digests that identify the data of a run: corpus, tokenizer, and each split's tokens."""
        return {"corpus": self.record.corpus, "tokenizer": self.record.tokenizer, **self.split_checksums()}

    def verify(self) -> None:
        """Reads all files and compares them with the recorded digests.

        Raises:
            DataError: A file is damaged.
        """
        verify_files(self.folder, self.files())
        self.tokenizer()


S = TypeVar("S", bound=Store)


def find_or_build(
    source: Source,
    load: Callable[[], C],
    tokenizer: TokenizerConfig | Tokenizer,
    cache: Path,
    training_text: Callable[[C], Split],
    folder_of: Callable[[str, Tokenizer], Path],
    write: Callable[[Path, C, Tokenizer], None],
    open_store: Callable[[Path], S],
) -> S:
    """Returns the store of a source, building it if it is not there yet; any number of processes may ask.

    Args:
        source: Where the data comes from.
        load: Reads its corpus.
        tokenizer: Options of the tokenizer, or a ready one.
        cache: The cache folder.
        training_text: What a tokenizer that learns is given of the corpus.
        folder_of: Where the store of a corpus, by its fingerprint, and a tokenizer lies.
        write: Writes a store into an empty folder.
        open_store: Opens a store, or raises DataError.

    Raises:
        DataError: The data cannot be had or not be tokenized, or the cache cannot be written.
    """

    def intact(folder: Path, fingerprint: str) -> bool:
        try:
            return open_store(folder).record.corpus == fingerprint
        except DataError:
            return False

    before = take_stamp(source, cache)
    known = recall(before, cache)
    if known is not None:
        ready = tokenizer if isinstance(tokenizer, Tokenizer) else ready_tokenizer(tokenizer, known, cache)
        if ready is not None and intact(folder := folder_of(known, ready), known):
            return open_store(folder)
    corpus = load()
    if isinstance(tokenizer, TokenizerConfig):
        text = TrainingText(training_text(corpus), corpus.fingerprint, cache) if tokenizer.learns() else None
        tokenizer = build_tokenizer(tokenizer, text)
    made = tokenizer
    folder = folder_of(corpus.fingerprint, made)
    build_once(folder, lambda empty: write(empty, corpus, made), lambda found: intact(found, corpus.fingerprint))
    remember(before, take_stamp(source, cache), corpus.fingerprint, cache)
    return open_store(folder)

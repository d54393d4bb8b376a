"""Token ids on disk, written once and memory-mapped afterwards.

A store belongs to one corpus (by the digest of its contents), one tokenizer and one format version; all three make up
its folder's name, so a changed text gets a new store and never an old one. `known_corpora` says when the text itself
need not be read to know its digest. The tokenizer lies in the store, so tokens can be read when its own files are gone.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smoe_train.data.source import (
    SPLITS,
    Corpus,
    Offsets,
    SourceConfig,
    SplitName,
    TextSource,
    build_source,
    fingerprint,
)
from smoe_train.data.stores.saved_tokenizer import FOLDER, save_tokenizer
from smoe_train.data.stores.saved_tokenizer import read_record as read_tokenizer_record
from smoe_train.data.stores.split_writer import SplitRecord, SplitWriter
from smoe_train.data.stores.store import DataRecord, Store, find_or_build
from smoe_train.data.stores.store_files import (
    REMEDY,
    FileRecord,
    check_sizes,
    map_array,
    read_record,
    write_record,
)
from smoe_train.data.tokenizer import (
    TokenArray,
    Tokenizer,
    TokenizerConfig,
)
from smoe_train.data.tokenizers.pieces import placed
from smoe_train.data.tokenizers.words import WordCounter
from smoe_train.errors import DataError

FORMAT_VERSION = 2


class StoreRecord(DataRecord):
    """The contents of ``store.json``."""

    splits: dict[SplitName, SplitRecord]


@dataclass(frozen=True)
class TokenStore(Store):
    """The tokens of one corpus under one tokenizer.

    Attributes:
        folder: Where they lie.
        record: What they are.
    """

    folder: Path
    record: StoreRecord

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Opens a store after checking its record and the size of every file.

        Raises:
            DataError: It is absent, incomplete, damaged, or of another format version.
        """
        record = read_record(StoreRecord, folder, "a token store", FORMAT_VERSION)
        store = cls(folder, record)
        check_sizes(folder, store.files())
        if read_tokenizer_record(folder / FOLDER).fingerprint != record.tokenizer:
            raise DataError(f"{folder / FOLDER}: is not the tokenizer of this store; {REMEDY}")
        return store

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """The splits there are."""
        return tuple(name for name in SPLITS if name in self.record.splits)

    def path(self, split: SplitName) -> Path:
        """Returns the file of a split's tokens."""
        return self.folder / f"{split}.bin"

    def documents_path(self, split: SplitName) -> Path:
        """Returns the file of a split's document ends."""
        return self.folder / f"{split}.documents.bin"

    def tokens(self, split: SplitName) -> TokenArray:
        """Returns the ids of a split as a read-only memory map, 1-D, of the record's dtype.

        Raises:
            DataError: There is no such split.
        """
        self._split(split)
        return map_array(self.path(split), self.record.dtype)

    def document_ends(self, split: SplitName) -> Offsets | None:
        """Returns where documents end as a read-only memory map, or None if the source knows no documents.

        Returns:
            Ascending offsets into `tokens`, int64, 1-D, of which the last is the number of tokens. Documents without a
            token are left out.

        Raises:
            DataError: There is no such split.
        """
        if self._split(split).documents is None:
            return None
        return map_array(self.documents_path(split), np.int64)

    def num_words(self, split: SplitName) -> int | None:
        """Returns the words and lines of the text, or None if the source's figures are not given per word.

        Perplexity per word is ``exp(nats / words)``, with the nats of the whole split, whatever the tokenizer.

        Raises:
            DataError: There is no such split.
        """
        return self._split(split).words

    def num_bytes(self, split: SplitName) -> int:
        """Returns the size of the text that a split's tokens stand for; bits per byte divide by it.

        Raises:
            DataError: There is no such split.
        """
        return self._split(split).bytes

    def split_checksums(self) -> dict[str, str]:
        """Returns the digest of each split's tokens."""
        return {name: self.record.splits[name].sha256 for name in self.splits}

    def files(self) -> dict[str, FileRecord]:
        """Returns the record of each file by name."""
        itemsize = np.dtype(self.record.dtype).itemsize
        files: dict[str, FileRecord] = {}
        for name, split in self.record.splits.items():
            files[self.path(name).name] = FileRecord(bytes=split.tokens * itemsize, sha256=split.sha256)
            if split.documents is not None:
                files[self.documents_path(name).name] = split.documents
        return files

    def _split(self, name: SplitName) -> SplitRecord:
        if name not in self.record.splits:
            raise DataError(
                f"{self.record.source} has no {name} split; there are: {', '.join(self.splits)}. "
                "Choose one of them, or give the source's options a share for it"
            )
        return self.record.splits[name]


def default_cache() -> Path:
    """Returns the cache folder: SMOE_TRAIN_CACHE, or ~/.cache/smoe_train."""
    configured = os.environ.get("SMOE_TRAIN_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "smoe_train"


def prepare(
    source_config: SourceConfig, tokenizer: TokenizerConfig | Tokenizer, cache_root: Path | None = None
) -> TokenStore:
    """Returns the token store of a source, building it if it is not there yet; any number of processes may ask.

    Args:
        source_config: Options of the source, which holds running text.
        tokenizer: Its options, or one that exists already, such as a checkpoint's.
        cache_root: Cache folder, `default_cache` if None.

    Raises:
        DataError: The text cannot be had or not be tokenized, or the cache cannot be written.
    """
    cache = default_cache() if cache_root is None else cache_root
    source = build_source(source_config)
    assert isinstance(source, TextSource), f"{source_config.source} holds labelled examples"
    return find_or_build(
        source,
        lambda: source.load(cache),
        tokenizer,
        cache,
        lambda corpus: corpus.splits["train"],
        lambda corpus, made: store_folder(source_config.source, corpus, made, cache),
        write_store,
        TokenStore.open,
    )


def store_folder(name: str, corpus_fingerprint: str, tokenizer: Tokenizer, cache: Path) -> Path:
    """Returns where the store of a corpus and a tokenizer lies."""
    key = f"{FORMAT_VERSION} {corpus_fingerprint} {tokenizer.fingerprint}"
    return cache / "stores" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def write_store(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Writes all files of a store into an empty folder.

    Raises:
        DataError: The text is not the one that the fingerprint was taken of, or the tokenizer cannot take it.
    """
    splits: dict[SplitName, SplitRecord] = {}
    contents: dict[SplitName, tuple[int, str]] = {}
    for name, split in corpus.splits.items():
        writer = SplitWriter(folder, name, split, tokenizer, WordCounter() if corpus.per_word else None)
        with placed(split, f"{corpus.name}: {name} split"):
            splits[name], contents[name] = writer.write()
    if fingerprint(contents, corpus.splits) != corpus.fingerprint:
        raise DataError(f"{corpus.name}: the text was changed while it was read; try again")
    record = StoreRecord(
        format_version=FORMAT_VERSION,
        source=corpus.name,
        corpus=corpus.fingerprint,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        dtype=tokenizer.dtype,
        splits=splits,
    )
    save_tokenizer(tokenizer, folder / FOLDER)
    write_record(folder, record)

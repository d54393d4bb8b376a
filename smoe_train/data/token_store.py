"""Token ids on disk, written once and memory-mapped afterwards.

A store belongs to one corpus (by the digest of its contents), one tokenizer and one format version; all three make up
its folder's name, so a changed text gets a new store and never an old one. `known_corpora` says when the text itself
need not be read to know its digest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError

from smoe_train.config import StrictModel
from smoe_train.data.build_once import build_once
from smoe_train.data.known_corpora import recall, remember, take_stamp
from smoe_train.data.source import (
    SPLITS,
    Corpus,
    SourceConfig,
    Split,
    SplitName,
    StoredFile,
    TextSource,
    build_source,
    checksum,
    fingerprint,
)
from smoe_train.data.tokenizer import TokenArray, TokenDtype, Tokenizer, TokenizerConfig, build_tokenizer
from smoe_train.errors import DataError

FORMAT_VERSION = 1
RECORD = "store.json"


class SplitRecord(StrictModel):
    """What a store's record says of one split."""

    tokens: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str


class StoreRecord(StrictModel):
    """The contents of ``store.json``."""

    format_version: int
    source: str
    corpus: str
    tokenizer: str
    vocab_size: int
    dtype: TokenDtype
    splits: dict[SplitName, SplitRecord]


@dataclass(frozen=True)
class TokenStore:
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
        remedy = "remove the folder and prepare the data again"
        try:
            record = StoreRecord.model_validate_json((folder / RECORD).read_bytes())
        except OSError as error:
            raise DataError(f"{folder}: is not a token store: {RECORD}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise DataError(f"{folder / RECORD}: is damaged: {first['msg']}; {remedy}") from error
        if record.format_version != FORMAT_VERSION:
            raise DataError(
                f"{folder}: has format {record.format_version}, this version reads {FORMAT_VERSION}; {remedy}"
            )
        store = cls(folder, record)
        for name, split in record.splits.items():
            expected = split.tokens * np.dtype(record.dtype).itemsize
            path = store.path(name)
            actual = path.stat().st_size if path.is_file() else 0
            if actual != expected:
                raise DataError(f"{path}: has {actual:,} bytes instead of {expected:,}; {remedy}")
        return store

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """The splits there are."""
        return tuple(name for name in SPLITS if name in self.record.splits)

    def path(self, split: SplitName) -> Path:
        """Returns the file of a split."""
        return self.folder / f"{split}.bin"

    def tokens(self, split: SplitName) -> TokenArray:
        """Returns the ids of a split as a read-only memory map, 1-D, of the record's dtype.

        Raises:
            DataError: There is no such split.
        """
        self._split(split)
        dtype = np.dtype(self.record.dtype).newbyteorder("<")
        return np.memmap(self.path(split), dtype=dtype, mode="r")

    def num_bytes(self, split: SplitName) -> int:
        """Returns the size of the text that a split's tokens stand for; bits per byte divide by it.

        Raises:
            DataError: There is no such split.
        """
        return self._split(split).bytes

    def checksums(self) -> dict[str, str]:
        """Returns the digests that identify the data of a run: corpus, tokenizer, and each split's tokens."""
        splits: dict[str, str] = {name: self.record.splits[name].sha256 for name in self.splits}
        return {"corpus": self.record.corpus, "tokenizer": self.record.tokenizer, **splits}

    def verify(self) -> None:
        """Reads all tokens and compares them with the recorded digests.

        Raises:
            DataError: A file is damaged.
        """
        for name in self.splits:
            file = StoredFile.at(self.path(name))
            _, sha256 = checksum(file.chunks())
            if sha256 != self.record.splits[name].sha256:
                raise DataError(
                    f"{file.name}: is damaged: sha256 {sha256} instead of {self.record.splits[name].sha256}; "
                    "remove the folder and prepare the data again"
                )

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
    source_config: SourceConfig, tokenizer_config: TokenizerConfig, cache_root: Path | None = None
) -> TokenStore:
    """Returns the token store of a source, building it if it is not there yet; any number of processes may ask.

    Raises:
        DataError: The text cannot be had, or the cache cannot be written.
    """
    cache = default_cache() if cache_root is None else cache_root
    source, tokenizer = build_source(source_config), build_tokenizer(tokenizer_config)
    assert isinstance(source, TextSource), f"{source_config.source} holds labelled examples"
    before = take_stamp(source, cache)
    known = recall(before, cache)
    if known is not None and _intact(folder := store_folder(source_config.source, known, tokenizer, cache)):
        return TokenStore.open(folder)
    corpus = source.load(cache)
    folder = store_folder(corpus.name, corpus.fingerprint, tokenizer, cache)
    build_once(folder, lambda empty: write_store(empty, corpus, tokenizer), _intact)
    remember(before, take_stamp(source, cache), corpus.fingerprint, cache)
    return TokenStore.open(folder)


def store_folder(name: str, corpus_fingerprint: str, tokenizer: Tokenizer, cache: Path) -> Path:
    """Returns where the store of a corpus and a tokenizer lies."""
    key = f"{FORMAT_VERSION} {corpus_fingerprint} {tokenizer.fingerprint}"
    return cache / "stores" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def write_store(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Writes all files of a store into an empty folder.

    Raises:
        DataError: The text is not the one that the fingerprint was taken of.
    """
    splits: dict[SplitName, SplitRecord] = {}
    contents: dict[SplitName, tuple[int, str]] = {}
    for name, split in corpus.splits.items():
        splits[name], contents[name] = _write_split(folder / f"{name}.bin", split, tokenizer)
    if fingerprint(contents) != corpus.fingerprint:
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
    (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


class _Watched:
    """Passes chunks through and takes their size and digest."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = chunks
        self.num_bytes = 0
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.chunks:
            self.num_bytes += len(chunk)
            self.digest.update(chunk)
            yield chunk


def _write_split(path: Path, split: Split, tokenizer: Tokenizer) -> tuple[SplitRecord, tuple[int, str]]:
    text, digest, tokens = _Watched(split.read()), hashlib.sha256(), 0
    dtype = np.dtype(tokenizer.dtype)
    with path.open("wb") as file:
        for ids, _ in tokenizer.encode(text):
            assert ids.dtype == dtype, f"{type(tokenizer).__name__} yields {ids.dtype}, not {dtype}"
            data = ids.astype(dtype.newbyteorder("<"), copy=False).tobytes()
            digest.update(data)
            file.write(data)
            tokens += len(ids)
    if not tokens:
        raise DataError(f"{path.stem}: the split has {split.num_bytes:,} bytes but not one token; it needs more text")
    record = SplitRecord(tokens=tokens, bytes=text.num_bytes, sha256=digest.hexdigest())
    return record, (text.num_bytes, text.digest.hexdigest())


def _intact(folder: Path) -> bool:
    try:
        TokenStore.open(folder)
    except DataError:
        return False
    return True

"""Where data comes from: the source contract, the table of sources, and splits that are streamed, never held whole.

A `TextSource` yields bytes, a `LabelledSource` examples. What a token is, and where tokens are kept, is decided
elsewhere (`tokenizers`, `token_store`, `example_store`).
"""

from __future__ import annotations

import hashlib
import lzma
import stat
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TypeVar, get_args
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from smoe_train.config import StrictModel
from smoe_train.data.examples import LabelledCorpus
from smoe_train.errors import DataError
from smoe_train.registry import Registry

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
CHUNK_BYTES = 1 << 20

Offsets = npt.NDArray[np.int64]

S = TypeVar("S", bound="type[Source]")


class SourceConfig(StrictModel):
    """Options of one data source; subclasses add a ``source`` literal, the tag of the recipe's union."""

    source: str


@dataclass(frozen=True)
class Split:
    """One part of a corpus.

    Attributes:
        num_bytes: Its size.
        read: Returns a new iterator over the contents, in chunks of about 1 MiB; raises DataError when it cannot.
        document_ends: Where each document ends, ascending byte offsets of which the last is ``num_bytes``; None if the
            split is one text without known parts.
        place: Says where a byte offset of the split lies ("wiki.train.raw, byte 17"), for messages.
    """

    num_bytes: int
    read: Callable[[], Iterator[bytes]]
    document_ends: Offsets | None = None
    place: Callable[[int], str] = "byte {:,}".format


@dataclass(frozen=True)
class Corpus:
    """A named text with its splits, and the digest of exactly these contents.

    Attributes:
        name: The source's name.
        splits: ``train`` and ``valid``, perhaps ``test``, in this order; none is empty.
        fingerprint: `fingerprint` of the contents.
        per_word: Whether the set's figures are given per word, as WikiText's; its words and lines are then counted.
    """

    name: str
    splits: Mapping[SplitName, Split]
    fingerprint: str
    per_word: bool = False

    @classmethod
    def read(cls, name: str, splits: Mapping[SplitName, Split], per_word: bool = False) -> Corpus:
        """Reads all splits once to take the fingerprint.

        Raises:
            DataError: A split is missing, empty, unreadable, or not as long as it says.
        """
        contents: dict[SplitName, tuple[int, str]] = {}
        for split_name, split in splits.items():
            num_bytes, sha256 = checksum(split.read())
            if num_bytes != split.num_bytes:
                raise DataError(
                    f"{name}: the {split_name} split has {num_bytes:,} bytes instead of {split.num_bytes:,}; "
                    "it was changed while it was read, try again"
                )
            contents[split_name] = (num_bytes, sha256)
        for split_name in SPLITS:
            num_bytes, _ = contents.get(split_name, (0, ""))
            if not num_bytes and (split_name in contents or split_name != "test"):
                raise DataError(
                    f"{name}: the {split_name} split is empty; it needs more text or another division of it"
                )
        ordered = {key: splits[key] for key in SPLITS if key in splits}
        return cls(name, ordered, fingerprint(contents, ordered), per_word)


def checksum(chunks: Iterable[bytes], algorithm: Literal["sha256", "md5"] = "sha256") -> tuple[int, str]:
    """Returns the number of bytes and their digest in hexadecimal."""
    digest, num_bytes = hashlib.new(algorithm, usedforsecurity=False), 0
    for chunk in chunks:
        digest.update(chunk)
        num_bytes += len(chunk)
    return num_bytes, digest.hexdigest()


def fingerprint(contents: Mapping[SplitName, tuple[int, str]], splits: Mapping[SplitName, Split]) -> str:
    """Returns a sha256 over the size, sha256 and document ends of each split, so that moving a boundary changes it."""
    digest = hashlib.sha256()
    for name in SPLITS:
        if name in contents:
            num_bytes, sha256 = contents[name]
            digest.update(f"{name} {num_bytes} {sha256}\n".encode())
            if (ends := splits[name].document_ends) is not None:
                digest.update(f"documents {hashlib.sha256(ends.astype('<i8').tobytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


class Source:
    """One data source; constructed with its options, reads nothing before `load`."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config

    def files(self, cache: Path) -> Sequence[Path] | None:
        """Returns every file that the data is made from, without reading them; None if that cannot be told.

        With None the data is read anew each time; with files only when one of them (or the source's code) changed.

        Raises:
            DataError: The options name something that is not there.
        """
        return None


class TextSource(Source, ABC):
    """A source of running text, for language modelling."""

    @abstractmethod
    def load(self, cache: Path) -> Corpus:
        """Finds (or downloads into ``cache``), checks and fingerprints the text.

        Raises:
            DataError: The text is missing, unreachable, damaged, or does not fit the options.
        """


class LabelledSource(Source, ABC):
    """A source of labelled examples, for classification and regression."""

    @abstractmethod
    def load(self, cache: Path) -> LabelledCorpus:
        """Finds (or downloads into ``cache``), checks and reads the examples.

        Raises:
            DataError: They are missing, unreachable, damaged or do not fit the options; the message has file and row.
        """


@dataclass(frozen=True)
class SourceEntry:
    """A data source: its class and the class of its options."""

    source: type[Source]
    config: type[SourceConfig]

    @property
    def labelled(self) -> bool:
        """Whether it holds labelled examples rather than running text."""
        return issubclass(self.source, LabelledSource)


SOURCES: Registry[SourceEntry] = Registry("data source")


def register_source(name: str, config: type[SourceConfig]) -> Callable[[S], S]:
    """Returns a class decorator that adds a source under ``name``, the value of ``data.source`` in recipes."""

    def add(source: S) -> S:
        SOURCES.register(name)(SourceEntry(source, config))
        return source

    return add


def build_source(config: SourceConfig) -> Source:
    """Returns the source that the options belong to."""
    return SOURCES.get(config.source).source(config)


def in_memory(data: bytes) -> Split:
    """Returns a split that is held in memory: for small texts that are put together rather than read."""

    def read() -> Iterator[bytes]:
        return (data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))

    return Split(len(data), read)


@dataclass(frozen=True)
class StoredFile:
    """A file, or a member of an archive, that can be opened again and again for reading.

    Attributes:
        name: What to call it in messages.
        num_bytes: Its size.
        open: Returns a new seekable binary stream.
    """

    name: str
    num_bytes: int
    open: Callable[[], IO[bytes]]

    @classmethod
    def at(cls, path: Path) -> StoredFile:
        """Returns the plain file at ``path``.

        Raises:
            DataError: There is none that can be looked at.
        """
        try:
            state = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(state.st_mode):  # a pipe or a device, which has no size and perhaps no end
            raise DataError(f"{path}: is no regular file; give a file")
        return cls(str(path), state.st_size, lambda: path.open("rb"))

    def chunks(self) -> Iterator[bytes]:
        """Yields the contents in chunks of about 1 MiB; raises DataError when it cannot."""
        return _read_file(self, 0, self.num_bytes)


def byte_range(files: Sequence[StoredFile], start: int, stop: int, documents: bool = False) -> Split:
    """Returns bytes [start, stop) of the concatenated files as a split.

    Args:
        files: The files.
        start: First byte.
        stop: Byte behind the last.
        documents: Whether each file is a document of its own, rather than all together one text.
    """
    ends = np.cumsum([file.num_bytes for file in files], dtype=np.int64)

    def read() -> Iterator[bytes]:
        for file, end in zip(files, ends.tolist(), strict=True):
            offset = end - file.num_bytes
            first, last = max(start - offset, 0), min(stop - offset, file.num_bytes)
            if first < last:
                yield from _read_file(file, first, last)

    def place(offset: int) -> str:
        i = min(int(np.searchsorted(ends, start + offset, "right")), len(files) - 1)
        return f"{files[i].name}, byte {start + offset - int(ends[i]) + files[i].num_bytes:,}"

    # Files without a byte are no documents; the last one may be cut.
    document_ends = np.unique(np.clip(ends[ends > start], None, stop) - start) if documents else None
    return Split(stop - start, read, document_ends, place)


@contextmanager
def reading(file: StoredFile) -> Iterator[IO[bytes]]:
    """Opens a file; what goes wrong in the block because the file cannot be read, or is damaged, is a DataError."""
    try:
        with file.open() as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError, BadZipFile, NotImplementedError) as error:
        raise DataError(f"{file.name}: cannot be read: {error}") from error


def _read_file(file: StoredFile, first: int, last: int) -> Iterator[bytes]:
    with reading(file) as stream:
        stream.seek(first)
        left = last - first
        while left:
            chunk = stream.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise DataError(f"{file.name}: ends {left:,} bytes early; it was cut while it was read")
            left -= len(chunk)
            yield chunk

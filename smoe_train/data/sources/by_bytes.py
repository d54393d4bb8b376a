"""What enwik8 and text8 share: 10^8 known bytes, in a zip archive by themselves, divided by byte offsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from smoe_train.data.reading.archives import is_zip, open_members
from smoe_train.data.reading.download import Published
from smoe_train.data.source import (
    Corpus,
    SourceConfig,
    Split,
    SplitName,
    StoredFile,
    byte_range,
    checksum,
)
from smoe_train.errors import DataError


class ByBytesConfig(SourceConfig):
    """Sizes of the splits; the default ones are those of the literature, 90M / 5M / 5M bytes from start to end."""

    train_bytes: int = Field(90_000_000, gt=0)
    """Size of the training split, from the first byte."""
    valid_bytes: int = Field(5_000_000, gt=0)
    """Size of the validation split, which follows the training split."""
    test_bytes: int = Field(5_000_000, ge=0)
    """Size of the test split, which follows the validation split; 0 for none."""

    def sizes(self) -> dict[SplitName, int]:
        """Returns the size of each split that is not empty, in order."""
        sizes: dict[SplitName, int] = {
            "train": self.train_bytes,
            "valid": self.valid_bytes,
            "test": self.test_bytes,
        }
        return {name: size for name, size in sizes.items() if size}


@dataclass(frozen=True)
class StandardText:
    """A published text.

    Attributes:
        name: Name of the data source, of the file and of the archive's member.
        archive: Its archive.
        md5: Digest of the text.
        num_bytes: Its size.
    """

    name: str
    archive: Published
    md5: str
    num_bytes: int = 100_000_000


def stored_text(path: Path, text: StandardText) -> StoredFile:
    """Returns the text at ``path``: the file itself, or the archive's member of its name.

    Raises:
        DataError: There is no file, or the archive is damaged, has no such member, or one larger than the text.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such file; set data.path to the file {text.name} or to {text.archive.name}, or leave "
            "it out to download the archive"
        )
    if not is_zip(path):
        return StoredFile.at(path)
    members = open_members(path)
    if text.name not in members:
        shown = ", ".join(repr(name[:60]) for name in list(members)[:5]) or "nothing"
        raise DataError(f"{path}: holds no member named {text.name!r} (it holds {shown}); use {text.archive.name}")
    if members[text.name].num_bytes > text.num_bytes:
        raise DataError(
            f"{path}: the member {text.name!r} has {members[text.name].num_bytes:,} bytes (at most "
            f"{text.num_bytes:,}); use the original {text.archive.name}"
        )
    return members[text.name]


def divided(file: StoredFile, text: StandardText, config: ByBytesConfig) -> Corpus:
    """Returns the file divided by the sizes in the options.

    Raises:
        DataError: The file is neither the whole text nor a piece of it with sizes of its own that fit.
    """
    sizes = config.sizes()
    check_size(file.name, file.num_bytes, sum(sizes.values()), text)
    if file.num_bytes == text.num_bytes:
        check_digest(file.name, checksum(file.chunks(), "md5")[1], text)
    splits: dict[SplitName, Split] = {}
    start = 0
    for name, size in sizes.items():
        splits[name] = byte_range([file], start, start + size)
        start += size
    return Corpus.read(text.name, splits)


def check_size(where: str, num_bytes: int, split_bytes: int, text: StandardText) -> None:
    """Refuses a piece that is too short for the splits, or whose splits are those of the whole text."""
    if num_bytes < split_bytes or (split_bytes == text.num_bytes != num_bytes):
        part = max(1, num_bytes // 20)
        raise DataError(
            f"{where}: has {num_bytes:,} bytes; {text.name} has {text.num_bytes:,} and the splits ask for "
            f"{split_bytes:,}. A piece of {text.name} needs split sizes that fit it, for this one e.g. "
            f"{sizes_as_options({'train': max(1, num_bytes - 2 * part), 'valid': part, 'test': part})}"
        )


def check_digest(where: str, md5: str, text: StandardText) -> None:
    """Refuses a text of the right size with other contents."""
    if md5 != text.md5:
        raise DataError(
            f"{where}: has {text.name}'s size but not its contents (md5 {md5}, not {text.md5}); fetch it again, or use "
            "data.source=text for another text"
        )


def sizes_as_options(sizes: Mapping[SplitName, int]) -> str:
    """Returns split sizes as they stand on a command line."""
    return " ".join(f"data.{name}_bytes={size}" for name, size in sizes.items())

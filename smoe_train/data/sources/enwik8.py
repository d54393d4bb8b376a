"""enwik8: the first 10^8 bytes of an English Wikipedia dump of 2006 (Hutter Prize; the byte-level LM benchmark)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from smoe_train.data.reading.download import Published, fetch, location
from smoe_train.data.reading.rows import text_of
from smoe_train.data.source import (
    CHUNK_BYTES,
    Corpus,
    Split,
    SplitName,
    StoredFile,
    TextSource,
    reading,
    register_source,
)
from smoe_train.data.sources.by_bytes import (
    ByBytesConfig,
    StandardText,
    check_digest,
    divided,
    sizes_as_options,
    stored_text,
)
from smoe_train.data.sources.hub import read_hub
from smoe_train.data.stores.build_once import build_once
from smoe_train.errors import DataError

ENWIK8 = StandardText(
    name="enwik8",
    archive=Published(
        name="enwik8.zip",
        urls=("http://mattmahoney.net/dc/enwik8.zip", "https://data.deepai.org/enwik8.zip"),
        digest="547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        num_bytes=36_445_475,
    ),
    md5="a1fa5ffddb56f4953e226637dabbb36a",
)
# One row with all bytes; the main branch holds a script, which the library no longer runs.
HUB = ("LTCB/enwik8", "enwik8-raw", "train", "refs/convert/parquet")
REMEDY = "set data.path to it; data.source=pydocs needs no download"

NUMBERS = {str(value).encode(): value for value in range(256)} | {b"\n": 10}


class Enwik8Config(ByBytesConfig):
    """Options of enwik8; the default split is the one of the literature, 90M / 5M / 5M bytes from start to end."""

    source: Literal["enwik8"] = "enwik8"
    path: Path | None = None
    """The file ``enwik8``, ``enwik8.zip``, a piece of enwik8, or a folder with Transformer-XL's ``train.txt``,
    ``valid.txt`` and ``test.txt`` of decimal numbers; without it the archive is downloaded once."""


@register_source("enwik8", Enwik8Config)
class Enwik8Source(TextSource):
    """enwik8 or a piece of it, split by byte offsets.

    Split as in Transformer-XL's prep_enwik8.py. A whole file must have the published md5; a piece cannot be checked,
    so it is accepted only with split sizes of its own.
    """

    config: Enwik8Config

    def files(self, cache: Path) -> Sequence[Path]:
        """Returns the one file that is read, or the three of a folder."""
        if self.config.path is None:
            return [_hub_copy(cache) if _hub_copy(cache).is_file() else location(ENWIK8.archive, cache)]
        path = self.config.path.expanduser()
        return [path / f"{name}.txt" for name in self.config.sizes()] if path.is_dir() else [path]

    def load(self, cache: Path) -> Corpus:
        """Downloads the text if no path is set, checks and divides it."""
        if self.config.path is None:
            return divided(stored_text(_downloaded(cache), ENWIK8), ENWIK8, self.config)
        path = self.config.path.expanduser()
        if path.is_dir():
            return _from_numbers(path, self.config)
        return divided(stored_text(path, ENWIK8), ENWIK8, self.config)


def _hub_copy(cache: Path) -> Path:
    return cache / "downloads" / "enwik8-hub" / "enwik8"


def _downloaded(cache: Path) -> Path:
    copy = _hub_copy(cache)
    if copy.is_file():
        return copy
    try:
        return fetch(ENWIK8.archive, cache, REMEDY)
    except DataError as error:
        try:
            build_once(copy.parent, lambda folder: _write_from_hub(folder / copy.name), lambda _: copy.is_file())
        except DataError as second:
            raise DataError(f"{error}. Nor from the hub: {second}") from second
        return copy


def _write_from_hub(path: Path) -> None:
    rows = list(read_hub(*HUB))
    data = b"".join(text_of(f"{HUB[0]}: row {number}", row, "text").encode() for number, row in rows)
    check_digest(HUB[0], hashlib.md5(data, usedforsecurity=False).hexdigest(), ENWIK8)
    path.write_bytes(data)


def _from_numbers(folder: Path, config: Enwik8Config) -> Corpus:
    """Returns the splits that prep_enwik8.py wrote: decimal byte values and line ends between single spaces."""
    sizes = config.sizes()
    missing = [name for name in sizes if not (folder / f"{name}.txt").is_file()]
    if missing:
        raise DataError(
            f"{folder}: there is no {missing[0]}.txt; set data.path to the file enwik8, to enwik8.zip, or to a folder "
            "with Transformer-XL's train.txt, valid.txt and test.txt (data.test_bytes=0 for no test split)"
        )
    digest = hashlib.md5(usedforsecurity=False)
    splits: dict[SplitName, Split] = {}
    found: dict[SplitName, int] = {}
    for name in sizes:
        file = StoredFile.at(folder / f"{name}.txt")
        found[name] = 0
        for chunk in numbers(file):
            digest.update(chunk)
            found[name] += len(chunk)
        splits[name] = _numbers_split(file, found[name])
    if found != sizes:
        raise DataError(
            f"{folder}: the files do not have the sizes of the splits ({sizes_as_options(sizes)}); if they are meant "
            f"to be a piece of enwik8, set {sizes_as_options(found)}"
        )
    if sum(found.values()) == ENWIK8.num_bytes:
        check_digest(str(folder), digest.hexdigest(), ENWIK8)
    return Corpus.read("enwik8", splits)


def _numbers_split(file: StoredFile, num_bytes: int) -> Split:
    return Split(num_bytes, lambda: numbers(file), place=lambda offset: f"{file.name}: number {offset + 1:,}")


def numbers(file: StoredFile) -> Iterator[bytes]:
    """Yields the bytes that a file of decimal numbers stands for.

    Raises:
        DataError: Something else stands between two spaces; the message says at which number.
    """
    left, done = b"", 0
    with reading(file) as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            words = (left + chunk).split(b" ")
            left = words.pop() if chunk else b""
            try:
                yield bytes([NUMBERS[word] for word in words])
            except KeyError as error:
                place = done + next(i for i, word in enumerate(words) if word not in NUMBERS) + 1
                raise DataError(
                    f"{file.name}: number {place:,} is {str(error.args[0][:20])[1:]}; only 0 to 255 and line ends may "
                    "stand between single spaces, as Transformer-XL's prep_enwik8.py writes them"
                ) from error
            done += len(words)
            if not chunk:
                return

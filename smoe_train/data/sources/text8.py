"""text8: 10^8 characters of English Wikipedia in the alphabet a to z and space (the character-level LM benchmark)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from smoe_train.bounded import read_bounded
from smoe_train.data import progress
from smoe_train.data.reading.archives import is_zip, open_members
from smoe_train.data.reading.download import Published, fetch, location
from smoe_train.data.source import Corpus, StoredFile, TextSource, checksum, register_source
from smoe_train.data.sources.by_bytes import ByBytesConfig, StandardText, divided, stored_text
from smoe_train.data.stores.build_once import build_once
from smoe_train.errors import DataError

TEXT8 = StandardText(
    name="text8",
    archive=Published(
        name="text8.zip",
        urls=("http://mattmahoney.net/dc/text8.zip", "https://data.deepai.org/text8.zip"),
        digest="a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        num_bytes=31_344_016,
    ),
    md5="3bea1919949baf155f99411df5fada7e",
)
DIGEST = "sha256"
REMEDY = "set data.path to it, or data.dump_path to enwik9, which text8 is made from"

DIGITS = (b"zero", b"one", b"two", b"three", b"four", b"five", b"six", b"seven", b"eight", b"nine")
# wikifil.pl, substitution by substitution; a table, because their order is the definition.
SUBSTITUTIONS: tuple[tuple[re.Pattern[bytes], bytes], ...] = (
    (re.compile(rb"&amp;"), b"&"),
    (re.compile(rb"&lt;"), b"<"),
    (re.compile(rb"&gt;"), b">"),
    (re.compile(rb"<ref[^<]*</ref>"), b""),
    (re.compile(rb"<[^>]*>"), b""),
    (re.compile(rb"\[http:[^] ]*"), b"["),
    (re.compile(rb"\|thumb", re.IGNORECASE), b""),
    (re.compile(rb"\|left", re.IGNORECASE), b""),
    (re.compile(rb"\|right", re.IGNORECASE), b""),
    (re.compile(rb"\|\d+px", re.IGNORECASE), b""),
    (re.compile(rb"\[\[image:[^\[\]]*\|", re.IGNORECASE), b""),
    (re.compile(rb"\[\[category:([^|\]]*)[^]]*\]\]", re.IGNORECASE), rb"[[\1]]"),
    (re.compile(rb"\[\[[a-z\-]*:[^\]]*\]\]"), b""),
    (re.compile(rb"\[\[[^|\]]*\|"), b"[["),
    (re.compile(rb"\{\{[^}]*\}\}"), b""),
    (re.compile(rb"\{[^}]*\}"), b""),
    (re.compile(rb"[\[\]]"), b""),
    (re.compile(rb"&[^;]*;"), b" "),
)
TAGS = re.compile(rb"<.*>")
REDIRECT = re.compile(rb"#redirect", re.IGNORECASE)
OTHERS = re.compile(rb"[^a-z]+")
FOREIGN = re.compile(rb"[^a-z ]")


class Text8Config(ByBytesConfig):
    """Options of text8; the default split is the one of the literature, 90M / 5M / 5M characters from start to end."""

    source: Literal["text8"] = "text8"
    path: Path | None = None
    """The file ``text8``, ``text8.zip`` or a piece of text8; without it (and ``dump_path``) the archive is downloaded
    once."""
    dump_path: Path | None = None
    """A Wikipedia dump to make it from by Mahoney's filter: ``enwik9`` gives all of text8, ``enwik8`` its first three
    quarters, both as a file or zipped."""

    @model_validator(mode="after")
    def _one_origin(self) -> Text8Config:
        if self.path is not None and self.dump_path is not None:
            raise ValueError("path and dump_path exclude each other: text8 is read, or made from a dump; remove either")
        return self


@register_source("text8", Text8Config)
class Text8Source(TextSource):
    """text8 or a piece of it, split by offsets; a whole file must have the published md5."""

    config: Text8Config

    def files(self, cache: Path) -> Sequence[Path]:
        """Returns the one file that is read."""
        path = self.config.path or self.config.dump_path
        return [location(TEXT8.archive, cache) if path is None else path.expanduser()]

    def load(self, cache: Path) -> Corpus:
        """Downloads or makes the text if no path is set, checks and divides it."""
        if self.config.dump_path is not None:
            file = StoredFile.at(_derived(self.config.dump_path.expanduser(), cache))
        elif self.config.path is not None:
            file = stored_text(self.config.path.expanduser(), TEXT8)
            _check_alphabet(file)
        else:
            file = stored_text(fetch(TEXT8.archive, cache, REMEDY), TEXT8)
        return divided(file, TEXT8, self.config)


def filtered(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the text of a Wikipedia dump in lower-case letters and single spaces, with digits spelled out.

    A port of Matt Mahoney's wikifil.pl (http://mattmahoney.net/dc/textdata.html, public domain): the text between
    ``<text ...>`` and ``</text>`` of articles that are no redirects, without markup.
    """
    visible = False
    for record in _records(chunks):
        if b"<text " in record:
            visible = True
        if REDIRECT.search(record):
            visible = False
        if not visible:
            continue
        if b"</text>" in record:
            visible = False
        text = TAGS.sub(b"", record, count=1)
        for pattern, replacement in SUBSTITUTIONS:
            text = pattern.sub(replacement, text)
        text = text.lower()
        for digit, word in enumerate(DIGITS):
            text = text.replace(b"%d" % digit, b" " + word + b" ")
        yield OTHERS.sub(b" ", b" " + text + b" ")[:-1]


def _records(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields what ends with ``>``, and the rest."""
    left: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b">")
        left.append(first)
        for part in others:
            yield b"".join(left) + b">"
            left = [part]
    if rest := b"".join(left):
        yield rest


def _check_alphabet(file: StoredFile) -> None:
    offset = 0
    for chunk in file.chunks():
        if found := FOREIGN.search(chunk):
            raise DataError(
                f"{file.name}: byte {offset + found.start():,} is {found[0]!r}, and text8 has only a to z and spaces; "
                "make it from a dump by data.dump_path, or use data.source=text for another text"
            )
        offset += len(chunk)


def _derived(path: Path, cache: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; set data.dump_path to enwik9 or enwik8, as a file or zipped")
    dump = StoredFile.at(path)
    if is_zip(path):
        members = open_members(path, "enwik[89]")
        if len(members) != 1:
            raise DataError(f"{path}: holds no member enwik8 or enwik9; use the original archive")
        dump = next(iter(members.values()))
    _, digest = checksum(dump.chunks())
    final = cache / "derived" / f"text8-{digest[:32]}" / "text8"

    def build(folder: Path) -> None:
        left, written = TEXT8.num_bytes, hashlib.sha256()
        task = progress.current().task("making text8", TEXT8.num_bytes)
        with (folder / final.name).open("wb") as file, task as advance:
            for text in filtered(dump.chunks()):
                written.update(text[:left])
                left -= file.write(text[:left])
                advance(len(text))
                if not left:
                    break
        (folder / DIGEST).write_text(written.hexdigest())

    build_once(final.parent, build, _intact)
    return final


def _intact(folder: Path) -> bool:
    """Returns whether the text made of a dump is still what it was; a piece of text8 has no published digest."""
    try:
        recorded = read_bounded(folder / DIGEST, 64).decode()
        return recorded == checksum(StoredFile.at(folder / TEXT8.name).chunks())[1]
    except (OSError, UnicodeDecodeError, DataError):
        return False

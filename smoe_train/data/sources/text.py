"""Plain text files, taken as the bytes they are; of several, each is a document."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from smoe_train.data.reading.archives import inside
from smoe_train.data.source import (
    Corpus,
    SourceConfig,
    Split,
    SplitName,
    StoredFile,
    TextSource,
    byte_range,
    register_source,
)
from smoe_train.errors import DataError

DEFAULT_FRACTION = 0.05
LONGEST_LINE = 1 << 16


class TextConfig(SourceConfig):
    """Options of plain text files."""

    source: Literal["text"] = "text"
    path: Path
    """A text file, or a folder whose ``*.txt`` files are joined in the order of their names, each a document."""
    valid_path: Path | None = None
    """Text (file or folder) of the validation split; without it, the split is cut from the end of ``path``."""
    test_path: Path | None = None
    """Text (file or folder) of the test split; needs ``valid_path``."""
    valid_fraction: float | None = Field(None, gt=0.0, lt=1.0)
    """Share of the bytes of ``path`` that validate: the piece before the test split (0.05 unless ``valid_path``). Each
    piece begins with a line, or with a word where lines are longer than 64 KiB."""
    test_fraction: float | None = Field(None, ge=0.0, lt=1.0)
    """Share of the bytes of ``path`` that test: the last piece (0.05 unless ``valid_path``); 0 for no test split."""

    @model_validator(mode="after")
    def _one_way_to_split(self) -> TextConfig:
        fractions = [self.valid_fraction, self.test_fraction]
        if self.valid_path is not None and fractions != [None, None]:
            raise ValueError("valid_fraction and test_fraction have no effect with valid_path; remove either")
        if self.test_path is not None and self.valid_path is None:
            raise ValueError("test_path needs valid_path: give both splits as files, or neither")
        if sum(DEFAULT_FRACTION if share is None else share for share in fractions) >= 1.0:
            raise ValueError("valid_fraction + test_fraction must be below 1, the rest is for training")
        return self


@register_source("text", TextConfig)
class TextFilesSource(TextSource):
    """Files of text: split by fractions of their bytes, or given split by split."""

    config: TextConfig

    def files(self, cache: Path) -> Sequence[Path]:
        """Returns all files of all splits."""
        return [path for paths in self._paths().values() for path in paths]

    def load(self, cache: Path) -> Corpus:
        """Divides the text and fingerprints it."""
        config = self.config
        texts = {name: [StoredFile.at(path) for path in paths] for name, paths in self._paths().items()}
        sizes = {name: sum(file.num_bytes for file in files) for name, files in texts.items()}
        if not sizes["train"]:
            raise DataError(f"{config.path}: holds no text (0 bytes); set data.path to a file with text in it")
        documents = any(len(files) > 1 for files in texts.values())
        if config.valid_path is not None:
            splits = {name: byte_range(files, 0, sizes[name], documents) for name, files in texts.items()}
            return Corpus.read("text", splits)
        test_share = DEFAULT_FRACTION if config.test_fraction is None else config.test_fraction
        valid_share = DEFAULT_FRACTION if config.valid_fraction is None else config.valid_fraction
        size = sizes["train"]
        train = texts["train"]
        test_start = _next_line(train, size - int(size * test_share), size)
        valid_start = _next_line(train, test_start - int(size * valid_share), test_start)
        if valid_start == test_start or (test_share and test_start == size):
            raise DataError(
                f"{config.path}: {size:,} bytes are too few to cut off valid_fraction={valid_share} and "
                f"test_fraction={test_share}; set larger fractions, data.valid_path, or a longer text"
            )
        cut: dict[SplitName, Split] = {
            "train": byte_range(train, 0, valid_start, documents),
            "valid": byte_range(train, valid_start, test_start, documents),
        }
        if test_share:
            cut["test"] = byte_range(train, test_start, size, documents)
        return Corpus.read("text", cut)

    def _paths(self) -> dict[SplitName, list[Path]]:
        config = self.config
        paths = {"train": _text_files(config.path, "data.path")}
        if config.valid_path is not None:
            paths["valid"] = _text_files(config.valid_path, "data.valid_path")
        if config.test_path is not None:
            paths["test"] = _text_files(config.test_path, "data.test_path")
        seen: dict[Path, str] = {}
        for name, files in paths.items():
            for file in files:
                if (other := seen.setdefault(file.resolve(), name)) != name:
                    raise DataError(f"{file}: belongs to both the {other} and the {name} split; name it once")
        return paths  # type: ignore[return-value]


def _next_line(files: Sequence[StoredFile], start: int, stop: int) -> int:
    """Returns where a line begins at ``start`` or soon after; else a word; else a character."""
    if not 0 < start < stop:
        return start
    window = b"".join(byte_range(files, start - 1, min(start + LONGEST_LINE, stop)).read())
    for border in (rb"\n", rb"\s", rb"[\x00-\xff](?![\x80-\xbf])"):
        if (found := re.search(border, window[:-1])) is not None:
            return start - 1 + found.end()
    return start


def _text_files(path: Path, key: str) -> list[Path]:
    path = path.expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: there is no such file or folder; set {key} to a text file or a folder of *.txt")
    files = sorted(inside(path, file) for file in path.glob("*.txt") if file.is_file())
    if not files:
        raise DataError(f"{path}: the folder holds no *.txt file; set {key} to a text file or a folder of *.txt")
    return files

"""Any JSONL, CSV, TSV or parquet files, or any data set of the hub, of which one column is the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from smoe_train.data.reading.documents import divided, of_documents
from smoe_train.data.reading.rows import SUFFIXES, hub_files, read_rows, row_format, text_of
from smoe_train.data.source import Corpus, SourceConfig, Split, SplitName, TextSource, register_source
from smoe_train.data.sources.hub import read_hub
from smoe_train.errors import DataError

DEFAULT_FRACTION = 0.05


class RecordsConfig(SourceConfig):
    """Options of files, or of a data set of the hub, with a column of texts; each row is a document."""

    source: Literal["records"] = "records"
    path: Path | None = None
    """A file of rows (``.jsonl``, ``.json``, ``.ndjson``, ``.csv``, ``.tsv``, ``.parquet``), or a folder that lies as
    data sets do on the hub (``train-00000-of-00002.parquet``, ``data/train.jsonl``)."""
    hub: str | None = None
    """Id on the Hugging Face hub, instead of ``path``."""
    subset: str | None = None
    """The configuration of the data set on the hub, or the folder in ``path`` that holds it."""
    revision: str | None = None
    """Commit, tag or branch on the hub; without it the newest."""
    column: str = "text"
    """The column of the texts; a line end is added behind a text that has none."""
    train_split: str = "train"
    """Which split of a data set on the hub, or of a folder, trains."""
    valid_split: str | None = None
    """Which split of it validates; without it (and ``valid_path``), the split is cut from the end of the other."""
    test_split: str | None = None
    """Which split of it tests; needs ``valid_split``."""
    valid_path: Path | None = None
    """File of the validation split, if ``path`` is a file."""
    test_path: Path | None = None
    """File of the test split; needs ``valid_path``."""
    valid_fraction: float | None = Field(None, gt=0.0, lt=1.0)
    """Share of the bytes that validate, in whole rows: the piece before the test split (0.05 unless it is given)."""
    test_fraction: float | None = Field(None, ge=0.0, lt=1.0)
    """Share of the bytes that test: the last piece (0.05 unless the splits are given); 0 for no test split."""

    @model_validator(mode="after")
    def _one_origin(self) -> RecordsConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError("set either path (local files) or hub (a data set's id on the hub)")
        if self.hub is None and self.revision is not None:
            raise ValueError("revision has no effect on local files; remove it")
        if self.hub is not None and (self.valid_path or self.test_path):
            raise ValueError("valid_path and test_path have no effect with hub; set valid_split and test_split")
        return self

    @model_validator(mode="after")
    def _one_way_to_split(self) -> RecordsConfig:
        if self.valid_split is not None and self.valid_path is not None:
            raise ValueError("valid_split and valid_path exclude each other; remove either")
        for kind in ("split", "path"):
            if getattr(self, f"test_{kind}") is not None and getattr(self, f"valid_{kind}") is None:
                raise ValueError(f"test_{kind} needs valid_{kind}: give both splits, or neither")
        fractions = [self.valid_fraction, self.test_fraction]
        if (self.valid_split or self.valid_path) and fractions != [None, None]:
            raise ValueError("valid_fraction and test_fraction have no effect where the validation split is given")
        if sum(DEFAULT_FRACTION if share is None else share for share in fractions) >= 1.0:
            raise ValueError("valid_fraction + test_fraction must be below 1, the rest is for training")
        return self


@register_source("records", RecordsConfig)
class RecordsSource(TextSource):
    """Rows of which one column is a document, in files or on the hub."""

    config: RecordsConfig

    def files(self, cache: Path) -> Sequence[Path] | None:
        """Returns all files of all splits; None for the hub, whose newest revision may change."""
        if self.config.hub is not None:
            return None
        return [path for paths in self._paths().values() for path in paths]

    def load(self, cache: Path) -> Corpus:
        """Reads all rows once to find the documents, divides them and takes the fingerprint."""
        config = self.config
        splits: dict[SplitName, Split] = {}
        if config.hub is not None:
            for name, split in self._split_names().items():
                splits[name] = of_documents(f"{config.hub}, split {split}", partial(self._read_hub, split))
        else:
            for name, paths in self._paths().items():
                splits[name] = of_documents(str(paths[0]), partial(self._read_files, paths))
        if "valid" in splits:
            return Corpus.read("records", splits)
        valid = DEFAULT_FRACTION if config.valid_fraction is None else config.valid_fraction
        test = DEFAULT_FRACTION if config.test_fraction is None else config.test_fraction
        return Corpus.read("records", divided(str(config.hub or config.path), splits["train"], valid, test))

    def _split_names(self) -> dict[SplitName, str]:
        config = self.config
        names: dict[SplitName, str | None] = {
            "train": config.train_split,
            "valid": config.valid_split,
            "test": config.test_split,
        }
        chosen = {name: split for name, split in names.items() if split is not None}
        if len(set(chosen.values())) < len(chosen):
            raise DataError(f"{config.hub or config.path}: {', '.join(chosen.values())}: each split may serve once")
        return chosen

    def _paths(self) -> dict[SplitName, list[Path]]:
        config = self.config
        assert config.path is not None
        if config.path.expanduser().is_dir():
            return self._paths_in(config.path.expanduser())
        if config.valid_split or config.train_split != "train" or config.subset:
            raise DataError(
                f"{config.path}: is no folder, so train_split, valid_split and subset have no effect; use valid_path"
            )
        named = {"train": config.path, "valid": config.valid_path, "test": config.test_path}
        paths: dict[SplitName, list[Path]] = {}
        for name, path in named.items():
            if path is not None:
                paths[name] = [_row_file(path.expanduser(), "path" if name == "train" else f"{name}_path")]  # type: ignore[index]
        resolved = [path[0].resolve() for path in paths.values()]
        if len(set(resolved)) < len(resolved):
            raise DataError(f"{config.path}: belongs to two splits; each file may serve once")
        return paths

    def _paths_in(self, folder: Path) -> dict[SplitName, list[Path]]:
        if self.config.valid_path is not None:
            raise DataError(f"{folder}: is a folder, so valid_path has no effect; use valid_split")
        if self.config.subset and not (folder / self.config.subset).is_dir():
            raise DataError(f"{folder}: there is no folder {self.config.subset!r} in it; correct data.subset")
        found: Mapping[str, list[Path]] = hub_files(folder, self.config.subset, tuple(SUFFIXES))
        paths: dict[SplitName, list[Path]] = {}
        for name, split in self._split_names().items():
            if split not in found:
                raise DataError(
                    f"{folder}: holds no files of a split {split!r} (by their names there are: "
                    f"{', '.join(sorted(found)) or 'none'}); set data.{name}_split to one of them or "
                    "data.path to a file"
                )
            paths[name] = found[split]
        return paths

    def _read_files(self, paths: Sequence[Path]) -> Iterator[bytes]:
        column = self.config.column
        for path in paths:
            for number, row in read_rows(path, columns=[column]):
                yield document(text_of(f"{path}: row {number}", row, column))

    def _read_hub(self, split: str) -> Iterator[bytes]:
        config = self.config
        assert config.hub is not None
        for number, row in read_hub(config.hub, config.subset, split, config.revision):
            yield document(text_of(f"{config.hub}, split {split}: row {number}", row, config.column))


def document(text: str) -> bytes:
    """Returns a text with a line end behind it; an empty one stays empty."""
    return (text if not text or text.endswith("\n") else f"{text}\n").encode()


def _row_file(path: Path, key: str) -> Path:
    if not path.is_file() or row_format(path.name) is None:
        what = "is no file of rows" if path.is_file() else "there is no such file or folder"
        raise DataError(f"{path}: {what}; set data.{key} to a file that ends in {', '.join(SUFFIXES)}")
    return path

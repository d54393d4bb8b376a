"""What the sources of labelled sets share: which splits are used, and that no part of a set is taken for the whole."""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from smoe_train.data.examples import (
    DEV,
    EXAMPLE_SPLITS,
    TEST,
    TRAIN,
    Example,
    ExampleSplitName,
    LabelledCorpus,
    TaskInfo,
)
from smoe_train.data.reading import download
from smoe_train.data.reading.row_examples import Columns, to_example
from smoe_train.data.reading.rows import Row, read_rows, row_format
from smoe_train.data.reading.split_files import SplitFiles
from smoe_train.data.source import LabelledSource, SourceConfig, StoredFile
from smoe_train.errors import DataError

logger = logging.getLogger(__name__)


class LabelledConfig(SourceConfig):
    """Options of every labelled set: where it lies and which rows are used."""

    path: Path | None = None
    """A folder or archive with the splits, or one file, which is taken for the training split; without any path the set
    is downloaded."""
    train_path: Path | None = None
    """File of the training split, instead of the one in ``path``."""
    dev_path: Path | None = None
    """File of the dev split, instead of the one in ``path``."""
    test_path: Path | None = None
    """File of the test split, instead of the one in ``path``."""
    splits: list[ExampleSplitName] | None = Field(None, min_length=1)
    """The splits to use, all of which must be there; by default all that the set has, of which only test splits may be
    missing (a warning tells)."""
    dev_fraction: float | None = Field(None, gt=0.0, lt=1.0)
    """Share of the training rows that become the dev split, where there is none; chosen by a hash of the texts, so rows
    with equal texts stay together and the choice depends on nothing else."""
    train_rows: int | None = Field(None, gt=0)
    """Number of training rows to keep (after ``dev_fraction``), chosen by a hash of the texts."""
    dev_rows: int | None = Field(None, gt=0)
    """Number of dev rows to keep, chosen in the same way; counts for each dev split."""
    test_rows: int | None = Field(None, gt=0)
    """Number of test rows to keep, chosen in the same way; counts for each test split."""

    @model_validator(mode="after")
    def _splits_fit(self) -> LabelledConfig:
        if self.splits is None:
            return self
        if len(set(self.splits)) != len(self.splits):
            raise ValueError("splits names one twice")
        if self.dev_fraction is not None and not {TRAIN, DEV} <= set(self.splits):
            raise ValueError("dev_fraction cuts dev from train; name both in splits, or remove dev_fraction")
        for part in (TRAIN, DEV, TEST):
            if getattr(self, f"{part}_rows") is not None and not any(one.startswith(part) for one in self.splits):
                raise ValueError(f"{part}_rows has no effect: {part} is not among splits; remove either")
            if getattr(self, f"{part}_path") is not None and part not in self.splits:
                raise ValueError(f"{part}_path has no effect: {part} is not among splits; remove either")
        return self

    def split_paths(self) -> dict[str, Path]:
        """Returns the single files that the options name, by split."""
        paths = {TRAIN: self.train_path, DEV: self.dev_path, TEST: self.test_path}
        return {split: path for split, path in paths.items() if path is not None}

    @property
    def local(self) -> bool:
        """Whether the set is read from files of the user."""
        return self.path is not None or bool(self.split_paths())


class PublishedConfig(LabelledConfig):
    """Options of a set whose numbers of rows are known."""

    allow_piece: bool = False
    """Accept splits that do not have the published number of rows: a piece of the set, which cannot be checked."""
    revision: str | None = None
    """Commit, tag or branch of the set on the hub; the newest by default."""

    @model_validator(mode="after")
    def _revision_is_of_the_hub(self) -> PublishedConfig:
        if self.revision is not None and self.local:
            raise ValueError("revision is of the hub and has no effect with files; remove it or the paths")
        return self


@dataclass(frozen=True)
class HubSplit:
    """A split of a set on the Hugging Face hub."""

    name: str
    config: str | None
    split: str
    revision: str | None


class SplitSource(LabelledSource):
    """A labelled set that lies split by split in files or on the hub."""

    config: LabelledConfig

    published: Mapping[str, int] = {}
    """Number of rows of each split of the whole set; empty if that is not known."""
    usual: tuple[str, ...] = (TRAIN, DEV)
    """Splits that the set is expected to have."""
    reports_on_test: bool = False
    """Whether the set has no dev split and its test split, with public labels, takes that place."""

    layout: str
    """What `find` looks for, for messages."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What to call the set."""

    @property
    @abstractmethod
    def task(self) -> TaskInfo:
        """What is asked."""

    @property
    @abstractmethod
    def columns(self) -> Columns:
        """Where a row has its parts."""

    @abstractmethod
    def find(self, cache: Path) -> Mapping[str, SplitFiles | HubSplit]:
        """Returns what there is of each split, without reading it; `downloads` are there by then.

        Raises:
            DataError: The options name something that is not there.
        """

    def downloads(self) -> Sequence[download.Published]:
        """Returns the files to fetch for want of a path; the hub has a cache of its own."""
        return ()

    def read_file(self, split: str, file: StoredFile, skipped: dict[str, int]) -> Iterator[tuple[int, Row]]:
        """Yields the rows of a file; rows that are left out are counted in ``skipped``."""
        return read_rows(file)

    def files(self, cache: Path) -> Sequence[Path] | None:
        """Returns the files that are read; None if any of it comes from the hub."""
        if self.downloads():
            return [download.location(file, cache) for file in self.downloads()]
        found = self.find(cache)
        paths: list[Path] = []
        for origin in self._origins(found).values():
            source = found[origin]
            if isinstance(source, HubSplit):
                return None
            paths.extend(source.paths)
        return list(dict.fromkeys(paths))

    def load(self, cache: Path) -> LabelledCorpus:
        """Reads the splits, checks their numbers of rows and divides them."""
        config, skipped = self.config, dict[str, int]()
        for file in self.downloads():
            download.fetch(file, cache, "set data.path to it")
        found = self.find(cache)
        origins = self._origins(found, warn=True)
        self._check_apart({split: found[origin] for split, origin in origins.items()})
        splits: dict[str, list[Example]] = {}
        for split, origin in origins.items():
            splits[split] = self.read(split, origin, found[origin], skipped)
            self._check_number(origin, len(splits[split]), found[origin])
        if config.dev_fraction is not None:
            splits[TRAIN], splits[DEV] = cut(splits[TRAIN], config.dev_fraction)
            if not splits[TRAIN] or not splits[DEV]:
                raise DataError(
                    f"{self.name}: data.dev_fraction={config.dev_fraction} leaves {len(splits[TRAIN]):,} training and "
                    f"{len(splits[DEV]):,} dev rows; change it, or use more rows"
                )
        for part in (TRAIN, DEV, TEST):
            self._keep(part, getattr(config, f"{part}_rows"), splits)
        ordered: dict[str, list[Example]] = {split: splits[split] for split in EXAMPLE_SPLITS if split in splits}
        return LabelledCorpus.create(self.name, self.task, ordered, skipped)

    def read(self, split: str, origin: str, source: SplitFiles | HubSplit, skipped: dict[str, int]) -> list[Example]:
        """Returns the examples of a split.

        Args:
            split: What it is used for; only test rows may lack a label.
            origin: Which split of the set it is.
            source: Where it lies.
            skipped: Receives the number of rows left out, by file and reason.

        Raises:
            DataError: A file is damaged or a row is wrong; the message has file and row.
        """
        labelled = not split.startswith(TEST)
        rows = self._rows(origin, source, skipped)
        return [
            to_example(where, row, place, self.columns, self.task, labelled) for place, (where, row) in enumerate(rows)
        ]

    def _rows(self, origin: str, source: SplitFiles | HubSplit, skipped: dict[str, int]) -> Iterator[tuple[str, Row]]:
        if isinstance(source, HubSplit):
            from smoe_train.data.sources.hub import read_hub

            for number, row in read_hub(source.name, source.config, source.split, source.revision):
                yield f"{source.name}: {source.split}: row {number}", row
            return
        for file in source.files:
            unit = "row" if row_format(file.name) == "parquet" else "line"
            for number, row in self.read_file(origin, file, skipped):
                yield f"{file.name}: {unit} {number}", row

    def _origins(self, found: Mapping[str, SplitFiles | HubSplit], warn: bool = False) -> dict[str, str]:
        """Returns, by split of the corpus, the split of the set that it is made from."""
        config, origins = self.config, {split: split for split in found}
        if self.reports_on_test and DEV not in found and TEST in found and config.dev_fraction is None:
            origins[DEV] = origins.pop(TEST)
        if config.dev_fraction is not None and DEV in origins:
            raise DataError(f"{self.name}: has a dev split, so data.dev_fraction has no effect; remove it")
        usual = [split for split in EXAMPLE_SPLITS if split in self.usual or split in origins]
        for split in config.splits or usual:
            needed = TRAIN if split == DEV and config.dev_fraction is not None else split
            if needed in origins:
                continue
            if config.splits is not None or not origins or not split.startswith(TEST):
                raise DataError(self._missing(needed, origins))
            if warn:
                logger.warning("%s: there is no %s split; no predictions can be made for it", self.name, split)
        return {split: origins[split] for split in config.splits or usual if split in origins}

    def _missing(self, split: str, origins: Mapping[str, str]) -> str:
        where = "" if self.config.path is None else f" at {self.config.path}"
        there = f"there are: {', '.join(origins)}" if origins else f"expected {self.layout}"
        cure = f"set data.{split}_path"
        if split == DEV and TRAIN in origins:
            cure += ", or data.dev_fraction=0.1 to cut it from the training rows"
        if origins:
            rest = {*origins} if self.config.dev_fraction is None else {*origins, DEV}
            cure += f", or data.splits=[{','.join(one for one in EXAMPLE_SPLITS if one in rest)}] to go without"
        return f"{self.name}: has no {split} split{where} ({there}); {cure}"

    def _check_apart(self, sources: Mapping[str, SplitFiles | HubSplit]) -> None:
        seen: dict[object, str] = {}
        for split, source in sources.items():
            if isinstance(source, SplitFiles) and source.shared:
                continue
            parts = [source] if isinstance(source, HubSplit) else [Path(file.name).resolve() for file in source.files]
            for part in parts:
                if part in seen:
                    raise DataError(
                        f"{source.name}: is both the {seen[part]} and the {split} split of {self.name}; use each once"
                    )
                seen[part] = split

    def _check_number(self, origin: str, number: int, source: SplitFiles | HubSplit) -> None:
        name = source.name
        if not number:
            raise DataError(f"{name}: holds no rows; fetch it again")
        published = self.published.get(origin, number)
        if number != published and not (isinstance(self.config, PublishedConfig) and self.config.allow_piece):
            raise DataError(
                f"{name}: has {number:,} rows, and the {origin} split of {self.name} has {published:,}; use the whole "
                "split, or set data.allow_piece=true if this piece is meant"
            )

    def _keep(self, part: str, limit: int | None, splits: dict[str, list[Example]]) -> None:
        if limit is None:
            return
        names = [split for split in splits if split.startswith(part)]
        if not names:
            raise DataError(f"{self.name}: has no {part} split, so data.{part}_rows has no effect; remove it")
        for split in names:
            if limit > len(splits[split]):
                raise DataError(
                    f"{self.name}: data.{part}_rows={limit} is more than the {len(splits[split]):,} rows of the "
                    f"{split} split; lower or remove it"
                )
            splits[split] = keep(splits[split], limit)


def keep(rows: Sequence[Example], number: int) -> list[Example]:
    """Returns some of the rows, chosen by a hash of their texts, in the order of ``rows``."""
    order = sorted(range(len(rows)), key=lambda row: _digest("keep", rows[row]))
    return [rows[row] for row in sorted(order[:number])]


def cut(rows: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """Divides rows into a larger and a smaller part, each in the order of ``rows``.

    Rows are lined up by a hash of their texts and the first ones taken, so that equal texts never lie in both parts
    and the share is met to within the repetitions of one text.

    Args:
        rows: What to divide.
        fraction: Share of the smaller part.
    """
    digests = [_digest("cut", one) for one in rows]
    count: dict[bytes, int] = {}
    for digest in digests:
        count[digest] = count.get(digest, 0) + 1
    chosen: set[bytes] = set()
    wanted, taken = round(fraction * len(rows)), 0
    for digest in sorted(count):
        if taken >= wanted:
            break
        chosen.add(digest)
        taken += count[digest]
    large = [one for one, digest in zip(rows, digests, strict=True) if digest not in chosen]
    small = [one for one, digest in zip(rows, digests, strict=True) if digest in chosen]
    return large, small


def _digest(purpose: str, example: Example) -> bytes:
    # Each use has its own order, or the rows kept would depend on the rows cut.
    return hashlib.sha256(repr((purpose, example.first, example.second)).encode()).digest()

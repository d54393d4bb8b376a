"""IMDB, the Large Movie Review Dataset (Maas et al. 2011): 25,000 + 25,000 reviews, positive or negative."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from smoe_train.data.examples import DEV, TEST, TRAIN, TaskInfo
from smoe_train.data.reading import download
from smoe_train.data.reading.archives import inside, is_archive, read_members
from smoe_train.data.reading.labelled_source import HubSplit, PublishedConfig, SplitSource
from smoe_train.data.reading.row_examples import Columns
from smoe_train.data.reading.rows import Row, read_lines, read_rows, row_format
from smoe_train.data.reading.split_files import SplitFiles, find_splits
from smoe_train.data.source import StoredFile, register_source

HUB = "stanfordnlp/imdb"
ARCHIVE = download.Published(
    "aclImdb_v1.tar.gz",
    ["https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"],
    "7c2ac02c03563afcf9b574c7e56c153a",
    "md5",
)
TASK = TaskInfo("imdb", "classification", ("neg", "pos"), ("accuracy",))
STEMS = {TRAIN: ("train",), DEV: ("dev", "validation"), TEST: ("test",)}
REVIEW = re.compile(r"(?:.*/)?(?P<split>train|test)/(?P<label>neg|pos)/[^/]+\.txt")
BREAKS = re.compile(r"\s*(?:<br\s*/?>\s*)+")


class ImdbConfig(PublishedConfig):
    """Options of IMDB; its test split, whose labels are public, is the dev split unless ``dev_fraction`` is set.

    ``path`` is ``aclImdb_v1.tar.gz``, its unpacked folder ``aclImdb`` (reviews in ``train/pos/`` and so on), or a
    folder of parquet, JSONL or CSV files.
    """

    source: Literal["imdb"] = "imdb"
    fetch: Literal["hub", "archive"] | None = None
    """Where to download from without a path: the Hugging Face hub (default) or the original archive."""

    @model_validator(mode="after")
    def _fetch_has_an_effect(self) -> ImdbConfig:
        if self.fetch is not None and self.local:
            raise ValueError("fetch has no effect with files; remove it or the paths")
        if self.fetch == "archive" and self.revision is not None:
            raise ValueError("revision is of the hub and has no effect with fetch: archive; remove it")
        return self


@register_source("imdb", ImdbConfig)
class ImdbSource(SplitSource):
    """IMDB; line breaks (``<br />``) become one space, reviews without label are not read."""

    config: ImdbConfig
    name = "imdb"
    task = TASK
    columns = Columns(("text", "review"), label=("label", "sentiment"), names={"negative": 0, "positive": 1})
    published: Mapping[str, int] = {TRAIN: 25_000, TEST: 25_000}
    reports_on_test = True
    layout = "train/{neg,pos}/*.txt, test/{neg,pos}/*.txt, or train and test as .parquet, .jsonl or .csv"

    def downloads(self) -> Sequence[download.Published]:
        """Returns the original archive if it is asked for."""
        return (ARCHIVE,) if self.config.fetch == "archive" else ()

    def files(self, cache: Path) -> Sequence[Path] | None:
        """Returns the archive without looking into it, or every review."""
        path = self.config.path
        if path is not None and is_archive(path.expanduser()) and not self.config.split_paths():
            return [path.expanduser()]
        return super().files(cache)

    def find(self, cache: Path) -> Mapping[str, SplitFiles | HubSplit]:
        """Returns the reviews of each split; an archive is read whole, once."""
        config = self.config
        path = download.location(ARCHIVE, cache) if self.downloads() else config.path
        if path is None and not config.local:
            return {split: HubSplit(HUB, None, split, config.revision) for split in (TRAIN, TEST)}
        found = {} if path is None else _find_in(path.expanduser())
        return found | {split: SplitFiles.at(file) for split, file in config.split_paths().items()}

    def read_file(self, split: str, file: StoredFile, skipped: dict[str, int]) -> Iterator[tuple[int, Row]]:
        """Yields the rows of a file, or the one review in it."""
        if row_format(file.name) is None:
            text = "\n".join(line for _, line in read_lines(file))
            yield 1, {"text": without_breaks(text), "label": Path(file.name).parent.name}
            return
        for number, row in read_rows(file):
            yield (
                number,
                {key: without_breaks(value) if isinstance(value, str) else value for key, value in row.items()},
            )


def without_breaks(text: str) -> str:
    """Returns a text with each run of HTML line breaks, and the white space around it, as one space."""
    return BREAKS.sub(" ", text)


def _find_in(path: Path) -> dict[str, SplitFiles]:
    if is_archive(path):
        return _reviews(path)
    for folder in (path / "aclImdb", path):
        found: dict[str, SplitFiles] = {}
        for split in (TRAIN, TEST):
            files = [file for label in TASK.labels for file in sorted((folder / split / label).glob("*.txt"))]
            if files:
                found[split] = SplitFiles.at(*(inside(path, file) for file in files))
        if found:
            return found
    return find_splits(path, ("", "plain_text", "imdb"), STEMS)


def _reviews(path: Path) -> dict[str, SplitFiles]:
    """Returns the reviews in an archive, held in memory: it can be read from start to end only."""
    reviews: dict[str, list[tuple[str, bytes]]] = {}
    for name, data in read_members(path, lambda name: REVIEW.fullmatch(name) is not None):
        match = REVIEW.fullmatch(name)
        assert match is not None
        reviews.setdefault(match["split"], []).append((name, data))
    return {
        split: SplitFiles(tuple(_held(f"{path}:{name}", data) for name, data in sorted(members)), (path,))
        for split, members in reviews.items()
    }


def _held(name: str, data: bytes) -> StoredFile:
    return StoredFile(name, len(data), lambda: io.BytesIO(data))

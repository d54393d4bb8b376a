"""GLUE (arXiv 1804.07461): nine tasks of sentence understanding and their diagnostic set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from smoe_train.data.examples import DEV, TEST, TRAIN, TaskInfo
from smoe_train.data.reading import download
from smoe_train.data.reading.archives import is_archive
from smoe_train.data.reading.glue_tasks import DEV_MISMATCHED, GLUE_TASKS, HUB, TEST_MISMATCHED, GlueName
from smoe_train.data.reading.labelled_source import HubSplit, PublishedConfig, SplitSource
from smoe_train.data.reading.row_examples import Columns
from smoe_train.data.reading.rows import Row, read_lines, read_rows, read_tsv, row_format
from smoe_train.data.reading.split_files import SplitFiles, find_splits
from smoe_train.data.source import StoredFile, register_source

MRPC_TRAIN, MRPC_TEST = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt"
MRPC_DEV_IDS = ("dev_ids.tsv", "mrpc_dev_ids.tsv")


class GlueConfig(PublishedConfig):
    """Options of GLUE.

    ``path`` is the folder ``glue_data``, a task's own folder, its official zip archive, or a folder of TSV, CSV, JSONL
    or parquet files as the hub lays them out.
    """

    source: Literal["glue"] = "glue"
    task: GlueName
    """The task; ``ax`` is the diagnostic set, which has only a test split."""
    dev_mismatched_path: Path | None = None
    """File of MNLI's dev split of other genres, instead of the one in ``path``."""
    test_mismatched_path: Path | None = None
    """File of MNLI's test split of other genres, instead of the one in ``path``."""
    fetch: Literal["hub", "archive"] | None = None
    """Where to download from without a path: the Hugging Face hub (default) or the original archives."""

    @model_validator(mode="after")
    def _options_fit_the_task(self) -> GlueConfig:
        rows = GLUE_TASKS[self.task].rows
        unknown = [split for split in [*(self.splits or ()), *self.split_paths()] if split not in rows]
        if unknown:
            raise ValueError(f"{self.task} has no {unknown[0]} split; it has: {', '.join(rows)}")
        if self.fetch is not None and self.local:
            raise ValueError("fetch has no effect with files; remove it or the paths")
        if self.fetch == "archive" and self.revision is not None:
            raise ValueError("revision is of the hub and has no effect with fetch: archive; remove it")
        return self

    def split_paths(self) -> dict[str, Path]:
        """Returns the single files that the options name, by split."""
        more = {DEV_MISMATCHED: self.dev_mismatched_path, TEST_MISMATCHED: self.test_mismatched_path}
        return super().split_paths() | {split: path for split, path in more.items() if path is not None}


@register_source("glue", GlueConfig)
class GlueSource(SplitSource):
    """One task of GLUE."""

    config: GlueConfig

    def __init__(self, config: GlueConfig) -> None:
        super().__init__(config)
        self.glue = GLUE_TASKS[config.task]
        self.published = self.glue.rows
        self.usual = tuple(self.glue.rows)
        files = ", ".join(f"{names[0]}.tsv" for names in self.glue.stems.values())
        self.layout = f"{files}, or the same as .csv, .jsonl or .parquet, in it or in {self.glue.folder}/"

    @property
    def name(self) -> str:
        """``glue-rte``."""
        return f"glue-{self.config.task}"

    @property
    def task(self) -> TaskInfo:
        """From the table of tasks."""
        return self.glue.info

    @property
    def columns(self) -> Columns:
        """From the table of tasks."""
        return self.glue.columns

    def downloads(self) -> Sequence[download.Published]:
        """Returns the original files if these are asked for."""
        return self.glue.archives if self.config.fetch == "archive" else ()

    def find(self, cache: Path) -> Mapping[str, SplitFiles | HubSplit]:
        """Looks for the original layout, then for the hub's."""
        config, glue = self.config, self.glue
        if not config.local and config.fetch != "archive":
            return {split: HubSplit(HUB, config.task, name, config.revision) for split, name in glue.hub_splits.items()}
        if config.fetch == "archive":
            return self._find_in(download.location(glue.archives[0], cache))
        found = {} if config.path is None else self._find_in(config.path.expanduser())
        return found | {split: SplitFiles.at(file) for split, file in config.split_paths().items()}

    def _find_in(self, path: Path) -> dict[str, SplitFiles]:
        glue = self.glue
        if path.name == MRPC_TRAIN:
            return _undivided_mrpc(path.parent)
        if path.is_file() and not is_archive(path):
            return {next(iter(glue.rows)): SplitFiles.at(path)}
        folders = (glue.folder, self.config.task, *(["diagnostic"] if self.config.task == "ax" else []), "")
        found = find_splits(path, folders, glue.stems)
        if self.config.task == "mrpc" and TRAIN not in found:
            for folder in folders:
                found = _undivided_mrpc(path / folder) | found
        return found

    def read_file(self, split: str, file: StoredFile, skipped: dict[str, int]) -> Iterator[tuple[int, Row]]:
        """Yields the rows of a file; of QQP those with too few tabs are left out and counted."""
        if row_format(file.name) != "tsv" and Path(file.name).suffix != ".txt":
            return read_rows(file)
        first = self.columns.first
        _, header = next(read_lines(file))
        headless = not any(name in header.split("\t") for name in first)

        def skip(number: int, complaint: str) -> None:
            reason = f"{Path(file.name).name}: too few tabs"
            skipped[reason] = skipped.get(reason, 0) + 1

        rows = read_tsv(
            file,
            columns=self.glue.headerless if headless and self.glue.headerless else None,
            required=first[:1] if headless else (),
            on_short_row=skip if self.glue.skips_short_rows else None,
        )
        return _part_of_mrpc(split, Path(file.name), rows) if Path(file.name).name == MRPC_TRAIN else rows


def _undivided_mrpc(folder: Path) -> dict[str, SplitFiles]:
    """Returns the splits of MRPC as its authors publish it: the ids of GLUE's dev rows say how to divide train."""
    ids = next((folder / name for name in MRPC_DEV_IDS if (folder / name).is_file()), None)
    if ids is None or not (folder / MRPC_TRAIN).is_file():
        return {}
    train = StoredFile.at(folder / MRPC_TRAIN)
    both = SplitFiles((train,), (folder / MRPC_TRAIN, ids), shared=True)
    found = {TRAIN: both, DEV: both}
    return found | ({TEST: SplitFiles.at(folder / MRPC_TEST)} if (folder / MRPC_TEST).is_file() else {})


def _part_of_mrpc(split: str, path: Path, rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    file = next(path.with_name(name) for name in MRPC_DEV_IDS if path.with_name(name).is_file())
    ids = {(row["first"], row["second"]) for _, row in read_tsv(file, columns=("first", "second"))}
    for number, row in rows:
        if ((row.get("#1 ID"), row.get("#2 ID")) in ids) == (split == DEV):
            yield number, row

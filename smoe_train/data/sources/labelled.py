"""Any labelled set: CSV, TSV, JSONL or parquet files, or rows of the hub, with columns for texts and label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from smoe_train.data.examples import DEV, TEST, TRAIN, Metric, TaskInfo
from smoe_train.data.reading.labelled_source import HubSplit, LabelledConfig, SplitSource
from smoe_train.data.reading.row_examples import Columns
from smoe_train.data.reading.rows import Row, read_rows, read_tsv, row_format
from smoe_train.data.reading.split_files import SplitFiles, find_splits
from smoe_train.data.source import StoredFile, register_source
from smoe_train.errors import DataError

STEMS = {TRAIN: ("train",), DEV: ("dev", "validation", "valid"), TEST: ("test",)}
CLASSIFICATION: tuple[Metric, ...] = ("accuracy", "f1", "matthews")
REGRESSION: tuple[Metric, ...] = ("pearson", "spearman")


def _class_name(value: object) -> object:
    """Returns the name that is meant where YAML reads another type than text."""
    if isinstance(value, bool):
        raise ValueError("is a truth value to YAML, as yes, no, on and off are; put quotation marks around names")
    return str(value) if isinstance(value, int) else value


ClassName = Annotated[str, BeforeValidator(_class_name, json_schema_input_type=str | int)]


class LabelledFilesConfig(LabelledConfig):
    """Options of any labelled set.

    ``path`` is a folder with train, dev (or validation) and test as CSV, TSV, JSONL or parquet, or one such file.
    """

    source: Literal["labelled"] = "labelled"
    task: str = Field("labelled", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """What to call the task in results."""
    hub: str | None = None
    """Id of the set on the Hugging Face hub, instead of files."""
    subset: str | None = None
    """Configuration of the set on the hub."""
    revision: str | None = None
    """Commit, tag or branch of the set on the hub; the newest by default."""
    train_split: str | None = None
    """Name of the training split on the hub ("train" by default)."""
    dev_split: str | None = None
    """Name of the dev split on the hub; without it there is none, and ``dev_fraction`` cuts it from train."""
    test_split: str | None = None
    """Name of the test split on the hub; without it there is none."""
    text: str = "text"
    """Column of the text, or of the first of a pair."""
    text2: str | None = None
    """Column of the second text of pairs."""
    label: str = "label"
    """Column of the label: a class by name or id (by name alone if names are numbers), or a number; test rows may lack
    it."""
    index: str | None = None
    """Column of the number that names a row in predictions; without it rows are counted from 0."""
    columns: list[str] | None = None
    """Names of the columns of TSV files without a header line."""
    labels: list[ClassName] | None = Field(None, min_length=2)
    """Names of the classes in the order of their ids; of classification only."""
    low: float | None = None
    """Smallest label; of regression only."""
    high: float | None = None
    """Largest label; of regression only."""
    metrics: list[Metric] | None = Field(None, min_length=1)
    """What is reported, its mean being the score: accuracy, f1 (two classes), matthews (accuracy by default), or of
    regression pearson, spearman (both by default)."""

    @model_validator(mode="after")
    def _one_kind_of_task(self) -> LabelledFilesConfig:
        numbers = [self.low, self.high]
        if (self.labels is None) == (None in numbers) or (self.labels is not None and numbers != [None, None]):
            raise ValueError("give either labels (classification) or low and high (regression)")
        if self.labels is None and not (self.low or 0.0) < (self.high or 0.0):
            raise ValueError("low must be below high")
        if len(set(self.labels or ())) != len(self.labels or ()):
            raise ValueError("labels names a class twice")
        allowed = REGRESSION if self.labels is None else CLASSIFICATION
        wrong = [metric for metric in self.metrics or () if metric not in allowed]
        if wrong:
            raise ValueError(f"metric {wrong[0]} does not fit this task; allowed are {', '.join(allowed)}")
        if "f1" in (self.metrics or ()) and len(self.labels or ()) != 2:
            raise ValueError("f1 needs two classes, of which the second counts as positive")
        return self

    @model_validator(mode="after")
    def _one_place(self) -> LabelledFilesConfig:
        if (self.hub is None) == (not self.local):
            raise ValueError("give either hub or path (or train_path, dev_path, test_path)")
        if self.hub is None:
            for key in ("subset", "revision", "train_split", "dev_split", "test_split"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} is of the hub and has no effect with files; remove it")
        elif self.columns is not None:
            raise ValueError("columns has no effect with the hub; remove it")
        if self.columns is not None and len(set(self.columns)) != len(self.columns):
            raise ValueError("columns names one twice")
        return self


@register_source("labelled", LabelledFilesConfig)
class LabelledFilesSource(SplitSource):
    """Rows of the user's own."""

    config: LabelledFilesConfig
    layout = "train, dev (or validation) and test as .csv, .tsv, .jsonl or .parquet"

    @property
    def name(self) -> str:
        """The task's name."""
        return self.config.task

    @property
    def task(self) -> TaskInfo:
        """As the options say."""
        config = self.config
        if config.labels is not None:
            metrics = tuple(config.metrics or ("accuracy",))
            return TaskInfo(config.task, "classification", tuple(config.labels), metrics)
        low, high = config.low or 0.0, config.high or 0.0
        return TaskInfo(config.task, "regression", (), tuple(config.metrics or REGRESSION), low, high)

    @property
    def columns(self) -> Columns:
        """As the options say."""
        config = self.config
        return Columns(
            (config.text,),
            () if config.text2 is None else (config.text2,),
            (config.label,),
            () if config.index is None else (config.index,),
        )

    def find(self, cache: Path) -> Mapping[str, SplitFiles | HubSplit]:
        """Returns the files, or the hub's splits."""
        config = self.config
        if config.hub is not None:
            names = {TRAIN: config.train_split or "train", DEV: config.dev_split, TEST: config.test_split}
            return {
                split: HubSplit(config.hub, config.subset, name, config.revision)
                for split, name in names.items()
                if name is not None
            }
        found = {} if config.path is None else find_splits(config.path, ("",), STEMS)
        return found | {split: SplitFiles.at(file) for split, file in config.split_paths().items()}

    def read_file(self, split: str, file: StoredFile, skipped: dict[str, int]) -> Iterator[tuple[int, Row]]:
        """Yields the rows of a file."""
        if self.config.columns is None:
            return read_rows(file)
        if row_format(file.name) != "tsv":
            raise DataError(f"{file.name}: is no TSV file, so data.columns has no effect; remove it")
        return read_tsv(file, columns=self.config.columns)

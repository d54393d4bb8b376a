"""SST-5, the Stanford Sentiment Treebank in five classes (Socher et al. 2013): whole sentences, not phrases."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Literal

from smoe_train.data.examples import DEV, TEST, TRAIN, TaskInfo
from smoe_train.data.reading.labelled_source import HubSplit, PublishedConfig, SplitSource
from smoe_train.data.reading.row_examples import Columns
from smoe_train.data.reading.rows import Row, read_lines, read_rows, row_format
from smoe_train.data.reading.split_files import TEXT_SUFFIXES, SplitFiles, find_splits
from smoe_train.data.source import StoredFile, register_source
from smoe_train.errors import DataError

HUB = "SetFit/sst5"
TASK = TaskInfo(
    "sst5", "classification", ("very negative", "negative", "neutral", "positive", "very positive"), ("accuracy",)
)
STEMS = {
    TRAIN: ("train", "sst_train"),
    DEV: ("dev", "sst_dev", "validation"),
    TEST: ("test", "sst_test"),
}
FASTTEXT = re.compile(r"__label__([1-5])\s+(.*)")
TREE = re.compile(r"\(([0-4]) ")
LEAF = re.compile(r"\([0-4] ([^() ]+)\)")
ESCAPES = {"-LRB-": "(", "-RRB-": ")", "\\/": "/", "\\*": "*"}
"""How the treebank writes what would be mistaken for its own signs."""


class Sst5Config(PublishedConfig):
    """Options of SST-5.

    ``path`` is a folder or zip archive with train, dev and test in fastText form (``__label__5<tab>text``), as trees,
    JSONL, CSV or parquet.
    """

    source: Literal["sst5"] = "sst5"


@register_source("sst5", Sst5Config)
class Sst5Source(SplitSource):
    """SST-5: 8,544 / 1,101 / 2,210 sentences, all with labels."""

    config: Sst5Config
    name = "sst5"
    task = TASK
    columns = Columns(("text", "sentence"), label=("label",))
    published: Mapping[str, int] = {TRAIN: 8_544, DEV: 1_101, TEST: 2_210}
    usual = (TRAIN, DEV, TEST)
    layout = "train, dev and test (or sst_train ...) as .txt, .jsonl, .csv or .parquet"

    def find(self, cache: Path) -> Mapping[str, SplitFiles | HubSplit]:
        """Returns the files, or the hub's splits."""
        config = self.config
        if not config.local:
            names = {TRAIN: "train", DEV: "validation", TEST: "test"}
            return {split: HubSplit(HUB, None, name, config.revision) for split, name in names.items()}
        suffixes = (*TEXT_SUFFIXES, ".txt")
        found = {} if config.path is None else find_splits(config.path, ("", "sst5", "trees"), STEMS, suffixes)
        return found | {split: SplitFiles.at(file) for split, file in config.split_paths().items()}

    def read_file(self, split: str, file: StoredFile, skipped: dict[str, int]) -> Iterator[tuple[int, Row]]:
        """Yields the rows of a file; lines of text files are trees or have fastText's form."""
        if row_format(file.name) is not None:
            return read_rows(file)
        return ((number, _line(f"{file.name}: line {number}", line)) for number, line in read_lines(file))


def _line(where: str, line: str) -> Row:
    if line.startswith("("):
        return read_tree(where, line)
    match = FASTTEXT.fullmatch(line)
    if match is None:
        raise DataError(
            f"{where}: {line[:60]!r} is neither a tree like '(3 (2 good) (2 film))' nor in fastText's form like "
            "'__label__4<tab>good film' with labels 1 to 5"
        )
    return {"label": int(match[1]) - 1, "text": match[2]}


def read_tree(where: str, line: str) -> Row:
    """Returns label and text of a sentence's tree: the label of its root, and its leaves with spaces between.

    Raises:
        DataError: It is no tree.
    """
    line = line.strip()
    root = TREE.match(line)
    depths = list(accumulate({"(": 1, ")": -1}.get(character, 0) for character in line))
    if root is None or depths[-1] != 0 or 0 in depths[:-1]:
        raise DataError(f"{where}: {line[:60]!r} is not one tree with labels 0 to 4 and closed brackets")
    words = LEAF.findall(line)
    for escape, sign in ESCAPES.items():
        words = [word.replace(escape, sign) for word in words]
    return {"label": int(root[1]), "text": " ".join(words)}

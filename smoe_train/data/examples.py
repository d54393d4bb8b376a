"""Labelled examples: what a row of GLUE or of another classification set is once its file format is gone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

TaskKind = Literal["classification", "regression"]
Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
ExampleSplitName = Literal["train", "dev", "dev_mismatched", "test", "test_mismatched"]
EXAMPLE_SPLITS: tuple[ExampleSplitName, ...] = get_args(ExampleSplitName)

TRAIN = "train"
DEV = "dev"
TEST = "test"


@dataclass(frozen=True)
class TaskInfo:
    """What is asked of a model, and how its answers are judged and handed in.

    Attributes:
        name: The task, in lower case: ``rte``, ``sst5``.
        kind: Whether labels are classes or numbers.
        labels: Names of the classes in the order of their ids, as submissions spell them; none for regression.
        metrics: What is reported; their mean chooses checkpoints and is the task's score, as GLUE defines it.
        low: Smallest label of a regression task.
        high: Largest label of a regression task.
        submissions: By split, the file of the GLUE submission archive that holds its predictions.
    """

    name: str
    kind: TaskKind
    labels: tuple[str, ...]
    metrics: tuple[Metric, ...]
    low: float = 0.0
    high: float = 0.0
    submissions: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_outputs(self) -> int:
        """Width of the model's head: one logit a class, or the number itself."""
        return len(self.labels) if self.kind == "classification" else 1


@dataclass(frozen=True)
class Example:
    """One labelled text, or pair of texts.

    Attributes:
        first: The text, or the first of a pair (premise, question).
        second: The second of a pair (hypothesis, sentence), or None.
        label: Class id, number, or None where it is not published.
        index: What names the row in a submission: the number that the file gives it, or its place counted from 0.
    """

    first: str
    second: str | None
    label: int | float | None
    index: int


@dataclass(frozen=True)
class LabelledCorpus:
    """A named set of examples by split.

    Attributes:
        name: The source's name, with the task if the source has several (``glue-rte``).
        task: What is asked.
        splits: ``train``, ``dev``, ``test`` in this order as far as they exist; MNLI has ``dev_mismatched`` and
            ``test_mismatched`` too. None is empty.
        skipped: Rows left out because the set itself is dirty, counted by file and reason.
        fingerprint: Digest of task and examples.
    """

    name: str
    task: TaskInfo
    splits: Mapping[str, Sequence[Example]]
    skipped: Mapping[str, int]
    fingerprint: str

    @classmethod
    def create(
        cls, name: str, task: TaskInfo, splits: Mapping[str, Sequence[Example]], skipped: Mapping[str, int]
    ) -> LabelledCorpus:
        """Returns a corpus with its fingerprint."""
        digest = hashlib.sha256(json.dumps(asdict(task), sort_keys=True).encode())
        for split, examples in splits.items():
            digest.update(f"{split} {len(examples)}\n".encode())
            for one in examples:
                row = [one.first, one.second, one.label, one.index]
                digest.update(json.dumps(row, ensure_ascii=True).encode() + b"\n")
        return cls(name, task, splits, skipped, digest.hexdigest())

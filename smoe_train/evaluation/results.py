"""``results.json`` of a run folder: what a fine-tuned run scored on the splits that are reported once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smoe_train.bounded import read_json
from smoe_train.durable import write_file
from smoe_train.errors import DataError, RunFailedError

RESULTS = "results.json"


@dataclass(frozen=True)
class SplitResult:
    """The figures of one split.

    Attributes:
        split: ``dev``, or another one with labels.
        examples: How many they are over.
        metrics: By name.
        score: Their mean.
        constant: By metric, what `smoe_train.evaluation.metrics.constant_baseline` scores.
    """

    split: str
    examples: int
    metrics: Mapping[str, float]
    score: float
    constant: Mapping[str, float]


@dataclass(frozen=True)
class TaskResult:
    """The contents of ``results.json``, where the fields of the first split stand beside ``task``.

    Attributes:
        task: The task's name.
        splits: At least one; MNLI has ``dev`` and ``dev_mismatched``.
        run: The run's name.
        seed: Its seed.
        step: Of the checkpoint that was evaluated.
        selection: Split, score and step that chose it.
        setting: What the run has in common with those that differ from it in task and seed alone, if it was said.
    """

    task: str
    splits: tuple[SplitResult, ...]
    run: str
    seed: int
    step: int
    selection: Mapping[str, Any] | None = None
    setting: str | None = None

    def write(self, run_folder: Path) -> None:
        """Writes ``results.json``, atomically.

        Raises:
            RunFailedError: It cannot be written.
        """
        first, *others = self.splits
        content = {
            "task": self.task,
            **asdict(first),
            **({"others": [asdict(one) for one in others]} if others else {}),
            "selection": self.selection,
            "run": self.run,
            "seed": self.seed,
            "step": self.step,
            **({} if self.setting is None else {"setting": self.setting}),
        }
        path = run_folder / RESULTS
        try:
            write_file(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise RunFailedError(f"{path}: cannot be written: {error.strerror}") from error

    @classmethod
    def read(cls, run_folder: Path) -> TaskResult:
        """Reverses `write`.

        Raises:
            DataError: There is no such file, or it is damaged.
        """
        path = run_folder / RESULTS
        try:
            content = read_json(path)
            return cls(
                str(content["task"]),
                tuple(_split(one) for one in (content, *content.get("others", ()))),
                str(content["run"]),
                int(content["seed"]),
                int(content["step"]),
                content.get("selection"),
                content.get("setting"),
            )
        except OSError as error:
            raise DataError(
                f"{path}: {error.strerror}; only a fine-tuning run that has trained to its end has results"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: is damaged ({type(error).__name__}: {error}); evaluate the run anew") from error


def _split(content: Mapping[str, Any]) -> SplitResult:
    metrics, constant = ({str(k): float(v) for k, v in content[key].items()} for key in ("metrics", "constant"))
    if metrics.keys() != constant.keys() or not metrics:
        raise ValueError(f"metrics {sorted(metrics)}, of the constant {sorted(constant)}")
    return SplitResult(str(content["split"]), int(content["examples"]), metrics, float(content["score"]), constant)

"""Files of predictions, spelled as GLUE's submissions spell them: ``predictions/<split>.tsv`` of a run folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from smoe_train.bounded import read_bounded
from smoe_train.data.examples import TaskInfo
from smoe_train.durable import write_file
from smoe_train.errors import DataError, RunFailedError

PREDICTIONS = "predictions"
HEADER = "index\tprediction"
MAX_BYTES = 256 << 20

Row = tuple[int, str]


def predictions_file(run_folder: Path, split: str, other_task: str | None = None) -> Path:
    """Returns where a run's predictions for a split are.

    Args:
        run_folder: The run.
        split: A split of the run's own task.
        other_task: The task whose split it is, if it is another one: AX is answered by a run of MNLI.
    """
    folder = run_folder / PREDICTIONS
    return (folder if other_task is None else folder / other_task) / f"{split}.tsv"


def spell(task: TaskInfo, predictions: npt.NDArray[np.float64]) -> list[str]:
    """Returns predictions as text: the names of the classes, or numbers within the task's range with 3 decimals."""
    if task.kind == "regression":
        return [f"{value:.3f}" for value in np.clip(predictions, task.low, task.high)]
    return [task.labels[int(value)] for value in predictions]


def format_predictions(rows: Iterable[Row]) -> bytes:
    """Returns the content of a file of predictions."""
    return "".join([f"{HEADER}\n", *(f"{index}\t{text}\n" for index, text in rows)]).encode()


def write_predictions(
    path: Path, task: TaskInfo, index: npt.NDArray[np.int64], predictions: npt.NDArray[np.float64]
) -> None:
    """Writes the predictions for a split, one row an example in the order of the split, atomically.

    Args:
        path: The file; its folder is created.
        task: What was asked.
        index: [N], what names each example.
        predictions: [N], class ids or numbers.

    Raises:
        RunFailedError: The file cannot be written.
    """
    rows = list(zip(index.tolist(), spell(task, predictions), strict=True))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, format_predictions(rows))
    except OSError as error:
        raise RunFailedError(f"{path}: cannot be written: {error.strerror}") from error


def read_predictions(path: Path) -> list[Row]:
    """Returns the rows of a file of predictions.

    Raises:
        DataError: The file cannot be read or is none.
    """
    try:
        lines = read_bounded(path, MAX_BYTES).decode().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a file of predictions: {error}") from error
    if lines[0] != HEADER:
        raise DataError(
            f"{path}:1: expected the header `index<tab>prediction`; write the file with smoe-train evaluate"
        )
    return [_row(path, number, line) for number, line in enumerate(lines[1:], start=2)]


def _row(path: Path, number: int, line: str) -> Row:
    index, tab, text = line.partition("\t")
    if not (tab and text and index.isdecimal()):
        raise DataError(f"{path}:{number}: expected a number, a tab and a prediction; found {line[:60]!r}")
    return int(index), text

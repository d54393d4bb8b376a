"""Examples out of rows: which columns hold the texts and the label, and what the label means."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from smoe_train.data.examples import Example, TaskInfo
from smoe_train.data.reading.rows import Row, text_of
from smoe_train.errors import DataError

WHOLE = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Columns:
    """Where a row has its parts; each may be called differently by different publishers, the first name found counts.

    Attributes:
        first: The text, or the first of a pair.
        second: The second of a pair; empty if there is none.
        label: The label; rows of a test split may lack it.
        index: What names the row; without it, its place does.
        names: Other names of classes than those of the task, each with its id.
    """

    first: tuple[str, ...]
    second: tuple[str, ...] = ()
    label: tuple[str, ...] = ("label",)
    index: tuple[str, ...] = ()
    names: Mapping[str, int] = field(default_factory=dict)


def to_example(where: str, row: Row, place: int, columns: Columns, task: TaskInfo, labelled: bool) -> Example:
    """Returns the example in a row; white space around texts is dropped (SST-2 has some, and only in two splits).

    Args:
        where: File and row, for messages.
        row: The row.
        place: How many rows of the split come before it.
        columns: Where its parts are.
        task: Says what labels mean.
        labelled: Whether it must have a label.

    Raises:
        DataError: A column is missing, a text or label is none, or a label is missing.
    """
    column = _present(row, columns.label)
    if column is None and labelled:
        raise _lacks(where, row, columns.label)
    label = None if column is None else to_label(where, row[column], task, columns.names)
    if label is None and labelled:
        assert column is not None
        raise DataError(f"{where}: has no label ({column} is {row[column]!r}); allowed are {_allowed(task)}")
    second = _text(where, row, columns.second) if columns.second else None
    return Example(_text(where, row, columns.first), second, label, _index(where, row, columns.index, place))


def to_label(where: str, value: object, task: TaskInfo, names: Mapping[str, int]) -> int | float | None:
    """Returns the class id or number that a value stands for.

    No label, None, are null, "", and -1 unless that is a number of the task. Numbers are ids of classes, unless classes
    have numbers for names (stars from 1 to 5): then they are names, so that "1" and 1 never mean different classes.

    Raises:
        DataError: It stands for nothing.
    """
    named_by_numbers = any(WHOLE.fullmatch(label) for label in task.labels)
    if named_by_numbers and isinstance(value, int | float) and math.isfinite(value) and value == int(value):
        value = str(int(value))
    if isinstance(value, str):
        value = value.strip()
        if value in task.labels:
            return task.labels.index(value)
        if value in names:
            return names[value]
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if value in ("-1", -1) and not task.low <= -1 <= task.high:
        return None
    if task.kind == "regression":
        number = _number(value)
        if number is not None and task.low <= number <= task.high:
            return number
    elif not named_by_numbers:
        if isinstance(value, str) and WHOLE.fullmatch(value):
            value = int(value)
        if isinstance(value, int | float) and value in range(len(task.labels)):
            return int(value)
    raise DataError(f"{where}: the label {str(value)[:60]!r} is none of {task.name}; allowed are {_allowed(task)}")


def _allowed(task: TaskInfo) -> str:
    if task.kind == "regression":
        return f"numbers from {task.low:g} to {task.high:g}"
    shown = ", ".join(task.labels[:6]) + (", ..." if len(task.labels) > 6 else "")
    if any(WHOLE.fullmatch(label) for label in task.labels):
        return shown
    return f"{shown}, or their ids 0 to {len(task.labels) - 1}"


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None


def _present(row: Row, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row), None)


def _lacks(where: str, row: Row, names: tuple[str, ...]) -> DataError:
    wanted = " or ".join(map(repr, names))
    return DataError(f"{where}: has no column {wanted}; there are: {', '.join(map(repr, row))}")


def _text(where: str, row: Row, names: tuple[str, ...]) -> str:
    column = _present(row, names)
    if column is None:
        raise _lacks(where, row, names)
    return text_of(where, row, column).strip()


def _index(where: str, row: Row, names: tuple[str, ...], place: int) -> int:
    column = _present(row, names)
    if column is None:
        return place
    value = row[column]
    if isinstance(value, str) and WHOLE.fullmatch(value):
        value = int(value)
    if not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63:
        raise DataError(f"{where}: {column} is {str(value)[:60]!r}, which is no row number")
    return value

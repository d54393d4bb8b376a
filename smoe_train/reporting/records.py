"""Records: flat dictionaries, one a line in ``metrics.jsonl`` and ``routing.jsonl``."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from smoe_train.errors import RunFailedError

Value = float | int | str | bool | None | Sequence[float]
Record = Mapping[str, Value]

_R = TypeVar("_R", bound=Mapping[str, Any])

METRICS = "metrics.jsonl"
ROUTING = "routing.jsonl"

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(record: Record) -> bytes:
    """Returns one line of JSON; floats survive bit for bit, NaN and infinities become strings of that name.

    Raises:
        TypeError: A value is of no type that JSON has (a tensor or NumPy scalar: call ``.item()`` first).
    """
    return json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Reverses `encode`.

    Raises:
        ValueError: The line is not one JSON object.
    """
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return {key: _restored(value) for key, value in record.items()}


def complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each line with its record and leaves out a damaged end, which a crash while writing leaves behind.

    Raises:
        RunFailedError: A damaged line has sound ones after it, or the file cannot be read.
    """
    damaged: int | None = None
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = decode(line)
                except ValueError:
                    damaged = damaged or number
                    continue
                if damaged is not None:
                    raise RunFailedError(
                        f"{path}:{damaged}: is not a JSON object although sound lines follow, so no crash left it; "
                        "repair or delete that line, then run again"
                    )
                yield line.rstrip(b"\n") + b"\n", record
    except OSError as error:
        raise RunFailedError(f"{path}: cannot be read: {error.strerror}") from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a file, without a damaged end; none if there is no such file.

    Raises:
        RunFailedError: The file is damaged before its end.
    """
    return [record for _, record in complete_lines(path)] if path.exists() else []


def by_rank_in_step(records: Iterable[_R]) -> list[list[_R]]:
    """Splits the records of one split into series: the first of every step, the second of every step and so on.

    A validation with several ``top_k`` leaves several records a step; the first is the run's own.
    """
    series: list[list[_R]] = []
    seen: Counter[Any] = Counter()
    for record in records:
        rank = seen[record["step"]]
        seen[record["step"]] += 1
        if rank == len(series):
            series.append([])
        series[rank].append(record)
    return series


def scalars_by_step(records: Iterable[Record]) -> dict[int, dict[str, float]]:
    """Groups the numbers of records by step, for the trackers.

    They are named ``split/key`` and ``routing_split/layer_03/key``; further validations of a step with another top_k
    ``split_top_k_8/key``.
    """
    steps: dict[int, dict[str, float]] = {}
    taken: set[tuple[int, str]] = set()
    for record in records:
        step, split, layer = record["step"], record["split"], record.get("layer")
        assert isinstance(step, int)
        prefix = f"{split}/" if layer is None else f"routing_{split}/layer_{layer:02d}/"
        if (step, prefix) in taken and layer is None:
            prefix = f"{split}_top_k_{record.get('top_k')}/"
        taken.add((step, prefix))
        steps.setdefault(step, {}).update(
            (prefix + key, value)
            for key, value in record.items()
            if isinstance(value, int | float) and key not in ("step", "layer")
        )
    return steps


def _finite(value: Value) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _restored(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    return [_restored(item) for item in value] if isinstance(value, list) else value

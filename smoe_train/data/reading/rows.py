"""Rows of JSONL, TSV, CSV and parquet files, each with the number at which it is found.

Rows of the hub, which need the library ``datasets``, come from `smoe_train.data.sources.hub`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from smoe_train.data.reading.archives import inside
from smoe_train.data.source import StoredFile, reading
from smoe_train.errors import DataError

RowFormat = Literal["jsonl", "tsv", "csv", "parquet"]
Row = dict[str, Any]
OnShortRow = Callable[[int, str], None]

SUFFIXES: Mapping[str, RowFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".tsv": "tsv",
    ".csv": "csv",
    ".parquet": "parquet",
}
BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 256 << 20
BATCH_ROWS = 1024
SHARD = re.compile(r"^(?P<split>.+?)(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?$")


def row_format(name: str) -> RowFormat | None:
    """Returns the format that a file's name tells, or None."""
    return SUFFIXES.get(Path(name).suffix.lower())


def read_rows(
    file: Path | StoredFile, format: RowFormat | None = None, columns: Sequence[str] = ()
) -> Iterator[tuple[int, Row]]:
    """Yields each row with its number: the line on which it begins, as an editor counts, or of parquet the row from 1.

    Args:
        file: What to read.
        format: Its format; None goes by the name.
        columns: Columns that must be there; of parquet only these are read, or all if none are named.

    Raises:
        DataError: The file is damaged or not of that format; the message has file and row.
    """
    file = file if isinstance(file, StoredFile) else StoredFile.at(file)
    format = format or row_format(file.name)
    if format is None:
        raise DataError(
            f"{file.name}: the name does not tell its format; allowed are {', '.join(SUFFIXES)}: rename the file"
        )
    if format == "jsonl":
        return _read_jsonl(file, columns)
    if format == "parquet":
        return _read_parquet(file, columns)
    return read_csv(file, columns) if format == "csv" else read_tsv(file, required=columns)


def read_lines(file: Path | StoredFile) -> Iterator[tuple[int, str]]:
    """Yields each line with its number from 1, without its end (LF or CRLF) and without a leading BOM.

    Raises:
        DataError: A line is not valid UTF-8, has a NUL byte or is longer than 256 MiB; the file is empty or unreadable.
    """
    return ((number, _without_end(line)) for number, line in _lines_with_ends(file))


def read_tsv(
    file: Path | StoredFile,
    columns: Sequence[str] | None = None,
    required: Sequence[str] = (),
    on_short_row: OnShortRow | None = None,
) -> Iterator[tuple[int, Row]]:
    """Yields the rows of a file with tabs between columns, in which quotes have no meaning (``csv.QUOTE_NONE``).

    A BOM, CRLF ends and blank lines at the end are accepted. All values are strings, exactly as they stand.

    Args:
        file: What to read.
        columns: Names of the columns of a file without header; None takes them from the first line.
        required: Columns that the header must have.
        on_short_row: Called with number and complaint of a row with too few tabs, which is then left out; with None
            it is an error.

    Raises:
        DataError: The header lacks a column, a row has another number of columns, or the file is no text.
    """
    name, lines = _name(file), read_lines(file)
    if columns is None:
        number, line = next(lines)
        columns = line.split("\t")
        _check_header(name, number, columns, required)
    blank: int | None = None
    for number, line in lines:
        if blank is not None:
            raise DataError(f"{name}: line {blank}: is blank, but rows follow it; remove the line")
        if not line:
            blank = number
            continue
        values = line.split("\t")
        if len(values) != len(columns):
            few = len(values) < len(columns)
            complaint = (
                f"has {len(values)} columns instead of {len(columns)} ({', '.join(columns)}): too "
                f"{'few' if few else 'many'} tabs"
            )
            if few and on_short_row is not None:
                on_short_row(number, complaint)
                continue
            raise DataError(f"{name}: line {number}: {complaint}; correct the line or fetch the file again")
        yield number, dict(zip(columns, values, strict=True))


def read_csv(file: Path | StoredFile, required: Sequence[str] = ()) -> Iterator[tuple[int, Row]]:
    """Yields the rows of a file with commas, whose quoted fields may hold commas and line ends; the header names them.

    Raises:
        DataError: The header lacks a column, a row has another number of columns or an open quote, or it is no text.
    """
    name = _name(file)
    csv.field_size_limit(MAX_LINE_BYTES)  # the module's own limit of 128 KiB is less than a long article
    reader = csv.reader((line for _, line in _lines_with_ends(file)), strict=True)
    columns: list[str] | None = None
    first = 1
    try:
        for values in reader:
            if columns is None:
                columns = values
                _check_header(name, first, columns, required)
            elif values:
                if len(values) != len(columns):
                    raise DataError(
                        f"{name}: line {first}: has {len(values)} columns instead of {len(columns)} "
                        f"({', '.join(columns)}); put fields with commas into double quotes"
                    )
                yield first, dict(zip(columns, values, strict=True))
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}: line {first}: is not valid CSV: {error}; correct the line") from error


def text_of(where: str, row: Mapping[str, Any], column: str) -> str:
    """Returns the text in a column.

    Args:
        where: File and row, for the message.
        row: The row.
        column: Its name.

    Raises:
        DataError: There is no such column, or it holds no text, or text that cannot be stored (a NUL, half a surrogate
            pair).
    """
    if column not in row:
        raise DataError(f"{where}: has no column {column!r}; there are: {', '.join(map(repr, row))}")
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds {_shown(value)} instead of a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: column {column!r} is not valid Unicode: half a surrogate pair at character {error.start + 1}"
        ) from error
    if "\0" in value:
        raise DataError(f"{where}: column {column!r} has a NUL at character {value.index(chr(0)) + 1}; it is no text")
    return value


def hub_files(
    folder: Path, config: str | None = None, suffixes: Sequence[str] = (".parquet",)
) -> dict[str, list[Path]]:
    """Returns the files of each split in a folder that lies as data sets do on the hub, shards in order.

    Read are ``<folder>/<config>/`` if there is such a folder, else ``<folder>/data/``, else ``<folder>``; in it files
    like ``train-00000-of-00002.parquet`` or ``train.parquet``, or folders like ``train/0000.parquet``.

    Args:
        folder: Where they lie.
        config: Name of the configuration, e.g. ``wikitext-2-raw-v1``.
        suffixes: Endings of the files' names.

    Raises:
        DataError: A shard is missing, or a file is a link out of the folder.
    """
    inner = next((folder / name for name in (config, "data") if name and (folder / name).is_dir()), folder)
    splits: dict[str, list[Path]] = {}
    shards: dict[str, tuple[set[int], int]] = {}
    for path in sorted([*inner.glob("*/*"), *inner.glob("*")]):
        if path.suffix not in suffixes or not path.is_file():
            continue
        match = SHARD.match(path.stem)
        assert match is not None
        if path.parent == inner:
            splits.setdefault(match["split"], []).append(inside(folder, path))
            if match["count"] is not None:
                shards.setdefault(match["split"], (set(), int(match["count"])))[0].add(int(match["number"]))
        elif path.stem.isdigit():
            splits.setdefault(path.parent.name, []).append(inside(folder, path))
    for split, (numbers, count) in shards.items():
        missing = sorted(set(range(count)) - numbers)
        if missing or len(numbers) != len(splits[split]):
            raise DataError(
                f"{inner}: the {split} split has {len(splits[split])} files for {count} shards"
                + (f", number {missing[0]:05d} is missing" if missing else "")
                + "; fetch them all, from one revision"
            )
    return splits


def _name(file: Path | StoredFile) -> str:
    return file.name if isinstance(file, StoredFile) else str(file)


def _without_end(line: str) -> str:
    line = line.removesuffix("\n")
    return line.removesuffix("\r")


def _lines_with_ends(file: Path | StoredFile) -> Iterator[tuple[int, str]]:
    file = file if isinstance(file, StoredFile) else StoredFile.at(file)
    number = 0
    with reading(file) as stream:
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{file.name}: line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{where}: is longer than {MAX_LINE_BYTES >> 20} MiB; this is not a file of rows")
            if number == 1:
                line = line.removeprefix(BOM)
            if (position := line.find(b"\0")) >= 0:
                raise DataError(f"{where}: has a NUL byte at byte {position + 1} of the line; it is damaged or no text")
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}: is not valid UTF-8: {error.reason} (byte 0x{line[error.start]:02x} at byte "
                    f"{error.start + 1} of the line); convert the file to UTF-8"
                ) from error
    if not number:
        raise DataError(f"{file.name}: is empty (0 bytes); fetch it again")


def _check_header(name: str, number: int, columns: Sequence[str], required: Sequence[str]) -> None:
    missing = [column for column in required if column not in columns]
    if missing:
        found = ", ".join(repr(column[:40]) for column in columns[:12])
        raise DataError(
            f"{name}: line {number}: the header lacks {', '.join(map(repr, missing))} (it has {found}); add the header "
            "line if it was cut off"
        )
    if len(set(columns)) != len(columns):
        raise DataError(f"{name}: line {number}: the header names a column twice: {', '.join(columns)}")


def _read_jsonl(file: StoredFile, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    for number, line in read_lines(file):
        if not line.strip():
            continue
        where = f"{file.name}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is not valid JSON: {error}; each line must be one object") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: holds {_shown(row)} instead of an object; each line must be one object")
        missing = [column for column in columns if column not in row]
        if missing:
            raise DataError(f"{where}: lacks {', '.join(map(repr, missing))}; there are: {', '.join(map(repr, row))}")
        yield number, row


def _read_parquet(file: StoredFile, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    remedy = "it is damaged or no parquet file, fetch it again"
    number = 0
    with reading(file) as stream:
        try:
            parquet = pyarrow.parquet.ParquetFile(stream)
            names = parquet.schema_arrow.names
            missing = [column for column in columns if column not in names]
            if missing:
                raise DataError(
                    f"{file.name}: lacks column {', '.join(map(repr, missing))}; there are: "
                    f"{', '.join(map(repr, names))}"
                )
            for batch in parquet.iter_batches(BATCH_ROWS, columns=list(columns) or None):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file.name}: after row {number}: cannot be read: {error}; {remedy}") from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

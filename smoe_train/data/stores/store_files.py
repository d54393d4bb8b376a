"""What every store folder has: a record that is checked on reading, and files whose size and sha256 it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from smoe_train.bounded import MAX_JSON_BYTES, read_bounded
from smoe_train.config import StrictModel
from smoe_train.data.source import StoredFile, checksum
from smoe_train.errors import DataError

RECORD = "store.json"
REMEDY = "remove the folder and prepare the data again"


class FileRecord(StrictModel):
    """What a store's record says of one file."""

    bytes: int = Field(ge=0)
    sha256: str


class FormatRecord(StrictModel):
    """Base of the records of stores."""

    format_version: int


Record = TypeVar("Record", bound=FormatRecord)


def read_record(model: type[Record], folder: Path, kind: str, version: int) -> Record:
    """Returns the record of the store in ``folder``.

    Args:
        model: Its class.
        folder: The store.
        kind: What the folder is expected to be, with its article, for messages ("a token store").
        version: The format that can be read.

    Raises:
        DataError: It is absent, damaged, or of another format version.
    """
    path = folder / RECORD
    try:
        data = read_bounded(path, MAX_JSON_BYTES)
        found = FormatVersion.model_validate_json(data).format_version
        if found != version:
            raise DataError(f"{folder}: has format {found}, this version reads {version}; {REMEDY}")
        return model.model_validate_json(data)
    except OSError as error:
        raise DataError(f"{folder}: is not {kind}: {RECORD}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{path}: is damaged: {first['msg']}; {REMEDY}") from error


class FormatVersion(FormatRecord, extra="ignore"):
    """The one key that a record of any format version has."""


def write_record(folder: Path, record: FormatRecord) -> None:
    """Writes the record of a store."""
    (folder / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")


def write_arrays(path: Path, arrays: Iterable[npt.NDArray[Any]]) -> FileRecord:
    """Writes arrays one behind the other, little-endian on every machine."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for array in arrays:
            data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
            digest.update(data)
            size += file.write(data)
    return FileRecord(bytes=size, sha256=digest.hexdigest())


def map_array(path: Path, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Returns a file of `write_arrays` as a read-only memory map, 1-D; an empty file as an empty array."""
    dtype = np.dtype(dtype).newbyteorder("<")
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def check_sizes(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Compares the sizes of files, by name, with what is recorded.

    Raises:
        DataError: One is missing or has another size.
    """
    for name, file in files.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else -1
        if actual != file.bytes:
            found = "is missing" if actual < 0 else f"has {actual:,} bytes"
            raise DataError(f"{path}: {found} instead of {file.bytes:,}; {REMEDY}")


def verify_files(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Reads files, by name, and compares them with the recorded digests.

    Raises:
        DataError: One is damaged.
    """
    for name, file in files.items():
        _, sha256 = checksum(StoredFile.at(folder / name).chunks())
        if sha256 != file.sha256:
            raise DataError(f"{folder / name}: is damaged: sha256 {sha256} instead of {file.sha256}; {REMEDY}")

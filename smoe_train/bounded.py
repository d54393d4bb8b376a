"""What strangers may have written: files read whole only if small, and folders that nothing is to lead out of."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Returns the contents of a file.

    Raises:
        OSError: It cannot be read, is larger than ``max_bytes``, or is no regular file: a device has no end, and a
            pipe may never send anything.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        if state.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"has more than {max_bytes:,} bytes", str(path))
        data: bytes = file.read(state.st_size)  # not up to the limit, so much memory would be taken at once
    return data


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Returns what a JSON file says.

    Raises:
        OSError: See `read_bounded`.
        ValueError: It is not JSON.
    """
    try:
        return json.loads(read_bounded(path, max_bytes))
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def leading_out(folder: Path, *patterns: str) -> list[Path]:
    """Returns the links to other places than the folder, among what matches the patterns in it."""
    home = os.path.realpath(folder)
    links = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_symlink()]
    return [path for path in links if not f"{os.path.realpath(path)}/".startswith(f"{home}/")]


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

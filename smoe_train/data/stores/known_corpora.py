"""Remembers which corpus some files made, so that unchanged files need not be read again to know it.

Reading and hashing 100 MB takes a fraction of a second, but collecting docstrings or unpacking an archive takes
seconds, and each process of a run would pay it. So files count as unchanged as long as path, size, inode, mtime *and*
ctime of each are the same. The system sets ctime at every change of contents or metadata and offers no way to set it
back, so a text that was replaced with its size and mtime preserved is still noticed. Two cases remain in which times
could lie, and neither is remembered: files that changed while they were read, and files that changed within the last
two seconds (a second change could fall into the same tick of the file system's clock). The options, the Python version
and the code of this package belong to the key as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from smoe_train.bounded import read_json
from smoe_train.data.source import Source

SETTLING_NANOSECONDS = 2_000_000_000


@dataclass(frozen=True)
class Stamp:
    """The state of a source's files.

    Attributes:
        key: Digest of everything that decides the corpus.
        changed_ns: When the youngest file changed, in nanoseconds since the epoch.
    """

    key: str
    changed_ns: int


def take_stamp(source: Source, cache: Path) -> Stamp | None:
    """Returns the present state of a source's files; None if it does not name them or one is absent."""
    files = source.files(cache)
    if not files:
        return None
    digest = hashlib.sha256(f"{_code()}\n{sys.version}\n{source.config.model_dump_json()}\n".encode())
    changed_ns = 0
    for path in files:
        try:
            state = path.stat()
        except OSError:
            return None
        times = (state.st_mtime_ns, state.st_ctime_ns)
        digest.update(repr((str(path.resolve()), state.st_size, state.st_ino, *times)).encode())
        changed_ns = max(changed_ns, *times)
    return Stamp(digest.hexdigest(), changed_ns)


def recall(stamp: Stamp | None, cache: Path) -> str | None:
    """Returns the fingerprint of the corpus that these files made, if known."""
    if stamp is None:
        return None
    try:
        fingerprint = read_json(_entry(stamp, cache))["corpus"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fingerprint if isinstance(fingerprint, str) else None


def remember(before: Stamp | None, after: Stamp | None, fingerprint: str, cache: Path) -> None:
    """Notes that the files with these stamps, taken before and after reading them, made this corpus."""
    if before is None or before != after or time.time_ns() - before.changed_ns < SETTLING_NANOSECONDS:
        return
    entry = _entry(before, cache)
    temporary = entry.with_name(f"{entry.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a cache that can only be read serves its stores all the same
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"corpus": fingerprint}) + "\n", encoding="utf-8")
        temporary.replace(entry)


def _entry(stamp: Stamp, cache: Path) -> Path:
    return cache / "known" / f"{stamp.key}.json"


@lru_cache(maxsize=1)
def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()

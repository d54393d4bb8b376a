"""Failing system calls of a running process, injected by strace into those that touch certain paths."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from faults.traced import ATTACH_SECONDS, allow_tracing, attached


def wait_for_tracer() -> None:
    """Waits, in the process to be traced, until it is."""
    allow_tracing()
    deadline = time.monotonic() + ATTACH_SECONDS
    while time.monotonic() < deadline:
        if "TracerPid:\t0\n" not in Path("/proc/self/status").read_text():
            return
        time.sleep(0.002)
    os._exit(97)


@contextlib.contextmanager
def injected(pid: int, injections: Sequence[str], prefix: Path, *paths: Path) -> Iterator[None]:
    """Lets system calls of a process and its threads fail while the block runs.

    Args:
        pid: The process; it calls `wait_for_tracer`.
        injections: As in ``write:error=ENOSPC:when=3+``; without any, nothing is done.
        prefix: Where the calls are written.
        paths: Files and folders that calls must touch to fail; any if there are none.
    """
    if not injections:
        yield
        return
    options = [part for path in paths for part in ("-P", str(path))]
    options += [part for one in injections for part in ("-e", f"inject={one}")]
    with attached(pid, prefix, options):
        yield

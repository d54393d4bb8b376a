"""Watching, delaying and killing a process at its system calls, by strace attached to it."""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.lives import Life

ATTACH_SECONDS = 20.0
# Everything that takes a file name or a descriptor: more than a save does, so that no call of it is missed.
TRACED = "%file,%desc"
_LINE = re.compile(r"(?P<time>\d+\.\d+) (?P<call>\w+)\((?P<rest>.*)")
_ANYBODY = -1


@dataclass(frozen=True)
class Call:
    """A system call that a process made.

    Attributes:
        thread: Which of its threads, in the order of their first call.
        name: The call.
        number: Which call of this name by this thread, from 1, as strace counts.
        text: Its arguments and result; file names behind descriptors are in ``<>``.
    """

    thread: int
    name: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.name} {self.number} of thread {self.thread}"


def why_not(folder: Path) -> str:
    """Returns why calls cannot be traced here, or an empty text."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    life = Life(1, lambda: time.sleep(60), folder / "probe.txt")
    try:
        with attached(life.pids[0], folder / "probe"):
            return ""
    except OSError as error:
        return str(error)
    finally:
        life.kill()
        life.wait(ATTACH_SECONDS)


def allow_tracing() -> None:
    """Lets strace attach to this process where the system allows that to its parents only (Yama)."""
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(_ANYBODY), 0, 0, 0)


@contextlib.contextmanager
def attached(pid: int, prefix: Path, options: Sequence[str] = ()) -> Iterator[None]:
    """Traces a process and its threads within the block, or until it ends.

    Args:
        pid: The process.
        prefix: Where the calls go: a file a thread.
        options: What else strace should do, such as ``-e inject=...``.

    Raises:
        OSError: strace cannot attach.
    """
    command = ["strace", "-ff", "-ttt", "-y", "-s", "0", "-e", f"trace={TRACED}", "-e", "signal=none", *options]
    errors = prefix.with_suffix(".errors")
    with errors.open("wb") as file:
        strace = subprocess.Popen([*command, "-o", str(prefix), "-p", str(pid)], stderr=file)
    try:
        deadline = time.monotonic() + ATTACH_SECONDS
        while not _is_traced(pid):
            if strace.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"strace cannot attach: {errors.read_text().strip()}")
            time.sleep(0.002)
        yield
    finally:
        strace.terminate()  # it lets go of what is left of the process, and ends
        strace.wait()


def calls(prefix: Path) -> list[Call]:
    """Returns what was traced, in the order of time."""
    found = []
    for path in prefix.parent.glob(f"{prefix.name}.[0-9]*"):
        count: Counter[str] = Counter()
        for line in path.read_text(errors="replace").splitlines():
            match = _LINE.match(line)
            if match is not None:
                name = match["call"]
                count[name] += 1
                found.append((float(match["time"]), int(path.suffix[1:]), name, count[name], match["rest"]))
    found.sort()
    threads = list(dict.fromkeys(thread for _, thread, *_ in found))
    return [Call(threads.index(thread), name, number, rest) for _, thread, name, number, rest in found]


def _is_traced(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return "TracerPid:\t0\n" not in status

"""Memory that is free but not given back: the C library is told to, where it piles up over the steps."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GROWTH = 0.25  # of resident memory since it was last settled
LEAST_GROWTH_BYTES = 128 * 2**20


def resident_bytes() -> int:
    """Returns the resident memory of this process, 0 where the system does not tell (anything but Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def give_back() -> None:
    """Gives free pages of the heap back to the system; glibc alone has a call for it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@dataclass
class Heap:
    """Keeps resident memory from growing with the number of shapes that a run meets on a CPU.

    Each new number of expert rows makes oneDNN keep a primitive (36 KiB for a GELU in fp32, 440 KiB for a product in
    bf16, measured). They come to lie between the buffers of the steps, glibc fits no later buffer into the gaps, and
    these stay resident: a run whose live memory was 200 MiB grew by 3 MiB a step. Giving the gaps back costs the page
    faults of one step's buffers, so it is done only after memory has grown by `GROWTH`; a run that does not grow never
    pays. Neither a lower ``MALLOC_ARENA_MAX`` nor a fixed ``MALLOC_MMAP_THRESHOLD_`` of 1 MiB stops the growth, and one
    of 128 KiB costs half as much time again.

    Attributes:
        resident: Returns the resident memory in bytes.
        trim: Gives free memory back.
    """

    resident: Callable[[], int] = resident_bytes
    trim: Callable[[], None] = give_back
    _settled: int | None = None

    def tidy(self) -> bool:
        """Gives free memory back if the process has grown; returns whether it has."""
        now = self.resident()
        if self._settled is None:  # the first time, or the buffers of a step are there again
            self._settled = now
            return False
        self._settled = min(self._settled, now)
        if now - self._settled <= max(GROWTH * self._settled, LEAST_GROWTH_BYTES):
            return False
        self.trim()
        self._settled = None
        return True

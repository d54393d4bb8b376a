"""What becomes of memory that a step has freed: kept for the next step, and given back where it piles up."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GROWTH = 0.25  # of resident memory since it was last settled
LEAST_GROWTH_BYTES = 128 * 2**20
MAPPED_BYTES, KEPT_BYTES, TOP_BYTES = 512 * 2**20, 2**31 - 1, 64 * 2**20
USERS_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


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


def keep_freed_memory() -> bool:
    """Lets the C library keep what is freed for the next step, instead of giving it back and faulting it in again.

    Weight gradients and activations are freed and asked for in every step; glibc maps each large buffer anew, and the
    system clears its pages: 5 % of a CPU step with 16 experts and 8 % with 64 (measured, bf16). Buffers beyond
    `MAPPED_BYTES` are still mapped: what little they gain is not worth gaps of their size. `Heap` gives back what piles
    up all the same.

    Returns:
        Whether it was done; not where there is another C library, or the user has chosen such settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name in os.environ for name in USERS_SETTINGS):
        return False
    # The numbers of the settings are those of <malloc.h>.
    settings = {-3: MAPPED_BYTES, -1: KEPT_BYTES, -2: TOP_BYTES}
    accepted = [mallopt(setting, value) == 1 for setting, value in settings.items()]
    return all(accepted)


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
        reuses: Whether freed memory is kept for the next step, see `keep_freed_memory`.
        resident: Returns the resident memory in bytes.
        trim: Gives free memory back.
    """

    reuses: bool = False
    resident: Callable[[], int] = resident_bytes
    trim: Callable[[], None] = give_back
    _settled: int | None = None

    def reuse_from_now(self) -> None:
        """Keeps what is freed from now on, if at all; called after a step.

        Weights, moments and what else stays are there then, mapped one by one: in the heap they would lie between the
        buffers of the first step and leave gaps that later ones do not fit.
        """
        if self.reuses:
            self.reuses = False  # once is enough
            self.trim()
            keep_freed_memory()

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

"""The same work in several processes that begin at the same moment."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

SECONDS = 20


def run_at_once(work: Callable[..., None], *arguments: Any, processes: int = 3) -> list[int | None]:
    """Returns the exit codes of forked processes that call ``work(*arguments)``; None if one is not done in time."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(processes)

    def meet() -> None:
        barrier.wait(SECONDS)
        work(*arguments)

    started = [context.Process(target=meet) for _ in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(SECONDS)
    return [process.exitcode for process in started]

"""Runs a function on several gloo ranks, forked from the test process that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# A fork must not inherit a running thread pool, and ranks must not compete for cores.
torch.set_num_threads(1)

import deepspeed  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401 - ZeRO imports it late, which takes seconds

from smoe_train import assembly  # noqa: E402, F401

TIMEOUT_SECONDS = 120.0


def run_ranks(
    world_size: int, work: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT_SECONDS
) -> list[Any]:
    """Returns what ``work(*arguments)`` returned on each rank, in rank order.

    Each rank has RANK, WORLD_SIZE and the rest set, as a launcher would. Results travel through ``torch.save``.

    Raises:
        AssertionError: A rank failed or took too long; the message holds the first failing rank's traceback.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        processes = [
            context.Process(target=_rank, args=(rank, world_size, port, Path(folder), work, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if any(process.exitcode not in (None, 0) for process in processes):
                deadline = min(deadline, time.monotonic() + 2.0)  # the others wait for a rank that is gone
            time.sleep(0.01)
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        failures = sorted(Path(folder).glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
        if failures:
            raise AssertionError(f"rank {failures[0].stem} failed:\n{failures[0].read_text()}")
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world_size, f"ranks ended with {codes} (killed after {timeout} s if -9)"
        return [torch.load(Path(folder) / f"{rank}.result", weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int, world_size: int, port: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    try:
        torch.save(work(*arguments), folder / f"{rank}.result")
    except BaseException:
        (folder / f"{rank}.failed").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # no destructors: process groups would wait for each other

"""Ranks of one launch, forked from a process that has imported everything, to be killed at any instant."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import deepspeed.ops
from support import ranks as _imports_everything  # noqa: F401

from smoe_train.cli.start import begin, decide
from smoe_train.cli.worker import run_worker, train_worker
from smoe_train.parallel.process import LAUNCH_VARIABLES
from smoe_train.recipe import Recipe
from smoe_train.training.stop import StopRequest

# Outgoing connections get ports above these, so that none of them takes the port between the choice and its use.
PORTS = range(20000, 32000)

# DeepSpeed looks for compilers when this is first read, which takes a second: once, here, and not in every rank.
assert deepspeed.ops.__compatible_ops__ is not None


class Life:
    """The ranks of one launch.

    Args:
        world_size: How many.
        work: What each does; what it returns is the exit code.
        output: A file for whatever they print.
    """

    def __init__(self, world_size: int, work: Callable[[], int | None], output: Path) -> None:
        port = _free_port()
        self.started = self.killed = time.monotonic()
        self.codes: list[int | None] = [None] * world_size
        self.pids = [_fork(rank, world_size, port, work, output) for rank in range(world_size)]

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """Sends SIGKILL to these ranks, or to all."""
        self.killed = time.monotonic()
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if self.codes[rank] is None:
                with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                    os.kill(self.pids[rank], signal.SIGKILL)

    def running(self) -> bool:
        """Whether any rank is still there; notes the exit codes of those that are not (-9: killed)."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return None in self.codes

    def failed(self) -> bool:
        """Whether any rank has ended otherwise than well."""
        self.running()
        return any(code not in (None, 0) for code in self.codes)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits for all ranks to end, or for something else to become true; returns whether either came in time."""
        deadline = time.monotonic() + seconds
        while self.running() and not until():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True


def begin_run(recipe: Recipe, run_folder: Path) -> bool:
    """Does what a launch does before it starts its ranks; returns whether there is anything left to train."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        start = decide(recipe, run_folder, "auto", 2)
        if not start.finished:
            begin(start)
    return not start.finished


def train_rank(run_folder: Path) -> int:
    """What a rank of ``smoe-train train --resume auto`` does; returns its exit code."""
    return run_worker(lambda: train_worker(run_folder, "auto", StopRequest()), None)


def _fork(rank: int, world_size: int, port: int, work: Callable[[], int | None], output: Path) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _die_with(parent)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        values = (str(rank), str(world_size), str(rank), "127.0.0.1", str(port))
        os.environ.update(zip(LAUNCH_VARIABLES, values, strict=True), DS_ACCELERATOR="cpu")
        code = work() or 0
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # no destructors: process groups would wait for each other


def _die_with(parent: int) -> None:
    """Whoever ends the suite ends its ranks."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _free_port() -> int:
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port

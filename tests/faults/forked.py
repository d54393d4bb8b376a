"""The whole of ``smoe-train train``, command, launcher and ranks, forked from a process that has imported everything.

The command and the ranks run the product's own entry points. The launcher does what torchrun does, in a few lines: it
passes signals on, stops all when one fails, and turns every failure into exit code 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
from faults.lives import _free_port as free_port

from smoe_train.cli import app, supervise, worker, worker_process
from smoe_train.cli.launcher import LAUNCHER_PID
from smoe_train.training.watchdog import Heartbeat, Watchdog, heartbeat_path

RANKS = 2
DAY = 86400.0


@dataclass(frozen=True)
class Fault:
    """What is to happen to one rank.

    Attributes:
        kind: ``raise``, ``exit``, ``kill``, ``segfault``, ``stop``, ``spin``, ``sleep``, ``lock`` or ``clock``.
        phase: In which phase.
        step: After which step.
        rank: To which rank; None for all.
        mark: A file that says when it happened.
        once: Whether not again after a restart.
    """

    kind: str
    phase: str
    step: int
    mark: Path
    rank: int | None = 1
    once: bool = False

    @property
    def happened_at(self) -> float | None:
        """When it happened, by the monotonic clock; None if it did not."""
        try:
            return float(self.mark.read_text())
        except (OSError, ValueError):
            return None

    def inject(self, watchdog: Watchdog, trainer: Any) -> None:
        """Puts the fault where the trainer says what it does."""
        beat = trainer.beat

        def faulty(phase: str) -> None:
            beat(phase)
            due = phase == self.phase and trainer.state.step >= self.step
            if due and not (self.once and self.mark.exists()):
                self.mark.write_text(str(time.monotonic()))
                HAPPEN[self.kind]()

        trainer.beat = faulty


def _raise() -> None:
    raise RuntimeError("this rank has had enough")


def _spin() -> None:
    while True:
        pass


def _turn_back() -> None:
    now = time.time
    time.time = lambda: now() - DAY


HAPPEN: dict[str, Callable[[], Any]] = {
    "raise": _raise,
    "exit": lambda: os._exit(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "spin": _spin,
    "sleep": lambda: time.sleep(1000),
    "lock": lambda: ctypes.PyDLL(None).sleep(1000),  # in C, without giving up the interpreter
    "clock": _turn_back,
}


class Command:
    """A running ``smoe-train train``.

    Args:
        recipe: Recipe file.
        run_folder: Its run folder.
        arguments: Further arguments.
        fault: What happens to a rank.
    """

    def __init__(self, recipe: Path, run_folder: Path, *arguments: str, fault: Fault | None = None) -> None:
        self.run_folder = run_folder
        self.output = run_folder.with_suffix(".output")
        line = ["smoe-train", "train", str(recipe), f"name={run_folder.name}", "--output-dir", str(run_folder.parent)]
        self._ended: float | None = None
        self.code: int | None = None
        self.before = len(self.output.read_text(errors="replace")) if self.output.is_file() else 0
        self.started = time.monotonic()
        self.pid = _fork(lambda: self._main([*line, "--nproc", str(RANKS), *arguments], fault))

    def _main(self, line: list[str], fault: Fault | None) -> NoReturn:
        os.setsid()
        file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)
        sys.argv = line
        launcher = _launcher_class(fault)
        supervise.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
            Popen=launcher, TimeoutExpired=subprocess.TimeoutExpired
        )
        app.main()
        os._exit(0)

    def running(self) -> bool:
        """Whether it is still there."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code, self._ended = os.waitstatus_to_exitcode(status), time.monotonic()
        return self.code is None

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits for its end, or for something else; returns whether either came in time."""
        deadline = time.monotonic() + seconds
        while self.running() and not until():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    @property
    def ended(self) -> float:
        """When it ended, by the monotonic clock."""
        assert self._ended is not None
        return self._ended

    @property
    def said(self) -> str:
        """What it has printed, with launcher and ranks."""
        return self.output.read_text(encoding="utf-8", errors="replace")[self.before :]

    def ranks(self) -> list[int]:
        """Returns the process ids of the ranks that have begun."""
        beats = [Heartbeat.read(heartbeat_path(self.run_folder / "logs", rank)) for rank in range(RANKS)]
        return [beat.pid for beat in beats if beat is not None]

    def step(self) -> int:
        """Returns the step that the slowest rank has reached."""
        beats = [Heartbeat.read(heartbeat_path(self.run_folder / "logs", rank)) for rank in range(RANKS)]
        return min((beat.step if beat is not None else 0) for beat in beats)

    def signal(self, number: int) -> None:
        """Sends a signal to the command."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kills what is left."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self.wait(10)


def alive(pids: Sequence[int]) -> list[int]:
    """Returns which of these processes still run."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def _fork(work: Callable[[], Any]) -> int:
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code: Any = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # whoever ends the suite ends its processes
        if os.getppid() != parent:
            os._exit(1)
        for number in supervise.FORWARDED:  # as after an exec
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        code = work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code or 0)


def _launcher_class(fault: Fault | None) -> type:
    class Launcher:
        """In the place of ``subprocess.Popen``: forks the launcher instead of executing it."""

        def __init__(self, skin: Sequence[str], env: Mapping[str, str], start_new_session: bool) -> None:
            assert start_new_session
            self.returncode: int | None = None
            self.pid = _fork(lambda: _launch(list(skin), env, fault))

        def poll(self) -> int | None:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

        def wait(self, timeout: float | None = None) -> int:
            deadline = None if timeout is None else time.monotonic() + timeout
            while self.poll() is None:
                if deadline is not None and time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired("launcher", timeout or 0.0)
                time.sleep(0.005)
            assert self.returncode is not None
            return self.returncode

        def send_signal(self, number: int) -> None:
            if self.poll() is None:
                os.kill(self.pid, number)

    return Launcher


def _launch(skin: list[str], env: Mapping[str, str], fault: Fault | None) -> int:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    port = free_port()
    arguments = skin[skin.index("smoe_train.cli.worker_process") :]
    pids: list[int] = []
    received: list[int] = []

    def pass_on(number: int, _frame: object = None) -> None:
        received.append(number)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    launcher = os.getpid()
    for rank in range(RANKS):
        pid = _fork(partial(_rank, rank, port, launcher, arguments, fault))
        pids.append(pid)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    codes: dict[int, int] = {}
    while len(codes) < RANKS:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            codes[pid] = os.waitstatus_to_exitcode(status)
            pids.remove(pid)
            if codes[pid] != 0 and len(codes) == 1:
                pass_on(signal.SIGTERM)
        time.sleep(0.01)
    killed = [-code for code in codes.values() if code < 0 and code != -signal.SIGTERM]
    return 128 + max(killed) if killed else int(any(codes.values()))


def _rank(rank: int, port: int, launcher: int, arguments: list[str], fault: Fault | None) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        **{LAUNCHER_PID: str(launcher)},
    )
    sys.argv = arguments
    worker.write_report = lambda run_folder: None  # its pictures take longer to draw than the run to train
    if fault is not None and fault.rank in (None, rank):
        watch = Watchdog.watch

        def watched(self: Watchdog, trainer: Any) -> None:
            watch(self, trainer)
            fault.inject(self, trainer)

        Watchdog.watch = watched  # type: ignore[method-assign]
    worker_process.main()

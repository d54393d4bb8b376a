"""Runs the workers of a run: passes signals on, ends them when one fails or hangs, tells why, and starts them again.

The command line process stays the parent: it starts a launcher (torchrun or DeepSpeed's), which starts the workers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from types import FrameType

import psutil

from smoe_train.cli.hangs import Hearts, collect, culprit, lives
from smoe_train.cli.last_words import WorkerError, clear_logs, read_worker_errors
from smoe_train.cli.launch import GRACE_SECONDS
from smoe_train.cli.launcher import LAUNCHER_PID
from smoe_train.errors import RunStoppedError
from smoe_train.training.watchdog import ADVICE, overdue_message

POLL_SECONDS = 0.2
# A failed rank may leave its peers in a collective that never returns; by then they have had their say.
FAILURE_SECONDS = 3.0
KILLED_SECONDS = 5.0
RESTARTS_IN_VAIN = 3
RESUMABLE = "the same command resumes the run"

# SIGHUP (a closed terminal) and SIGUSR1 (a scheduler's notice) ask for the same as SIGTERM; their default, to
# end this process, would kill the workers without a checkpoint.
FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGTERM,
}


@dataclass(frozen=True)
class Limits:
    """What workers are held to.

    Attributes:
        ranks: Workers on this machine that keep a heartbeat; 0 if none does.
        grace_seconds: How long they may take to end after a request to stop.
        hang_seconds: How long one may go without a sign of life; None for ever.
    """

    ranks: int = 0
    grace_seconds: float = GRACE_SECONDS
    hang_seconds: float | None = None


@dataclass(frozen=True)
class Ended:
    """How the workers ended.

    Attributes:
        code: Exit code of the run.
        message: For the user; empty if there is nothing to say.
        restart: Whether another attempt may go better: no mistake of the user and no wish to stop.
    """

    code: int
    message: str = ""
    restart: bool = False


def run_workers(
    command: Sequence[str], environment: Mapping[str, str], logs: Path, limits: Limits | None = None
) -> int:
    """Runs a launcher until it ends, tells what went wrong, and returns the exit code of the run; see `supervise`."""
    received: list[Signals] = []
    with signals_into(received):
        ended = supervise(command, environment, logs, limits or Limits(), received)
    _say(ended.message)
    return ended.code


def run_restarting(
    attempt: Callable[[list[Signals], bool], Ended], max_restarts: int, newest_step: Callable[[], int]
) -> int:
    """Runs workers, and again after failures that may not come back; returns the exit code of the last attempt.

    Args:
        attempt: Starts the workers and returns how they ended, given the signals that have come and whether this is a
            restart.
        max_restarts: How often to start them again; fewer times if `RESTARTS_IN_VAIN` in a row get no further.
        newest_step: Step of the newest checkpoint, 0 without one.
    """
    received: list[Signals] = []
    restarts, in_vain, newest = 0, 0, newest_step()
    with signals_into(received):
        while True:
            ended = attempt(received, restarts > 0)
            _say(ended.message)
            if received or not ended.restart or max_restarts == 0:
                return ended.code
            reached = newest_step()
            in_vain = 0 if reached > newest or restarts == 0 else in_vain + 1
            newest = reached
            if restarts == max_restarts:
                _say(f"gave up after {restarts} restarts (--max-restarts)")
                return ended.code
            if in_vain == RESTARTS_IN_VAIN:
                _say(f"gave up: {in_vain} restarts in a row got no further than step {newest}")
                return ended.code
            restarts += 1
            _say(f"restart {restarts} of {max_restarts}, from {f'step {newest}' if newest else 'the beginning'}")


def supervise(
    command: Sequence[str], environment: Mapping[str, str], logs: Path, limits: Limits, received: list[Signals]
) -> Ended:
    """Runs a launcher until it ends and returns how.

    The first signal is passed on, so that the workers can write a checkpoint; a second one kills everything. Once a
    worker has failed, the others have ``FAILURE_SECONDS`` left.

    Args:
        command: From ``build_command``.
        environment: Environment of the launcher and its workers.
        logs: The run's ``logs`` folder, where workers leave word.
        limits: What the workers are held to.
        received: Signals that have come, filled by `signals_into`.
    """
    clear_logs(logs)
    skin = [sys.executable, "-m", "smoe_train.cli.launcher", *command[2:]]  # in the place of `python -m`
    # A session of its own: Ctrl-C in a terminal goes to the whole process group, but the launcher must see it
    # once, from here; a second one breaks off its clean-up.
    launcher = subprocess.Popen(skin, env={**environment, LAUNCHER_PID: str(os.getpid())}, start_new_session=True)
    try:
        return _Watch(launcher, received, logs, limits).until_end()
    finally:
        kill_tree(launcher)


def signals_into(received: list[Signals]) -> contextlib.AbstractContextManager[None]:
    """Collects the signals that ask a run to stop instead of ending this process; what was ignored stays ignored."""
    return _answering(lambda number, _frame: received.append(Signals(number)))


def stoppable() -> contextlib.AbstractContextManager[None]:
    """Ends this process in order at a signal that comes before there is anything to save, or to pass it on to."""

    def end(number: int, _frame: FrameType | None) -> None:
        _say(_before_the_first_step(Signals(number)))
        raise SystemExit(RunStoppedError.exit_code)

    return _answering(end)


@contextlib.contextmanager
def _answering(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    heard = [one for one in FORWARDED if signal.getsignal(one) != signal.SIG_IGN]  # nohup: the user wants it ignored
    before = {one: signal.signal(one, handler) for one in heard}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def kill_tree(launcher: subprocess.Popen[bytes]) -> None:
    """Kills a process that was started here with all that it has started; does nothing if it has ended."""
    if launcher.poll() is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(launcher.pid)
        tree = [*root.children(recursive=True), root]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        # They hold memory and the run's files until they are gone, which what is started next may need.
        deadline = time.monotonic() + KILLED_SECONDS
        while any(lives(process.pid) for process in tree[:-1]) and time.monotonic() < deadline:
            time.sleep(0.01)
    launcher.wait()


class _Watch:
    """One launcher and its workers, until they have ended or had to be ended."""

    def __init__(
        self, launcher: subprocess.Popen[bytes], received: Sequence[Signals], logs: Path, limits: Limits
    ) -> None:
        self._launcher, self._received, self._logs, self._limits = launcher, received, logs, limits
        self._hearts = Hearts(logs, limits.ranks, limits.hang_seconds)
        self._asked_at: float | None = None
        self._failed_at: float | None = None
        self._gone: Sequence[int] = ()

    def until_end(self) -> Ended:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._how_it_ended(self._launcher.wait(POLL_SECONDS))
            self._hearts.look()
            now = time.monotonic()
            gone = self._hearts.gone()  # before the words: who has ended by now has left its own
            errors = read_worker_errors(self._logs)
            if self._received and self._asked_at is None:
                self._launcher.send_signal(FORWARDED[self._received[0]])
                self._asked_at = now
            if self._failed_at is None and _failed_any(errors, gone):
                self._failed_at, self._gone = now, gone
            if len(self._received) > 1:
                names = " and ".join(one.name for one in self._received[:2])
                return Ended(128 + self._received[0], f"ended at once by {names}, without a checkpoint; {RESUMABLE}")
            if self._failed_at is None and (any(one.hung for one in errors) or self._hearts.standing_still()):
                return self._hung()
            if self._asked_at is not None and now - self._asked_at > self._limits.grace_seconds:
                number = self._received[0]
                return Ended(128 + number, f"error: {overdue_message(self._limits.grace_seconds, number)}")
            if self._failed_at is not None and now - self._failed_at > FAILURE_SECONDS:
                kill_tree(self._launcher)
                return self._how_it_ended(None)

    def _hung(self) -> Ended:
        standings = collect(self._logs, self._limits.ranks)
        reports = [one.message for one in read_worker_errors(self._logs) if one.hung]
        what = reports[0] if reports else f"a rank gives no sign of life; {ADVICE}"
        if standings:
            what = f"{culprit(standings)}; {what}"
        message = "\n\n".join([*map(str, standings), f"error: the run hangs: {what}"])
        return Ended(RunStoppedError.exit_code, message, restart=True)

    def _how_it_ended(self, status: int | None) -> Ended:
        """Returns how a run ended whose launcher had this status, or None if it had to be killed after a failure."""
        errors = read_worker_errors(self._logs)
        if status == 0:
            return Ended(0)
        killed_by = 0 if status is None else -status if status < 0 else status - 128
        if any(one.hung for one in errors) and all(one.stopped or one.hung or one.lost_peer for one in errors):
            return self._hung()
        failures = [one for one in errors if not one.stopped and not one.lost_peer]
        # A scheduler may signal workers too, before they listen.
        asked = {signal.SIGINT, signal.SIGTERM, *self._received} if self._received else set()
        if killed_by > 0 and killed_by not in asked and not (failures and status is not None and status < 0):
            # Killed from outside: what the others say of it, lost connections or a stop, is no cause.
            return _killed("the launcher" if status is not None and status < 0 else "a worker", killed_by)
        if failures:
            return _failed(failures[0])
        stopped = [one.message for one in errors if one.stopped]
        if self._received and stopped:
            return Ended(RunStoppedError.exit_code, stopped[0])
        if self._received and not self._limits.ranks:  # no heartbeats: whether there is anything to resume is not known
            return Ended(128 + self._received[0], f"stopped by {self._received[0].name}")
        if self._received and not self._hearts.begun:
            return Ended(RunStoppedError.exit_code, _before_the_first_step(self._received[0]))
        if status is None:
            ranks = " and ".join(f"rank {rank}" for rank in self._gone) or "a worker"
            return Ended(
                1, f"error: {ranks} ended without a word (killed for lack of memory?); {RESUMABLE}", restart=True
            )
        return _failed(errors[0]) if errors else Ended(1, restart=True)


def _failed_any(errors: Sequence[WorkerError], gone: Sequence[int]) -> bool:
    with_word = {one.rank for one in errors}
    return any(not one.stopped and not one.hung for one in errors) or any(rank not in with_word for rank in gone)


def _before_the_first_step(number: Signals) -> str:
    return f"stopped by {number.name} before the first step; {RESUMABLE}"


def _failed(error: WorkerError) -> Ended:
    if error.stopped:
        return Ended(error.exit_code, error.message)
    prefix = f"rank {error.rank} failed: " if error.exit_code == 1 else ""
    return Ended(error.exit_code, prefix + error.message, restart=error.exit_code == 1 or error.hung)


def _killed(who: str, number: int) -> Ended:
    name = Signals(number).name
    hint = " (lack of memory?)" if name == "SIGKILL" else ""
    message = f"error: {who} was killed by {name}{hint}; what the others saw is in the run's logs; {RESUMABLE}"
    return Ended(128 + number, message, restart=True)


def _say(text: str) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)

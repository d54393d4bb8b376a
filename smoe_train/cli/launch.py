"""Starts the worker processes of a run, passes signals on to them and turns their end into an exit code.

The command line process stays the parent: it starts a launcher (torchrun or DeepSpeed's), which starts the
workers. Run as a module, this file is a thin skin around that launcher: ``python -m smoe_train.cli.launch MODULE
ARGUMENTS`` calls ``MODULE.main()``, dies with its parent and keeps the launcher's traceback off the terminal, where
it would bury the workers' own message.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import importlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import psutil

from smoe_train.errors import LaunchError, RunStoppedError

Launcher = Literal["torchrun", "deepspeed", "in_process"]

LAUNCHERS = ("auto", "torchrun", "deepspeed", "in_process")
LOOPBACK = "127.0.0.1"
TORCHRUN = "torch.distributed.run"
LAUNCHER_PID = "SMOE_TRAIN_LAUNCHER_PID"

# How long torchrun lets workers write their last checkpoint after a signal, before it kills them.
STOP_SECONDS = 120
# A failed rank may leave its peers in a collective that never returns; by then they have had their say.
FAILURE_SECONDS = 10.0
POLL_SECONDS = 0.2

PR_SET_PDEATHSIG = 1
# SIGHUP (a closed terminal) and SIGUSR1 (a scheduler's notice) ask for the same as SIGTERM; their default, to
# end this process, would kill the workers without a checkpoint.
FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGTERM,
}

_HOST_LINE = re.compile(r"(?P<name>[^\s#]+)\s+slots=(?P<slots>\d+)")


@dataclass(frozen=True)
class LaunchPlan:
    """How the workers of one run are started.

    Attributes:
        launcher: What starts them; ``in_process`` means that the command line process is the only worker.
        nproc: Number of worker processes, on all hosts together.
        hostfile: Machines to use, or None for this one.
        devices: Accelerators as in ``CUDA_VISIBLE_DEVICES``, which DeepSpeed's launcher overwrites; empty for 0..N-1.
        master_port: Port of the rendezvous, or None for the launcher's own choice.
    """

    launcher: Launcher
    nproc: int
    hostfile: Path | None = None
    devices: tuple[str, ...] = ()
    master_port: int | None = None


def plan_launch(launcher: str, nproc: int | None, hostfile: Path | None, environ: Mapping[str, str]) -> LaunchPlan:
    """Chooses the launcher and checks that the options fit together.

    Args:
        launcher: ``auto``, ``torchrun``, ``deepspeed`` or ``in_process``.
        nproc: Worker processes on this machine; None means 1, or what the hostfile says.
        hostfile: Machines to use, or None.
        environ: Environment of the command line process.

    Raises:
        LaunchError: The options contradict each other or the hostfile is not usable.
    """
    if launcher not in LAUNCHERS:
        raise LaunchError(f"--launcher: {launcher!r} is unknown; allowed: {', '.join(LAUNCHERS)}")
    if nproc is not None and nproc < 1:
        raise LaunchError(f"--nproc: {nproc} processes cannot train; give 1 or more")
    if hostfile is not None:
        return _plan_hosts(launcher, nproc, hostfile, environ)
    count = nproc or 1
    if launcher == "in_process" and count > 1:
        raise LaunchError(f"--launcher in_process runs one worker, not {count}; use --launcher torchrun")
    if launcher == "in_process" or (launcher == "auto" and count == 1):
        return LaunchPlan("in_process", 1)
    if launcher == "deepspeed":
        return LaunchPlan("deepspeed", count, None, _visible_devices(count, environ), _free_port())
    return LaunchPlan("torchrun", count)


def build_command(plan: LaunchPlan, worker_module: str, worker_arguments: Sequence[str]) -> list[str]:
    """Returns the command that starts all workers of ``plan``, each running ``python -m worker_module``.

    Raises:
        LaunchError: An argument would not survive the way to remote machines.
        ValueError: The plan starts no process.
    """
    worker = [worker_module, *worker_arguments]
    if plan.launcher == "in_process":
        raise ValueError("an in-process plan has no command: call the worker")
    if plan.launcher == "torchrun":
        options = ["--standalone", "--local-addr", LOOPBACK, "--nproc-per-node", str(plan.nproc)]
        options += ["--shutdown-timeout", str(STOP_SECONDS), "-m"]
        return [sys.executable, "-m", TORCHRUN, *options, *worker]
    port = [] if plan.master_port is None else [f"--master_port={plan.master_port}"]
    options = [*port, "--module", "--no_local_rank", "--log_level=warning"]
    if plan.hostfile is None:
        # The part of DeepSpeed's launcher that starts workers, without its front: `deepspeed` dies of a SIGTERM
        # and leaves them behind, ignores CUDA_VISIBLE_DEVICES when told a number, and uses a fixed port.
        devices: Sequence[int | str] = plan.devices or range(plan.nproc)
        world = base64.urlsafe_b64encode(json.dumps({"localhost": list(devices)}).encode()).decode()
        options = [f"--world_info={world}", f"--master_addr={LOOPBACK}", *options]
        return [sys.executable, "-m", "deepspeed.launcher.launch", *options, *worker]
    # With one host and no --force_multi DeepSpeed would start the workers here, whatever host the file names.
    options = [f"--hostfile={plan.hostfile}", "--force_multi", *options]
    remote = [worker_module, *(_remote_argument(argument) for argument in worker_arguments)]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options, *remote]


def read_hostfile(path: Path) -> dict[str, int]:
    """Reads ``NAME slots=N`` lines into name -> slots; empty lines and ``#`` comments are skipped.

    Raises:
        LaunchError: The file is missing or names no host, or lines are wrong; all of them are listed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise LaunchError(f"--hostfile: cannot read {path}: {reason}") from error
    hosts: dict[str, int] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        match = _HOST_LINE.fullmatch(text)
        if not text:
            continue
        if match is None or int(match["slots"]) < 1:
            problems.append(f"{path}:{number}: {text!r} is not a host; write NAME slots=N with N of 1 or more")
        elif match["name"] in hosts:
            problems.append(f"{path}:{number}: host {match['name']!r} is listed twice; add up its slots in one line")
        else:
            hosts[match["name"]] = int(match["slots"])
    if not hosts and not problems:
        problems = [f"{path}: no host in it; write one line NAME slots=N for each machine"]
    if problems:
        raise LaunchError("\n".join(problems))
    return hosts


def worker_environment(nproc: int, base: Mapping[str, str]) -> dict[str, str]:
    """Returns ``base`` with the settings that worker processes need before torch is loaded.

    What is already set is kept. ``DS_ACCELERATOR`` is left alone: DeepSpeed finds accelerators by itself and falls
    back to the CPU; a value guessed here, without torch, could hide a GPU.

    Args:
        nproc: Worker processes on this machine.
        base: Environment to start from.
    """
    settings = {
        # More threads than cores make every small product wait for a thread that is not running.
        "OMP_NUM_THREADS": str(max(1, _usable_cores() // nproc)),
        # Experts get a new number of rows each step; oneDNN builds a primitive (about 2 ms) for each new shape,
        # and its default cache of 1024 entries forgets them before they come again.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "20000",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**settings, **base}


def already_launched(environ: Mapping[str, str]) -> bool:
    """Tells whether this process is a worker that a launcher or the user's own script has started."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent ends; does nothing outside Linux.

    Without it, workers whose launcher was killed train on unseen. To be called first in a worker.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    expected = os.environ.get(LAUNCHER_PID)
    if expected is not None and expected != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)  # the parent ended before the request was in place


def write_worker_error(logs: Path, rank: int, exit_code: int, message: str) -> None:
    """Leaves word of why a worker ends: launchers turn every failure into exit code 1.

    Args:
        logs: The run's ``logs`` folder.
        rank: Global rank of the worker.
        exit_code: What the command line shall end with.
        message: For the user; one or more lines.
    """
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"rank-{rank}.error.json"
    record = {"rank": rank, "exit_code": exit_code, "message": message, "time": time.time()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(path)


def run_workers(command: Sequence[str], environment: Mapping[str, str], logs: Path) -> int:
    """Runs a launcher until it ends and returns the exit code of the run.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 is passed on, so that the workers can write a checkpoint; a
    second one kills everything. Once a worker has reported a failure, the others have ``FAILURE_SECONDS`` left.

    Args:
        command: From ``build_command``.
        environment: Environment of the launcher and its workers.
        logs: The run's ``logs`` folder, where workers leave ``rank-<r>.error.json``.

    Returns:
        0; the exit code that the first failing worker left; 128 + signal; or 1.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("rank-*.error.json"):
        old.unlink()
    skin = [sys.executable, "-m", "smoe_train.cli.launch", *command[2:]]  # in the place of `python -m`
    received: list[signal.Signals] = []
    with signals_into(received):
        # A session of its own: Ctrl-C in a terminal goes to the whole process group, but the launcher must see it
        # once, from here; a second one breaks off its clean-up.
        launcher = subprocess.Popen(skin, env={**environment, LAUNCHER_PID: str(os.getpid())}, start_new_session=True)
        try:
            status = _wait(launcher, received, logs)
        finally:
            kill_tree(launcher)
    return _exit_code(status, received, _worker_errors(logs))


@dataclass(frozen=True)
class _WorkerError:
    time: float
    rank: int
    exit_code: int
    message: str


def _plan_hosts(launcher: str, nproc: int | None, hostfile: Path, environ: Mapping[str, str]) -> LaunchPlan:
    if launcher not in ("auto", "deepspeed"):
        raise LaunchError(
            f"--launcher {launcher} starts processes on this machine only; --hostfile needs --launcher deepspeed, "
            "or leave --hostfile away and start torchrun on each machine yourself"
        )
    slots = sum(read_hostfile(hostfile).values())
    if nproc is not None and nproc != slots:
        raise LaunchError(f"--nproc {nproc}: {hostfile} has {slots} slots; leave --nproc away or edit the slots")
    if shutil.which("pdsh", path=environ.get("PATH")) is None:
        raise LaunchError("--hostfile: DeepSpeed reaches other machines with pdsh, which is not installed; install it")
    port = environ.get("MASTER_PORT")
    if port is not None and not port.isdecimal():
        raise LaunchError(f"MASTER_PORT: {port!r} is not a port; unset it or give a number")
    return LaunchPlan("deepspeed", slots, hostfile.absolute(), (), int(port) if port else None)


def _visible_devices(nproc: int, environ: Mapping[str, str]) -> tuple[str, ...]:
    devices = tuple(name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip())
    if devices and len(devices) < nproc:
        raise LaunchError(
            f"--nproc {nproc}: CUDA_VISIBLE_DEVICES={','.join(devices)} has only {len(devices)}; "
            "unset it or lower --nproc"
        )
    return devices[:nproc]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _remote_argument(argument: str) -> str:
    # pdsh replaces %-signs and DeepSpeed puts double quotes around blanks; both break what is quoted here.
    if re.search(r"[\s%\"]", argument):
        raise LaunchError(
            f"the argument {argument!r} cannot be passed to other machines (blank, % or double quote); "
            "write it into the recipe, or use a path without such characters"
        )
    return shlex.quote(argument)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def signals_into(received: list[signal.Signals]) -> Iterator[None]:
    """Collects the signals that ask a run to stop instead of ending this process; what was ignored stays ignored."""

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    heard = [one for one in FORWARDED if signal.getsignal(one) != signal.SIG_IGN]  # nohup: the user wants it ignored
    before = {one: signal.signal(one, note) for one in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(launcher: subprocess.Popen[bytes], received: Sequence[signal.Signals], logs: Path) -> int:
    forwarded = False
    failed_at: float | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return launcher.wait(POLL_SECONDS)
        if received and not forwarded:
            launcher.send_signal(FORWARDED[received[0]])
            forwarded = True
        if failed_at is None and any(e.exit_code != RunStoppedError.exit_code for e in _worker_errors(logs)):
            failed_at = time.monotonic()
        hung = failed_at is not None and time.monotonic() - failed_at > FAILURE_SECONDS
        if hung or len(received) > 1:
            kill_tree(launcher)


def kill_tree(launcher: subprocess.Popen[bytes]) -> None:
    """Kills a process that was started here with all that it has started; does nothing if it has ended."""
    if launcher.poll() is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(launcher.pid)
        for process in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    launcher.wait()


def _worker_errors(logs: Path) -> list[_WorkerError]:
    errors = []
    for path in logs.glob("rank-*.error.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            errors.append(_WorkerError(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(errors, key=lambda error: (error.time, error.rank))


def _exit_code(status: int, received: Sequence[signal.Signals], errors: Sequence[_WorkerError]) -> int:
    if status == 0:
        return 0
    killed_by = -status if status < 0 else status - 128
    failures = [error for error in errors if error.exit_code != RunStoppedError.exit_code]
    if killed_by > 0 and not received and (status > 0 or not failures):
        # Killed from outside: what the others say of it, lost connections or a stop, is no cause. (A launcher that
        # this process had to kill, since a peer of a failed worker hung, has failures to tell of.)
        who = "the launcher" if status < 0 else "a worker"
        name = signal.Signals(killed_by).name
        hint = " (lack of memory?)" if name == "SIGKILL" else ""
        print(
            f"error: {who} was killed by {name}{hint}; what the others saw is in the run's logs; "
            "the same command resumes the run",
            file=sys.stderr,
        )
        return 128 + killed_by
    if errors:
        first = errors[0]
        prefix = f"rank {first.rank} failed: " if first.exit_code == 1 else ""
        print(f"{prefix}{first.message}", file=sys.stderr)
        return first.exit_code
    return 128 + received[0] if received else 1


def _main(module: str, arguments: Sequence[str]) -> int:
    """Runs ``module.main()``; returns 128 + signal if a worker was ended by one, else the launcher's exit code."""
    die_with_parent()
    os.environ[LAUNCHER_PID] = str(os.getpid())
    sys.argv = [module, *arguments]
    logging.disable(logging.ERROR)  # what matters is raised; the rest names every process that is stopped
    killed_by = 0
    try:
        importlib.import_module(module).main()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stop:
        if not isinstance(stop.code, int) or stop.code >= 0:
            raise
        killed_by = -stop.code  # DeepSpeed's launcher
    except Exception as error:
        if type(error).__name__ == "ChildFailedError":
            # A worker that was killed is the cause, even if one that lost its connection ended a moment earlier.
            failures = error.failures.values()  # type: ignore[attr-defined]
            killed_by = max([-one.exitcode for one in failures if one.exitcode != -signal.SIGTERM], default=0)
        elif type(error).__name__ != "SignalException":  # which torchrun raises once it has stopped the workers
            raise
        if killed_by <= 0:
            return 1
    else:
        return 0
    return 128 + killed_by


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2:]))

"""Decides how the worker processes of a run are started, and with which command and environment; starts nothing."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smoe_train.errors import LaunchError

Launcher = Literal["torchrun", "deepspeed", "in_process"]

LAUNCHERS = ("auto", "torchrun", "deepspeed", "in_process")
LOOPBACK = "127.0.0.1"
TORCHRUN = "torch.distributed.run"
GRACE_SECONDS = 120.0

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


def plan_launch(
    launcher: str, nproc: int | None, hostfile: Path | None, environ: Mapping[str, str], restarts: bool = False
) -> LaunchPlan:
    """Chooses the launcher and checks that the options fit together.

    Args:
        launcher: ``auto``, ``torchrun``, ``deepspeed`` or ``in_process``.
        nproc: Worker processes on this machine; None means 1, or what the hostfile says.
        hostfile: Machines to use, or None.
        environ: Environment of the command line process.
        restarts: Whether workers are to be started again, which needs a process that outlives them.

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
    if launcher == "in_process" and restarts:
        raise LaunchError("--max-restarts: a run in this process cannot be restarted by it; use --launcher torchrun")
    if launcher == "in_process" or (launcher == "auto" and count == 1 and not restarts):
        return LaunchPlan("in_process", 1)
    if launcher == "deepspeed":
        return LaunchPlan("deepspeed", count, None, _visible_devices(count, environ), _free_port())
    return LaunchPlan("torchrun", count)


def build_command(
    plan: LaunchPlan, worker_module: str, worker_arguments: Sequence[str], grace_seconds: float = GRACE_SECONDS
) -> list[str]:
    """Returns the command that starts all workers of ``plan``, each running ``python -m worker_module``.

    Args:
        plan: What to start.
        worker_module: What each worker runs.
        worker_arguments: Its arguments.
        grace_seconds: How long workers may take to end after a signal; DeepSpeed's launcher waits 30 s, whatever it is.

    Raises:
        LaunchError: An argument would not survive the way to remote machines.
        ValueError: The plan starts no process.
    """
    worker = [worker_module, *worker_arguments]
    if plan.launcher == "in_process":
        raise ValueError("an in-process plan has no command: call the worker")
    if plan.launcher == "torchrun":
        options = ["--standalone", "--local-addr", LOOPBACK, "--nproc-per-node", str(plan.nproc)]
        # The parent kills after the grace, and says so; torchrun comes after it.
        options += ["--shutdown-timeout", str(math.ceil(grace_seconds) + 10), "-m"]
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


def worker_environment(nproc: int, base: Mapping[str, str], local: bool = True) -> dict[str, str]:
    """Returns ``base`` with the settings that worker processes need before torch is loaded.

    What is already set is kept. ``DS_ACCELERATOR`` is left alone: DeepSpeed finds accelerators by itself and falls
    back to the CPU; a value guessed here, without torch, could hide a GPU.

    Args:
        nproc: Worker processes on this machine.
        base: Environment to start from.
        local: Whether all workers are on this machine.
    """
    settings = {
        # More threads than cores make every small product wait for a thread that is not running.
        "OMP_NUM_THREADS": str(max(1, _usable_cores() // nproc)),
        # oneDNN builds a primitive (0.1 to 2 ms) for each new shape. Its default cache of 1024 is too small for padded
        # batches of many widths; but a product in bf16 takes 0.4 to 0.7 MB of it, and nothing else limits that.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "2048",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if local and sys.platform == "linux":
        settings["GLOO_SOCKET_IFNAME"] = "lo"  # nothing listens to the network, nor hangs on how the host is called
    return {**settings, **base}


def already_launched(environ: Mapping[str, str]) -> bool:
    """Tells whether this process is a worker that a launcher or the user's own script has started."""
    return "RANK" in environ and "WORLD_SIZE" in environ


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

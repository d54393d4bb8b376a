"""Signals to stop: at any instant, twice, during a save that never ends, and to torchrun itself."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil
from faults.bench import NOTE, RUN_SECONDS, Bench, Tally, steps
from faults.forked import RANKS, Fault, alive
from faults.runs import newest_step, records_of
from faults.scenario import Outcome

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def signals(bench: Bench, count: int) -> Outcome:
    """C4: one signal after another at random instants, until runs are at their ends; then every bit is compared."""
    draw, tally, name, before_training, most_lost = random.Random(4), Tally(), "", 0, 0
    number = 0
    while number < count:
        name = name or f"signals-{number}"
        run_folder = bench.folder / name
        command, which = bench.command(name), draw.choice(SIGNALS)
        wait = draw.uniform(0.0, bench.seconds)
        command.wait(wait)
        if command.running():
            command.signal(which)
        if not command.wait(RUN_SECONDS):
            tally.judge(f"{name}, signal {number}", [f"{which.name} after {wait:.2f} s: did not end"])
            command.end()
            return tally.outcome("signals", "C4")
        if command.code == 0:  # it was at its end, or in its last step
            problems = [] if records_of(run_folder) == bench.records else ["records differ at the end"]
            if problems:
                tally.judge(name, problems)
            name = ""
            continue
        number += 1
        lost = steps(run_folder) - newest_step(run_folder)
        most_lost = max(most_lost, lost)
        before_training += "before" in command.said
        # Until Python has come to the command's first line, a signal has its usual effect.
        usual = -which if not command.said and wait < 1.0 else 75
        problems = [f"exit code {command.code}: {command.said[-300:]!r}"] if command.code not in (75, usual) else []
        problems += [f"{lost} steps lost"] if lost > 1 else []
        tally.seconds.append(command.ended - command.started - wait)
        tally.judge(f"{name}, {which.name} {wait:.2f} s after its start", problems)
    if name:
        tally.judge(f"{name}, to its end", bench.finished(name))
    return tally.outcome(
        f"SIGTERM, SIGINT, SIGUSR1 or SIGHUP at a random instant, {before_training} of them before the first step; "
        "seconds to the end with exit code 75",
        "C4",
        NOTE + "exit code 1, nothing saved",
        most_steps_lost=most_lost,
    )


def second_signals(bench: Bench) -> Outcome:
    """C4: a second signal ends everything at once, even a rank that writes its checkpoint for ever."""
    tally = Tally()
    for phase in ("train", "save"):
        name = f"second-{phase}"
        fault = Fault("sleep", phase, 3, bench.folder / f"{name}.mark")
        command = bench.command(name, "training.hang_seconds=null", fault=fault)
        command.wait(RUN_SECONDS, lambda fault=fault: fault.happened_at is not None)  # type: ignore[misc]
        command.signal(signal.SIGTERM)
        time.sleep(1.0)
        problems = [] if command.running() else ["the first signal ended it"]
        sent = time.monotonic()
        command.signal(signal.SIGINT)
        if not command.wait(5.0) or command.code != 128 + signal.SIGTERM or alive(command.ranks()):
            problems.append(f"exit code {command.code}, {alive(command.ranks())} run on")
        else:
            tally.seconds.append(command.ended - sent)
        command.end()
        tally.judge(name, problems or bench.finished(name))
    return tally.outcome("a second signal while the run cannot stop; seconds to its end", "C4")


def overdue(bench: Bench) -> Outcome:
    """C4: a run that does not stop within its grace time is ended, and says so."""
    tally = Tally()
    fault = Fault("sleep", "save", 3, bench.folder / "overdue.mark")
    options = ("training.hang_seconds=null", "training.grace_seconds=2")
    command = bench.command("overdue", *options, fault=fault)
    command.wait(RUN_SECONDS, lambda: fault.happened_at is not None)
    sent = time.monotonic()
    command.signal(signal.SIGTERM)
    command.wait(10.0)
    problems = [] if command.code == 143 and "no checkpoint within" in command.said else [f"exit code {command.code}"]
    if command.code is not None:
        tally.seconds.append(command.ended - sent)
        problems += [] if command.ended - sent < 4.0 else [f"took {command.ended - sent:.1f} s"]
    command.end()
    tally.judge("overdue", problems or bench.finished("overdue"))
    return tally.outcome("a save that takes longer than grace_seconds (2 s); seconds from the signal", "C4")


def real_launcher(bench: Bench) -> Outcome:
    """C4, E11: torchrun itself, stopped while it loads torch and while it trains; nothing may listen to the network."""
    tally = Tally()
    run_folder = bench.folder / "real"
    line = [sys.executable, "-m", "smoe_train.cli.app", "train", str(bench.recipe), "--nproc", str(RANKS)]
    line += ["name=real", "--output-dir", str(bench.folder), "training.hang_seconds=60"]
    for instant in (0.8, 2.5, 5.0, None):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (bench.folder / "real.output").open("w") as output:
            process = subprocess.Popen(line, stdout=output, stderr=output, env=environment)
        open_to_all: set[str] = set()
        if instant is not None:
            time.sleep(instant)
        else:
            deadline = time.monotonic() + RUN_SECONDS
            while steps(run_folder) < 1 and process.poll() is None and time.monotonic() < deadline:
                open_to_all |= _listening(process.pid) - {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
                time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40.0)
        said = (bench.folder / "real.output").read_text(errors="replace")
        # Before Python has come to the command, a signal has its usual effect.
        allowed = {75, -signal.SIGTERM} if instant is not None and instant < 1.0 else {75}
        problems = [] if process.returncode in allowed else [f"exit code {process.returncode}: {said[-300:]!r}"]
        problems += [f"listens at {', '.join(sorted(open_to_all))}"] if open_to_all else []
        problems += ["left processes"] if alive([child.pid for child in children]) else []
        process.kill()
        process.wait()
        tally.judge(f"SIGTERM {'in the first steps' if instant is None else f'{instant} s after the start'}", problems)
    if run_folder.exists():
        shutil.rmtree(run_folder)
    return tally.outcome("torchrun itself: SIGTERM while torch is loaded and later; sockets open to others", "C4, E11")


def _listening(pid: int) -> set[str]:
    found: set[str] = set()
    with contextlib.suppress(psutil.Error):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                connections: Sequence[Any] = process.net_connections("tcp")
                found |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
    return found

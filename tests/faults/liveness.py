"""Ranks that fail or hang, dead launchers, restarts, two runs at once, peers that never come, and signals to stop."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import psutil
from faults.bench import HANG_SECONDS, NOTE, RUN_SECONDS, Bench, Tally, undisturbed, until_step
from faults.forked import RANKS, Command, Fault, alive
from faults.lives import Life
from faults.runs import records_of
from faults.scenario import Outcome, Scale
from faults.stops import overdue, real_launcher, second_signals, signals

from smoe_train.parallel.rendezvous import meet

CRASH_WITHIN, HANG_WITHIN, ORPHANS_WITHIN = 5.0, 5.0, 5.0
PHASES = ("train", "validate", "save")
AT_ONCE = 2
# Kinds of crash and the exit code of each: a signal that nobody sent is reported as one.
CRASHES = {"raise": {1}, "exit": {1}, "kill": {1, 137}, "segfault": {1, 139}}
HANGS = ("stop", "spin", "sleep", "lock")
COUNTS: dict[Scale, dict[str, int]] = {
    "short": {"crashes": 1, "hangs": 1, "signals": 2, "topologies": 4},
    "commit": {"crashes": 6, "hangs": 8, "signals": 20, "kills": 2, "topologies": 30, "restarts": 2},
    "nightly": {"crashes": 36, "hangs": 48, "signals": 500, "kills": 20, "topologies": 30, "restarts": 6},
}


def run(scale: Scale, folder: Path) -> list[Outcome]:
    """Tries every fault; commands, launchers and ranks are forked, but for those that try the real launcher."""
    counts = COUNTS[scale]
    bench = undisturbed(folder, resumes=scale != "short")
    outcomes = [
        _crashes(bench, counts["crashes"]),
        _hangs(bench, counts["hangs"]),
        signals(bench, counts["signals"]),
        _topologies(bench, counts["topologies"]),
    ]
    if scale != "short":
        outcomes += [
            second_signals(bench),
            overdue(bench),
            _dead_parents(bench, counts["kills"]),
            _restarts(bench, counts["restarts"]),
            _two_runs(bench),
            _missing_peers(folder),
            _clock(bench),
            real_launcher(bench),
        ]
    return outcomes


def _some(kinds: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Returns so many pairs of kind and phase, all kinds and all phases as soon as there are enough."""
    kinds = list(kinds)
    every = [(kinds[n % len(kinds)], PHASES[(n + n // len(kinds)) % len(PHASES)]) for n in range(12)]
    return list(itertools.islice(itertools.cycle(every), count))


def _together(bench: Bench, cells: Sequence[tuple[str, str]], what: str) -> Iterator[tuple[str, Command, Fault]]:
    """Yields ended commands, a few of which run at a time: they mostly wait."""
    for start in range(0, len(cells), AT_ONCE):
        wave = []
        for number, (kind, phase) in enumerate(cells[start : start + AT_ONCE], start=start):
            name = f"{what}-{number}-{kind}-{phase}"
            fault = Fault(kind, phase, 3, bench.folder / f"{name}.mark")
            wave.append((name, bench.command(name, fault=fault), fault))
        deadline = time.monotonic() + RUN_SECONDS
        while sum(command.running() for _, command, _ in wave) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield from wave
        for _, command, _ in wave:
            command.end()


def _took(command: Command, fault: Fault, within: float) -> tuple[float, list[str]]:
    """Returns the seconds from a fault to the end of the command, and what is wrong with that end."""
    happened = fault.happened_at
    if command.code is None:
        return 0.0, [f"did not end: {command.said[-300:]!r}"]
    if happened is None:
        return 0.0, [f"ended with {command.code} before the fault: {command.said[-300:]!r}"]
    seconds = command.ended - happened
    problems = [] if seconds <= within else [f"took {seconds:.1f} s"]
    left = alive(command.ranks())
    return seconds, problems + ([f"left {left} running"] if left else [])


def _crashes(bench: Bench, count: int) -> Outcome:
    """C1: the command ends with the failing rank's traceback last, and no peer's complaint after it."""
    tally = Tally()
    for name, command, fault in _together(bench, _some(CRASHES, count), "crash"):
        seconds, problems = _took(command, fault, CRASH_WITHIN)
        tally.seconds.append(seconds)
        said = command.said.rstrip()
        if command.code not in CRASHES[fault.kind]:
            problems.append(f"exit code {command.code}: {said[-300:]!r}")
        if fault.kind == "raise":
            if not said.endswith("RuntimeError: this rank has had enough"):
                problems.append(f"its traceback is not last: {said[-300:]!r}")
            if "rank 1 failed: Traceback" not in said:
                problems.append("the rank is not named")
        tally.judge(name, problems or bench.finished(name))
    kinds = "raises, ends without a word, is killed or crashes"
    return tally.outcome(
        f"a rank {kinds}, in a step, a validation or a save; seconds to the end of the run",
        "C1, C14",
        NOTE + "2.7 s, the peers' noise mixed in",
        slowest_seconds=max(tally.seconds),
    )


def _hangs(bench: Bench, count: int) -> Outcome:
    """C2: the command ends within the time for hangs, names the rank and shows where each rank is."""
    tally = Tally()
    for name, command, fault in _together(bench, _some(HANGS, count), "hang"):
        seconds, problems = _took(command, fault, HANG_SECONDS + HANG_WITHIN)
        tally.seconds.append(max(0.0, seconds - HANG_SECONDS))
        last = (command.said.rstrip().splitlines() or [""])[-1]
        if command.code != 75:
            problems.append(f"exit code {command.code}: {command.said[-300:]!r}")
        if "the run hangs" not in last or "rank 1" not in last:
            problems.append(f"rank 1 is not named: {last!r}")
        stacks = re.findall(r"^rank (\d) \(pid .*\):\n(?:Current thread|Thread) 0x", command.said, re.MULTILINE)
        if sorted(stacks) != ["0", "1"]:
            problems.append(f"stacks of ranks {stacks}")
        if "forked.py" not in command.said and fault.kind != "stop":
            problems.append("the stacks do not show the place")
        tally.judge(name, problems or bench.finished(name))
    return tally.outcome(
        f"a rank is stopped, spins, sleeps or locks its interpreter; seconds beyond hang_seconds ({HANG_SECONDS:g} s)",
        "C2",
        NOTE + "not noticed in 45 s (30 minutes by default)",
        slowest_seconds=max(tally.seconds),
    )


def _dead_parents(bench: Bench, count: int) -> Outcome:
    """C3: whoever started the ranks is killed with SIGKILL; nobody trains on."""
    tally = Tally()
    for number, victim in itertools.product(range(count), ("command", "launcher")):
        name = f"orphans-{number}-{victim}"
        command = bench.command(name)
        problems = [] if until_step(command, 3) else [f"did not train: {command.said[-300:]!r}"]
        ranks = command.ranks()
        launcher = psutil.Process(ranks[0]).ppid() if ranks else 0
        if not problems:
            killed = time.monotonic()
            os.kill(command.pid if victim == "command" else launcher, signal.SIGKILL)
            while alive([*ranks, launcher]) and time.monotonic() < killed + ORPHANS_WITHIN:
                time.sleep(0.01)
            tally.seconds.append(time.monotonic() - killed)
            problems += [f"{left} run on" for left in [alive([*ranks, launcher])] if left]
            if not command.wait(ORPHANS_WITHIN) or command.code == 0:
                problems.append(f"the command ended with {command.code}")
        command.end()
        tally.judge(name, problems or bench.finished(name))
    return tally.outcome(
        "SIGKILL of the command or of the launcher; seconds until no rank runs",
        "C3",
        NOTE + "2 of 2 ranks train on",
    )


def _restarts(bench: Bench, count: int) -> Outcome:
    """--max-restarts: a rank is killed, hangs or raises once, and the command comes to the end by itself."""
    tally = Tally()
    for number, kind in enumerate(itertools.islice(itertools.cycle(("kill", "stop", "raise")), count)):
        name = f"restart-{number}-{kind}"
        fault = Fault(kind, "train", 5, bench.folder / f"{name}.mark", once=True)
        command = bench.command(name, "--max-restarts", "2", fault=fault)
        command.wait(RUN_SECONDS)
        problems = [] if command.code == 0 else [f"exit code {command.code}: {command.said[-300:]!r}"]
        problems += [] if "restart 1 of 2, from step" in command.said else ["it does not say that it restarts"]
        problems += [] if records_of(command.run_folder) == bench.records else ["records differ"]
        command.end()
        tally.judge(name, problems)
    name = "restart-in-vain"
    fault = Fault("raise", "train", 0, bench.folder / f"{name}.mark")
    command = bench.command(name, "--max-restarts", "50", fault=fault)
    command.wait(RUN_SECONDS)
    given_up = command.code == 1 and "gave up: 3 restarts in a row" in command.said
    command.end()
    tally.judge(name, [] if given_up else [f"exit code {command.code}: {command.said[-300:]!r}"])
    return tally.outcome("restarts by --max-restarts: bit-equal to the undisturbed run, or given up", "C1, C2")


def _two_runs(bench: Bench) -> Outcome:
    """C8: a second command is refused and told who is there; a note of the dead is recognised."""
    tally = Tally()
    first = bench.command("shared")
    problems = [] if until_step(first, 1) else ["the first one did not train"]
    second = Command(bench.recipe, bench.folder / "shared")
    second.wait(RUN_SECONDS)
    if second.code != 2 or f"another command is training in this folder (pid {first.pid} on " not in second.said:
        problems.append(f"exit code {second.code}: {second.said[-300:]!r}")
    if not first.running():
        problems.append("the first one ended")
    tally.judge("two at once", problems)
    first.end()
    third = bench.command("shared")
    third.wait(RUN_SECONDS)
    said = f"ended without cleaning up (pid {first.pid} on " in third.said
    problems = [] if third.code == 0 and said else [f"exit code {third.code}: {third.said[-300:]!r}"]
    problems += [] if records_of(bench.folder / "shared") == bench.records else ["records differ"]
    third.end()
    tally.judge("after a kill", problems)
    return tally.outcome("two commands in one run folder; the lock of a dead one", "C8", NOTE + "both write")


_TOPOLOGIES = """
import json, sys, time
from smoe_train.cli.app import main
found = []
for line in json.loads(sys.argv[1]):
    sys.argv = ["smoe-train", *line]
    started = time.process_time()
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    found.append((code, time.process_time() - started))
print(json.dumps(found))
"""


def _topologies(bench: Bench, count: int) -> Outcome:
    """C9: processes, groups and experts that do not fit are refused before a process starts or a file is written.

    Times are of the processor, without those of the first one, which are those of the imports.
    """
    sizes: list[tuple[int, int, int]] = [
        (nproc, group, experts)
        for nproc, group, experts in itertools.product((1, 2, 3, 4, 6), (2, 3, 4, 5, 8), (2, 3, 6, 8))
        if nproc % group or experts % group
    ]
    chosen = random.Random(9).sample(sizes, count)
    output = bench.folder / "topologies"
    lines = [
        [
            *("train", str(bench.recipe), "--output-dir", str(output), "--nproc", str(nproc)),
            *(f"parallel.expert_parallel_size={group}", f"model.moe.num_experts={experts}"),
        ]
        for nproc, group, experts in chosen
    ]
    command = [sys.executable, "-c", _TOPOLOGIES, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    tally = Tally()
    if done.returncode != 0:
        tally.judge("topologies", [done.stderr[-300:]])
        return tally.outcome("impossible topologies", "C9")
    found = json.loads(done.stdout.splitlines()[-1])
    for (code, seconds), line in zip(found, lines, strict=True):
        problems = [f"exit code {code}"] if code != 2 else []
        problems += [f"took {seconds:.2f} s"] if seconds > 0.5 and line is not lines[0] else []
        tally.judge(" ".join(line), problems)
        if line is not lines[0]:
            tally.seconds.append(seconds)
    if output.exists():
        tally.judge("topologies", ["left something behind"])
    return tally.outcome(
        "processes, groups and experts that do not fit; seconds of CPU to the message",
        "C9",
        NOTE + "late, in every rank",
    )


def _missing_peers(folder: Path) -> Outcome:
    """C10: a rank that never comes, or is looked for elsewhere, is named by those that wait."""
    tally = Tally()
    patience = timedelta(seconds=2.0)

    def absent(missing: int) -> Callable[[], int]:
        def work() -> int:
            if os.environ["RANK"] != str(missing):
                meet(os.environ, patience)
            return 0

        return work

    def elsewhere() -> int:
        if os.environ["RANK"] == "1":
            meet({**os.environ, "MASTER_PORT": "1"}, patience)
        return 0

    for name, work, expected in (
        ("rank 1 absent", absent(1), "LaunchError: rank 0: 1 of 2 ranks are there; missing: 1 after 2 s"),
        ("rank 0 absent", absent(0), "LaunchError: rank 1: nobody answered at MASTER_ADDR 127.0.0.1"),
        ("another port", elsewhere, "LaunchError: rank 1: nobody answered at MASTER_ADDR 127.0.0.1, MASTER_PORT 1 "),
    ):
        output = folder / f"{name}.output"
        life = Life(RANKS, work, output)
        problems = [] if life.wait(20.0) else ["waits for ever"]
        tally.seconds.append(time.monotonic() - life.started)
        life.kill()
        life.wait(5.0)
        said = output.read_text(errors="replace") if output.is_file() else ""
        tally.judge(name, problems + ([] if expected in said else [said[-300:]]))
    return tally.outcome(
        "a rank that never joins, a wrong address; seconds to the message (of 2 s allowed here, 120 s by default)",
        "C10",
        NOTE + "30 minutes, no rank named",
    )


def _clock(bench: Bench) -> Outcome:
    """C11: the wall clock of all ranks is set back by a day in the middle of a run with a time limit."""
    tally = Tally()
    fault = Fault("clock", "train", 4, bench.folder / "clock.mark", rank=None)
    command = bench.command("clock", "training.max_seconds=600", fault=fault)
    command.wait(RUN_SECONDS)
    problems = [] if command.code == 0 else [f"exit code {command.code}: {command.said[-300:]!r}"]
    problems += [] if records_of(command.run_folder) == bench.records else ["records differ"]
    command.end()
    tally.judge("clock", problems)
    return tally.outcome("the clock jumps back by a day in the middle of a run", "C11")

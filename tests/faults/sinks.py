"""Where figures go, broken in every way: the run must not notice.

Each try is a whole run of the command line in a forked process. It must end with exit code 0, with the checkpoint that
an undisturbed run ends with, bit for bit, with one warning for each thing that is broken, without a traceback, and the
training thread may spend at most 2 s in all that it reports; and its record must be complete, unless the fault is that
it cannot be. How things are broken is in `sink_breakers`.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.lives import Life
from faults.runs import records_of
from faults.scenario import Outcome, Scale
from faults.sink_breakers import LAST, STEPS, Events, Fault, all_faults
from faults.traced import why_not
from faults.tracing import injected, wait_for_tracer
from support.tiny import tiny_recipe, write_text

from smoe_train.checkpoint import Checkpoint
from smoe_train.checkpoint.folders import CHECKPOINTS, step_name
from smoe_train.cli import app, worker
from smoe_train.cli.last_words import LOGS
from smoe_train.parallel.process import LAUNCH_VARIABLES
from smoe_train.reporting import METRICS

ADDED_SECONDS = 2.0
LIFE_SECONDS = 120.0
SPENT = "seconds"
ROUNDS = {"short": 1, "commit": 1, "nightly": 10}
PLAIN_DEEPSPEED = (
    "its monitors are called in the training loop, unguarded: what they raise ends the run, what they wait for it "
    "waits for (0.19.8, `monitor/monitor.py`)"
)


@dataclass(frozen=True)
class Undisturbed:
    """What a run comes to that nobody disturbs.

    Attributes:
        run_folder: Its folder.
        files: Size and SHA-256 of its last checkpoint's files.
        records: Its records, bit for bit.
    """

    run_folder: Path
    files: Mapping[str, Any]
    records: Any


def run(scale: Scale, folder: Path) -> list[Outcome]:
    """Trains with each sink broken in each way, and starts with records that no run may start with."""
    text = write_text(folder / "corpus.txt")
    golden = _undisturbed(text, folder, lives=1 if scale == "short" else 2)
    outcomes = []
    for line, (title, faults) in enumerate(all_faults(why_not(folder)).items()):
        chosen = [fault for fault in faults if fault.short or scale != "short"]
        if not chosen:
            continue
        able = [fault for fault in chosen if not fault.impossible]
        failures, waited = [], []
        for number in range(ROUNDS[scale]):
            for fault in able:
                problems, seconds = _try(fault, text, folder / f"{line}-{fault.name}-{number}", golden)
                waited.append(seconds)
                failures += [f"{fault.name}, round {number}: {'; '.join(problems)}"] if problems else []
        measured = {"ways": float(len(able)), "worst_seconds": max(waited, default=0.0)}
        measured |= {f"not tried here: {fault.name}: {fault.impossible}": 1.0 for fault in chosen if fault.impossible}
        tried = len(able) * ROUNDS[scale]
        why = "" if able else "; ".join(fault.impossible for fault in chosen)
        outcomes.append(
            Outcome(title, "C13", tried, tried - len(failures), (), PLAIN_DEEPSPEED, tuple(failures), measured, why)
        )
    return [*outcomes, _damaged_at_the_start(text, folder, golden, scale)]


def _live(text: Path, folder: Path, fault: Fault, **sections: Any) -> Life:
    """Trains in a forked process, as the command line does, with something broken."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "tiny.yaml"
    values = {
        "parallel": {"engine": "local"},
        "model": {"dropout": 0.1},
        "training": {"max_steps": STEPS},
        "checkpoint": {"every_steps": STEPS},
        "evaluation": {"every_steps": STEPS},
        "reporting": {"log_every_steps": 1},
    }
    for name, section in {**fault.sections, **sections}.items():
        values[name] = {**values.get(name, {}), **section}
    recipe.write_text(tiny_recipe(text, 1, **values).to_yaml(), encoding="utf-8")

    def work() -> int:
        for name in LAUNCH_VARIABLES:
            os.environ.pop(name, None)
        run_folder = folder / "tiny"
        run_folder.mkdir(exist_ok=True)
        if not fault.draws_report:
            worker.write_report = lambda run_folder: run_folder  # most of the time of a tiny run
        if fault.injections:
            wait_for_tracer()
        events = fault.prepare(run_folder) or {}
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
        worker.open_journal = _watched(worker.open_journal, events, folder)  # type: ignore[attr-defined]
        sys.argv = ["smoe-train", "train", str(recipe), "--output-dir", str(folder)]
        try:
            app.main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        return 0

    return Life(1, work, folder / "output.txt")


def _watched(open_journal: Any, events: Events, folder: Path) -> Any:
    """Lets something happen just before the record of a step is written, and notes what the journal's calls take."""
    spent = [0.0]

    def timed(call: Any) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            started = time.monotonic()
            try:
                return call(*arguments, **options)
            finally:
                spent[0] += time.monotonic() - started

        return called

    def opened(*arguments: Any) -> Any:
        journal = timed(open_journal)(*arguments)
        metrics, close = timed(journal.metrics), timed(journal.close)

        def eventful(records: Any) -> None:
            for record in records:
                if record["split"] == "train":
                    events.get(record["step"], lambda: None)()
            metrics(records)

        def close_after_all() -> None:
            events.get(LAST, lambda: None)()
            close()
            (folder / SPENT).write_text(str(spent[0]))

        journal.metrics, journal.close, journal.routing = eventful, close_after_all, timed(journal.routing)
        return journal

    return opened


def _undisturbed(text: Path, folder: Path, lives: int) -> Undisturbed:
    found = []
    for number in range(lives):
        life = _live(text, folder / f"undisturbed-{number}", Fault("nothing", lambda run_folder: None))
        assert life.wait(LIFE_SECONDS), "the undisturbed run hangs"
        run_folder = folder / f"undisturbed-{number}" / "tiny"
        assert life.codes == [0], (run_folder.parent / "output.txt").read_text()[-2000:]
        found.append((_last_files(run_folder), records_of(run_folder)))
    assert all(one == found[0] for one in found), "two undisturbed runs differ"
    return Undisturbed(run_folder, *found[0])


def _last_files(run_folder: Path) -> Any:
    checkpoint = Checkpoint.open(run_folder / CHECKPOINTS / step_name(STEPS))
    checkpoint.verify()
    return checkpoint.files


def _try(fault: Fault, text: Path, folder: Path, golden: Undisturbed) -> tuple[list[str], float]:
    """Trains with a fault; returns what is not as promised, and how long training waited for its sinks."""
    life = _live(text, folder, fault)
    with injected(life.pids[0], fault.injections, folder / "calls", folder / "tiny" / METRICS):
        ended = life.wait(LIFE_SECONDS)
    if not ended:
        life.kill()
        life.wait(LIFE_SECONDS)
        return ["hangs"], 0.0
    problems = _problems(fault, folder, golden)
    if life.codes != [0]:
        problems.append(f"exit code {life.codes[0]}: {(folder / 'output.txt').read_text()[-300:]}")
    spent = float((folder / SPENT).read_text()) if (folder / SPENT).is_file() else 0.0
    if fault.injections:  # a traced process is slow
        spent = 0.0
    if spent > ADDED_SECONDS:
        problems.append(f"training waited {spent:.1f} s for what it reports to")
    if not problems:
        shutil.rmtree(folder, ignore_errors=True)
    return problems, spent


def _problems(fault: Fault, folder: Path, golden: Undisturbed) -> list[str]:
    run_folder, found = folder / "tiny", []
    try:
        if _last_files(run_folder) != golden.files:
            found.append("the last checkpoint differs")
    except Exception as error:
        found.append(f"no last checkpoint: {error}")
    for name, mine, theirs in zip(("metrics", "routing"), records_of(run_folder), golden.records, strict=True):
        if (fault.keeps_record and mine != theirs) or not set(mine) <= set(theirs) or len(set(mine)) != len(mine):
            found.append(f"{name}: {len(mine)} records, not the {len(theirs)} of the undisturbed run")
    printed = (folder / "output.txt").read_text(errors="replace")
    log = run_folder / LOGS / "rank-0.log"
    logged = log.read_text() if log.is_file() and not log.is_symlink() else ""
    if "Traceback" in printed + logged:
        found.append(f"a traceback: {(printed + logged)[-300:]}")
    said = max(printed.count("warning: "), logged.count(" WARNING "))
    if said > fault.warnings or (said == 0 and fault.warnings > 0):
        found.append(f"{said} warnings: {(logged or printed)[-600:]}")
    return found


def _damaged_at_the_start(text: Path, folder: Path, golden: Undisturbed, scale: Scale) -> Outcome:
    """A record that cannot be continued is an error before anything is trained."""

    def in_the_way(run_folder: Path) -> None:
        shutil.copytree(golden.run_folder, run_folder, dirs_exist_ok=True)
        (run_folder / METRICS).unlink()
        (run_folder / METRICS).mkdir()

    def damaged(run_folder: Path) -> None:
        shutil.copytree(golden.run_folder, run_folder, dirs_exist_ok=True)
        lines = (run_folder / METRICS).read_bytes().splitlines(keepends=True)
        (run_folder / METRICS).write_bytes(b"".join([*lines[:5], b"{damaged\n", *lines[5:]]))

    failures = []
    ways = {"a damaged line": damaged}
    if scale != "short":
        ways["a folder in its place"] = in_the_way
    for way, prepare in ways.items():
        place = folder / way
        life = _live(text, place, Fault(way, prepare), training={"max_steps": STEPS + 4})
        ended = life.wait(LIFE_SECONDS)
        printed = (place / "output.txt").read_text()
        trained = (place / "tiny" / CHECKPOINTS / step_name(STEPS + 4)).exists()
        if not ended or life.codes != [1] or METRICS not in printed or "Traceback" in printed or trained:
            failures.append(f"{way}: exit code {life.codes[0]}, {printed[-300:]}")
    return Outcome(
        "metrics.jsonl damaged or not to be opened at the start: an error before any step",
        "C13",
        len(ways),
        len(ways) - len(failures),
        failures=tuple(failures),
        plain_deepspeed="has no record of its own",
    )

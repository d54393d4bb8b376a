"""Disks that are full, failing, read-only or gone in the middle of a save.

Each try is a run of two expert-parallel ranks that saves in the background. One save meets the fault; the disk is well
again before the next one, or stays as it is. Promised is: nobody hangs; every checkpoint that there is verifies and is
the undisturbed run's, bit for bit; training goes on or ends as `checkpoint.failures_allowed` says; the message names
the path, the bytes needed and the bytes free; and with room again the same command takes the run to the same end.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.lives import Life, begin_run, train_rank
from faults.places import may_mount, mounted, unusable_places
from faults.runs import LIFE_SECONDS, WORLD_SIZE, Golden, differences, newest_step, undisturbed
from faults.scenario import Outcome, Scale
from faults.traced import ATTACH_SECONDS, allow_tracing, why_not
from support.tiny import tiny_recipe, write_text

from smoe_train.checkpoint import CheckpointStore, store, writing
from smoe_train.checkpoint.folders import CHECKPOINTS, MANIFEST, step_name
from smoe_train.cli import worker
from smoe_train.recipe import Recipe

STEPS, EVERY, STRUCK = 10, 2, 4
UNDISTURBED = "undisturbed"
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS")
CALLS = ("mkdir", "openat", "ftruncate", "write", "fsync", "renameat", "rename")
# How many calls of each name are made to fail in turn, and with how many errors each; a save makes fewer than a dozen.
POINTS = {"short": (1, 1), "commit": (2, 1), "nightly": (12, len(ERRORS))}
ROUNDS = {"short": 1, "commit": 2, "nightly": 20}
PLAIN_DEEPSPEED = (
    "leaves the previous checkpoint alone, but ends with `basic_ios::clear: iostream error` without path or room, and "
    "never flushes, so that an error of the disk goes unseen (measured before, 0.19.8)"
)
MESSAGE = re.compile(r"checkpoints/step-\d{8}: could not be written: .*needed, .*free")


@dataclass
class Tally:
    """What the tries of one line came to."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, problems: list[str]) -> None:
        """Counts one try."""
        self.tried += 1
        self.failures += [f"{name}: {'; '.join(problems)}"] if problems else []

    def outcome(self, fault: str, catalogue: str, skipped: str = "") -> Outcome:
        """Returns the line."""
        survived, failures = self.tried - len(self.failures), tuple(self.failures)
        return Outcome(fault, catalogue, self.tried, survived, (), PLAIN_DEEPSPEED, failures, self.measured, skipped)


@dataclass(frozen=True)
class Struck:
    """What a rank does around the save that meets the fault; called in the rank, between two steps.

    Attributes:
        before: Just before that save begins.
        after: Just before the next save begins.
    """

    before: Callable[[int], None] = lambda rank: None
    after: Callable[[int], None] = lambda rank: None


def run(scale: Scale, folder: Path) -> list[Outcome]:
    """Saves to disks that fail for a while, for good, at every call, and that go away."""
    golden = undisturbed(_recipe(folder), folder / UNDISTURBED)
    kinds = [_full_for_a_while, _full_for_good, _failing_calls]
    if scale != "short":
        kinds += [_gone, _read_only]
    return [*(kind(golden, folder, scale) for kind in kinds), unusable_places(folder, few=scale == "short")]


def _recipe(folder: Path, **checkpoint: Any) -> Recipe:
    text = folder / "corpus.txt"
    if not text.exists():
        write_text(text)
    return tiny_recipe(
        text,
        WORLD_SIZE,
        model={"dropout": 0.1},
        parallel={"expert_parallel_size": 2},
        training={"max_steps": STEPS},
        evaluation={"every_steps": STEPS},
        checkpoint={"every_steps": EVERY, "keep_last": 100, **checkpoint},
        reporting={"log_every_steps": 1},
    )


def _live(run_folder: Path, struck: Struck) -> Life:
    """Starts the ranks of a run, one of whose saves meets a fault."""

    def work() -> int:
        begin = CheckpointStore.begin

        def begin_struck(self: CheckpointStore, step: int, *arguments: Any, **options: Any) -> None:
            rank = int(os.environ["RANK"])
            if step == STRUCK:
                struck.before(rank)
            elif step == STRUCK + EVERY:
                struck.after(rank)
            begin(self, step, *arguments, **options)

        CheckpointStore.begin = begin_struck  # type: ignore[method-assign]
        worker.write_report = lambda run_folder: run_folder  # it takes longer to draw than the run to train
        return train_rank(run_folder)

    return Life(WORLD_SIZE, work, run_folder / "output.txt")


def _survives(
    golden: Golden, run_folder: Path, struck: Struck, failures_allowed: int = 1, must_fail: bool = True
) -> list[str]:
    """Trains with a fault that passes; returns what is not as promised."""
    begin_run(_allowing(golden.recipe, failures_allowed), run_folder)
    life = _live(run_folder, struck)
    return _judged(life, golden, run_folder, must_fail)


def _judged(life: Life, golden: Golden, run_folder: Path, must_fail: bool) -> list[str]:
    if not life.wait(LIFE_SECONDS):
        life.kill()
        life.wait(LIFE_SECONDS)
        return ["hangs"]
    printed = (run_folder / "output.txt").read_text(errors="replace")
    found = [] if life.codes == [0] * WORLD_SIZE else [f"ended with {life.codes}: {printed[-600:]}"]
    if must_fail and not MESSAGE.search(printed):
        found.append(f"no message with path, needed and free bytes: {printed[-600:]}")
    if "Traceback" in printed:
        found.append(f"a traceback: {printed[-600:]}")
    found += differences(run_folder, golden, finished=True)
    if not found:
        shutil.rmtree(run_folder, ignore_errors=True)  # a mounted folder in it is taken away by whoever mounted it
    return found


def _allowing(recipe: Recipe, failures: int) -> Recipe:
    section = recipe.checkpoint.model_copy(update={"failures_allowed": failures})
    return recipe.model_copy(update={"checkpoint": section})


# A disk without room


def _full_for_a_while(golden: Golden, folder: Path, scale: Scale) -> Outcome:
    """No file may grow beyond a part of a checkpoint's, by either rank or by both."""
    tally = Tally()
    ways = {"rank 0": (0,), "rank 1": (1,), "both ranks": (0, 1)}
    for number in range(ROUNDS[scale]):
        for name, ranks in list(ways.items())[: 1 if scale == "short" else None]:
            size = (4096, 20_000)[number % 2]
            run_folder = folder / f"while-{name}-{number}"
            tally.add(f"{name}, {size} bytes, round {number}", _survives(golden, run_folder, _limit(size, ranks)))
    return tally.outcome("a disk without room for one save (RLIMIT_FSIZE): training goes on", "A6")


def _limit(size: int, ranks: tuple[int, ...]) -> Struck:
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)

    def before(rank: int) -> None:
        if rank in ranks:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, whole[1]))

    return Struck(before, lambda rank: resource.setrlimit(resource.RLIMIT_FSIZE, whole))


def _full_for_good(golden: Golden, folder: Path, scale: Scale) -> Outcome:
    """The file system of the checkpoints fills up, or files may not grow; later there is room."""
    tally = Tally()
    kinds = [_limited_for_good] if scale == "short" or not may_mount() else [_limited_for_good, _small_file_system]
    for number in range(ROUNDS[scale]):
        for kind in kinds:
            for allowed in (0, 1) if scale != "short" else (1,):
                run_folder = folder / f"good-{kind.__name__}-{allowed}-{number}"
                problems = kind(golden, run_folder, allowed)
                tally.add(f"{kind.__name__.strip('_')}, failures_allowed {allowed}, round {number}", problems)
    tally.measured["on_a_full_tmpfs"] = float(_small_file_system in kinds)
    return tally.outcome("a disk that stays full: ends as checkpoint.failures_allowed says, goes on with room", "A6")


def _limited_for_good(golden: Golden, run_folder: Path, allowed: int) -> list[str]:
    begin_run(_allowing(golden.recipe, allowed), run_folder)
    life = _live(run_folder, Struck(_limit(4096, (0, 1)).before))
    return _ended_full(life, golden, run_folder, allowed, STRUCK - EVERY) or _goes_on(golden, run_folder, allowed)


def _small_file_system(golden: Golden, run_folder: Path, allowed: int) -> list[str]:
    """Holds two checkpoints and a half."""
    begin_run(_allowing(golden.recipe, allowed), run_folder)
    place = run_folder / CHECKPOINTS
    place.mkdir(exist_ok=True)
    with mounted(place, f"size={_bytes_on_tmpfs(run_folder.parent / UNDISTURBED) * 5 // 2}"):
        problems = _ended_full(_live(run_folder, Struck()), golden, run_folder, allowed, 2 * EVERY)
        if not problems:
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
            problems = _goes_on(golden, run_folder, allowed)
    return problems


def _bytes_on_tmpfs(undisturbed: Path) -> int:
    """Returns what one checkpoint takes there: whole pages."""
    files = (undisturbed / CHECKPOINTS / step_name(EVERY)).rglob("*")
    return sum(-(-path.stat().st_size // PAGE_BYTES) * PAGE_BYTES for path in files if path.is_file())


def _ended_full(life: Life, golden: Golden, run_folder: Path, allowed: int, newest: int) -> list[str]:
    """Returns what is wrong with the end of a run whose disk stayed full after a step."""
    if not life.wait(LIFE_SECONDS):
        life.kill()
        life.wait(LIFE_SECONDS)
        return ["hangs"]
    printed = (run_folder / "output.txt").read_text(errors="replace")
    found = [] if 1 in life.codes and 0 not in life.codes else [f"ended with {life.codes}"]
    failed = len(set(re.findall(r"step-\d{8}(?=: could not be written)", printed)))
    if failed != allowed + 1:
        found.append(f"{failed} saves failed before the end, failures_allowed is {allowed}: {printed[-600:]}")
    if not MESSAGE.search(printed) or "Traceback" in printed:
        found.append(f"no message with path, needed and free bytes, or a traceback: {printed[-600:]}")
    if newest_step(run_folder) != newest:
        found.append(f"the newest checkpoint is of step {newest_step(run_folder)}, not {newest}")
    return found + differences(run_folder, golden, finished=False)


def _goes_on(golden: Golden, run_folder: Path, allowed: int) -> list[str]:
    (run_folder / "output.txt").unlink()
    if not begin_run(_allowing(golden.recipe, allowed), run_folder):
        return ["takes the run for finished"]
    return _judged(_live(run_folder, Struck()), golden, run_folder, must_fail=False)


# Calls that fail


def _failing_calls(golden: Golden, folder: Path, scale: Scale) -> Outcome:
    """The k-th call of a name fails in the thread that writes, or in the one that commits."""
    tally = Tally()
    skipped = why_not(folder)
    if skipped:
        return tally.outcome(_CALLS_FAIL, "A6", skipped)
    points, errors = POINTS[scale]
    hit, number = 0, 0
    places = [(part, rank, call) for part, rank in (("write", 0), ("write", 1), ("commit", 0)) for call in CALLS]
    for part, rank, call in places if scale != "short" else [("write", 1, "write")]:
        for k in range(1, points + 1):
            before = hit
            for _ in range(errors):
                error, number = ERRORS[number % len(ERRORS)], number + 1
                injection = f"{call}:error={error}:when={k}"
                failed, problems = _with_failing_call(golden, folder / f"call-{number}", part, rank, injection)
                hit += failed
                if failed or problems:
                    tally.add(f"{part} of rank {rank}, {injection}", problems)
            if hit == before:
                break  # there is no k-th call of that name
    tally.measured["calls_that_failed"] = hit
    return tally.outcome(_CALLS_FAIL, "A6")


_CALLS_FAIL = "ENOSPC, EDQUOT, EIO, EROFS from a call of a save (strace): training goes on"


def _with_failing_call(
    golden: Golden, run_folder: Path, part: str, rank: int, injection: str
) -> tuple[bool, list[str]]:
    """Returns whether there was such a call, and what is not as promised."""
    begin_run(_allowing(golden.recipe, 1), run_folder)
    ready = run_folder / "thread"

    def pause(action: Callable[..., Any]) -> Callable[..., Any]:
        """Lets the tracer attach to the thread that is about to act."""

        def paused(*arguments: Any, **options: Any) -> Any:
            thread = threading.get_native_id()
            part_file = ready.with_suffix(".part")
            part_file.write_text(str(thread))
            part_file.rename(ready)
            _wait(lambda: not _untraced(thread))
            return action(*arguments, **options)

        return paused

    def before(own: int) -> None:
        if own != rank:
            return
        allow_tracing()
        if part == "write":
            write = store.write_files
            store.write_files = _once(pause(write), write)  # type: ignore[attr-defined]
        else:
            commit = CheckpointStore._commit
            CheckpointStore._commit = _once(pause(commit), commit)  # type: ignore[method-assign]

    life = _live(run_folder, Struck(before))
    life.wait(LIFE_SECONDS, ready.exists)
    calls = run_folder.with_suffix(".calls")
    failed = False
    if ready.exists():
        command = ["strace", "-o", str(calls), "-e", f"trace={injection.split(':')[0]}", "-e", f"inject={injection}"]
        with subprocess.Popen([*command, "-p", ready.read_text()], stderr=subprocess.DEVNULL) as tracer:
            life.wait(LIFE_SECONDS)
            tracer.terminate()
        failed = calls.is_file() and "(INJECTED)" in calls.read_text()
        ready.unlink(missing_ok=True)
    # A folder that the other rank made meanwhile, or what fails once a checkpoint is visible, does it no harm.
    whole = (run_folder / CHECKPOINTS / step_name(STRUCK) / MANIFEST).is_file()
    return failed, _judged(life, golden, run_folder, must_fail=not whole)


def _once(first: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that is another one from its second call on."""
    left = [first]

    def call(*arguments: Any, **options: Any) -> Any:
        return (left.pop() if left else then)(*arguments, **options)

    return call


def _untraced(thread: int) -> bool:
    return "TracerPid:\t0\n" in Path(f"/proc/{thread}/status").read_text()


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ATTACH_SECONDS
    while not until() and time.monotonic() < deadline:
        time.sleep(0.002)


# Folders that go away


def _gone(golden: Golden, folder: Path, scale: Scale) -> Outcome:
    """In the middle of a save, between two files, the folder is no more what it was."""
    tally = Tally()
    ways = {"replaced by a file for a while": _replaced, "the half-written one removed": _half_removed}
    for number in range(ROUNDS[scale]):
        for name, way in ways.items():
            run_folder = folder / f"gone-{name}-{number}"
            tally.add(f"{name}, round {number}", _survives(golden, run_folder, way(run_folder / CHECKPOINTS)))
        tally.add(f"all of them removed, round {number}", _all_removed(golden, folder / f"removed-{number}"))
    return tally.outcome("the folder of checkpoints removed or turned into a file within a save", "A6, C12")


def _in_the_middle(rank: int, act: Callable[[], None]) -> None:
    """Lets something happen before this rank flushes its first file of the save that begins now."""
    if rank == 0:
        flush = writing.flush

        def acting(path: Path) -> None:
            act()
            flush(path)

        writing.flush = _once(acting, flush)  # type: ignore[attr-defined]


def _replaced(place: Path) -> Struck:
    away = place.with_name("away")

    def replace() -> None:
        place.rename(away)
        place.write_text("in the way")

    def put_back(rank: int) -> None:
        if rank == 0:
            place.unlink()
            away.rename(place)

    return Struck(lambda rank: _in_the_middle(rank, replace), put_back)


def _half_removed(place: Path) -> Struck:
    return Struck(
        lambda rank: _in_the_middle(rank, lambda: [shutil.rmtree(one) for one in place.glob(".tmp-*")] and None)
    )


def _all_removed(golden: Golden, run_folder: Path) -> list[str]:
    """What was there is lost, by whoever removed it; the run makes new ones."""
    place = run_folder / CHECKPOINTS
    return _survives(golden, run_folder, Struck(lambda rank: _in_the_middle(rank, lambda: shutil.rmtree(place))))


def _read_only(golden: Golden, folder: Path, scale: Scale) -> Outcome:
    """The file system of the checkpoints is mounted read-only for one save."""
    line = "the file system of checkpoints read-only for one save (remount): training goes on"
    tally = Tally()
    if not may_mount():
        return tally.outcome(line, "A6, C12", "only root may mount a file system")
    for number in range(ROUNDS[scale]):
        run_folder = folder / f"read-only-{number}"
        place = run_folder / CHECKPOINTS
        place.mkdir(parents=True)

        def remount(rank: int, how: str, place: Path = place) -> None:
            if rank == 0:
                subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)

        with mounted(place, "size=64m"):
            struck = Struck(lambda rank: remount(rank, "ro"), lambda rank: remount(rank, "rw"))
            problems = _survives(golden, run_folder, struck)
        tally.add(f"round {number}", problems)
    return tally.outcome(line, "A6, C12")

"""SIGKILL at every system call of a save, slow and dying ranks within one, and the order in which it is flushed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from faults.lives import Life
from faults.scenario import Outcome, Scale
from faults.traced import Call, allow_tracing, attached, calls, why_not

from smoe_train.checkpoint import Checkpoint, CheckpointStore
from smoe_train.checkpoint.store import Peers
from smoe_train.cli.run_folder import OneRank
from smoe_train.errors import CheckpointError, RunFailedError

LIFE_SECONDS = 60.0
SURVIVOR_SECONDS = 5.0
# Between two of these calls a disk does not change, so a kill at any other call leaves what one of them leaves.
CHANGING = re.compile(r"mkdir|p?write|ftruncate|fallocate|copy_file|sendfile|f(data)?sync|rename|unlink|rmdir")
SLOW_CALLS = ("openat", "fsync", "rename,renameat,renameat2")
SLOW_MICROSECONDS = 300_000
LEFTOVERS = (".tmp-step-00000009-0", ".trash-step-00000009-0")


@dataclass(frozen=True)
class Save:
    """A save to be interrupted.

    Attributes:
        name: What is special about it.
        before: Steps that were saved before.
        step: The step that is saved.
    """

    name: str
    before: tuple[int, ...]
    step: int

    def allowed(self) -> set[tuple[int, float] | None]:
        """Returns which checkpoints, by step and content, a run may go on from after an interruption.

        A run that saves a step again was taken back behind it, so that where it went on from is right, too.
        """
        newest = max((step for step in self.before if step < self.step), default=None)
        before = None if newest is None else (newest, float(newest))
        same = {(self.step, float(self.step))} if self.step in self.before else set()
        return {before, (self.step, self.value), *same}

    @property
    def value(self) -> float:
        """What the new checkpoint holds; that of an earlier one is its step."""
        return self.step + 0.5


FIRST = Save("the first of a run", (), 1)
PRUNING = Save("one that prunes, over what killed saves left", (1, 2), 3)
SAME_STEP = Save("one over a checkpoint of the same step", (1, 2), 2)
SAVES = (FIRST, PRUNING, SAME_STEP)


def run(scale: Scale, folder: Path) -> list[Outcome]:
    """Interrupts saves wherever the disk can change; at the nightly scale, at every call that touches a file of it."""
    killed = "SIGKILL at each system call of a save"
    of_one = "SIGKILL of one of two ranks at each system call of its part of a save"
    slow = "One of two ranks is slow in a save: nothing is committed before its files are there"
    order = "Order of flushes: nothing is renamed into place, or left, that a power cut could take apart"
    reason = why_not(folder)
    if reason:
        lines = ((killed, "A2, A4"), (of_one, "A3"), (slow, "A3"), (order, "A2"))
        return [Outcome(line, catalogue, 0, 0, skipped=reason) for line, catalogue in lines]
    # Whatever is imported late is imported here, and not within the calls that are counted.
    _save(CheckpointStore(folder / "warm", OneRank(), keep_last=2), OneRank(), 1, 1.0, world_size=1)
    plain = "no such order: files are written in place and never flushed, and `latest` is emptied first (0.19.8)"
    saves = (PRUNING,) if scale == "short" else SAVES
    results = [_Trial(folder, save, world_size=1).killed_everywhere(scale) for save in saves]
    outcomes = [_outcome(killed, "A2, A4", results, plain)]
    if scale != "short":
        two = _Trial(folder, PRUNING, world_size=2)
        outcomes.append(_outcome(of_one, "A3", [two.killed_everywhere(scale)], plain))
        outcomes.append(_outcome(slow, "A3", [two.slow(names) for names in SLOW_CALLS], "`latest` names it at once"))
    flushed = [(1, _Trial(folder, save, world_size=1).unflushed()) for save in saves]
    return [*outcomes, _outcome(order, "A2", flushed, plain)]


def _outcome(fault: str, catalogue: str, results: Iterable[tuple[int, list[str]]], plain: str) -> Outcome:
    results = list(results)
    tried, failures = sum(tried for tried, _ in results), [line for _, lines in results for line in lines]
    return Outcome(fault, catalogue, tried, max(tried - len(failures), 0), (), plain, tuple(failures))


class _Trial:
    """A save by one rank, or by two of which the second is traced.

    Args:
        folder: For everything.
        save: Which save.
        world_size: 1 or 2.
    """

    def __init__(self, folder: Path, save: Save, world_size: int) -> None:
        self.save, self.world_size = save, world_size
        self.folder = folder / f"{world_size}-{save.step}-{len(save.before)}"
        self.prefix = self.folder / "calls"
        self.checkpoints = self.folder / "run" / "checkpoints"
        self.killed = False  # whether the last interruption was

    def killed_everywhere(self, scale: Scale) -> tuple[int, list[str]]:
        """Returns at how many calls the save was killed, and what was not as promised."""
        tried, failures = 0, []
        for committing in (False, True) if self.world_size == 1 else (False,):
            points = self._points(committing, every=scale == "nightly")[:: 4 if scale == "short" else 1]
            for call in points:
                option = f"inject={call.name}:signal=SIGKILL:when={call.number}"
                self._interrupt(committing, option)
                problem = self._problem() if self.killed else "it was not killed"
                if problem:
                    part = "committing" if committing else "writing"
                    failures.append(f"{self.save.name}, {part}, {call}: {problem}")
            tried += len(points)
        return tried, failures

    def slow(self, names: str) -> tuple[int, list[str]]:
        """Delays calls of the second rank, and looks at the checkpoint as soon as there is one."""
        seen: list[str] = []

        def appeared() -> bool:
            path = self.checkpoints / f"step-{self.save.step:08}"
            if path.is_dir() and not seen:
                seen.append(_problem_of(lambda: Checkpoint.open(path).verify()))
            return bool(seen)

        delays = f"inject={names}:delay_enter={SLOW_MICROSECONDS}"
        seconds = self._interrupt(False, delays, appeared)
        problems = [problem for problem in (*seen, self._problem(finished=True)) if problem]
        if seconds < SLOW_MICROSECONDS / 1e6:
            problems.append("the rank was not slow")
        return 1, [f"{names}: {problem}" for problem in problems]

    def unflushed(self) -> list[str]:
        """Returns what a power cut could take apart although the save takes it for safe."""
        self._interrupt(None, "")
        problems = lost_by_power_cut(calls(self.prefix), self.folder / "run")
        return [f"{self.save.name}: {problem}" for problem in problems]

    def _points(self, committing: bool, every: bool) -> list[Call]:
        """Returns the calls of the save at which it can be killed."""
        self._interrupt(committing, "")
        made = calls(self.prefix)
        # strace counts by thread: whichever thread comes first to a number of calls is hit.
        first = {(call.name, call.number): call for call in reversed(made)}
        touching = [call for call in made if str(self.checkpoints) in call.text]
        wanted = [call for call in touching if every or CHANGING.match(call.name) or "O_CREAT" in call.text]
        missed = [call for call in wanted if first[call.name, call.number] is not call]
        assert not missed or self.world_size > 1 or every, f"cannot be hit: {', '.join(map(str, missed))}"
        return [call for call in wanted if call not in missed]

    def _interrupt(self, committing: bool | None, option: str, until: Callable[[], bool] = lambda: False) -> float:
        """Saves, with strace on the last rank while it writes or while the save is committed; None: throughout.

        Returns:
            How long the part took that was traced.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.checkpoints.mkdir(parents=True) if self.save.before else self.checkpoints.parent.mkdir(parents=True)
        self._save_before()
        ready, go = os.pipe(), os.pipe()

        def wait() -> None:
            if int(os.environ["RANK"]) == self.world_size - 1:
                os.write(ready[1], b".")
                os.read(go[0], 1)

        life = Life(self.world_size, lambda: self._work(committing, wait), self.folder / "output.txt")
        try:
            os.read(ready[0], 1)
            started = time.monotonic()
            with attached(life.pids[-1], self.prefix, ["-e", option] if option else []):
                os.write(go[1], b".")
                life.wait(LIFE_SECONDS, lambda: until() or life.codes[-1] is not None)
                life.wait(SURVIVOR_SECONDS)
            self.killed = life.codes[-1] == -signal.SIGKILL
            return time.monotonic() - started
        finally:
            life.kill()
            life.wait(LIFE_SECONDS)
            for end in (*ready, *go):
                os.close(end)

    def _save_before(self) -> None:
        store = CheckpointStore(self.checkpoints, OneRank(), keep_last=2)
        for step in self.save.before:
            _save(store, OneRank(), step, float(step), self.world_size)
        for name in LEFTOVERS if self.save is PRUNING else ():
            shutil.copytree(self.checkpoints / "step-00000001", self.checkpoints / name)

    def _work(self, committing: bool | None, wait: Callable[[], None]) -> None:
        allow_tracing()
        peers: Any = OneRank()
        if self.world_size > 1:
            from smoe_train.parallel.process import Process

            peers = Process.start()
        store = CheckpointStore(self.checkpoints, peers, keep_last=2)
        if not committing:
            wait()
        store.begin(**_content(peers.rank, self.save.step, self.save.value, self.world_size))
        while store.busy:
            time.sleep(0.001)
        if committing:
            wait()
        if committing is not False or self.world_size > 1:
            store.settle()

    def _problem(self, finished: bool = False) -> str:
        """Returns what is wrong with the folder after an interruption, or an empty text."""
        return _problem_of(lambda: self._judge(finished))

    def _judge(self, finished: bool) -> None:
        store = CheckpointStore(self.checkpoints, OneRank(), keep_last=2)
        for path in store.complete():
            Checkpoint.open(path).verify()
        checkpoint = store.newest_sound(lambda text: None)
        found = None if checkpoint is None else (checkpoint.step, _value(checkpoint, self.world_size))
        allowed = {(self.save.step, self.save.value)} if finished else self.save.allowed()
        assert found in allowed, f"a run would go on from {found}"
        if checkpoint is not None:
            Checkpoint.open(store.find("latest")).verify()
        later = self.save.step + 1
        _save(store, OneRank(), later, float(later), self.world_size)
        assert store.complete()[0].name == f"step-{later:08}"
        left = [path.name for path in self.checkpoints.iterdir() if path.name.startswith(".")]
        assert not left, f"leftovers after the next save: {left}"


def _content(rank: int, step: int, value: float, world_size: int) -> dict[str, Any]:
    """Returns a rank's arguments of a save of two tensors; rank 0 writes the tokenizer besides."""
    names = [f"rank-{rank}"] if world_size > 1 else ["rank-0", "experts-0"]
    files = {f"{name}.safetensors": {f"weight/{name}": torch.full((8, 8), value)} for name in names}
    return {"step": step, "files": files, "state": {"value": value}, "tokenizer": {"vocab.json": f"[{value}]".encode()}}


def _save(store: CheckpointStore, peers: Peers, step: int, value: float, world_size: int) -> None:
    """Saves what all ranks would, in one."""
    parts = [_content(rank, step, value, world_size) for rank in range(world_size)]
    files = {name: tensors for part in parts for name, tensors in part["files"].items()}
    store.save(**{**parts[0], "files": files})


def _value(checkpoint: Checkpoint, world_size: int) -> float:
    """Returns the one value that everything in a checkpoint must have.

    Raises:
        AssertionError: It is a mixture.
    """
    values = {float(checkpoint.state["value"])}
    for name in checkpoint.tensors:
        values |= set(checkpoint.tensor(name).unique().tolist())
    values.add(float((checkpoint.path / "tokenizer" / "vocab.json").read_text()[1:-1]))
    assert len(values) == 1, f"a mixture of {sorted(values)}"
    assert len(checkpoint.tensors) == 2, "tensors are missing"
    return values.pop()


def _problem_of(check: Callable[[], None]) -> str:
    try:
        check()
    except (AssertionError, CheckpointError, RunFailedError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


_RESULT = re.compile(r"\) += (?P<value>-?\d+)")
_DESCRIPTOR = re.compile(r"^\d+<(?P<path>[^>]*)>")
_NAME = re.compile(r'"(?P<path>[^"]*)"')


def lost_by_power_cut(made: Iterable[Call], folder: Path) -> list[str]:
    """Returns what was not on the disk when it was relied on.

    A file or folder that was changed is unsafe until it is flushed. Before a folder ``step-*`` or a pointer gets its
    name, nothing in it may be unsafe; in the end, no folder with such a name or with such folders in it.

    Args:
        made: The calls of a save.
        folder: The run's; what happens elsewhere does not count.
    """
    unsafe: dict[str, str] = {}
    found = []

    def change(path: str, text: str) -> None:
        if path.startswith(str(folder)):
            unsafe[path] = text

    for call in made:
        result, descriptor = _RESULT.search(call.text), _DESCRIPTOR.match(call.text)
        if result is None or int(result["value"]) < 0:
            continue
        names = [match["path"] for match in _NAME.finditer(call.text)]
        if call.name in ("fsync", "fdatasync") and descriptor is not None:
            unsafe.pop(descriptor["path"], None)
        elif re.match(r"p?write|ftruncate|fallocate|copy_file|sendfile", call.name) and descriptor is not None:
            change(descriptor["path"], "its content")
        elif call.name.startswith("mkdir") or (call.name.startswith("open") and "O_CREAT" in call.text):
            change(str(Path(names[0]).parent), f"the name {Path(names[0]).name} in it")
        elif call.name.startswith("rename"):
            source, target = names
            if re.match(r"(step-\d+|latest|best)$", Path(target).name):
                inside = [path for path in unsafe if path == source or path.startswith(f"{source}/")]
                found += [f"{Path(target).name} gets its name before {path}: {unsafe[path]}" for path in inside]
            for path in [path for path in unsafe if path == source or path.startswith(f"{source}/")]:
                unsafe[target + path[len(source) :]] = unsafe.pop(path)
            if not Path(target).name.startswith("."):  # what is thrown away may come back
                change(str(Path(target).parent), f"the name {Path(target).name} in it")
    shown = {path: text for path, text in unsafe.items() if "/." not in path}
    return found + [f"{path} is not flushed in the end: {text}" for path, text in shown.items()]

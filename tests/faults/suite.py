"""All modules of the fault suite, and running one of them in a process of its own."""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from faults.scenario import Outcome, Scale

# Far more than a module takes: one that hangs must not keep the suite from its end.
LIMIT_SECONDS = {"short": 600.0, "commit": 1800.0, "nightly": 8 * 3600.0}

MODULES = (
    "kills",
    "resumes",
    "system_calls",
    "corruption",
    "reshard",
    "disk",
    "sinks",
    "liveness",
    "numerics",
    "recipes",
    "data_files",
    "security",
)


@dataclass(frozen=True)
class ModuleResult:
    """What came of one module.

    Attributes:
        module: Its name.
        outcomes: What it returned.
        seconds: Wall time.
        error: Traceback or end of a module that did not return; empty if it did.
    """

    module: str
    outcomes: tuple[Outcome, ...]
    seconds: float
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether the module returned and every outcome is as promised."""
        return not self.error and bool(self.outcomes) and all(outcome.passed for outcome in self.outcomes)


def load(module: str) -> Callable[[Scale, Path], list[Outcome]]:
    """Returns a module's ``run``."""
    run: Callable[[Scale, Path], list[Outcome]] = importlib.import_module(f"faults.{module}").run
    return run


def run_module(module: str, scale: Scale, folder: Path) -> ModuleResult:
    """Runs a module in a forked process: an audit hook, a limit or a crash of one must not reach the next."""
    context = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder / "outcomes.pickle"
    started = time.monotonic()
    process = context.Process(target=_work, args=(module, scale, folder, answer))
    process.start()
    process.join(LIMIT_SECONDS[scale])
    if process.is_alive() and process.pid is not None:
        for one in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
            one.kill()
        process.join()
    seconds = time.monotonic() - started
    if not answer.is_file():
        return ModuleResult(module, (), seconds, f"ended with exit code {process.exitcode} before it returned")
    outcomes, error = pickle.loads(answer.read_bytes())
    return ModuleResult(module, tuple(outcomes), seconds, error)


def _work(module: str, scale: Scale, folder: Path, answer: Path) -> None:
    outcomes: list[Outcome] = []
    error = ""
    try:
        outcomes = load(module)(scale, folder)
    except BaseException:
        error = traceback.format_exc()
    answer.write_bytes(pickle.dumps((outcomes, error)))

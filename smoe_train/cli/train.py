"""``train``: check everything, prepare the data, create the run folder, start the workers."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, NoReturn

from smoe_train.cli.last_words import LOGS
from smoe_train.cli.launch import LaunchPlan, already_launched, build_command, plan_launch
from smoe_train.cli.launch import worker_environment as environment_of_workers
from smoe_train.cli.outputs import keep_going_without_console
from smoe_train.cli.supervise import Ended, Limits, run_restarting, stoppable, supervise
from smoe_train.errors import LaunchError, SmoeError

if TYPE_CHECKING:
    from smoe_train.recipe import Recipe
    from smoe_train.training.stop import StopRequest
    from smoe_train.training.watchdog import Watchdog

# What imports torch is imported in functions: it reads the environment of a process when it is loaded.
WORKER = "smoe_train.cli.worker_process"


@dataclass(frozen=True)
class TrainOptions:
    """What the command line said.

    Attributes:
        recipe: File or short name.
        overrides: ``key.path=value`` texts.
        nproc: Processes, or None for one (or what the hostfile says).
        launcher: ``auto``, ``torchrun``, ``deepspeed`` or ``in_process``.
        hostfile: Machines, or None.
        resume: ``auto``, ``never``, or the path of a checkpoint.
        output_dir: Folder of run folders.
        max_restarts: How often to start workers again that failed, were killed or hang.
    """

    recipe: str
    overrides: tuple[str, ...]
    nproc: int | None
    launcher: str
    hostfile: Path | None
    resume: str
    output_dir: Path
    max_restarts: int = 0

    def plan(self) -> LaunchPlan:
        """Returns how workers are started."""
        return plan_launch(self.launcher, self.nproc, self.hostfile, os.environ, self.max_restarts > 0)


def print_config(options: TrainOptions) -> None:
    """Prints the resolved recipe."""
    from smoe_train.recipe import load_recipe

    print(load_recipe(options.recipe, options.overrides, options.plan().nproc).to_yaml(), end="")


def print_plan(options: TrainOptions) -> None:
    """Prints what would be run, after every check that needs no process."""
    from smoe_train.cli.start import decide
    from smoe_train.cli.validate import show
    from smoe_train.recipe import load_recipe

    plan = options.plan()
    recipe = load_recipe(options.recipe, options.overrides, plan.nproc)
    show(recipe, plan.nproc)
    folder = options.output_dir / recipe.name
    start = decide(recipe, folder, options.resume, plan.nproc)
    if start.finished:
        print(start.nothing_to_do())
    else:
        print(f"run folder: {folder}, from {start.checkpoint.path.name if start.checkpoint else 'the beginning'}")
    for change in start.changes:
        print(f"changed since the run was started: {change}")
    if plan.launcher == "in_process":
        print("launch: in this process")
    else:
        print("launch:", " ".join(_command(plan, recipe, folder, options.resume)))


def train(options: TrainOptions) -> int:
    """Trains and returns the exit code.

    Raises:
        SmoeError: A mistake that shows before any worker starts; nothing is left behind.
    """
    started = time.monotonic()
    keep_going_without_console()
    if already_launched(os.environ):
        return _train_as_worker(options)
    with stoppable():
        return _train_as_command(options, started)


def _train_as_command(options: TrainOptions, started: float) -> int:
    plan = options.plan()
    if plan.launcher == "in_process":
        os.environ.update(environment_of_workers(1, os.environ))  # before torch is imported
    from smoe_train.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides, plan.nproc)
    run_folder = options.output_dir / recipe.name
    from smoe_train.cli.run_folder import held
    from smoe_train.cli.start import begin, decide

    start = decide(recipe, run_folder, options.resume, plan.nproc)
    if start.finished:
        print(start.nothing_to_do(), file=sys.stderr)
        return 0
    with held(run_folder):
        begin(start)
        print(f"run {run_folder}: {plan.nproc} process{'es' if plan.nproc > 1 else ''}", file=sys.stderr)
        code = SmoeError.exit_code
        try:
            if plan.launcher == "in_process":
                code = _train_here(recipe, run_folder, options.resume, started)
            else:
                code = _train_in_workers(plan, recipe, run_folder, options, started)
        finally:
            if code != 0 and options.resume not in ("auto", "never"):
                # Whatever has been said of the same command: it would begin there again.
                print("note: --resume auto goes on from here; --resume PATH would begin there again", file=sys.stderr)
        return code


def _command(plan: LaunchPlan, recipe: Recipe, run_folder: Path, resume: str) -> list[str]:
    arguments = ["--run-folder", str(run_folder.absolute()), "--resume", resume]
    if recipe.training.hang_seconds is not None:
        arguments += ["--hang-seconds", str(recipe.training.hang_seconds)]
    return build_command(plan, WORKER, arguments, recipe.training.grace_seconds)


def _train_in_workers(plan: LaunchPlan, recipe: Recipe, run_folder: Path, options: TrainOptions, started: float) -> int:
    from smoe_train.checkpoint.folders import CHECKPOINTS, complete_checkpoints, step_of
    from smoe_train.training.stop import STARTED

    environment = {**environment_of_workers(plan.nproc, os.environ, plan.hostfile is None), STARTED: str(started)}
    # Workers on other machines have process ids of their own there; they report a hang themselves.
    watched = plan.nproc if plan.hostfile is None else 0
    limits = Limits(watched, recipe.training.grace_seconds, recipe.training.hang_seconds)

    def newest_step() -> int:
        found = complete_checkpoints(run_folder / CHECKPOINTS)
        return step_of(found[0]) if found else 0

    def attempt(received: list[Signals], restart: bool) -> Ended:
        # Before its first checkpoint a run starts where it was told to; then from its own newest.
        resume = "auto" if restart and newest_step() > 0 else options.resume
        return supervise(_command(plan, recipe, run_folder, resume), environment, run_folder / LOGS, limits, received)

    return run_restarting(attempt, options.max_restarts, newest_step)


def _train_here(recipe: Recipe, run_folder: Path, resume: str, started: float) -> int:
    from smoe_train.cli.outputs import log_to
    from smoe_train.cli.worker import train_worker
    from smoe_train.training.stop import StopRequest

    stop = StopRequest(started)
    stop.listen(second_ends=True)
    log_to(run_folder / LOGS)
    with _watchdog(recipe, run_folder, stop) as watchdog:
        train_worker(run_folder, resume, stop, watchdog=watchdog)
    return 0


def _watchdog(recipe: Recipe, run_folder: Path, stop: StopRequest) -> Watchdog:
    """Returns what watches a process that has no parent of ours to do it."""
    from smoe_train.training.watchdog import Watchdog

    rank = int(os.environ.get("RANK", "0"))

    def print_end(_code: int, message: str) -> None:
        print(f"error: rank {rank}: {message}", file=sys.stderr)

    watchdog = Watchdog(run_folder / LOGS, rank, recipe.training.hang_seconds, print_end, alone=True)
    watchdog.end_after(stop, recipe.training.grace_seconds)
    return watchdog


def _train_as_worker(options: TrainOptions) -> NoReturn:
    """Acts as one worker of a job that somebody else has launched (torchrun, srun), and ends the process."""
    from smoe_train.training.stop import StopRequest

    if options.max_restarts:
        raise LaunchError("--max-restarts: whoever launched this worker restarts it (torchrun has the same option)")
    stop = StopRequest()
    from smoe_train.assembly import start_process
    from smoe_train.cli.outputs import log_to
    from smoe_train.cli.run_folder import held
    from smoe_train.cli.start import begin, decide
    from smoe_train.cli.worker import leave, run_worker, train_worker
    from smoe_train.recipe import load_recipe

    with contextlib.ExitStack() as stack:

        def work() -> None:
            recipe = load_recipe(options.recipe, options.overrides, int(os.environ["WORLD_SIZE"]))
            run_folder = options.output_dir / recipe.name
            process = start_process(recipe)
            stop.listen(second_ends=False)  # before, there was nothing to save: a signal ended the process
            problem, nothing = None, None
            if process.is_first:
                try:
                    start = decide(recipe, run_folder, options.resume, process.world_size)
                    nothing = start.nothing_to_do() if start.finished else None
                    if nothing is None:
                        stack.enter_context(held(run_folder))
                        begin(start)
                except SmoeError as error:
                    problem = error
            if nothing is not None:
                print(nothing, file=sys.stderr)
            go_on = process.broadcast_object(problem is None and nothing is None)
            if problem is not None:
                raise problem
            if go_on:
                log_to(run_folder / LOGS)
                with _watchdog(recipe, run_folder, stop) as watchdog:
                    train_worker(run_folder, options.resume, stop, process, watchdog)

        code = run_worker(work, logs=None)
    leave(code)

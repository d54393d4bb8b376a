"""``train``: check everything, prepare the data, create the run folder, start the workers."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from smoe_train.cli.launch import LaunchPlan, already_launched, build_command, plan_launch, run_workers
from smoe_train.cli.launch import worker_environment as environment_of_workers
from smoe_train.errors import SmoeError

# What imports torch is imported in functions: it reads the environment of a process when it is loaded.
WORKER = "smoe_train.cli.worker"


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
    """

    recipe: str
    overrides: tuple[str, ...]
    nproc: int | None
    launcher: str
    hostfile: Path | None
    resume: str
    output_dir: Path

    def plan(self) -> LaunchPlan:
        """Returns how workers are started."""
        return plan_launch(self.launcher, self.nproc, self.hostfile, os.environ)


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
        print("launch:", " ".join(build_command(plan, WORKER, _arguments(folder, options.resume))))


def train(options: TrainOptions) -> int:
    """Trains and returns the exit code.

    Raises:
        SmoeError: A mistake that shows before any worker starts; nothing is left behind.
    """
    if already_launched(os.environ):
        return _train_as_worker(options)
    plan = options.plan()
    if plan.launcher == "in_process":
        os.environ.update(environment_of_workers(1, os.environ))  # before torch is imported
    from smoe_train.cli.run_folder import LOGS, held
    from smoe_train.cli.start import begin, decide
    from smoe_train.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides, plan.nproc)
    run_folder = options.output_dir / recipe.name
    start = decide(recipe, run_folder, options.resume, plan.nproc)
    if start.finished:
        print(start.nothing_to_do(), file=sys.stderr)
        return 0
    with held(run_folder):
        begin(start)
        print(f"run {run_folder}: {plan.nproc} process{'es' if plan.nproc > 1 else ''}", file=sys.stderr)
        if plan.launcher == "in_process":
            return _train_here(run_folder, options.resume)
        command = build_command(plan, WORKER, _arguments(run_folder, options.resume))
        return run_workers(command, environment_of_workers(plan.nproc, os.environ), run_folder / LOGS)


def _arguments(run_folder: Path, resume: str) -> list[str]:
    return ["--run-folder", str(run_folder.absolute()), "--resume", resume]


def _train_here(run_folder: Path, resume: str) -> int:
    from smoe_train.cli.run_folder import LOGS
    from smoe_train.cli.worker import log_to, train_worker
    from smoe_train.training.stop import StopRequest

    stop = StopRequest()
    stop.listen(second_ends=True)
    log_to(run_folder / LOGS)
    train_worker(run_folder, resume, stop)
    return 0


def _train_as_worker(options: TrainOptions) -> NoReturn:
    """Acts as one worker of a job that somebody else has launched (torchrun, srun), and ends the process."""
    from smoe_train.assembly import start_process
    from smoe_train.cli.run_folder import LOGS, held
    from smoe_train.cli.start import begin, decide
    from smoe_train.cli.worker import leave, log_to, run_worker, train_worker
    from smoe_train.recipe import load_recipe
    from smoe_train.training.stop import StopRequest

    stop = StopRequest()
    stop.listen(second_ends=False)
    with contextlib.ExitStack() as stack:

        def work() -> None:
            recipe = load_recipe(options.recipe, options.overrides, int(os.environ["WORLD_SIZE"]))
            run_folder = options.output_dir / recipe.name
            process = start_process(recipe)
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
                train_worker(run_folder, options.resume, stop, process)

        leave(run_worker(work, logs=None))

"""``train``: check everything, prepare the data, create the run folder, start the workers."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smoe_train.cli.launch import LaunchPlan, already_launched, build_command, plan_launch, run_workers
from smoe_train.cli.launch import worker_environment as environment_of_workers
from smoe_train.cli.run_folder import LOGS, RECIPE, create, held, store_of
from smoe_train.errors import CheckpointError
from smoe_train.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from smoe_train.checkpoint import Checkpoint
    from smoe_train.data import TokenStore

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
    print(load_recipe(options.recipe, options.overrides, options.plan().nproc).to_yaml(), end="")


def print_plan(options: TrainOptions) -> None:
    """Prints what would be run, after every check that needs no process."""
    from smoe_train.cli.validate import validate

    plan = options.plan()
    recipe = load_recipe(options.recipe, options.overrides, plan.nproc)
    validate(options.recipe, options.overrides, plan.nproc, as_json=False)
    folder = options.output_dir / recipe.name
    print(f"\nrun folder: {folder}{' (exists)' if folder.exists() else ''}")
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
    recipe = load_recipe(options.recipe, options.overrides, plan.nproc)
    run_folder = options.output_dir / recipe.name
    _check_start(recipe, run_folder, options.resume)
    with held(run_folder):
        create(run_folder, recipe, options.resume)
        print(f"run {run_folder}: {plan.nproc} process{'es' if plan.nproc > 1 else ''}", file=sys.stderr)
        if plan.launcher == "in_process":
            return _train_here(run_folder, options.resume)
        command = build_command(plan, WORKER, _arguments(run_folder, options.resume))
        return run_workers(command, environment_of_workers(plan.nproc, os.environ), run_folder / LOGS)


def _arguments(run_folder: Path, resume: str) -> list[str]:
    return ["--run-folder", str(run_folder.absolute()), "--resume", resume]


def _train_here(run_folder: Path, resume: str) -> int:
    from smoe_train.cli.worker import log_to, train_worker
    from smoe_train.training.stop import StopRequest

    stop = StopRequest()
    stop.listen(second_ends=True)
    log_to(run_folder / LOGS)
    train_worker(run_folder, resume, stop)
    return 0


def _train_as_worker(options: TrainOptions) -> int:
    """Acts as one worker of a job that somebody else has launched (torchrun, srun)."""
    from smoe_train.assembly import start_process
    from smoe_train.cli.worker import exit_code_of, train_worker
    from smoe_train.training.stop import StopRequest

    recipe = load_recipe(options.recipe, options.overrides, int(os.environ["WORLD_SIZE"]))
    run_folder = options.output_dir / recipe.name
    stop = StopRequest()
    stop.listen(second_ends=False)

    def work() -> None:
        process = start_process(recipe)
        if process.is_first:
            _check_start(recipe, run_folder, options.resume)
            create(run_folder, recipe, options.resume)
        process.barrier()
        train_worker(run_folder, options.resume, stop)

    return exit_code_of(work, run_folder / LOGS)


def _check_start(recipe: Recipe, run_folder: Path, resume: str) -> None:
    """Reads the data, and refuses what cannot be resumed, before anything is written to the run folder."""
    checkpoint = _starting_point(run_folder, resume)
    tokens = _prepare_data(recipe)
    if checkpoint is not None:
        from smoe_train.assembly import check_identity, identity

        check_identity(identity(recipe, tokens), checkpoint)


def _starting_point(run_folder: Path, resume: str) -> Checkpoint | None:
    """Returns a checkpoint of the run that shall go on, or None to start anew; workers verify and choose again."""
    if resume == "never" or (resume == "auto" and not (run_folder / RECIPE).is_file()):
        return None
    from smoe_train.checkpoint import Checkpoint

    if resume != "auto":
        checkpoint = Checkpoint.open(Path(resume))
        checkpoint.verify()
        return checkpoint
    store = store_of(run_folder)
    for path in store.complete():
        with contextlib.suppress(CheckpointError):
            return Checkpoint.open(path)
    leftovers = sorted(path.name for path in store.folder.glob("step-*"))
    if leftovers:
        raise CheckpointError(
            f"{run_folder}: has checkpoints but none is complete ({', '.join(leftovers)}); remove them to start again"
        )
    return None


def _prepare_data(recipe: Recipe) -> TokenStore:
    """Reads and tokenizes the data once, here, where a mistake ends in one message."""
    from smoe_train.data import prepare

    tokens = prepare(recipe.data, recipe.tokenizer)
    counts = ", ".join(f"{split} {len(tokens.tokens(split)):,}" for split in tokens.splits)
    print(f"data {recipe.data.source}: tokens {counts}", file=sys.stderr)
    return tokens

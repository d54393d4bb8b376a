"""What each process of a training run does, from joining its peers to the last checkpoint."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from smoe_train.assembly import (
    AnyStore,
    build_trainer,
    check_identity,
    open_journal,
    prepare_data,
    report_task,
    run_tokenizer,
    start_process,
)
from smoe_train.checkpoint import Checkpoint, CheckpointStore
from smoe_train.checkpoint.folders import CHECKPOINTS
from smoe_train.cli.launch import die_with_parent, write_worker_error
from smoe_train.cli.run_folder import LOGS
from smoe_train.data import ExampleStore
from smoe_train.errors import SmoeError
from smoe_train.recipe import RECIPE, Recipe, load_recipe
from smoe_train.reporting import environment, write_environment, write_report
from smoe_train.training.stop import StopRequest
from smoe_train.training.trainer import Trainer

if TYPE_CHECKING:
    from smoe_train.parallel.process import Process

logger = logging.getLogger("smoe_train")
logger.addHandler(logging.NullHandler())  # without one, Python would print what is logged


def train_worker(run_folder: Path, resume: str, stop: StopRequest, process: Process | None = None) -> None:
    """Trains the recipe of a run folder to its end, together with the other ranks.

    Args:
        run_folder: Holds ``recipe.yaml``.
        resume: ``auto``, ``never``, or the path of a checkpoint.
        stop: Whether the run was asked to stop.
        process: This process, if it has been started already.
    """
    recipe = load_recipe(str(run_folder / RECIPE), resolved=True)
    process = process or start_process(recipe)
    store = CheckpointStore(run_folder / CHECKPOINTS, process, recipe.checkpoint.keep_last)
    checkpoint = choose_checkpoint(store, resume)
    trainer = build_trainer(recipe, process, run_folder, stop, resumes=checkpoint is not None)
    data = prepare_data(recipe, run_tokenizer(run_folder))
    try:
        if checkpoint is not None:
            check_identity(recipe, data, checkpoint)
            trainer.resume(checkpoint)
        step = checkpoint.step if checkpoint is not None else None
        logger.info("rank %d of %d starts at step %d", process.rank, process.world_size, step or 0)
        if process.is_first:
            _record_environment(recipe, data, run_folder, trainer)
            own = checkpoint is None or trainer.store.holds(checkpoint)
            trainer.journal = open_journal(recipe, run_folder, step if own else None)
            if step is not None:
                trainer.journal.note(f"resumed from {checkpoint.path if checkpoint else ''}")
        trainer.train()
        if isinstance(data, ExampleStore):
            _report_task(trainer, recipe, data, run_folder)
    finally:
        if trainer.journal is not None:
            trainer.journal.close()
    if process.is_first:
        _write_report(run_folder)
    process.barrier()
    trainer.engine.close()
    process.stop()


def _report_task(trainer: Trainer, recipe: Recipe, data: ExampleStore, run_folder: Path) -> None:
    """Evaluates the best checkpoint on the splits that are reported once."""
    best = trainer.process.broadcast_object(trainer.store.find("best") if trainer.process.is_first else None)
    checkpoint = Checkpoint.open(best)
    results = report_task(trainer.model, recipe, data, checkpoint, run_folder, trainer.process)
    if trainer.journal is not None:
        shared = {"step": checkpoint.step, "tokens": trainer.state.tokens}
        trainer.journal.metrics([{**shared, "split": one.split, "score": one.score, **one.metrics} for one in results])
        for one in results:
            figures = ", ".join(f"{name} {value:.4f} ({one.constant[name]:.4f})" for name, value in one.metrics.items())
            trainer.journal.note(f"{one.split}, checkpoint of step {checkpoint.step}: {figures}; constant in brackets")


def choose_checkpoint(store: CheckpointStore, resume: str) -> Checkpoint | None:
    """Returns the checkpoint to start from, verified, or None to start anew."""
    if resume == "never":
        return None
    if resume == "auto":
        return store.newest_sound(warn=lambda text: print(f"warning: {text}", file=sys.stderr))
    checkpoint = Checkpoint.open(Path(resume))
    checkpoint.verify()
    return checkpoint


def _write_report(run_folder: Path) -> None:
    """Writes the report; a run that has trained to its end does not fail for lack of one."""
    try:
        write_report(run_folder)
    except (SmoeError, OSError) as error:
        logger.warning("no report: %s", error)
        print(f"warning: no report: {error}; try `smoe-train report {run_folder}`", file=sys.stderr)


def _record_environment(recipe: Recipe, data: AnyStore, run_folder: Path, trainer: Trainer) -> None:
    topology = {
        "world_size": trainer.process.world_size,
        "expert_parallel_size": trainer.expert_parallel_size,
        "zero_stage": recipe.parallel.zero_stage,
        "precision": recipe.parallel.precision,
        "device": str(trainer.process.device),
    }
    write_environment(run_folder, environment(topology, data.checksums()))


def log_to(logs: Path) -> None:
    """Sends this rank's log to its own file."""
    logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(logs / f"rank-{os.environ.get('RANK', '0')}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def run_worker(work: Callable[[], None], logs: Path | None) -> int:
    """Runs a worker's work and returns its exit code.

    Args:
        work: What to do.
        logs: Where to leave word for the parent of what went wrong; None prints it, as there is no parent of ours.
    """
    rank = int(os.environ["RANK"])
    try:
        work()
    except SmoeError as error:
        code, message = error.exit_code, str(error)
        logger.error("%s", message)
    except Exception:
        code, message = 1, traceback.format_exc()
        logger.exception("failed")
    else:
        return 0
    if logs is None:
        print(f"rank {rank}: {message}", file=sys.stderr)
    else:
        write_worker_error(logs, rank, code, message)
    return code


def main() -> None:
    """Entry of a launched worker process."""
    die_with_parent()
    faulthandler.enable()
    parser = argparse.ArgumentParser(prog="python -m smoe_train.cli.worker")
    parser.add_argument("--run-folder", type=Path, required=True)
    parser.add_argument("--resume", default="auto")
    arguments = parser.parse_args()
    stop = StopRequest()
    stop.listen(second_ends=False)  # the parent kills on a second one; a scheduler may signal workers too
    logs = arguments.run_folder / LOGS
    log_to(logs)
    leave(run_worker(lambda: train_worker(arguments.run_folder, arguments.resume, stop), logs))


def leave(code: int) -> NoReturn:
    """Ends this process at once: peers may sit in a collective that this rank has left, and waiting hangs both."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

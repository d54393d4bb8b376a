"""What each process of a training run does, from joining its peers to the last checkpoint."""

from __future__ import annotations

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
from smoe_train.cli.last_words import write_worker_error
from smoe_train.data import ExampleStore
from smoe_train.errors import RunStoppedError, SmoeError
from smoe_train.recipe import RECIPE, Recipe, load_recipe
from smoe_train.reporting import METRICS, Record, environment, read_records, write_environment, write_report
from smoe_train.training.stop import StopRequest
from smoe_train.training.trainer import Trainer
from smoe_train.training.watchdog import END, Watchdog

if TYPE_CHECKING:
    from smoe_train.parallel.process import Process

logger = logging.getLogger("smoe_train")


def train_worker(
    run_folder: Path,
    resume: str,
    stop: StopRequest,
    process: Process | None = None,
    watchdog: Watchdog | None = None,
) -> None:
    """Trains the recipe of a run folder to its end, together with the other ranks.

    Args:
        run_folder: Holds ``recipe.yaml``.
        resume: ``auto``, ``never``, or the path of a checkpoint.
        stop: Whether the run was asked to stop.
        process: This process, if it has been started already.
        watchdog: Ends this process if it hangs.

    Raises:
        RunStoppedError: The run was asked to stop.
    """
    recipe = load_recipe(str(run_folder / RECIPE), resolved=True)
    stop.limit(recipe.training.max_seconds)
    process = process or start_process(recipe)
    store = CheckpointStore(run_folder / CHECKPOINTS, process, recipe.checkpoint.keep_last)
    checkpoint = choose_checkpoint(store, resume)
    trainer = build_trainer(recipe, process, run_folder, stop, resumes=checkpoint is not None)
    data = prepare_data(recipe, run_tokenizer(run_folder))
    if watchdog is not None:
        watchdog.watch(trainer)
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
        if process.any(stop.requested):
            text = f"stopped {stop.reason} before step {(step or 0) + 1}; the same command resumes the run"
            none_made = ", but no step was made: raise training.max_seconds" if stop.signal is None else ""
            raise RunStoppedError(text + none_made)
        trainer.train()
        trainer.beat(END)
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
    checkpoint.verify()
    result = report_task(trainer.model, recipe, data, checkpoint, run_folder, trainer.process)
    if result is None or trainer.journal is None:
        return
    shared = {"step": checkpoint.step, "tokens": trainer.state.tokens}
    records: list[Record] = [{**shared, "split": one.split, "score": one.score, **one.metrics} for one in result.splits]
    before = read_records(run_folder / METRICS)  # a run that was killed between the two comes here again
    trainer.journal.metrics([record for record in records if record not in before])
    for one in result.splits:
        figures = ", ".join(f"{name} {value:.4f} ({one.constant[name]:.4f})" for name, value in one.metrics.items())
        trainer.journal.note(f"{one.split}, checkpoint of step {checkpoint.step}: {figures}; constant in brackets")
    result.write(run_folder)  # the last of all: a run with results counts as finished


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
        "expert_parallel_size": recipe.parallel.expert_parallel_size,
        "zero_stage": recipe.parallel.zero_stage,
        "precision": recipe.parallel.precision,
        "device": str(trainer.process.device),
    }
    write_environment(run_folder, environment(topology, data.checksums()))


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
    try:
        if logs is not None:
            write_worker_error(logs, rank, code, message)
    except OSError:  # the disk that this rank failed of, perhaps
        logs = None
    if logs is None:
        print(f"rank {rank}: {message}", file=sys.stderr)
    return code


def leave(code: int) -> NoReturn:
    """Ends this process at once: peers may sit in a collective that this rank has left, and waiting hangs both."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

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
from typing import NoReturn

from smoe_train.assembly import CHECKPOINTS, build_trainer, check_identity, open_journal, start_process
from smoe_train.checkpoint import Checkpoint, CheckpointStore
from smoe_train.cli.launch import die_with_parent, write_worker_error
from smoe_train.cli.run_folder import LOGS, RECIPE
from smoe_train.errors import SmoeError
from smoe_train.recipe import Recipe, load_recipe
from smoe_train.reporting import environment, write_environment, write_report
from smoe_train.training.stop import StopRequest
from smoe_train.training.trainer import Trainer

logger = logging.getLogger("smoe_train")


def train_worker(run_folder: Path, resume: str, stop: StopRequest) -> None:
    """Trains the recipe of a run folder to its end, together with the other ranks.

    Args:
        run_folder: Holds ``recipe.yaml``.
        resume: ``auto``, ``never``, or the path of a checkpoint.
        stop: Whether the run was asked to stop.
    """
    recipe = load_recipe(str(run_folder / RECIPE))
    process = start_process(recipe)
    trainer = build_trainer(recipe, process, run_folder, stop)
    try:
        checkpoint = choose_checkpoint(trainer.store, resume)
        if checkpoint is not None:
            check_identity(trainer.identity, checkpoint)
            trainer.resume(checkpoint)
        step = checkpoint.step if checkpoint is not None else None
        logger.info("rank %d of %d starts at step %d", process.rank, process.world_size, step or 0)
        if process.is_first:
            _record_environment(recipe, run_folder, trainer)
            own = checkpoint is None or checkpoint.path.parent.resolve() == (run_folder / CHECKPOINTS).resolve()
            trainer.journal = open_journal(recipe, run_folder, step if own else None)
            if step is not None:
                trainer.journal.note(f"resumed from {checkpoint.path if checkpoint else ''}")
        trainer.train()
    finally:
        if trainer.journal is not None:
            trainer.journal.close()
    if process.is_first:
        write_report(run_folder)
    process.barrier()
    trainer.engine.close()
    process.stop()


def choose_checkpoint(store: CheckpointStore, resume: str) -> Checkpoint | None:
    """Returns the checkpoint to start from, verified, or None to start anew."""
    if resume == "never":
        return None
    if resume == "auto":
        return store.newest_sound(warn=lambda text: print(f"warning: {text}", file=sys.stderr))
    checkpoint = Checkpoint.open(Path(resume))
    checkpoint.verify()
    return checkpoint


def _record_environment(recipe: Recipe, run_folder: Path, trainer: Trainer) -> None:
    from smoe_train.data import prepare

    topology = {
        "world_size": trainer.process.world_size,
        "expert_parallel_size": trainer.expert_parallel_size,
        "zero_stage": recipe.parallel.zero_stage,
        "precision": recipe.parallel.precision,
        "device": str(trainer.process.device),
    }
    checksums = prepare(recipe.data, recipe.tokenizer).checksums()
    write_environment(run_folder, environment(topology, checksums))


def log_to(logs: Path) -> None:
    """Sends this rank's log to its own file."""
    logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(logs / f"rank-{os.environ.get('RANK', '0')}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def exit_code_of(work: Callable[[], None], logs: Path) -> int:
    """Runs a launched worker's work; what goes wrong is left in ``logs`` for the parent, and its exit code returned."""
    log_to(logs)
    rank = int(os.environ["RANK"])
    try:
        work()
    except SmoeError as error:
        logger.error("%s", error)
        write_worker_error(logs, rank, error.exit_code, str(error))
        return error.exit_code
    except Exception:
        logger.exception("failed")
        write_worker_error(logs, rank, 1, traceback.format_exc())
        return 1
    return 0


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
    leave(exit_code_of(lambda: train_worker(arguments.run_folder, arguments.resume, stop), arguments.run_folder / LOGS))


def leave(code: int) -> NoReturn:
    """Ends this process at once: peers may sit in a collective that this rank has left, and waiting hangs both."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()

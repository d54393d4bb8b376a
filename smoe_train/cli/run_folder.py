"""The folder of a run: where it is, who may write to it, and which checkpoint a command means by it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from smoe_train.bounded import leading_out, read_json
from smoe_train.checkpoint.folders import CHECKPOINTS, MANIFEST
from smoe_train.checkpoint.manifest import Checkpoint
from smoe_train.checkpoint.store import CheckpointStore
from smoe_train.cli.last_words import LOGS
from smoe_train.durable import write_file
from smoe_train.errors import CheckpointError, LaunchError, printable
from smoe_train.recipe import RECIPE, Recipe, load_recipe

LOCK = ".lock"
OWNER = ".owner.json"


class OneRank:
    """Stands in for the ranks where this process looks at checkpoints alone."""

    rank = 0

    def gather_objects(self, item: object) -> list[object]:
        """Returns the one object there is."""
        return [item]

    def broadcast_object(self, item: object) -> object:
        """Returns the object itself."""
        return item


def store_of(run_folder: Path) -> CheckpointStore:
    """Returns a run's checkpoints, for reading."""
    return CheckpointStore(run_folder / CHECKPOINTS, OneRank(), keep_last=1)


def create(run_folder: Path, recipe: Recipe, keep_old: bool) -> None:
    """Creates the folder of a run, or takes up the one that is there, and writes the resolved recipe.

    Args:
        run_folder: The folder.
        recipe: What it runs.
        keep_old: Whether to keep a recipe that is there as ``recipe.before-N.yaml``.

    Raises:
        LaunchError: The folder cannot be written.
    """
    try:
        (run_folder / LOGS).mkdir(parents=True, exist_ok=True)
        if keep_old and (run_folder / RECIPE).is_file():
            number = 1 + len(list(run_folder.glob("recipe.before-*.yaml")))
            # A copy: whenever this process is killed, the run has a recipe.
            write_file(run_folder / f"recipe.before-{number}.yaml", (run_folder / RECIPE).read_bytes())
        write_file(run_folder / RECIPE, recipe.to_yaml().encode())
    except OSError as error:
        raise LaunchError(f"{run_folder}: cannot be written: {error.strerror}; choose another --output-dir") from error


@contextmanager
def held(run_folder: Path) -> Iterator[None]:
    """Keeps other commands from writing to a run, whose folder is created.

    The kernel frees the lock of a dead process. Who holds it is written beside it, for the message to those that are
    refused; a note that its writer has left behind tells the next command of the crash.

    Raises:
        LaunchError: Another command holds it, it cannot be written, or a link in it leads to another place.
    """
    lock = FileLock(run_folder / LOCK)
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        if links := leading_out(run_folder, "*", "*/*"):
            raise LaunchError(
                f"{links[0]}: is a link out of the run folder, and nothing outside of it is written; move there what "
                "it leads to, or let the run folder itself be the link"
            )
        lock.acquire(timeout=0)
    except Timeout:
        who = _owner(run_folder) or "who it is has not been written down"
        raise LaunchError(
            f"{run_folder}: another command is training in this folder ({who}); wait for it or stop it"
        ) from None
    except OSError as error:
        raise _not_writable(run_folder, error) from error
    try:
        left = _owner(run_folder)
        if left is not None:
            print(printable(f"{run_folder}: the command before ended without cleaning up ({left})"), file=sys.stderr)
        _write_owner(run_folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            (run_folder / OWNER).unlink()
        lock.release()


def _owner(run_folder: Path) -> str | None:
    try:
        owner = read_json(run_folder / OWNER)
        return f"pid {owner['pid']} on {owner['host']}, started {owner['started']}: {owner['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_owner(run_folder: Path) -> None:
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
    }
    try:
        write_file(run_folder / OWNER, json.dumps(owner).encode())
    except OSError as error:
        raise _not_writable(run_folder, error) from error


def _not_writable(run_folder: Path, error: OSError) -> LaunchError:
    return LaunchError(f"{run_folder}: cannot be written: {error.strerror}; choose another --output-dir")


def open_run(run_or_checkpoint: Path, which: str) -> tuple[Path, Recipe, Checkpoint]:
    """Returns the run folder, its recipe and a verified checkpoint, from the path of a run or of a checkpoint.

    Args:
        run_or_checkpoint: A run folder, or one of its checkpoints.
        which: ``latest`` or ``best``, for a run folder.

    Raises:
        CheckpointError: There is no such run or checkpoint, or it is damaged.
    """
    if (run_or_checkpoint / MANIFEST).is_file():
        run_folder, path = run_or_checkpoint.resolve().parent.parent, run_or_checkpoint
    elif (run_or_checkpoint / RECIPE).is_file():
        run_folder, path = run_or_checkpoint, store_of(run_or_checkpoint).find(which)
    else:
        raise CheckpointError(f"{run_or_checkpoint}: is neither a run folder nor a complete checkpoint")
    if not (run_folder / RECIPE).is_file():
        raise CheckpointError(f"{run_or_checkpoint}: the run's {RECIPE} is missing from {run_folder}")
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    return run_folder, load_recipe(str(run_folder / RECIPE), resolved=True), checkpoint

"""The names of checkpoints, and which one is meant: nothing here reads more than a folder and a pointer."""

from __future__ import annotations

import re
from pathlib import Path

from smoe_train.bounded import read_bounded
from smoe_train.errors import CheckpointError

CHECKPOINTS = "checkpoints"  # folder of a run that holds them
MANIFEST = "manifest.json"  # what makes a folder a complete checkpoint
_STEP_NAME = re.compile(r"step-(\d{8,})\Z")


def step_name(step: int) -> str:
    """Returns the folder name of a step."""
    return f"step-{step:08d}"


def is_step_name(name: str) -> bool:
    """Returns whether a folder is named as checkpoints are."""
    return _STEP_NAME.match(name) is not None


def step_of(path: Path) -> int:
    """Returns the step of a checkpoint's folder."""
    return int(path.name.rpartition("-")[2])


def checkpoint_folders(folder: Path) -> list[Path]:
    """Returns the folders in a folder that are named as checkpoints are, newest first by step."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if is_step_name(path.name) and not path.is_symlink() and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder that have a manifest, newest first by step."""
    return [path for path in checkpoint_folders(folder) if (path / MANIFEST).is_file()]


def find_checkpoint(folder: Path, which: str) -> Path:
    """Returns the checkpoint that ``latest`` or ``best`` means: the newest complete one, or the one pointed to.

    Raises:
        CheckpointError: There is none.
    """
    if which not in ("latest", "best"):
        raise CheckpointError(f"{folder}: {which!r} names no checkpoint; say latest or best, or give its path")
    complete = complete_checkpoints(folder)
    path = pointed(folder, which) if which == "best" else next(iter(complete), None)
    if path is None or path not in complete:
        raise CheckpointError(f"{folder}: holds no {which} checkpoint")
    return path


def pointed(folder: Path, name: str) -> Path | None:
    """Returns the folder that a pointer names, which may not exist; None if it names none that can be."""
    try:
        target = read_bounded(folder / name, 1000).decode().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / target if _STEP_NAME.match(target) else None

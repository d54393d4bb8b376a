"""``checkpoint list | show | verify | prune``: what a run has saved, whether it is sound, and removing what is old."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from smoe_train.checkpoint import Checkpoint
from smoe_train.checkpoint.damage import EXPERT_TENSOR, place, spans
from smoe_train.checkpoint.folders import CHECKPOINTS, MANIFEST, checkpoint_folders, find_checkpoint, pointed, step_of
from smoe_train.cli.run_folder import held, store_of
from smoe_train.errors import CheckpointError, printable
from smoe_train.recipe import RECIPE


def list_checkpoints(run: Path, as_json: bool) -> None:
    """Prints every checkpoint of a run, newest first, and whether it is complete; no tensor is read.

    Raises:
        CheckpointError: There is no such run.
    """
    folder = folder_of(run)
    rows = [_outline(path, folder) for path in checkpoint_folders(folder)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        print(f"{run}: holds no checkpoint yet")
        return
    table = Table("step", "", "tokens", "MB", "processes", "experts over", "state", title=str(run))
    for row in rows:
        processes, size = (str(row.get(key, "")) for key in ("world_size", "expert_parallel_size"))
        megabytes = f"{row['bytes'] / 1e6:,.1f}" if "bytes" in row else ""
        tokens = f"{row['tokens']:,}" if "tokens" in row else ""
        state = "complete" if row["problem"] is None else "damaged, see below"
        table.add_row(str(row["step"]), ", ".join(row["marks"]), tokens, megabytes, processes, size, state)
    console = Console()
    console.print(table)
    for row in rows:
        if row["problem"] is not None:
            console.print(f"step {row['step']}: {row['problem']}", markup=False, highlight=False, soft_wrap=True)


def _outline(path: Path, folder: Path) -> dict[str, Any]:
    complete = (path / MANIFEST).is_file()
    newest = next((one for one in checkpoint_folders(folder) if (one / MANIFEST).is_file()), None)
    marks = ["latest"] * (path == newest) + ["best"] * (complete and path == pointed(folder, "best"))
    row: dict[str, Any] = {"checkpoint": str(path), "step": step_of(path), "marks": marks, "problem": None}
    try:
        checkpoint = Checkpoint.open(path)
        row |= _facts(checkpoint)
        checkpoint.verify_sizes()
    except CheckpointError as error:
        row["problem"] = _without_path(error, path)
    return row


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    state = checkpoint.state
    train = state.get("train") if isinstance(state.get("train"), dict) else {}
    assert train is not None
    return {
        "bytes": checkpoint.bytes,
        **{key: state[key] for key in ("world_size", "expert_parallel_size") if key in state},
        **{key: train[key] for key in ("tokens", "best_step", "best_cost") if key in train},
    }


def show(run: Path, which: str, with_tensors: bool, as_json: bool) -> None:
    """Prints what a checkpoint says of itself, its files, and what it holds of which kind.

    Args:
        run: A run folder, or one of its checkpoints.
        which: ``latest`` or ``best``, for a run folder.
        with_tensors: Whether to print every tensor with its file and SHA-256.
        as_json: Whether to print JSON.

    Raises:
        CheckpointError: There is no such checkpoint, or its manifest is damaged.
    """
    checkpoint = Checkpoint.open(checkpoint_of(run, which))
    kinds = Counter(name.split("/")[0] for name in checkpoint.tensors)
    experts: dict[str, set[int]] = {}
    for match in map(EXPERT_TENSOR.match, checkpoint.tensors):
        if match is not None:
            experts.setdefault(place(match["bank"]), set()).add(int(match["expert"]))
    result: dict[str, Any] = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "format": checkpoint.format,
        "version": checkpoint.version,
        **_facts(checkpoint),
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in checkpoint.files.items()},
        "tensors_by_kind": dict(kinds),
        "experts": {where: sorted(ids) for where, ids in experts.items()},
        "state": dict(checkpoint.state),
    }
    if with_tensors:
        result["tensors"] = {
            name: {"file": file, "sha256": checkpoint.tensor_sha256.get(name)}
            for name, file in checkpoint.tensors.items()
        }
    if as_json:
        print(json.dumps(result, indent=1))
        return
    _print(result, checkpoint)


def _print(result: dict[str, Any], checkpoint: Checkpoint) -> None:
    console, about = Console(), Table("", "", title=str(checkpoint.path), show_header=False)
    about.add_row("format", f"{checkpoint.format}{f', written by smoe_train {v}' if (v := checkpoint.version) else ''}")
    for key, value in _rows(checkpoint.state):
        about.add_row(key, value)
    console.print(about)
    held_by = Counter(checkpoint.tensors.values())
    files = Table("file", "bytes", "tensors", "sha256")
    for name, (size, digest) in checkpoint.files.items():
        files.add_row(name, f"{size:,}", str(held_by[name]), digest)
    console.print(files)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(result["tensors_by_kind"].items()))
    console.print(f"tensors: {kinds}")
    for where, ids in result["experts"].items():
        console.print(f"{where}: experts {spans(ids)}")
    for name, one in result.get("tensors", {}).items():
        console.print(f"{name}  {one['file']}  {one['sha256'] or ''}", soft_wrap=True, highlight=False)


def _rows(state: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Returns a state as lines of a table; what alarms remember is a matter of the program."""
    rows: list[tuple[str, str]] = []
    for key, value in state.items():
        if isinstance(value, dict) and key != "alarms":
            rows += _rows(value, f"{prefix}{key}.")
        elif key != "alarms":
            rows.append((escape(printable(f"{prefix}{key}")), escape(json.dumps(value))))
    return rows


def verify(run: Path, which: str, every: bool, as_json: bool) -> None:
    """Compares every byte of a checkpoint with its manifest.

    Args:
        run: A run folder, or one of its checkpoints.
        which: ``latest`` or ``best``, for a run folder.
        every: Whether to verify all checkpoints of the run.
        as_json: Whether to print JSON.

    Raises:
        CheckpointError: One is damaged; the message names files, experts and other tensors.
    """
    if every:
        paths = checkpoint_folders(folder_of(run))
    elif which == "latest" and _is_run(run):
        paths = checkpoint_folders(run / CHECKPOINTS)[:1]  # also one that has lost its manifest
    else:
        paths = [checkpoint_of(run, which)]
    if not paths:
        raise CheckpointError(f"{run}: holds no checkpoint")
    results: list[dict[str, Any]] = []
    for path in paths:
        result: dict[str, Any] = {"checkpoint": str(path), "problem": None}
        try:
            checkpoint = Checkpoint.open(path)
            result |= {"step": checkpoint.step, "files": len(checkpoint.files), "bytes": checkpoint.bytes}
            checkpoint.verify()
        except CheckpointError as error:
            result["problem"] = str(error)
        results.append(result)
        if not as_json and result["problem"] is None:
            print(f"{path}: sound, {result['files']} files, {result['bytes']:,} bytes")
    if as_json:
        print(json.dumps(results, indent=1))
    problems = [result["problem"] for result in results if result["problem"] is not None]
    if problems:
        count = f"{len(problems)} of {len(results)} checkpoints damaged:\n  " if len(results) > 1 else ""
        raise CheckpointError(count + "\n  ".join(problems))


def prune(run: Path, keep_last: int, keep_every: int | None, dry_run: bool, as_json: bool) -> None:
    """Removes old checkpoints of a run that is not training; the best and the newest sound one always stay.

    Args:
        run: A run folder.
        keep_last: How many of the newest sound ones to keep; damaged ones do not count.
        keep_every: Also keep the steps that are a multiple of this.
        dry_run: Whether to say only what would go.
        as_json: Whether to print JSON.

    Raises:
        CheckpointError: There is no such run, or none of its checkpoints is sound.
        LaunchError: The run is training.
    """
    folder = folder_of(run)
    if dry_run:
        kept, removed = _division(folder, keep_last, keep_every)
    else:
        with held(run):
            kept, removed = _division(folder, keep_last, keep_every)
            store_of(run).remove(removed)
    gone = "would be removed" if dry_run else "removed"
    if as_json:
        texts = {str(path): reason for path, reason in kept.items()}
        print(json.dumps({"kept": texts, "removed": [str(path) for path in removed], "dry_run": dry_run}, indent=1))
        return
    for path, reason in kept.items():
        print(f"{path.name}: kept, {reason}")
    for path in removed:
        print(f"{path.name}: {gone}")


def _division(folder: Path, keep_last: int, keep_every: int | None) -> tuple[dict[Path, str], list[Path]]:
    """Returns the checkpoints to keep, each with the reason, and those to remove, newest first."""
    best, kept, sound = pointed(folder, "best"), {}, 0
    found = checkpoint_folders(folder)
    for path in found:
        reasons = []
        if sound < keep_last and _is_sound(path):
            sound += 1
            reasons.append("the newest that is sound" if sound == 1 else f"number {sound} of the sound ones")
        if path == best:
            reasons.append("the best")
        if keep_every is not None and step_of(path) % keep_every == 0:
            reasons.append(f"a multiple of {keep_every}")
        if reasons:
            kept[path] = ", ".join(reasons)
    if found and not sound:
        raise CheckpointError(f"{folder}: no checkpoint is sound, so none is removed; see checkpoint verify --all")
    return kept, [path for path in found if path not in kept]


def _is_sound(path: Path) -> bool:
    try:
        Checkpoint.open(path).verify()
    except CheckpointError:
        return False
    return True


def folder_of(run: Path) -> Path:
    """Returns the folder of a run's checkpoints.

    Raises:
        CheckpointError: There is no such run.
    """
    if not _is_run(run):
        raise CheckpointError(f"{run}: is no run folder; give one, such as runs/<name>")
    return run / CHECKPOINTS


def checkpoint_of(run: Path, which: str) -> Path:
    """Returns the folder of a checkpoint, from a run folder or its own path.

    Raises:
        CheckpointError: There is none.
    """
    return find_checkpoint(run / CHECKPOINTS, which) if _is_run(run) else run


def _is_run(run: Path) -> bool:
    return (run / RECIPE).is_file() or (run / CHECKPOINTS).is_dir()


def _without_path(error: CheckpointError, path: Path) -> str:
    text = str(error)
    for prefix in (f"{path / MANIFEST}: ", f"{path}: "):
        text = text.removeprefix(prefix)
    return text

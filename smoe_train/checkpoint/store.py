"""The folder of checkpoints: atomic to write, checksummed, verified before anything is read from it.

A checkpoint is a folder ``step-00001000`` with files and a ``manifest.json``. It is written under a temporary name,
every file is flushed to disk, the manifest with sizes and SHA-256 sums is written last, and one rename makes it
visible: a folder with a valid manifest is complete, anything else is no checkpoint. ``latest`` and ``best`` are small
text files that hold a folder name; they are hints, replaced atomically and never trusted without the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smoe_train.checkpoint.folders import (
    MANIFEST,
    complete_checkpoints,
    find_checkpoint,
    pointed,
    step_name,
    step_of,
)
from smoe_train.durable import flush
from smoe_train.errors import CheckpointError, RunFailedError

FORMAT = 1
_FILE_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*\.safetensors|tokenizer/[A-Za-z0-9][A-Za-z0-9._-]*)\Z")
_TEMPORARY = ".tmp-"
_REMOVED = ".trash-"


class Peers(Protocol):
    """The ranks that write one checkpoint together."""

    @property
    def rank(self) -> int:
        """Rank of this process."""
        ...

    def gather_objects(self, item: Any) -> list[Any]:
        """Returns every rank's object, in rank order."""
        ...

    def broadcast_object(self, item: Any) -> Any:
        """Returns rank 0's object."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, verified or about to be.

    Attributes:
        path: Its folder.
        step: Optimizer steps taken.
        state: What the trainer saved besides tensors.
        files: Size and SHA-256 of each file.
        tensors: File that holds each tensor.
    """

    path: Path
    step: int
    state: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]
    tensors: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Reads the manifest.

        Raises:
            CheckpointError: There is none, or it is not one of this format.
        """
        try:
            if (path / MANIFEST).is_symlink():
                raise CheckpointError(f"{path / MANIFEST}: is a symbolic link, which no checkpoint holds")
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no complete checkpoint: it has no {MANIFEST}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path / MANIFEST}: cannot be read: {error}") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise CheckpointError(f"{path / MANIFEST}: format {found!r} is not {FORMAT}, the one this version reads")
        if manifest.pop("sha256", None) != _text_sha256(_canonical(manifest)):
            raise CheckpointError(f"{path / MANIFEST}: damaged: has another SHA-256 than when it was written")
        try:
            step, state = int(manifest["step"]), dict(manifest["state"])
            files = {name: (int(item["bytes"]), str(item["sha256"])) for name, item in manifest["files"].items()}
            tensors = {str(tensor): str(name) for tensor, name in manifest["tensors"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path / MANIFEST}: incomplete: {error!r}") from error
        if not all(_FILE_NAME.match(name) for name in files) or not set(tensors.values()) <= files.keys():
            raise CheckpointError(f"{path / MANIFEST}: names a file that no checkpoint may have")
        return cls(path, step, state, files, tensors)

    def verify(self) -> None:
        """Compares every file with the manifest.

        Raises:
            CheckpointError: A file is missing, has another size or another SHA-256; all such files are named.
        """
        damaged = [problem for name in self.files if (problem := self._file_problem(name)) is not None]
        if damaged:
            raise CheckpointError(f"{self.path}: damaged checkpoint: {'; '.join(damaged)}")

    def _file_problem(self, name: str) -> str | None:
        path, (expected_bytes, expected_sha256) = self.path / name, self.files[name]
        try:
            if path.is_symlink() or not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != expected_bytes:
                return f"{name} has {size} bytes instead of {expected_bytes}"
            return None if sha256(path) == expected_sha256 else f"{name} has another SHA-256 than when it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"

    def tensor(self, name: str) -> Tensor:
        """Returns one tensor on the CPU.

        Raises:
            CheckpointError: The checkpoint holds no such tensor or its file cannot be read.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}; it belongs to another model")
        try:
            with safe_open(self.path / self.tensors[name], framework="pt") as file:
                value: Tensor = file.get_tensor(name)
                return value
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / self.tensors[name]}: cannot be read: {error}") from error


class CheckpointStore:
    """All checkpoints of a run.

    Args:
        folder: Where they are; created when the first is saved.
        peers: The ranks that save and load together.
        keep_last: How many of the newest to keep; the best one is kept besides.
    """

    def __init__(self, folder: Path, peers: Peers, keep_last: int) -> None:
        self.folder = folder
        self._peers = peers
        self._keep_last = keep_last

    def save(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        best: bool = False,
        tokenizer: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Writes a checkpoint together with the other ranks; on return it is complete and on disk.

        Args:
            step: Optimizer steps taken.
            files: This rank's files by name, with their tensors by name; names differ between ranks.
            state: What to store besides tensors, JSON values; rank 0's counts.
            best: Whether to point ``best`` to it.
            tokenizer: The tokenizer's files by name, for the folder ``tokenizer``; rank 0's count.

        Raises:
            RunFailedError: Any rank could not write; earlier checkpoints are untouched.
        """
        temporary = self.folder / self._peers.broadcast_object(f"{_TEMPORARY}{step_name(step)}-{uuid.uuid4().hex}")
        plain = {f"tokenizer/{name}": data for name, data in (tokenizer or {}).items()} if self._peers.rank == 0 else {}
        written, problem = _attempt(lambda: _write_files(temporary, files, plain))
        outcomes = self._peers.gather_objects((written, problem))
        problem = _first_problem([problem for _, problem in outcomes])
        if self._peers.rank == 0:
            if problem is None:
                merged: dict[str, Any] = {}
                for rank_files, _ in outcomes:
                    merged |= rank_files or {}
                _, problem = _attempt(lambda: self._commit(temporary, step, merged, state, best))
            if problem is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        problem = self._peers.broadcast_object(problem)
        if problem is not None:
            raise RunFailedError(f"{self.folder / step_name(step)}: could not be written: {problem}")
        return self.folder / step_name(step)

    def _commit(
        self, temporary: Path, step: int, files: Mapping[str, Any], state: Mapping[str, Any], best: bool
    ) -> None:
        for name, item in files.items():
            path = temporary / name
            if not path.is_file() or path.stat().st_size != item["bytes"]:
                raise OSError(f"rank 0 does not see {name}: run folders must be on storage that all hosts share")
        manifest = {
            "format": FORMAT,
            "step": step,
            "state": dict(state),
            "files": {name: {"bytes": item["bytes"], "sha256": item["sha256"]} for name, item in files.items()},
            "tensors": {tensor: name for name, item in files.items() for tensor in item["tensors"]},
        }
        manifest["sha256"] = _text_sha256(_canonical(manifest))
        write_text_durably(temporary / MANIFEST, json.dumps(manifest, indent=1))
        flush(temporary)
        final = self.folder / step_name(step)
        replaced = self.folder / f"{_REMOVED}{uuid.uuid4().hex}"
        if final.exists():
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        flush(self.folder)
        self._point("latest", step)
        if best:
            self._point("best", step)
        self._prune(step)

    def _point(self, name: str, step: int) -> None:
        temporary = self.folder / f"{_TEMPORARY}{name}-{uuid.uuid4().hex}"
        write_text_durably(temporary, step_name(step) + "\n")
        temporary.replace(self.folder / name)
        flush(self.folder)

    def _prune(self, newest: int) -> None:
        """Removes old checkpoints and what crashed saves have left.

        Checkpoints of later steps than the one just written are damaged, or the run was taken back behind them: they
        stay, and do not count, lest they crowd out the sound ones.
        """
        best = pointed(self.folder, "best")
        written = [path for path in self.complete() if step_of(path) <= newest]
        for path in written[self._keep_last :]:
            if path != best:
                path.rename(self.folder / f"{_REMOVED}{path.name}-{uuid.uuid4().hex}")
        for leftover in self.folder.iterdir():
            if leftover.name.startswith((_REMOVED, _TEMPORARY)):  # no save is under way: it is this one
                _remove(leftover)

    def complete(self) -> list[Path]:
        """Returns the folders that have a manifest, newest first by step."""
        return complete_checkpoints(self.folder)

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Returns whether a checkpoint is one of this run's."""
        return checkpoint.path.resolve().parent == self.folder.resolve()

    def restore_best(self, step: int | None) -> bool:
        """Points ``best`` to a step again, which a crash may have prevented; returns whether it is still there."""
        found = False
        if self._peers.rank == 0 and step is not None and self.folder / step_name(step) in self.complete():
            self._point("best", step)
            found = True
        return bool(self._peers.broadcast_object(found))

    def later_than(self, step: int) -> list[Path]:
        """Returns the complete checkpoints of later steps."""
        return [path for path in self.complete() if int(path.name.removeprefix("step-")) > step]

    def set_aside(self, path: Path) -> Path:
        """Renames a checkpoint so that nothing takes it for one of this run any more; returns its new place."""
        aside = self.folder / f"abandoned-{path.name}-{uuid.uuid4().hex[:8]}"
        path.rename(aside)
        return aside

    def find(self, which: str) -> Path:
        """Returns the folder that ``latest`` or ``best`` means; see `find_checkpoint`."""
        return find_checkpoint(self.folder, which)

    def newest_sound(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """Returns the newest checkpoint that verifies, agreed between the ranks, or None if there is none.

        Args:
            warn: Told on rank 0 about each damaged checkpoint that is passed over.

        Raises:
            CheckpointError: There are checkpoints, but every one is damaged.
        """
        choice: tuple[Path | None, str | None] = (None, None)
        if self._peers.rank == 0:
            choice = self._newest_sound_here(warn)
        path, problem = self._peers.broadcast_object(choice)
        if problem is not None:
            raise CheckpointError(problem)
        return Checkpoint.open(path) if path is not None else None

    def _newest_sound_here(self, warn: Callable[[str], None]) -> tuple[Path | None, str | None]:
        problems = []
        for path in self.complete():
            try:
                Checkpoint.open(path).verify()
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warn(f"{problem}; resuming from the older {path.name} instead")
            return path, None
        if problems:
            advice = "remove them to start again, or name a sound checkpoint"
            return None, f"every checkpoint is damaged ({advice}):\n  " + "\n  ".join(problems)
        return None, None


def _remove(path: Path) -> None:
    """Removes a folder or file as far as that is possible; what stays is removed after the next save."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _canonical(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"))


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def write_text_durably(path: Path, text: str) -> None:
    """Writes a text file and flushes it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _write_files(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, bytes]
) -> dict[str, dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / name)
    for name, data in plain.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        flush((folder / name).parent)
    written = {}
    for name in [*files, *plain]:
        path = folder / name
        flush(path)
        written[name] = {"bytes": path.stat().st_size, "sha256": sha256(path), "tensors": sorted(files.get(name, ()))}
    return written


def _attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """Runs what may fail on one rank only, so that all ranks can agree on the outcome instead of waiting forever."""
    try:
        return action(), None
    except (OSError, ValueError, RuntimeError, SafetensorError, torch.OutOfMemoryError) as error:
        return None, f"{type(error).__name__}: {error}"


def _first_problem(problems: list[str | None]) -> str | None:
    found = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem is not None]
    return found[0] if found else None

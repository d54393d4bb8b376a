"""The folder of checkpoints: atomic to write, checksummed, verified before anything is read from it.

A checkpoint is a folder ``step-00001000`` with files and a ``manifest.json``. It is written under a temporary name,
every file is flushed to disk, the manifest with sizes and SHA-256 sums is written last, and one rename makes it
visible: a folder with a valid manifest is complete, anything else is no checkpoint. ``latest`` and ``best`` are small
text files that hold a folder name; they are hints, replaced atomically and never trusted without the manifest.

Threads write and commit, so that training goes on meanwhile; ranks talk to each other only where the trainer calls
`CheckpointStore.advance`, between two steps.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from smoe_train.checkpoint.folders import (
    MANIFEST,
    checkpoint_folders,
    complete_checkpoints,
    find_checkpoint,
    pointed,
    step_name,
    step_of,
)
from smoe_train.checkpoint.manifest import Checkpoint, NewerFormatError, WrittenFile, manifest_text
from smoe_train.checkpoint.writing import InThread, bytes_of, free_bytes, write_files, write_text_durably
from smoe_train.durable import flush, put_back, take_place
from smoe_train.errors import CheckpointError, RunFailedError

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
class Saved:
    """How a save ended.

    Attributes:
        path: The checkpoint, which is complete and on disk unless there was a problem.
        step: Its step.
        best: Whether it was to be the best so far.
        problem: Why there is no such checkpoint, or None.
        warning: What else could not be written, or None.
    """

    path: Path
    step: int
    best: bool
    problem: str | None
    warning: str | None = None


@dataclass
class _Saving:
    """A save under way."""

    step: int
    best: bool
    state: Mapping[str, Any]
    temporary: Path
    needed_bytes: int
    writing: InThread[dict[str, WrittenFile]]
    committing: InThread[str | None] | None = None
    written: bool = False


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
        self._saving: _Saving | None = None
        self._best: int | None = None  # step of the last that was saved here as the best

    def save(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        best: bool = False,
        tokenizer: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Writes a checkpoint together with the other ranks; on return it is complete and on disk.

        The arguments are those of `begin`.

        Raises:
            RunFailedError: Any rank could not write; earlier checkpoints are untouched.
        """
        self.begin(step, files, state, best, tokenizer)
        saved = self.settle()
        assert saved is not None
        if saved.problem is not None:
            raise RunFailedError(saved.problem)
        return saved.path

    def begin(
        self,
        step: int,
        files: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        best: bool = False,
        tokenizer: Mapping[str, bytes] | None = None,
    ) -> None:
        """Starts to write a checkpoint in a thread, on all ranks; nothing is committed before `advance`.

        Args:
            step: Optimizer steps taken.
            files: This rank's files by name, with their tensors by name; names differ between ranks. Nobody may
                change the tensors any more.
            state: What to store besides tensors, JSON values; rank 0's counts.
            best: Whether to point ``best`` to it.
            tokenizer: The tokenizer's files by name, for the folder ``tokenizer``; rank 0's count.
        """
        assert self._saving is None, "one save at a time: settle the last one first"
        temporary = self.folder / self._peers.broadcast_object(f"{_TEMPORARY}{step_name(step)}-{uuid.uuid4().hex}")
        plain = {f"tokenizer/{name}": data for name, data in (tokenizer or {}).items()} if self._peers.rank == 0 else {}
        needed = bytes_of(files) + sum(map(len, plain.values()))
        writing = InThread(lambda: write_files(temporary, files, plain))
        self._saving = _Saving(step, best, state, temporary, needed, writing)

    @property
    def saving(self) -> bool:
        """Whether a save is under way, on every rank alike."""
        return self._saving is not None

    @property
    def busy(self) -> bool:
        """Whether this rank's part of a save is still being written."""
        if self._saving is None:
            return False
        return self._saving.writing.running or (self._saving.committing is not None and self._saving.committing.running)

    def advance(self) -> Saved | None:
        """Takes the next step of a save, together with the other ranks; returns how it ended once it has.

        It waits for what is still being written, so the time for it is when no rank is `busy`.
        """
        saving = self._saving
        assert saving is not None, "no save is under way"
        if not saving.written:
            saving.written = True
            files, problem = saving.writing.result()
            outcomes = self._peers.gather_objects((files, problem, saving.needed_bytes))
            problem = _first_problem([problem for _, problem, _ in outcomes])
            saving.needed_bytes = sum(needed for _, _, needed in outcomes)
            if problem is not None:
                return self._end(problem)
            if self._peers.rank == 0:
                merged = {name: file for files, _, _ in outcomes for name, file in (files or {}).items()}
                saving.committing = InThread(lambda: self._commit(saving, merged))
            return None
        warning, problem = (None, None) if saving.committing is None else saving.committing.result()
        problem = self._peers.broadcast_object(problem if problem is None else f"rank 0: {problem}")
        return self._end(problem, warning)

    def settle(self) -> Saved | None:
        """Waits until the save under way has ended, if there is one, and returns how."""
        saved = None
        while self._saving is not None:
            saved = self.advance()
        return saved

    def _end(self, problem: str | None, warning: str | None = None) -> Saved:
        saving, self._saving = self._saving, None
        assert saving is not None
        path = self.folder / step_name(saving.step)
        if problem is not None:
            free = free_bytes(self.folder) if self._peers.rank == 0 else None
            if self._peers.rank == 0:
                shutil.rmtree(saving.temporary, ignore_errors=True)
            room = f", {_megabytes(free)} are free there" if free is not None else ""
            needed = f"about {_megabytes(saving.needed_bytes)} are needed{room}"
            problem = self._peers.broadcast_object(
                f"{path}: could not be written: {problem} ({needed}); earlier checkpoints are as they were"
            )
        return Saved(path, saving.step, saving.best, problem, warning)

    def _commit(self, saving: _Saving, files: Mapping[str, WrittenFile]) -> str | None:
        """Makes a checkpoint of what all ranks have written; returns what else could not be written."""
        temporary, step = saving.temporary, saving.step
        for name, file in files.items():
            path = temporary / name
            if not path.is_file() or path.stat().st_size != file.size:
                raise OSError(f"rank 0 does not see {name}: run folders must be on storage that all hosts share")
        write_text_durably(temporary / MANIFEST, manifest_text(step, saving.state, files))
        flush(temporary)
        take_place(temporary, self.folder / step_name(step))
        flush(self.folder)
        flush(self.folder.parent)  # which may hold this folder since this save
        # The checkpoint is there: what goes wrong from here on is no reason to say that it is not.
        if saving.best:
            self._best = step
        warnings = [self._point_if_possible("latest", step)]
        if self._best is not None and pointed(self.folder, "best") != self.folder / step_name(self._best):
            warnings.append(self._point_if_possible("best", self._best))
        self._prune(step)
        return next((warning for warning in warnings if warning is not None), None)

    def _point_if_possible(self, name: str, step: int) -> str | None:
        try:
            self._point(name, step)
        except OSError as error:
            return f"{self.folder / name}: could not be written: {error.strerror}; {step_name(step)} itself is sound"
        return None

    def _point(self, name: str, step: int) -> None:
        temporary = self.folder / f"{_TEMPORARY}{name}-{uuid.uuid4().hex}"
        write_text_durably(temporary, step_name(step) + "\n")
        temporary.replace(self.folder / name)
        flush(self.folder)

    def _prune(self, newest: int) -> None:
        """Removes old checkpoints and what crashed saves have left; what cannot be removed now goes after a later save.

        Checkpoints of later steps than the one just written are damaged, or the run was taken back behind them: they
        stay, and do not count, lest they crowd out the sound ones.
        """
        best = [pointed(self.folder, "best"), *([] if self._best is None else [self.folder / step_name(self._best)])]
        written = [path for path in self.complete() if step_of(path) <= newest]
        self.remove([path for path in written[self._keep_last :] if path not in best])

    def remove(self, checkpoints: Iterable[Path]) -> None:
        """Removes checkpoints, and what crashed saves have left; nobody may be saving meanwhile.

        Each is renamed first: whatever becomes of its files, it is no checkpoint any more.
        """
        for path in checkpoints:
            with contextlib.suppress(OSError):
                path.rename(self.folder / f"{_REMOVED}{path.name}-{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            for leftover in self.folder.iterdir():
                if leftover.name.startswith((_REMOVED, _TEMPORARY)):
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
            found = True
            if pointed(self.folder, "best") != self.folder / step_name(step):
                self._point_if_possible("best", step)
        return bool(self._peers.broadcast_object(found))

    def later_than(self, step: int) -> list[Path]:
        """Returns the complete checkpoints of later steps."""
        return [path for path in self.complete() if int(path.name.removeprefix("step-")) > step]

    def set_aside_later(self, step: int) -> list[Path]:
        """Sets the checkpoints of later steps aside, for all ranks; returns their new places on rank 0.

        Raises:
            RunFailedError: They cannot be renamed; every rank raises it.
        """
        aside: list[Path] = []
        problem: str | None = None
        if self._peers.rank == 0:
            try:
                aside = [self.set_aside(path) for path in self.later_than(step)]
            except OSError as error:
                problem = f"{self.folder}: checkpoints after step {step} cannot be set aside: {error.strerror}"
        problem = self._peers.broadcast_object(problem)
        if problem is not None:
            raise RunFailedError(problem)
        return aside

    def set_aside(self, path: Path) -> Path:
        """Renames a checkpoint so that nothing takes it for one of this run any more; returns its new place."""
        aside = self.folder / f"abandoned-{path.name}-{uuid.uuid4().hex[:8]}"
        path.rename(aside)
        return aside

    def find(self, which: str) -> Path:
        """Returns the folder that ``latest`` or ``best`` means; see `find_checkpoint`."""
        return find_checkpoint(self.folder, which)

    def newest_sound(self, warn: Callable[[str], None], at_most: int | None = None) -> Checkpoint | None:
        """Returns the newest checkpoint that verifies, agreed between the ranks, or None if there is none.

        Args:
            warn: Told on rank 0 about each damaged checkpoint that is passed over.
            at_most: Its last step; None for any.

        Raises:
            CheckpointError: There are checkpoints, but every one is damaged.
        """
        choice: tuple[Path | None, str | None] = (None, None)
        if self._peers.rank == 0:
            choice = self._newest_sound_here(warn, at_most)
        path, problem = self._peers.broadcast_object(choice)
        if problem is not None:
            raise CheckpointError(problem)
        return Checkpoint.open(path) if path is not None else None

    def _newest_sound_here(self, warn: Callable[[str], None], at_most: int | None) -> tuple[Path | None, str | None]:
        problems: list[tuple[int, str]] = []
        put_back(self.folder)
        for path in checkpoint_folders(self.folder):
            if at_most is not None and step_of(path) > at_most:
                continue
            try:
                Checkpoint.open(path).verify()
            except NewerFormatError as error:  # nothing is wrong with it: an older one would be the wrong choice
                return None, str(error)
            except CheckpointError as error:
                problems.append((step_of(path), str(error)))
                continue
            for step, problem in problems:
                lost = f"{step - step_of(path)} steps are lost, and trained again"
                warn(f"{problem}; resuming from the older {path.name} instead: {lost}")
            return path, None
        if problems:
            advice = "remove them to start again, or name a sound checkpoint"
            return None, f"every checkpoint is damaged ({advice}):\n  " + "\n  ".join(text for _, text in problems)
        return None, None


def _remove(path: Path) -> None:
    """Removes a folder or file as far as that is possible; what stays is removed after the next save."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _first_problem(problems: list[str | None]) -> str | None:
    found = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem is not None]
    return found[0] if found else None

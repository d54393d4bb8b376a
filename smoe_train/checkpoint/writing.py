"""Writing one rank's files of a checkpoint, in the foreground or in a thread."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from smoe_train.checkpoint.manifest import WrittenFile, sha256
from smoe_train.durable import flush

T = TypeVar("T")


class NotFiniteError(ValueError):
    """Weights or moments that hold NaN or infinity, which no checkpoint should bring back."""


# What a disk, a quota or the memory of this host can do to a save; anything else is a mistake in the program.
EXPECTED = (OSError, SafetensorError, torch.OutOfMemoryError, MemoryError, NotFiniteError)


def write_files(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], plain: Mapping[str, bytes]
) -> dict[str, WrittenFile]:
    """Writes files of tensors and plain files into a folder and flushes them to disk.

    Args:
        folder: Created if it is not there.
        files: Tensors by name, by file; on the host.
        plain: Contents of other files by name, which may begin with one folder.

    Raises:
        NotFiniteError: A weight or moment is not finite.
    """
    folder.parent.mkdir(exist_ok=True)  # not its parents: a run folder that is gone may be a disk that is gone
    folder.mkdir(exist_ok=True)
    written = {}
    for name, tensors in files.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        _require_finite(tensors)
        save_file(tensors, folder / name)
        (folder / name).chmod(folder.stat().st_mode & 0o666)  # safetensors leaves it to the owner alone
        flush(folder / name)
        digests = {key: _tensor_sha256(value) for key, value in sorted(tensors.items())}
        written[name] = WrittenFile((folder / name).stat().st_size, sha256(folder / name), digests)
    for name, data in plain.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        flush(folder / name)
        flush((folder / name).parent)
        written[name] = WrittenFile(len(data), hashlib.sha256(data).hexdigest(), {})
    return written


def bytes_of(files: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Returns the size of tensors in bytes, nearly that of the files they make."""
    return sum(tensor.numel() * tensor.element_size() for tensors in files.values() for tensor in tensors.values())


def write_text_durably(path: Path, text: str) -> None:
    """Writes a text file and flushes it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


class InThread(Generic[T]):
    """An action that runs in a thread, and what came of it.

    What a disk can do wrong is remembered as a text, so that all ranks can agree on the outcome instead of waiting
    for one that has left; any other exception is raised again where the result is asked for.

    Args:
        action: What to do; nobody else may touch what it reads.
    """

    def __init__(self, action: Callable[[], T]) -> None:
        self._result: T | None = None
        self._problem: str | None = None
        self._mistake: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(action,), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def result(self) -> tuple[T | None, str | None]:
        """Waits for the end and returns the action's result, or None and what was wrong."""
        self._thread.join()
        if self._mistake is not None:
            raise self._mistake
        return self._result, self._problem

    def _run(self, action: Callable[[], T]) -> None:
        try:
            if sys.platform == "linux":  # elsewhere, the number of a thread may be that of another process
                # Training goes before: where all cores compute, the thread takes what they leave.
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            self._result = action()
        except EXPECTED as error:
            self._problem = f"{type(error).__name__}: {error}"
        except BaseException as error:
            self._mistake = error


def free_bytes(folder: Path) -> int | None:
    """Returns what this process may still write to the file system of a folder, or None where that is not known."""
    for path in (folder, *folder.parents):
        try:
            return shutil.disk_usage(path).free
        except OSError as error:
            if error.errno != errno.ENOENT:
                return None
    return None


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if name.startswith(("weight/", "exp_avg/", "exp_avg_sq/")) and not bool(value.isfinite().all()):
            raise NotFiniteError(f"{name} holds NaN or infinity")


def _tensor_sha256(tensor: Tensor) -> str:
    # A view as bytes: numpy knows no bfloat16.
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()

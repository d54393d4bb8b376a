"""What a checkpoint's manifest says, and a checkpoint that is read by it: nothing is taken on trust."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from smoe_train.checkpoint.folders import MANIFEST
from smoe_train.errors import CheckpointError

FORMAT = 2
READABLE = (1, 2)  # 1 had no SHA-256 of single tensors
_FILE_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*\.safetensors|tokenizer/[A-Za-z0-9][A-Za-z0-9._-]*)\Z")


@dataclass(frozen=True)
class WrittenFile:
    """A file of a checkpoint as it was written.

    Attributes:
        size: Bytes.
        sha256: Of the file.
        tensors: SHA-256 of each tensor in it, by name; of its values as they lie in the file.
    """

    size: int
    sha256: str
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, verified or about to be.

    Attributes:
        path: Its folder.
        step: Optimizer steps taken.
        state: What the trainer saved besides tensors.
        files: Size and SHA-256 of each file.
        tensors: File that holds each tensor.
        tensor_sha256: SHA-256 of each tensor; empty in format 1.
    """

    path: Path
    step: int
    state: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]
    tensors: Mapping[str, str]
    tensor_sha256: Mapping[str, str]

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
        if not isinstance(manifest, dict) or manifest.get("format") not in READABLE:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise CheckpointError(
                f"{path / MANIFEST}: format {found!r} is none that this version reads (1 to {FORMAT})"
            )
        if manifest.pop("sha256", None) != _text_sha256(_canonical(manifest)):
            raise CheckpointError(f"{path / MANIFEST}: damaged: has another SHA-256 than when it was written")
        try:
            step, state = int(manifest["step"]), dict(manifest["state"])
            files = {name: (int(item["bytes"]), str(item["sha256"])) for name, item in manifest["files"].items()}
            tensors = {str(tensor): str(name) for tensor, name in manifest["tensors"].items()}
            digests = {str(tensor): str(digest) for tensor, digest in manifest.get("tensor_sha256", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path / MANIFEST}: incomplete: {error!r}") from error
        if not all(_FILE_NAME.match(name) for name in files) or not set(tensors.values()) <= files.keys():
            raise CheckpointError(f"{path / MANIFEST}: names a file that no checkpoint may have")
        return cls(path, step, state, files, tensors, digests)

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


def manifest_text(step: int, state: Mapping[str, Any], files: Mapping[str, WrittenFile]) -> str:
    """Returns the manifest of a checkpoint, with its own SHA-256.

    Args:
        step: Optimizer steps taken.
        state: What to store besides tensors, JSON values.
        files: All files of all ranks by name.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "state": dict(state),
        "files": {name: {"bytes": file.size, "sha256": file.sha256} for name, file in files.items()},
        "tensors": {tensor: name for name, file in files.items() for tensor in file.tensors},
        "tensor_sha256": {tensor: digest for file in files.values() for tensor, digest in file.tensors.items()},
    }
    manifest["sha256"] = _text_sha256(_canonical(manifest))
    return json.dumps(manifest, indent=1)


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

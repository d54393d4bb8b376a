"""What a checkpoint's manifest says, and a checkpoint that is read by it: nothing is taken on trust."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from smoe_train import __version__
from smoe_train.bounded import read_json
from smoe_train.checkpoint.damage import damaged_tensors, described
from smoe_train.checkpoint.folders import MANIFEST, is_step_name, step_of
from smoe_train.errors import CheckpointError

FORMAT = 2
MAX_MANIFEST_BYTES = 1 << 30  # 200 bytes a tensor, an expert having three of each of its own
READABLE = (1, 2)  # 1 had no SHA-256 of single tensors
_STATE: Mapping[str, type] = {"identity": dict, "optimizer_steps": int, "train": dict}  # what is taken by its type
_FILE_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*\.safetensors|tokenizer/[A-Za-z0-9][A-Za-z0-9._-]*)\Z")


class NewerFormatError(CheckpointError):
    """A checkpoint that is sound, but of a format that only a newer version reads."""


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
        format: Number of its format.
        version: Version of smoe_train that wrote it; empty in format 1.
    """

    path: Path
    step: int
    state: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]
    tensors: Mapping[str, str]
    tensor_sha256: Mapping[str, str]
    format: int
    version: str

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Reads the manifest.

        Raises:
            NewerFormatError: It was written by a newer version.
            CheckpointError: There is none, it is damaged, or it is another step's.
        """
        try:
            if (path / MANIFEST).is_symlink():
                raise CheckpointError(f"{path / MANIFEST}: is a symbolic link, which no checkpoint holds")
            manifest = read_json(path / MANIFEST, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no complete checkpoint: it has no {MANIFEST}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path / MANIFEST}: damaged, or cannot be read: {error}") from error
        _require_sound(manifest, path / MANIFEST)
        try:
            step, state = int(manifest["step"]), dict(manifest["state"])
            files = {name: (int(item["bytes"]), str(item["sha256"])) for name, item in manifest["files"].items()}
            tensors = {str(tensor): str(name) for tensor, name in manifest["tensors"].items()}
            digests = {str(tensor): str(digest) for tensor, digest in manifest.get("tensor_sha256", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path / MANIFEST}: incomplete: {error!r}") from error
        if not all(_FILE_NAME.match(name) for name in files) or not set(tensors.values()) <= files.keys():
            raise CheckpointError(f"{path / MANIFEST}: names a file that no checkpoint may have")
        wrong = [key for key, kind in _STATE.items() if key in state and not isinstance(state[key], kind)]
        if wrong:
            raise CheckpointError(f"{path / MANIFEST}: its state holds {wrong[0]!r} of a type that no checkpoint has")
        if is_step_name(path.name) and step_of(path) != step:
            raise CheckpointError(f"{path / MANIFEST}: is of step {step}, its folder is named after another one")
        return cls(path, step, state, files, tensors, digests, manifest["format"], str(manifest.get("version", "")))

    @property
    def bytes(self) -> int:
        """Size of all its files without the manifest."""
        return sum(size for size, _ in self.files.values())

    def verify(self) -> None:
        """Compares every file with the manifest.

        Raises:
            CheckpointError: A file is missing, has another size or another SHA-256, or was added; all such files are
                named, each with the experts and other tensors in it that are lost.
        """
        self._require_none([self._damage(name, whole=True) for name in self.files])

    def verify_sizes(self) -> None:
        """Compares the names and sizes of all files with the manifest, without reading them.

        Raises:
            CheckpointError: A file is missing, has another size, or was added.
        """
        self._require_none([self._damage(name, whole=False) for name in self.files])

    def _require_none(self, damage: list[str | None]) -> None:
        problems = [problem for problem in damage if problem is not None]
        try:
            problems += [f"{name} was added to it; remove that file" for name in self._unlisted()]
        except OSError as error:
            problems.append(f"what is in it cannot be listed: {error.strerror}")
        if problems:
            raise CheckpointError(f"{self.path}: damaged checkpoint: {'; '.join(problems)}")

    def _unlisted(self) -> list[str]:
        """Returns the files that the manifest does not list; file systems and browsers leave hidden ones, unread."""
        found = [path for path in self.path.rglob("*") if path.is_symlink() or not path.is_dir()]
        names = (path.relative_to(self.path).as_posix() for path in found if not path.name.startswith("."))
        return sorted(name for name in names if name != MANIFEST and name not in self.files)

    def _damage(self, name: str, whole: bool) -> str | None:
        path, (expected_bytes, expected_sha256) = self.path / name, self.files[name]
        try:
            if path.is_symlink() or not path.is_file():
                return f"{name} is missing{self._lost(name)}"
            size = path.stat().st_size
            if size != expected_bytes:
                return f"{name} has {size} bytes instead of {expected_bytes}{self._lost(name, path)}"
            if whole and sha256(path) != expected_sha256:
                return f"{name} has another SHA-256 than when it was written{self._lost(name, path)}"
            return None
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}{self._lost(name)}"

    def _lost(self, name: str, path: Path | None = None) -> str:
        """Returns in brackets which tensors of a file are lost: all, or those that differ in what is left of it."""
        held = [tensor for tensor, file in self.tensors.items() if file == name]
        if not held:
            return ""
        known = {tensor: self.tensor_sha256[tensor] for tensor in held if tensor in self.tensor_sha256}
        damaged = damaged_tensors(path, known) if path is not None and len(known) == len(held) else None
        if damaged is None:
            return f" (it held {described(held)})"
        return f" (damaged: {described(damaged)})" if damaged else " (its tensors are sound, its header is not)"

    def tensor(self, name: str) -> Tensor:
        """Returns one tensor on the CPU.

        Raises:
            CheckpointError: The checkpoint holds no such tensor or its file cannot be read.
        """
        return self.read([name])[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns tensors by name on the CPU, in the order asked for; each file is opened once.

        Raises:
            CheckpointError: The checkpoint holds no such tensor or a file cannot be read.
        """
        names = list(names)
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise CheckpointError(f"{self.path}: holds no tensor {name!r}; it belongs to another model")
            by_file.setdefault(self.tensors[name], []).append(name)
        found: dict[str, Tensor] = {}
        for path, held in by_file.items():
            try:
                with safe_open(self.path / path, framework="pt") as file:
                    found |= {name: file.get_tensor(name) for name in held}
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.path / path}: cannot be read: {error}") from error
        return {name: found[name] for name in names}


def manifest_text(step: int, state: Mapping[str, Any], files: Mapping[str, WrittenFile]) -> str:
    """Returns the manifest of a checkpoint, with its own SHA-256.

    Args:
        step: Optimizer steps taken.
        state: What to store besides tensors, JSON values.
        files: All files of all ranks by name.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "step": step,
        "state": dict(state),
        "files": {name: {"bytes": file.size, "sha256": file.sha256} for name, file in files.items()},
        "tensors": {tensor: name for name, file in files.items() for tensor in file.tensors},
        "tensor_sha256": {tensor: digest for file in files.values() for tensor, digest in file.tensors.items()},
    }
    manifest["sha256"] = _text_sha256(_canonical(manifest))
    return json.dumps(manifest, indent=1)


def _require_sound(manifest: Any, path: Path) -> None:
    """Raises unless a manifest is of a format that is read here, and is as it was written; takes its SHA-256 out."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise CheckpointError(f"{path}: damaged, or no manifest of a checkpoint: it says no format")
    unchanged = manifest.pop("sha256", None) == _text_sha256(_canonical(manifest))
    number = manifest["format"]
    if number in READABLE:
        if not unchanged:
            raise CheckpointError(f"{path}: damaged: has another SHA-256 than when it was written")
    elif number > FORMAT and unchanged:
        raise NewerFormatError(
            f"{path}: format {number} was made by a newer version of smoe_train, {manifest.get('version', 'unknown')}; "
            f"this one, {__version__}, reads formats {READABLE[0]} to {FORMAT}: update it"
        )
    else:
        raise CheckpointError(f"{path}: damaged: format {number} is none that was ever written")


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

"""What the corpus of hostile files is made of: an artefact, payloads, and how they are put into a work folder.

Every payload, were it ever executed, would create the file ``CANARY``. The corpus is free of harm beyond that.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CANARY = "CANARY"  # beside the work folder
RUN, EXPORT = Path("runs/tiny"), Path("export")
CHECKPOINT = "checkpoints/step-00000002"
ESCAPE = "\x1b[2J\x1b]0;owned\x07"

Command = tuple[str, ...]
READERS: tuple[Command, ...] = (
    ("checkpoint", "list", "runs/tiny"),
    ("checkpoint", "show", "runs/tiny"),
    ("checkpoint", "verify", "runs/tiny"),
    ("evaluate", "runs/tiny", "--checkpoint", "latest", "--max-tokens", "50"),
    ("generate", "runs/tiny", "--prompt", "router", "--max-new-tokens", "2"),
    ("checkpoint", "export", "runs/tiny", "out/export", "--checkpoint", "latest"),
    ("tokenizer", "show", "runs/tiny"),
    ("train", "recipe.yaml", "name=from-path", "--resume", f"runs/tiny/{CHECKPOINT}"),
    ("train", "recipe.yaml", "name=tuned", "initialise.path=runs/tiny", "initialise.checkpoint=latest"),
    ("train", "recipe.yaml"),
)
FROM_EXPORT: tuple[Command, ...] = (("train", "recipe.yaml", "name=tuned", "initialise.path=export"),)
DATA: tuple[Command, ...] = (("data", "prepare", "recipe.yaml"), ("data", "show", "recipe.yaml"))
CACHED: tuple[Command, ...] = (("data", "verify", "recipe.yaml"), ("data", "prepare", "recipe.yaml"))


@dataclass(frozen=True)
class Artefact:
    """Something hostile.

    Attributes:
        name: What it is.
        catalogue: Its number in the catalogue.
        plant: Puts it into a work folder, the current one, that holds a sound run, export, recipe and cache.
        commands: What a user then does.
        refused: Whether each of these must fail; else it may also take no harm.
    """

    name: str
    catalogue: str
    plant: Callable[[], None]
    commands: Sequence[Command]
    refused: bool = False


class _Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def payloads() -> dict[str, bytes]:
    """Returns files that execute something when they are unpickled, by their kind."""
    import subprocess

    import numpy as np
    import torch

    touch = f"open({str(Path.cwd().parent / CANARY)!r}, 'w')"
    shell = f"touch {Path.cwd().parent / CANARY}"
    system, evaluate, execute = _Calls(os.system, shell), _Calls(eval, touch), _Calls(exec, touch)
    archive, legacy, nested, array = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(2), "x": system}, archive)
    torch.save(evaluate, legacy, _use_new_zipfile_serialization=False)
    torch.save({"state": {"deep": [execute, torch.zeros(1)]}}, nested)
    np.save(array, np.array([system], dtype=object), allow_pickle=True)
    found = {
        "REDUCE os.system, protocol 0": pickle.dumps(system, 0),
        "REDUCE eval, protocol 2": pickle.dumps(evaluate, 2),
        "STACK_GLOBAL exec, protocol 4": pickle.dumps(execute, 4),
        "Popen, protocol 5": pickle.dumps(_Calls(subprocess.Popen, ["touch", shell.split()[1]]), 5),
        "GLOBAL through an allowed module": b"\x80\x02ctorch.serialization\nos.system\nX" + _short(shell) + b"\x85R.",
        "BUILD on a torch class": pickle.dumps({"a": _Calls(torch.load, str(Path.cwd().parent / "x.pt"))}, 2),
        "torch.save": archive.getvalue(),
        "torch.save, legacy": legacy.getvalue(),
        "torch.save, nested": nested.getvalue(),
        "numpy object array": array.getvalue(),
    }
    return found


def _short(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def add_code(folder: Path, config: dict[str, Any]) -> None:
    canary = Path.cwd().parent / CANARY
    for name in ("evil.py", "sitecustomize.py", "conftest.py", "tokenization_evil.py"):
        (folder / name).write_text(
            f"open({str(canary)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass T: pass\n"
        )
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            change_json(folder / name, config)


def change_json(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}), encoding="utf-8")


def link(path: Path, target: str) -> Callable[[], None]:
    def plant() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return plant


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def change_recipe(**sections: Any) -> None:
    """Merges sections over the recipe in the work folder; data is replaced."""
    import yaml

    from smoe_train.config import merge

    values = yaml.safe_load(Path("recipe.yaml").read_bytes())
    Path("recipe.yaml").write_text(yaml.safe_dump(merge(values, sections)), encoding="utf-8")

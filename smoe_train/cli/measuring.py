"""Measuring a checkpoint at several k, over worker processes whose first one hands its result back to the command."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smoe_train.cli.last_words import write_worker_error
from smoe_train.cli.launch import build_command, plan_launch, worker_environment
from smoe_train.cli.launcher import die_with_parent
from smoe_train.cli.supervise import run_workers
from smoe_train.errors import LaunchError, SmoeError
from smoe_train.recipe import Recipe


def top_k_values(text: str, recipe: Recipe) -> list[int]:
    """Returns the numbers of experts a token of ``--top-k``: comma-separated, or the recipe's if it is empty.

    Raises:
        LaunchError: They are not numbers from 1 to the number of experts.
    """
    if not text:
        return [recipe.model.moe.top_k]
    largest = recipe.model.moe.num_experts
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= largest for part in parts):
        raise LaunchError(f"--top-k {text!r}: expected numbers from 1 to {largest}, e.g. 1,2,4")
    return [int(part) for part in parts]


def in_workers(module: str, options: Mapping[str, Any], world_size: int) -> tuple[int, Any]:
    """Runs ``python -m module`` in several processes and returns the exit code, and what rank 0 measured if it is 0.

    Args:
        module: Its ``__main__`` calls `measuring_worker`.
        options: What to measure, of types that JSON has.
        world_size: Number of processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        arguments = ["--options", json.dumps(options), "--result", str(result)]
        command = build_command(plan_launch("torchrun", world_size, None, os.environ), module, arguments)
        code = run_workers(command, worker_environment(world_size, os.environ), Path(folder) / "logs")
        return code, json.loads(result.read_text(encoding="utf-8")) if code == 0 else None


def measuring_worker(module: str, measure: Callable[[dict[str, Any]], Any]) -> None:
    """Entry of a launched worker process: measures, and leaves rank 0's result or word of a failure to the parent."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--options", required=True)
    parser.add_argument("--result", type=Path, required=True)
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    try:
        found = measure(json.loads(arguments.options))
    except SmoeError as error:
        write_worker_error(arguments.result.parent / "logs", rank, error.exit_code, str(error))
        sys.exit(error.exit_code)
    if rank == 0:
        arguments.result.write_text(json.dumps(found), encoding="utf-8")

"""``evaluate``: bits per byte and perplexity of a checkpoint at any number of experts a token."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from smoe_train.cli.launch import build_command, plan_launch, run_workers, worker_environment
from smoe_train.cli.run_folder import open_run
from smoe_train.errors import DataError, LaunchError, SmoeError
from smoe_train.parallel.topology import Topology
from smoe_train.recipe import Recipe
from smoe_train.registry import suggest

WORKER = "smoe_train.cli.evaluate"


@dataclass(frozen=True)
class EvaluateOptions:
    """What the command line said.

    Attributes:
        run: Run folder or checkpoint.
        top_k: Comma-separated numbers, or empty for the recipe's.
        split: Split to evaluate.
        which: ``latest`` or ``best``.
        max_tokens: Evaluate only the first so many, or None for all.
        as_json: Whether to print JSON.
    """

    run: Path
    top_k: str
    split: str
    which: str
    max_tokens: int | None
    as_json: bool

    def top_k_values(self, recipe: Recipe) -> list[int]:
        """Returns the numbers of experts a token.

        Raises:
            LaunchError: They are not numbers from 1 to the number of experts.
        """
        if not self.top_k:
            return [recipe.model.moe.top_k]
        largest = recipe.model.moe.num_experts
        parts = self.top_k.split(",")
        if not all(part.strip().isdecimal() and 1 <= int(part) <= largest for part in parts):
            raise LaunchError(f"--top-k {self.top_k!r}: expected numbers from 1 to {largest}, e.g. 1,2,4")
        return [int(part) for part in parts]


def evaluate(options: EvaluateOptions, nproc: int | None) -> int:
    """Evaluates and prints; returns the exit code."""
    world_size = nproc or 1
    if world_size == 1:
        _print(evaluate_here(options), options.as_json)
        return 0
    _, recipe, _ = open_run(options.run, options.which)
    options.top_k_values(recipe)
    Topology.create(world_size, recipe.parallel.expert_parallel_size, recipe.model.moe.num_experts)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        arguments = ["--options", json.dumps({**vars(options), "run": str(options.run)}), "--result", str(result)]
        command = build_command(plan_launch("torchrun", world_size, None, os.environ), WORKER, arguments)
        code = run_workers(command, worker_environment(world_size, os.environ), Path(folder) / "logs")
        if code == 0:
            _print(json.loads(result.read_text(encoding="utf-8")), options.as_json)
        return code


def evaluate_here(options: EvaluateOptions) -> dict[str, object]:
    """Evaluates on this process, together with its peers if it has some.

    Raises:
        DataError: The data has no such split.
    """
    from smoe_train.assembly import build_for_evaluation, bytes_per_token, evaluation_knobs
    from smoe_train.data import prepare
    from smoe_train.data.loader import EvaluationBatches
    from smoe_train.evaluation import evaluate_language_model
    from smoe_train.parallel.process import Process

    _, recipe, checkpoint = open_run(options.run, options.which)
    top_k_values = options.top_k_values(recipe)
    process = Process.start() if "RANK" in os.environ else Process.alone()
    tokens = prepare(recipe.data, recipe.tokenizer)
    split = next((name for name in tokens.splits if name == options.split), None)
    if split is None:
        raise DataError(f"--split: unknown split {options.split!r}{suggest(options.split, list(tokens.splits))}")
    batches = EvaluationBatches(
        tokens.tokens(split),
        recipe.training.sequence_length,
        recipe.training.micro_batch_size,
        process.rank,
        process.world_size,
        options.max_tokens,
    )
    scores = evaluate_language_model(
        build_for_evaluation(recipe, process, checkpoint),
        batches,
        [evaluation_knobs(recipe, checkpoint, top_k) for top_k in top_k_values],
        bytes_per_token(tokens, split),
        process.device,
        process.sum,
    )
    process.stop()
    return {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "split": options.split,
        "scores": [score.to_json() for score in scores],
    }


def _print(result: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
        return
    table = Table("top_k", "loss (nats/token)", "bits per byte", "perplexity", "tokens")
    table.title = f"{result['split']} split, step {result['step']}"
    scores = result["scores"]
    assert isinstance(scores, list)
    for score in scores:
        table.add_row(
            str(score["top_k"]),
            f"{score['loss']:.4f}",
            f"{score['bits_per_byte']:.4f}",
            f"{score['perplexity']:.3f}",
            f"{score['tokens']:,}",
        )
    Console().print(table)


def main() -> None:
    """Entry of a launched worker process."""
    from smoe_train.cli.launch import die_with_parent, write_worker_error

    die_with_parent()
    parser = argparse.ArgumentParser(prog=f"python -m {WORKER}")
    parser.add_argument("--options", required=True)
    parser.add_argument("--result", type=Path, required=True)
    arguments = parser.parse_args()
    values = json.loads(arguments.options)
    rank = int(os.environ["RANK"])
    try:
        result = evaluate_here(EvaluateOptions(**{**values, "run": Path(values["run"])}))
    except SmoeError as error:
        write_worker_error(arguments.result.parent / "logs", rank, error.exit_code, str(error))
        sys.exit(error.exit_code)
    if rank == 0:
        arguments.result.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()

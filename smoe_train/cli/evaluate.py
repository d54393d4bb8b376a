"""``evaluate``: bits per byte and perplexity of a checkpoint at any number of experts a token."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from smoe_train.cli.measuring import in_workers, measuring_worker, top_k_values
from smoe_train.cli.run_folder import open_run
from smoe_train.errors import DataError
from smoe_train.parallel.topology import Topology
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


def evaluate(options: EvaluateOptions, nproc: int | None) -> int:
    """Evaluates and prints; returns the exit code."""
    world_size = nproc or 1
    if world_size == 1:
        _print(evaluate_here(options), options.as_json)
        return 0
    _, recipe, _ = open_run(options.run, options.which)
    top_k_values(options.top_k, recipe)
    Topology.create(world_size, recipe.parallel.expert_parallel_size, recipe.model.moe.num_experts)
    code, found = in_workers(WORKER, {**vars(options), "run": str(options.run)}, world_size)
    if code == 0:
        _print(found, options.as_json)
    return code


def evaluate_here(options: EvaluateOptions) -> dict[str, object]:
    """Evaluates on this process, together with its peers if it has some.

    Raises:
        DataError: The data has no such split.
    """
    from smoe_train.assembly import (
        build_for_evaluation,
        checkpoint_tokenizer,
        evaluation_knobs,
        prepare_data,
        text_batches,
        text_figures,
    )
    from smoe_train.data import TokenStore
    from smoe_train.evaluation import evaluate_language_model
    from smoe_train.parallel.process import Process

    _, recipe, checkpoint = open_run(options.run, options.which)
    k_values = top_k_values(options.top_k, recipe)
    process = Process.start() if "RANK" in os.environ else Process.alone()
    tokens = prepare_data(recipe, checkpoint_tokenizer(checkpoint))
    assert isinstance(tokens, TokenStore)
    split = next((name for name in tokens.splits if name == options.split), None)
    if split is None:
        raise DataError(f"--split: unknown split {options.split!r}{suggest(options.split, list(tokens.splits))}")
    batches = text_batches(tokens, split, recipe, process.rank, process.world_size, options.max_tokens)
    scores = evaluate_language_model(
        build_for_evaluation(recipe, process, checkpoint),
        batches,
        [evaluation_knobs(recipe, checkpoint, top_k) for top_k in k_values],
        text_figures(tokens, split),
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
    scores = result["scores"]
    assert isinstance(scores, list)
    by_word = "word_perplexity" in scores[0]
    columns = ["top_k", "loss (nats/token)", "bits per byte", "perplexity"]
    table = Table(*columns, *(["perplexity by word"] if by_word else []), "tokens")
    table.title = f"{result['split']} split, step {result['step']}"
    for score in scores:
        table.add_row(
            str(score["top_k"]),
            f"{score['loss']:.4f}",
            f"{score['bits_per_byte']:.4f}",
            f"{score['perplexity']:.3f}",
            *([f"{score['word_perplexity']:.3f}"] if by_word else []),
            f"{score['evaluated_tokens']:,}",
        )
    Console().print(table)


if __name__ == "__main__":
    measuring_worker(WORKER, lambda values: evaluate_here(EvaluateOptions(**{**values, "run": Path(values["run"])})))

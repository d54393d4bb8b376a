"""Run folders as fine-tuning leaves them, without any training."""

from __future__ import annotations

from pathlib import Path

from smoe_train.evaluation.results import SplitResult, TaskResult


def make_run(
    folder: Path,
    name: str,
    task: str,
    metrics: dict[str, float],
    constant: dict[str, float] | None = None,
    seed: int = 1,
    setting: str | None = None,
    mismatched: float | None = None,
    recipe: str = "",
) -> Path:
    """Writes ``results.json``, and a recipe with these further lines."""
    run = folder / name
    run.mkdir(parents=True)
    constant = constant or dict.fromkeys(metrics, 0.5)
    splits = [SplitResult("dev", 100, metrics, sum(metrics.values()) / len(metrics), constant)]
    if mismatched is not None:
        splits.append(SplitResult("dev_mismatched", 90, {"accuracy": mismatched}, mismatched, {"accuracy": 0.5}))
    TaskResult(task, tuple(splits), name, seed, 40, {"split": "selection", "score": 0.7, "step": 40}, setting).write(
        run
    )
    (run / "recipe.yaml").write_text(f"name: {name}\nseed: {seed}\ndata: {{task: {task}}}\n{recipe}")
    return run

"""``evaluate`` of fine-tuned runs: the metrics of their tasks, of a checkpoint or of a folder of runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from smoe_train.cli.evaluate import EvaluateOptions, evaluate
from smoe_train.cli.measuring import in_workers, measuring_worker, top_k_values
from smoe_train.cli.run_folder import open_run
from smoe_train.config import Layered, StrictModel, apply_overrides, build
from smoe_train.data import SOURCES, AnySourceConfig, SourceConfig, TaskInfo
from smoe_train.data.reading.glue_tasks import GLUE_NAMES
from smoe_train.errors import DataError, LaunchError, RecipeError
from smoe_train.evaluation.metrics import constant_baseline, task_score
from smoe_train.evaluation.predictions import predictions_file, write_predictions
from smoe_train.parallel.topology import Topology
from smoe_train.recipe import RECIPE, Recipe, load_recipe
from smoe_train.registry import suggest
from smoe_train.training.task_config import SequenceClassificationConfig

if TYPE_CHECKING:
    from smoe_train.data.stores.example_store import ExampleStore

WORKER = "smoe_train.cli.evaluate_tasks"
MISMATCHED = "mismatched"
NOT_METRICS = frozenset(
    {"run", "step", "task", "split", "top_k", "loss", "score", "evaluated_examples", "constant", "predictions"}
)
NAMES = (*GLUE_NAMES, f"mnli_{MISMATCHED}")


@dataclass(frozen=True)
class TaskOptions:
    """What the command line said.

    Attributes:
        run: Run folder, checkpoint, or a folder of run folders.
        tasks: Comma-separated names of tasks; the run's own if empty.
        split: Split to evaluate; if empty, ``dev``, or ``test`` of a task that has nothing else.
        top_k: Comma-separated numbers, or empty for the recipe's.
        which: ``latest`` or ``best``; ``best`` if empty.
        data: ``key=value`` overrides of the data section.
        write_predictions: Whether to write the answers into the run folder.
    """

    run: str
    tasks: str = ""
    split: str = ""
    top_k: str = ""
    which: str = ""
    data: tuple[str, ...] = ()
    write_predictions: bool = False


class _DataSection(StrictModel):
    data: AnySourceConfig
    """Where the examples come from."""


@dataclass(frozen=True)
class Target:
    """A split to evaluate a model on.

    Attributes:
        task: The name that it was asked for by; None for the run's own.
        data: Where its examples come from.
        mismatched: Whether it is the mismatched half of MNLI's split.
    """

    task: str | None
    data: SourceConfig
    mismatched: bool = False


def evaluate_any(options: TaskOptions, max_tokens: int | None, nproc: int | None, as_json: bool) -> int:
    """Evaluates fine-tuned runs on their tasks, and a run of another kind on its text; returns the exit code.

    Raises:
        LaunchError: An option is for runs of the other kind.
    """
    runs = fine_tuned_runs(Path(options.run))
    if runs:
        if max_tokens is not None:
            raise LaunchError("--max-tokens: is for text, and a task is evaluated on whole splits; leave it out")
        return evaluate_tasks(options, runs, nproc, as_json)
    if options.tasks or options.data or options.write_predictions:
        raise LaunchError(
            f"--task, --data and --write-predictions: are for fine-tuned runs, and {options.run} is none; fine-tune it "
            "with a recipe whose task.type is sequence_classification"
        )
    split, which = options.split or "valid", options.which or "latest"
    return evaluate(EvaluateOptions(Path(options.run), options.top_k, split, which, max_tokens, as_json), nproc)


def fine_tuned_runs(path: Path) -> list[Path]:
    """Returns the path itself if it is a fine-tuned run or its checkpoint, else the fine-tuned runs directly below it.

    It is empty for a run of another kind, and for what is no run at all.
    """
    if (path / RECIPE).is_file() or not path.is_dir():
        return [path] if _is_fine_tuned(path) else []
    run_folder = path.resolve().parent.parent
    if (run_folder / RECIPE).is_file():
        return [path] if _is_fine_tuned(run_folder) else []
    return [folder for folder in sorted(path.iterdir()) if _is_fine_tuned(folder)]


def _is_fine_tuned(run_folder: Path) -> bool:
    path = run_folder / RECIPE
    if not path.is_file():
        return False
    return isinstance(load_recipe(str(path), resolved=True).task, SequenceClassificationConfig)


def evaluate_tasks(options: TaskOptions, runs: Sequence[Path], nproc: int | None, as_json: bool) -> int:
    """Evaluates runs one after the other and prints what came of it; returns the exit code.

    Args:
        options: What to do with each.
        runs: From `fine_tuned_runs`.
        nproc: Processes for each run.
        as_json: Whether to print JSON.

    Raises:
        LaunchError: Tasks are named for several runs, which differ in what they were trained on.
    """
    if len(runs) > 1 and options.tasks:
        raise LaunchError(
            f"--task: {options.run} holds {len(runs)} fine-tuned runs, and each is evaluated on its own task; name one "
            "run, or leave --task out"
        )
    found: list[dict[str, Any]] = []
    for run in runs:
        code, rows = _evaluate_run(replace(options, run=str(run)), nproc or 1)
        if code != 0:
            return code
        found += rows
    _print(found, as_json)
    return 0


def _evaluate_run(options: TaskOptions, world_size: int) -> tuple[int, Any]:
    if world_size == 1:
        return 0, evaluate_here(options)
    _, recipe, _ = open_run(Path(options.run), options.which or "best")
    targets(recipe, options)
    top_k_values(options.top_k, recipe)
    Topology.create(world_size, recipe.parallel.expert_parallel_size, recipe.model.moe.num_experts)
    return in_workers(WORKER, asdict(options), world_size)


def evaluate_here(options: TaskOptions) -> list[dict[str, Any]]:
    """Evaluates one run on this process, together with its peers if it has some; returns a row for each split and k.

    Raises:
        DataError: A task's examples cannot be had, it has no such split, or the run's head does not fit it.
        LaunchError: There is no such task.
    """
    from smoe_train.assembly import (
        build_for_evaluation,
        checkpoint_task,
        checkpoint_tokenizer,
        evaluation_knobs,
        score_examples,
    )
    from smoe_train.data import prepare_examples
    from smoe_train.parallel.process import Process

    run_folder, recipe, checkpoint = open_run(Path(options.run), options.which or "best")
    wanted = targets(recipe, options)
    knobs = [evaluation_knobs(recipe, checkpoint, top_k) for top_k in top_k_values(options.top_k, recipe)]
    own = checkpoint_task(checkpoint)
    assert own is not None, f"{checkpoint.path} is of a classifier by its recipe, and of none by its state"
    stores: list[tuple[ExampleStore, list[str]]] = []
    for target in wanted:
        store = prepare_examples(target.data, checkpoint_tokenizer(checkpoint))
        check_head(store.task, own, run_folder)
        stores.append((store, splits_of(store, options.split, target)))
    process = Process.start() if "RANK" in os.environ else Process.alone()
    model = build_for_evaluation(recipe, process, checkpoint)
    rows: list[dict[str, Any]] = []
    for store, split in ((store, split) for store, splits in stores for split in splits):
        scores = score_examples(model, recipe, store, split, knobs, process)
        constant = constant_score(store, split)
        about = {"run": recipe.name, "step": checkpoint.step, "task": store.task.name, "split": split}
        if options.write_predictions:
            path = predictions_file(run_folder, split, store.task.name if store.task.name != own.name else None)
            about["predictions"] = str(path)
            if process.is_first:
                write_predictions(path, store.task, store.split(split).index, scores[0].predictions)
        rows += [{**about, **score.to_json(), "constant": constant} for score in scores]
    process.stop()
    return rows


def targets(recipe: Recipe, options: TaskOptions) -> list[Target]:
    """Returns what to evaluate a run on.

    Raises:
        LaunchError: There is no task of a name.
        RecipeError: The overrides of the data section are wrong.
    """
    if not options.tasks:
        return [Target(None, _data(recipe.data, {}, options.data))]
    return [_target(recipe.data, name.strip(), options.data) for name in options.tasks.split(",")]


def _target(own: SourceConfig, name: str, overrides: Sequence[str]) -> Target:
    labelled = [source for source, entry in SOURCES.items() if entry.labelled and source != "glue"]
    if name in NAMES:
        task = name.removesuffix(f"_{MISMATCHED}")
        return Target(name, _data(own, {"source": "glue", "task": task}, overrides), task != name)
    if name in labelled:
        return Target(name, _data(own, {"source": name}, overrides))
    raise LaunchError(f"--task: unknown task {name!r}{suggest(name, [*NAMES, *labelled])}")


def _data(own: SourceConfig, other: Mapping[str, str], overrides: Sequence[str]) -> SourceConfig:
    """Returns the data section for a task: the run's own where it is the same task, else only where its files are."""
    values = own.model_dump(mode="json")
    if any(values.get(key) != value for key, value in other.items()):
        place = {"path": values["path"]} if values["source"] == other["source"] and values.get("path") else {}
        values = {**place, **other}
    layered = apply_overrides(Layered({"data": values}, source="--data"), [f"data.{text}" for text in overrides])
    section, problems, _ = build(_DataSection, layered)
    if problems or section is None:
        raise RecipeError(problems)
    return section.data


def splits_of(store: ExampleStore, split: str, target: Target) -> list[str]:
    """Returns the splits of a task to evaluate: of the run's own task both of MNLI's, of a named one that half.

    Raises:
        DataError: The task has no such split.
    """
    base = split or ("dev" if "dev" in store.splits or target.mismatched else "test")
    if target.mismatched:
        base = f"{base}_{MISMATCHED}"
    if base not in store.splits:
        raise DataError(f"--split: task {store.task.name} has no split {base!r}{suggest(base, list(store.splits))}")
    other = f"{base}_{MISMATCHED}"
    return [base, other] if target.task is None and other in store.splits else [base]


def check_head(task: TaskInfo, own: TaskInfo, run_folder: Path) -> None:
    """Makes sure that a run's head answers what a task asks.

    Raises:
        DataError: The task has other labels than the run's own.
    """
    if (task.kind, task.labels) != (own.kind, own.labels):
        raise DataError(
            f"--task: {task.name} asks for {_described(task.labels)}, and {run_folder} was fine-tuned on {own.name} "
            f"for {_described(own.labels)}; evaluate a run of {task.name}"
        )


def _described(labels: Sequence[str]) -> str:
    if not labels:
        return "a number"
    return ", ".join(labels) if len(labels) <= 6 else f"{len(labels)} classes ({', '.join(labels[:3])}, ...)"


def constant_score(store: ExampleStore, split: str) -> float | None:
    """Returns what always giving the commonest answer of the training split scores, if both splits have labels."""
    labels = np.asarray(store.split(split).labels)
    known = labels[~np.isnan(labels)]
    if "train" not in store.splits or not len(known):
        return None
    return task_score(constant_baseline(store.task, np.asarray(store.split("train").labels), known))


def _print(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"scores": list(rows)}, indent=1))
        return
    table = Table("run", "task", Column("split", no_wrap=True), "top_k", "examples", "metrics", "score", "constant")
    for row in rows:
        metrics = [f"{name} {value:.4f}" for name, value in row.items() if name not in NOT_METRICS]
        table.add_row(
            f"{row['run']} (step {row['step']})",
            row["task"],
            row["split"],
            str(row["top_k"]),
            f"{row['evaluated_examples']:,}",
            "\n".join(metrics) or "none",
            f"{row['score']:.4f}" if metrics else "",
            "" if row["constant"] is None else f"{row['constant']:.4f}",
        )
    Console().print(table)


if __name__ == "__main__":
    measuring_worker(WORKER, lambda values: evaluate_here(TaskOptions(**{**values, "data": tuple(values["data"])})))

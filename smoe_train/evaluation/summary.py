"""Results of many fine-tuning runs: mean and spread over seeds for each task, and the GLUE average."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from smoe_train.config import read_values
from smoe_train.data.examples import DEV
from smoe_train.data.reading.glue_tasks import GLUE_TASKS
from smoe_train.errors import DataError, RecipeError
from smoe_train.evaluation.results import RESULTS, SplitResult, TaskResult

# The tasks of the GLUE score (arXiv 1804.07461, table 1); many papers leave WNLI out, as its dev split is adversarial.
SCORED_TASKS = tuple(name for name, task in GLUE_TASKS.items() if DEV in task.rows)
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) over seeds; no deviation of one."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns that of some values."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, on one split.

    Attributes:
        setting: The text that the runs give for what they have in common; None if they give none.
        task: The task.
        split: The split.
        runs: Their names.
        score_by_seed: The mean of the metrics, by seed.
        metrics: By name.
        constant: What always giving the same answer scores, by metric.
    """

    setting: str | None
    task: str
    split: str
    runs: tuple[str, ...]
    score_by_seed: Mapping[int, float]
    metrics: Mapping[str, Spread]
    constant: Mapping[str, float]

    @property
    def score(self) -> Spread:
        """The task's score."""
        return Spread.of(list(self.score_by_seed.values()))

    @property
    def constant_score(self) -> float:
        """The constant's score."""
        return fmean(self.constant.values())

    def to_json(self) -> dict[str, Any]:
        """Returns all of it by name; differences are to the constant."""
        return {
            "setting": self.setting,
            "task": self.task,
            "split": self.split,
            "runs": list(self.runs),
            "seeds": list(self.score_by_seed),
            "metrics": {
                name: {
                    **asdict(spread),
                    "constant": self.constant[name],
                    "difference": spread.mean - self.constant[name],
                }
                for name, spread in self.metrics.items()
            },
            "score": {
                **asdict(self.score),
                "constant": self.constant_score,
                "difference": self.score.mean - self.constant_score,
            },
        }


@dataclass(frozen=True)
class Average:
    """The GLUE average of one setting: the mean of its tasks' scores, MNLI's being the mean of its two splits'.

    Attributes:
        setting: As of the groups.
        tasks: Tasks that are in it.
        missing: Tasks of GLUE that are not.
        score: The mean over the tasks. Its deviation is that of the averages by seed, if all tasks have the same seeds.
        constant: The average of always giving the same answer.
    """

    setting: str | None
    tasks: tuple[str, ...]
    missing: tuple[str, ...]
    score: Spread
    constant: float

    def to_json(self) -> dict[str, Any]:
        """Returns all of it by name."""
        return {**asdict(self), "difference": self.score.mean - self.constant}


@dataclass(frozen=True)
class Summary:
    """What `summarise` found.

    Attributes:
        groups: One for each setting, task and split.
        averages: One for each setting that has tasks of GLUE.
        notes: Why a setting has none.
    """

    groups: tuple[Group, ...]
    averages: tuple[Average, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns all of it by name."""
        return {
            "groups": [group.to_json() for group in self.groups],
            "averages": [average.to_json() for average in self.averages],
            "notes": list(self.notes),
        }


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Returns the run folders with results among the paths and, where a path is none, directly below it.

    Raises:
        DataError: A path has none.
    """
    found: list[Path] = []
    for path in paths:
        own = [path] if (path / RESULTS).is_file() else sorted(file.parent for file in path.glob(f"*/{RESULTS}"))
        if not own:
            raise DataError(
                f"{path}: neither it nor a folder in it has {RESULTS}, which a fine-tuning run writes at its end"
            )
        found += own
    return list(dict.fromkeys(found))


def summarise(run_folders: Sequence[Path], with_wnli: bool = True) -> Summary:
    """Returns mean and spread over seeds of each setting, and the averages.

    Runs belong together if they have the same task and ``setting``; those whose results name no setting, if their
    recipes are alike but for ``name`` and ``seed``.

    Args:
        run_folders: Each with ``results.json``.
        with_wnli: Whether WNLI is a task of the average.

    Raises:
        DataError: Results are missing or damaged, two of the runs that belong together have one seed, or they were
            evaluated on different numbers of examples.
    """
    together: dict[tuple[str, str | None, str], list[TaskResult]] = {}
    for folder in run_folders:
        result = TaskResult.read(folder)
        recipe = _recipe_but_for_seed(folder) if result.setting is None else ""
        together.setdefault((result.task, result.setting, recipe), []).append(result)
    groups = [group for results in together.values() for group in _groups(results)]
    groups.sort(key=lambda group: (group.setting or "", _place(group.task), group.task, group.split))
    averages, notes = [], []
    for setting in dict.fromkeys(group.setting for group in groups):
        found = _average([group for group in groups if group.setting == setting], with_wnli)
        if isinstance(found, Average):
            averages.append(found)
        elif found:
            notes.append(found)
    return Summary(tuple(groups), tuple(averages), tuple(notes))


def _recipe_but_for_seed(folder: Path) -> str:
    try:
        recipe = read_values(folder / RECIPE)
    except RecipeError as error:
        raise DataError(
            f"{folder / RECIPE}: cannot be read ({error}), and the results name no setting, so it is not known with "
            "which runs they belong together"
        ) from error
    kept = {key: value for key, value in recipe.items() if key not in ("name", "seed")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _groups(results: Sequence[TaskResult]) -> list[Group]:
    by_seed: dict[int, TaskResult] = {}
    for result in results:
        twin = by_seed.setdefault(result.seed, result)
        if twin is not result:
            raise DataError(
                f"runs {twin.run} and {result.run}: both have task {result.task}, seed {result.seed} and the same "
                "setting, so they are one run twice; leave one out"
            )
    by_split: dict[str, list[tuple[TaskResult, SplitResult]]] = {}
    for seed in sorted(by_seed):
        for split in by_seed[seed].splits:
            by_split.setdefault(split.split, []).append((by_seed[seed], split))
    return [_group(rows) for rows in by_split.values()]


def _group(rows: Sequence[tuple[TaskResult, SplitResult]]) -> Group:
    (first, of_first), *_ = rows
    for run, split in rows:
        if (split.examples, split.metrics.keys()) != (of_first.examples, of_first.metrics.keys()):
            raise DataError(
                f"runs {first.run} and {run.run}: were evaluated on {of_first.examples:,} and {split.examples:,} "
                f"examples of {first.task} ({split.split}), or by other metrics; summarise them apart"
            )
    return Group(
        first.setting,
        first.task,
        of_first.split,
        tuple(run.run for run, _ in rows),
        {run.seed: split.score for run, split in rows},
        {name: Spread.of([split.metrics[name] for _, split in rows]) for name in of_first.metrics},
        # The same for all seeds, unless these cut the training split differently.
        {name: fmean(split.constant[name] for _, split in rows) for name in of_first.constant},
    )


def _place(task: str) -> int:
    names: tuple[str, ...] = SCORED_TASKS
    return names.index(task) if task in names else len(names)


def _average(groups: Sequence[Group], with_wnli: bool) -> Average | str:
    """Returns the average of the groups of one setting, or why there is none; nothing if they have no task of GLUE."""
    wanted = [task for task in SCORED_TASKS if with_wnli or task != "wnli"]
    by_task = {task: [group for group in groups if group.task == task] for task in wanted}
    tasks = tuple(task for task in wanted if by_task[task])
    if not tasks:
        return ""
    for task in tasks:
        if len({group.split for group in by_task[task]}) < len(by_task[task]):
            runs = ", ".join(dict.fromkeys(group.runs[0] for group in by_task[task]))
            return f"no GLUE average: {task} has runs of several settings ({runs}); name those of one setting only"
    means = [fmean(group.score.mean for group in by_task[task]) for task in tasks]
    constants = [fmean(group.constant_score for group in by_task[task]) for task in tasks]
    seeds = {tuple(group.score_by_seed) for task in tasks for group in by_task[task]}
    by_seed = [
        fmean(fmean(group.score_by_seed[seed] for group in by_task[task]) for task in tasks)
        for seed in (next(iter(seeds)) if len(seeds) == 1 else ())
    ]
    score = Spread.of(by_seed) if by_seed else Spread(fmean(means), None, min(len(one) for one in seeds))
    missing = tuple(task for task in wanted if task not in tasks)
    return Average(groups[0].setting, tasks, missing, score, fmean(constants))

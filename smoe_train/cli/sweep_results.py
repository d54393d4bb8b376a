"""What came of the runs of a sweep: the figures of each, their mean and spread over seeds, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

from smoe_train.recipe import RECIPE, Recipe
from smoe_train.reporting.records import METRICS, by_rank_in_step, read_records

if TYPE_CHECKING:  # torch would come along, before an in-process run has set up its environment
    from smoe_train.evaluation.summary import Spread

SEED = "seed"

State = Literal["pending", "running", "done", "failed", "stopped"]


@dataclass
class SweptRun:
    """One combination of values and what has become of it.

    Attributes:
        settings: Key -> value, as the command line has it.
        recipe: The resolved recipe, with the run's own name.
        state: How far it is.
        exit_code: What it ended with, if it has.
        figures: Its results by name, once it is done.
    """

    settings: dict[str, str]
    recipe: Recipe
    state: State = "pending"
    exit_code: int | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def overrides(self) -> tuple[str, ...]:
        """The settings as arguments of the command."""
        return tuple(f"{key}={value}" for key, value in self.settings.items())


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; a single run where seeds are not swept.

    Attributes:
        settings: What they have in common.
        runs: All of them, done or not.
    """

    settings: dict[str, str]
    runs: list[SweptRun]

    @property
    def done(self) -> list[SweptRun]:
        """Those with results."""
        return [run for run in self.runs if run.state == "done"]

    def values(self, figure: str) -> list[float]:
        """Returns one figure of all runs that have it."""
        return [run.figures[figure] for run in self.done if figure in run.figures]


def figures_of(run_folder: Path) -> dict[str, float]:
    """Returns the results of a finished run by name.

    Of a fine-tuning run, its ``results.json``: each metric on the reported split, ``score`` for their mean where there
    are several, ``constant`` for the score of always giving the same answer, and ``selection``, the score on the slice
    of train that chose the checkpoint and may choose among the runs of a sweep too. Of any other, the best and the last
    validation loss, in nats a token.

    Raises:
        SmoeError: A file is damaged.
    """
    from smoe_train.evaluation.results import RESULTS, TaskResult

    if not (run_folder / RESULTS).is_file():
        series = by_rank_in_step(one for one in read_records(run_folder / METRICS) if one["split"] == "valid")
        losses = [float(record["loss"]) for record in series[0]] if series else []
        return {"best_valid_loss": min(losses), "last_valid_loss": losses[-1]} if losses else {}
    result = TaskResult.read(run_folder)
    first, *others = result.splits
    found = dict(first.metrics)
    if len(found) > 1:
        found["score"] = first.score
    found["constant"] = fmean(first.constant.values())
    for other in others:
        found |= {f"{name} ({other.split})": value for name, value in other.metrics.items()}
    return found | ({"selection": float(result.selection["score"])} if result.selection else {})


def labels_of(keys: Sequence[str]) -> dict[str, str]:
    """Returns the last part of each key, or as many last parts as it takes to tell them apart."""
    depth = 1
    while True:
        labels = {key: ".".join(key.split(".")[-depth:]) for key in keys}
        if len(set(labels.values())) == len(keys):
            return labels
        depth += 1


def group_over_seeds(runs: Sequence[SweptRun]) -> list[Group]:
    """Returns the runs by what they have in common beside the seed, in their order."""
    groups: dict[tuple[tuple[str, str], ...], Group] = {}
    for run in runs:
        common = {key: value for key, value in run.settings.items() if key != SEED}
        groups.setdefault(tuple(common.items()), Group(common, [])).runs.append(run)
    return list(groups.values())


def to_json(runs: Sequence[SweptRun]) -> dict[str, Any]:
    """Returns combinations, states and results."""
    return {
        "runs": [
            {
                "settings": run.settings,
                "run": run.recipe.name,
                "state": run.state,
                "exit_code": run.exit_code,
                "figures": run.figures,
            }
            for run in runs
        ],
        "groups": [
            {
                "settings": group.settings,
                "done": len(group.done),
                "of": len(group.runs),
                "figures": {name: asdict(_spread(group.values(name))) for name in _names(group.done)},
            }
            for group in group_over_seeds(runs)
        ],
    }


def print_plan(runs: Sequence[SweptRun], output_dir: Path, as_json: bool) -> None:
    """Prints what a sweep would run, each with its folder and whether it has been begun."""
    begun = {run.recipe.name: (output_dir / run.recipe.name / RECIPE).is_file() for run in runs}
    if as_json:
        listed = [{"settings": r.settings, "run": r.recipe.name, "begun": begun[r.recipe.name]} for r in runs]
        print(json.dumps({"runs": listed}, indent=1))
        return
    labels = labels_of(list(runs[0].settings))
    table = Table(*labels.values(), "run folder", "begun", title=f"{len(runs)} runs")
    for run in runs:
        name = run.recipe.name
        table.add_row(*run.settings.values(), str(output_dir / name), "yes" if begun[name] else "no")
    Console().print(table)


def print_results(runs: Sequence[SweptRun], as_json: bool) -> None:
    """Prints settings and results, one line a group."""
    if as_json:
        print(json.dumps(to_json(runs), indent=1))
        return
    groups, names = group_over_seeds(runs), _names(runs)
    seeds = any(len(group.runs) > 1 for group in groups)
    labels = labels_of(list(runs[0].settings))
    keys = list(groups[0].settings)
    if seeds:
        table = Table(*(labels[key] for key in keys), "seeds done", *names)
    else:
        table = Table(*labels.values(), "run", "state", *names)
    for group in groups:
        cells = [_spread_text(group.values(name)) for name in names]
        if seeds:
            table.add_row(*group.settings.values(), f"{len(group.done)} of {len(group.runs)}", *cells)
            continue
        run = group.runs[0]
        code = f" (exit code {run.exit_code})" if run.exit_code else ""
        table.add_row(*run.settings.values(), run.recipe.name, f"{run.state}{code}", *cells)
    Console().print(table)
    if seeds:
        print("mean ± sample deviation over seeds")
        for run in runs:
            if run.state == "failed":
                print(f"{run.recipe.name}: failed (exit code {run.exit_code})")


def _names(runs: Sequence[SweptRun]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.figures))


def _spread(values: Sequence[float]) -> Spread:
    from smoe_train.evaluation.summary import Spread

    return Spread.of(values)


def _spread_text(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = _spread(values)
    return f"{spread.mean:.4f}" if spread.deviation is None else f"{spread.mean:.4f} ± {spread.deviation:.4f}"

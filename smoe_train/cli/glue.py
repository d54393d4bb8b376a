"""``glue``: what many fine-tuning runs amount to, and the archive that gluebenchmark.com scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from smoe_train.errors import LaunchError
from smoe_train.evaluation.submission import write_submission
from smoe_train.evaluation.summary import Average, Group, Spread, Summary, find_runs, summarise

HEADINGS = ("setting", "task", "split", "seeds", "metrics", "score", "constant", "gain")


def summary(runs: Sequence[Path], as_json: bool, as_markdown: bool, with_wnli: bool) -> None:
    """Prints mean and spread over seeds of each task and setting, and the GLUE averages.

    Raises:
        LaunchError: Two forms are asked for.
        DataError: See `summarise`.
    """
    if as_json and as_markdown:
        raise LaunchError("--json and --markdown: give one of the two")
    found = summarise(find_runs(runs), with_wnli)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
        return
    between = ", " if as_markdown else "\n"
    rows = [_group_row(group, between) for group in found.groups] + [_average_row(one) for one in found.averages]
    if as_markdown:
        print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    else:
        columns = [Column(name, no_wrap=name != "setting") for name in HEADINGS]
        table = Table(*columns, caption="times 100; mean ± sample deviation over seeds; gain over the constant answer")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    for note in _notes(found):
        print(f"\n{note}" if as_markdown else note)


def submission(runs: Sequence[Path], output: Path, fill_missing: bool) -> None:
    """Writes the archive and prints which run each of its files came from.

    Raises:
        DataError: See `write_submission`.
    """
    sources = write_submission(find_runs(runs), output, fill_missing)
    table = Table("file", "rows", "from")
    for file, folder in sources.items():
        table.add_row(file.name, f"{file.rows:,}", str(folder) if folder is not None else "a constant, in its place")
    Console().print(table)
    print(f"wrote {output}")


def _group_row(group: Group, between: str) -> list[str]:
    metrics = between.join(f"{name} {_percent(spread)}" for name, spread in group.metrics.items())
    setting = group.setting if group.setting is not None else group.runs[0]
    own = [setting, group.task, group.split, str(group.score.n), metrics]
    return own + _score_cells(group.score, group.constant_score)


def _average_row(average: Average) -> list[str]:
    own = [
        average.setting or "",
        "GLUE average",
        "",
        str(average.score.n),
        f"{len(average.tasks)} of {len(average.tasks) + len(average.missing)} tasks",
    ]
    return own + _score_cells(average.score, average.constant)


def _score_cells(score: Spread, constant: float) -> list[str]:
    return [_percent(score), f"{100 * constant:.2f}", f"{100 * (score.mean - constant):+.2f}"]


def _percent(spread: Spread) -> str:
    deviation = "" if spread.deviation is None else f" ± {100 * spread.deviation:.2f}"
    return f"{100 * spread.mean:.2f}{deviation}"


def _notes(found: Summary) -> list[str]:
    missing = [
        f"GLUE average{f' of {one.setting}' if one.setting else ''}: without {', '.join(one.missing)}"
        for one in found.averages
        if one.missing
    ]
    return missing + list(found.notes)

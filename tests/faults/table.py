"""The table of the fault suite: on the screen, as JSON, and in the documentation."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from faults.scenario import Outcome, Scale
from faults.suite import ModuleResult
from rich.console import Console
from rich.table import Table

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
NARROWEST = 150  # below this, lines of the table are broken into single words
COLUMNS = ("Fault", "Catalogue", "Tried", "Survived", "Recovery, median / max", "Plain DeepSpeed")


def show(results: Sequence[ModuleResult]) -> None:
    """Prints one table, and below it how to repeat whatever failed."""
    grid = Table(*COLUMNS)
    for outcome in _outcomes(results):
        grid.add_row(*_cells(outcome), style="" if outcome.passed else "bold red")
    console = Console()
    console.width = max(console.width, NARROWEST)
    console.print(grid)
    for result in results:
        lines = [line for outcome in result.outcomes if not outcome.passed for line in _reasons(outcome)]
        lines += [result.error.strip().splitlines()[-1]] if result.error else []
        for line in lines:
            console.print(f"FAILED {result.module}: {line}", markup=False)
    skipped = sum(bool(outcome.skipped) for outcome in _outcomes(results))
    seconds = sum(result.seconds for result in results)
    tried = sum(outcome.tried for outcome in _outcomes(results))
    survived = sum(outcome.survived for outcome in _outcomes(results))
    console.print(f"{survived} of {tried} faults survived as promised, {skipped} not tried here, {seconds:.0f} s")


def write_json(results: Sequence[ModuleResult], scale: Scale, path: Path) -> None:
    """Writes everything that was measured."""
    report = {
        **_circumstances(scale),
        "passed": all(result.passed for result in results),
        "modules": {
            result.module: {
                "passed": result.passed,
                "seconds": result.seconds,
                "error": result.error,
                "outcomes": [asdict(outcome) | {"passed": outcome.passed} for outcome in result.outcomes],
            }
            for result in results
        },
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def write_docs(results: Sequence[ModuleResult], scale: Scale, path: Path) -> None:
    """Replaces what stands between the markers of a page."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    facts = _circumstances(scale)
    seconds = sum(result.seconds for result in results)
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(_cells(outcome) for outcome in _outcomes(results))]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    about = (
        f"Scale `{scale}`, {facts['date'][:10]}, {facts['cores']} cores, {seconds:.0f} s in total; "
        f"Python {facts['python']}, torch {facts['torch']}, DeepSpeed {facts['deepspeed']}."
    )
    path.write_text(
        "\n".join([before.rstrip() + "\n", BEGIN, "", *lines, "", about, "", END]) + after, encoding="utf-8"
    )


def _outcomes(results: Sequence[ModuleResult]) -> list[Outcome]:
    return [outcome for result in results for outcome in result.outcomes]


def _cells(outcome: Outcome) -> tuple[str, ...]:
    recovery = ""
    if outcome.recovery_seconds:
        recovery = f"{statistics.median(outcome.recovery_seconds):.1f} s / {max(outcome.recovery_seconds):.1f} s"
    counts = (f"{outcome.tried:,}", f"{outcome.survived:,}")
    if outcome.skipped:
        counts = ("-", f"not tried: {outcome.skipped}")
    return (outcome.fault, outcome.catalogue, *counts, recovery, outcome.plain_deepspeed)


def _reasons(outcome: Outcome) -> list[str]:
    head = f"{outcome.fault}: {outcome.survived} of {outcome.tried} survived"
    return [head, *(f"{outcome.fault}: {failure}" for failure in outcome.failures)]


def _circumstances(scale: Scale) -> dict[str, Any]:
    return {
        "scale": scale,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
    }

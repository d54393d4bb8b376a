"""Arguments and options that several commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe's short name.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key.path=value", help="Override settings.")]
NumProcesses = Annotated[
    int | None, typer.Option("--nproc", min=1, max=1_000_000, help="Worker processes; all hosts together.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OutputDir = Annotated[Path, typer.Option("--output-dir", help="Folder of run folders.")]
RunArgument = Annotated[Path, typer.Argument(help="A run folder, or one of its checkpoints.")]
Which = Annotated[str, typer.Option("--checkpoint", help="latest or best, for a run folder.")]

__all__ = [
    "AsJson",
    "NumProcesses",
    "OutputDir",
    "Overrides",
    "RecipeArgument",
    "RunArgument",
    "Which",
]

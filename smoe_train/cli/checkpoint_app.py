"""What can be asked about checkpoints; each command's work is in a file of its own, loaded when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smoe_train.cli.arguments import AsJson, Overrides, RunArgument, Which

checkpoint_app = typer.Typer(help="Checkpoints of runs.", no_args_is_help=True)


@checkpoint_app.command("list")
def checkpoint_list(run: Annotated[Path, typer.Argument(help="A run folder.")], json: AsJson = False) -> None:
    """List a run's checkpoints: steps, which is latest and best, sizes, and which is not complete."""
    from smoe_train.cli import checkpoints as command

    command.list_checkpoints(run, json)


@checkpoint_app.command("show")
def checkpoint_show(
    run: RunArgument,
    which: Which = "latest",
    tensors: Annotated[bool, typer.Option("--tensors", help="Also every tensor, with file and SHA-256.")] = False,
    json: AsJson = False,
) -> None:
    """Show what a checkpoint holds: state, files, experts."""
    from smoe_train.cli import checkpoints as command

    command.show(run, which, tensors, json)


@checkpoint_app.command("verify")
def checkpoint_verify(
    run: RunArgument,
    which: Which = "latest",
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint of the run.")] = False,
    json: AsJson = False,
) -> None:
    """Compare every byte with the manifest; name damaged files, experts and other tensors (exit code 2)."""
    from smoe_train.cli import checkpoints as command

    command.verify(run, which, every, json)


@checkpoint_app.command("prune")
def checkpoint_prune(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    keep_last: Annotated[int, typer.Option("--keep-last", min=1, help="How many of the newest sound ones stay.")],
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", min=1, help="Steps that are a multiple of it stay too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
    json: AsJson = False,
) -> None:
    """Remove old checkpoints; the best and the newest sound one stay in any case."""
    from smoe_train.cli import checkpoints as command

    command.prune(run, keep_last, keep_every, dry_run, json)


@checkpoint_app.command("average")
def checkpoint_average(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders or checkpoints, two or more.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    which: Which = "latest",
    json: AsJson = False,
) -> None:
    """Write the mean of several checkpoints' weights, to evaluate, export or start from."""
    from smoe_train.cli import reshape as command

    command.average_checkpoints(runs, which, output, json)


@checkpoint_app.command("reshard")
def checkpoint_reshard(
    run: RunArgument,
    world_size: Annotated[int, typer.Option("--world-size", min=1, max=1_000_000, help="Processes that go on.")],
    expert_parallel_size: Annotated[
        int, typer.Option("--expert-parallel-size", min=1, max=1_000_000, help="Ranks that share one set of experts.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    overrides: Overrides = None,
    which: Which = "latest",
    json: AsJson = False,
) -> None:
    """Rewrite a checkpoint in the files of another topology; training resumes from either."""
    from smoe_train.cli import reshape as command

    command.reshard_checkpoint(run, which, world_size, expert_parallel_size, tuple(overrides or ()), output, json)


@checkpoint_app.command("export")
def checkpoint_export(
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    which: Which = "best",
    json: AsJson = False,
) -> None:
    """Write a checkpoint as a folder that transformers loads, with its tokenizer."""
    from smoe_train.cli import export as command

    command.export(run, folder, which, json)

"""``checkpoint average | reshard``: a new run folder with one checkpoint, made of others."""

from __future__ import annotations

import json
from pathlib import Path

from smoe_train.checkpoint import Checkpoint, CheckpointStore
from smoe_train.checkpoint.average import average
from smoe_train.checkpoint.folders import CHECKPOINTS, step_name
from smoe_train.checkpoint.reshard import Contents, reshard
from smoe_train.cli.export import new_folder
from smoe_train.cli.run_folder import OneRank, open_run
from smoe_train.data import tokenizer_files
from smoe_train.durable import write_file
from smoe_train.errors import CheckpointError, RunFailedError
from smoe_train.parallel.topology import Topology
from smoe_train.recipe import RECIPE, TOKENIZER, Recipe, load_recipe, tokenizer_of


def average_checkpoints(runs: list[Path], which: str, output: Path, as_json: bool) -> None:
    """Writes the mean of several checkpoints' weights, as a run folder that can be evaluated but not resumed.

    Args:
        runs: Run folders or checkpoints, at least two.
        which: ``latest`` or ``best``, for run folders.
        output: Where to write; must not exist or be empty.
        as_json: Whether to print JSON.

    Raises:
        CheckpointError: There are too few, one is damaged, or they are of different models.
        LaunchError: The folder holds something or cannot be written.
    """
    opened = [open_run(run, which) for run in runs]
    checkpoints = [checkpoint for _, _, checkpoint in opened]
    if len({checkpoint.path.resolve() for checkpoint in checkpoints}) < max(len(checkpoints), 2):
        raise CheckpointError("an average takes two or more checkpoints, each once")
    newest = max(checkpoints, key=lambda checkpoint: checkpoint.step)
    recipe = next(recipe for _, recipe, checkpoint in opened if checkpoint is newest)
    written = _write(output, recipe, newest, average(checkpoints))
    result = {
        "checkpoint": str(written.path),
        "step": written.step,
        "average_of": [str(one.path) for one in checkpoints],
    }
    text = (
        f"{output}: mean of {len(checkpoints)} checkpoints' weights, with the buffers and the place in training of "
        f"{newest.path.name}. Moments are left out: evaluate, generate, export it or start from it with "
        "initialise.path; it cannot be resumed"
    )
    print(json.dumps(result) if as_json else text)


def reshard_checkpoint(
    run: Path,
    which: str,
    world_size: int,
    expert_parallel_size: int,
    overrides: tuple[str, ...],
    output: Path,
    as_json: bool,
) -> None:
    """Writes a checkpoint in the files of another topology, as a run folder that can be resumed from.

    Args:
        run: A run folder, or one of its checkpoints.
        which: ``latest`` or ``best``, for a run folder.
        world_size: Processes that will go on with it.
        expert_parallel_size: Ranks that share one set of experts.
        overrides: Other settings of the run that must change with them, as ``key.path=value``.
        output: Where to write; must not exist or be empty.
        as_json: Whether to print JSON.

    Raises:
        RecipeError: The run cannot go on with so many processes.
        CheckpointError: There is no such checkpoint, or it is damaged.
        LaunchError: The folder holds something or cannot be written.
    """
    folder, _, checkpoint = open_run(run, which)
    overrides = (*overrides, f"parallel.expert_parallel_size={expert_parallel_size}")
    recipe = load_recipe(str(folder / RECIPE), overrides, world_size, resolved=True)
    topology = Topology.create(world_size, expert_parallel_size, recipe.model.moe.num_experts)
    written = _write(output, recipe, checkpoint, reshard(checkpoint, topology))
    changed = [
        name for name, digest in written.tensor_sha256.items() if checkpoint.tensor_sha256.get(name, digest) != digest
    ]
    if changed:
        raise RunFailedError(f"{output}: {changed[0]} is not what it was in {checkpoint.path}; do not use it")
    resume = f"smoe-train train {output / RECIPE} --nproc {world_size} --resume {written.path}"
    result = {
        "checkpoint": str(written.path),
        "step": written.step,
        "resharded": str(checkpoint.path),
        "files": sorted(written.files),
        "resume": resume,
    }
    text = (
        f"{written.path}: {checkpoint.path} in the files of {world_size} processes, experts over "
        f"{expert_parallel_size}; no tensor has changed. To go on from it:\n{resume}"
    )
    print(json.dumps(result) if as_json else text)


def _write(output: Path, recipe: Recipe, source: Checkpoint, contents: Contents) -> Checkpoint:
    """Writes a run folder that holds one checkpoint, both the latest and the best; returns it, verified."""
    tokenizer = tokenizer_of(source.path)
    names = {name: (tokenizer / name).read_bytes() for name in tokenizer_files(tokenizer)}
    with new_folder(output) as partial:
        store = CheckpointStore(partial / CHECKPOINTS, OneRank(), keep_last=1)
        store.save(source.step, contents.files, contents.state, best=True, tokenizer=names)
        write_file(partial / RECIPE, recipe.to_yaml().encode())
        (partial / TOKENIZER).mkdir()
        for name, data in names.items():
            write_file(partial / TOKENIZER / name, data)
    written = Checkpoint.open(output / CHECKPOINTS / step_name(source.step))
    written.verify()
    return written

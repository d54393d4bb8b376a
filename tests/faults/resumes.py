"""Resuming from every step of a run, and any series of interruptions seen from the data: no bit, no sample differs."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from faults.runs import (
    LIFE_SECONDS,
    WORLD_SIZE,
    begin_run,
    contest_recipe,
    differences,
    easy_first_recipe,
    live,
    stages_recipe,
    undisturbed,
    witnessed,
)
from faults.scenario import Outcome, Scale

from smoe_train.checkpoint.folders import CHECKPOINTS, step_name
from smoe_train.data.batches.loader import FixedBlocks, TrainBatches
from smoe_train.recipe import Recipe
from smoe_train.reporting import METRICS

SCHEDULES = {"short": 20, "commit": 200, "nightly": 10_000}
# Every how many steps a run is resumed, by recipe; the contests' warm-up ends with step 5.
STRIDES = {
    "short": {"contest": 5},
    "commit": {"contest": 1, "stages": 4, "easy-first": 4},
    "nightly": {"contest": 1, "stages": 1, "easy-first": 1},
}
PARALLEL: dict[str, list[dict[str, Any]]] = {
    "short": [{}],
    "commit": [{}],
    "nightly": [{"zero_stage": 0}, {}, {"zero_stage": 2}, {"precision": "bf16"}],
}
EVERY_CHECKPOINT = {"every_steps": 1, "keep_last": 1000}


def run(scale: Scale, folder: Path) -> list[Outcome]:
    """Resumes three recipes from their steps, and data in hypothetical series of runs."""
    recipes = {"contest": contest_recipe, "stages": stages_recipe, "easy-first": easy_first_recipe}
    tried, failures = 0, []
    for name, stride in STRIDES[scale].items():
        for number, parallel in enumerate(PARALLEL[scale]):
            place = folder / f"{name}-{number}"
            place.mkdir()
            recipe = recipes[name](place, checkpoint=EVERY_CHECKPOINT, parallel=parallel)
            steps = range(1, recipe.training.max_steps, stride)
            tried += len(steps)
            failures += [f"{name} {parallel}: {line}" for line in _resumed_from(recipe, place, steps)]
    return [
        Outcome(
            fault="Death right after the checkpoint of each step: in the contests' warm-up, at its end, in any epoch",
            catalogue="B1, B3, B8",
            tried=tried,
            survived=tried - len(failures),
            plain_deepspeed="saves no random state: every loss after a resume differs where there is dropout (0.19.8)",
            failures=tuple(failures),
        ),
        _data_order(SCHEDULES[scale]),
    ]


def _resumed_from(recipe: Recipe, folder: Path, steps: range) -> list[str]:
    straight = folder / "undisturbed"
    golden = undisturbed(recipe, straight)
    failures = []
    for step in steps:
        run_folder = folder / f"from-{step}"
        shutil.copytree(straight, run_folder)
        for later in range(step + 1, recipe.training.max_steps + 1):
            shutil.rmtree(run_folder / CHECKPOINTS / step_name(later))
        lines = (run_folder / METRICS).read_text().splitlines(keepends=True)
        # The report on the dev split, the last thing of a run, has the step of the best checkpoint.
        (run_folder / METRICS).write_text("".join(line for line in lines if '"split": "dev"' not in line))
        begin_run(recipe, run_folder)
        life = live(run_folder)
        ended = life.wait(LIFE_SECONDS)
        life.kill()
        found = [] if ended and life.codes == [0] * WORLD_SIZE else [f"ended with {life.codes}"]
        if witnessed(run_folder).get("step") != step:
            found.append(f"resumed at {witnessed(run_folder)}")
        found += differences(run_folder, golden, finished=True)
        failures += [f"from step {step}: {'; '.join(found)}"] if found else []
        shutil.rmtree(run_folder)
    return failures


def _data_order(count: int) -> Outcome:
    """Draws series of runs that die and go on with another number of ranks and loader workers."""
    failures = []
    for seed in range(count):
        problem = _series_problem(random.Random(seed))
        failures += [f"seed {seed}: {problem}"] if problem else []
    return Outcome(
        fault="Three deaths in a row, each time other ranks and loader workers: each sample once an epoch, in order",
        catalogue="B7",
        tried=count,
        survived=count - len(failures),
        plain_deepspeed="keeps no position in the data: the caller has to",
        failures=tuple(failures),
    )


def _series_problem(draw: random.Random) -> str:
    global_batch = draw.choice([4, 8, 12])
    blocks, seed = draw.randint(global_batch, 4 * global_batch), draw.randrange(2**32)
    steps = draw.randint(8, 3 * blocks // global_batch + 8)
    tokens = np.arange(blocks * 4 + 1, dtype=np.uint32)

    def read(first: int, last: int, world_size: int, workers: int) -> Iterator[list[int]]:
        """Yields the blocks of each step in the order of the global batch, gathered from all ranks."""
        micro = draw.choice([size for size in (1, 2) if global_batch % (world_size * size) == 0])
        ranks = [
            TrainBatches(FixedBlocks(tokens, 4), global_batch, micro, seed, rank, world_size, workers).steps(
                first, last
            )
            for rank in range(world_size)
        ]
        for parts in zip(*ranks, strict=True):
            placed = {
                place: block
                for part in parts
                for batch in part
                for place, block in zip(batch.sample_index_B.tolist(), batch.block_B.tolist(), strict=True)
            }
            yield [placed[place] for place in range(global_batch)]

    expected = list(read(0, steps, 1, 0))
    trained: list[list[int]] = []
    for life in range(4):
        # A run dies somewhere between its last checkpoint and what its workers have read ahead.
        dies = steps if life == 3 else draw.randint(len(trained), steps)
        workers = draw.choice([1, 2]) if draw.random() < 0.04 else 0
        batches = list(read(len(trained), dies, draw.choice([1, 2, 4]), workers))
        kept = len(batches) if life == 3 else draw.randint(0, len(batches))
        trained += batches[:kept]
    if trained != expected:
        return f"{len(trained)} steps, of which another order than an undisturbed run's"
    stream = [block for step in trained for block in step]
    for epoch in range(len(stream) // blocks):
        if Counter(stream[epoch * blocks : (epoch + 1) * blocks]) != Counter(range(blocks)):
            return f"epoch {epoch} has not each sample once"
    return ""

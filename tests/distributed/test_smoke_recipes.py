"""Every smoke recipe, as shipped, on two expert-parallel processes: it learns, and it resumes."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks

from smoe_train import assembly
from smoe_train.checkpoint import Checkpoint
from smoe_train.recipe import Recipe, load_recipe, shipped_recipes
from smoe_train.reporting import METRICS, ROUTING, read_records

SMOKE = [name for name in shipped_recipes() if name.startswith("smoke/")]
STEPS, MIDDLE = 50, 25
# How far the loss falls: of 5.5 nats a byte, or of ln 3 for a choice of three.
LEARNT = {"smoke/classification": 0.2}


def train(recipe: Recipe, folder: Path) -> None:
    """Trains like a worker, from the newest checkpoint of the folder if there is one."""
    process = assembly.start_process(recipe)
    trainer = assembly.build_trainer(recipe, process, folder)
    checkpoint = trainer.store.newest_sound(print)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    if process.is_first:
        trainer.journal = assembly.open_journal(recipe, folder, checkpoint.step if checkpoint else None)
    trainer.train()


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns what was recorded after the middle, without times."""
    found = (record for record in read_records(folder / name) if record["step"] > MIDDLE)
    return [{key: value for key, value in record.items() if not key.endswith("seconds")} for record in found]


@pytest.mark.parametrize("name", SMOKE)
def test_the_smoke_recipe_learns_and_resumes_bit_identically(name: str, tmp_path: Path) -> None:
    """50 steps; then from the checkpoint of step 25 alone, with whatever the policy keeps: all figures, all tensors."""
    recipe = load_recipe(name, ["parallel.expert_parallel_size=2", "checkpoint.keep_last=9"], 2)
    assert recipe.training.max_steps == STEPS
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    straight.mkdir()
    run_ranks(2, train, recipe, straight)
    losses = [record["loss"] for record in read_records(straight / METRICS) if record["split"] == "train"]
    assert statistics.fmean(losses[-10:]) < statistics.fmean(losses[:10]) - LEARNT.get(name, 0.5), losses
    middle = f"checkpoints/step-{MIDDLE:08d}"
    shutil.copytree(straight / middle, resumed / middle)
    run_ranks(2, train, recipe, resumed)
    for file in (METRICS, ROUTING):
        assert records(resumed, file) == records(straight, file)
        assert records(resumed, file)
    one, other = (Checkpoint.open(folder / f"checkpoints/step-{STEPS:08d}") for folder in (straight, resumed))
    assert sorted(one.tensors) == sorted(other.tensors)
    for key in one.tensors:
        torch.testing.assert_close(other.tensor(key), one.tensor(key), rtol=0, atol=0, equal_nan=True, msg=key)

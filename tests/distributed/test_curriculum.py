"""Re-ordering epochs on several ranks: one order for all, no sample lost, and resumable anywhere on any topology."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.tiny import tiny_recipe

from smoe_train import assembly
from smoe_train.checkpoint import Checkpoint, read_extra
from smoe_train.config import merge
from smoe_train.recipe import Recipe

BLOCKS, STEPS = 22, 9  # 8 a step: epochs begin in the middle of steps 2, 5 and 8


@pytest.fixture(scope="module")
def short_text(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("short") / "corpus.txt"
    path.write_text(text.read_text()[:450])
    return path


def recipe_of(path: Path, world_size: int, **sections: Any) -> Recipe:
    base = {
        "parallel": {"expert_parallel_size": world_size},
        "data": {"valid_fraction": 0.2, "test_fraction": 0.0},
        "training": {"max_steps": STEPS, "self_test": False},
        "model": {"moe": {"router": {"type": "adaptive", "base": {"type": "top_k", "init_std": 1.0}}}},
        "evaluation": {"every_steps": 100},
        "checkpoint": {"every_steps": 1, "keep_last": 20},
        "curriculum": {"order": {"by": "cosine"}},
    }
    return tiny_recipe(path, world_size, **merge(base, sections))


Streams = dict[int, dict[int, int]]


def train(recipe: Recipe, folder: Path, checkpoint: Path | None = None, stop_after: int | None = None) -> Any:
    """Trains like a worker; returns this rank's blocks by step and place in the global batch, and the orders made."""
    process = assembly.start_process(recipe)
    trainer = assembly.build_trainer(recipe, process, folder)
    if checkpoint is not None:
        trainer.resume(Checkpoint.open(checkpoint))
    steps: Streams = {}
    orders: dict[int, list[int]] = {}
    real, make = trainer.task.objective, trainer.sample_order.of_epoch

    def objective(forward: Any, batch: Any, knobs: Any, totals: Any) -> Any:
        if stop_after is not None and knobs.step >= stop_after:
            raise KeyboardInterrupt
        pairs = zip(batch.sample_index_B.tolist(), batch.block_B.tolist(), strict=True)
        steps.setdefault(knobs.step, {}).update(pairs)
        return real(forward, batch, knobs, totals)

    def of_epoch(epoch: int) -> Any:
        order = make(epoch)
        orders[epoch] = order.tolist()
        return order

    trainer.task.objective, trainer.sample_order.of_epoch = objective, of_epoch
    try:
        trainer.train()
    except KeyboardInterrupt:
        process.barrier()
    return steps, orders


def stream(ranks: list[Any], first: int = 0) -> list[int]:
    """The blocks of all ranks in the order of training."""
    found = []
    for step in range(first, STEPS):
        places = [place for steps, _ in ranks for place in steps[step]]
        assert sorted(places) == list(range(8)), "every place of the global batch on one rank"
        merged = {place: block for steps, _ in ranks for place, block in steps[step].items()}
        found += [merged[place] for place in range(8)]
    return found


@pytest.fixture(scope="module")
def whole(short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_ranks(2, train, recipe_of(short_text, 2), folder)


def test_all_ranks_have_one_order_that_is_a_permutation(whole: tuple[Path, list[Any]]) -> None:
    """A9: identical on all ranks, no sample lost, none twice."""
    _, ranks = whole
    assert ranks[0][1] == ranks[1][1]
    assert sorted(ranks[0][1]) == [1, 2, 3]
    blocks = stream(ranks)
    for epoch in range(3):
        found = blocks[epoch * BLOCKS : (epoch + 1) * BLOCKS]
        assert sorted(found) == list(range(BLOCKS))
        assert epoch == 0 or found == ranks[0][1][epoch]
    for steps, rank in zip((ranks[0][0], ranks[1][0]), (0, 1), strict=True):
        assert {place % 2 for places in steps.values() for place in places} == {rank}, "neighbours on different ranks"


@pytest.mark.parametrize("step", [1, 2, 4, 5, 7])
def test_a_resumed_run_is_bit_identical(
    whole: tuple[Path, list[Any]], short_text: Path, tmp_path: Path, step: int
) -> None:
    """A9: in the middle of an epoch, and at the step in which one ends and the next is ordered."""
    folder, ranks = whole
    recipe = recipe_of(short_text, 2, loader={"num_workers": 1 if step == 4 else 0})
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    again = run_ranks(2, train, recipe, tmp_path, checkpoint)
    assert stream(again, step) == stream(ranks)[8 * step :]
    last = f"step-{STEPS:08d}"
    expected = Checkpoint.open(folder / "checkpoints" / last)
    assert Checkpoint.open(tmp_path / "checkpoints" / last).files == expected.files, "the same bytes at the end"


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (4, 2)])
def test_another_number_of_ranks_ends_the_epoch_in_the_same_order_with_the_same_record(
    whole: tuple[Path, list[Any]], short_text: Path, tmp_path: Path, world_size: int, micro: int
) -> None:
    folder, ranks = whole
    recipe = recipe_of(short_text, world_size, training={"micro_batch_size": micro})
    checkpoint = folder / "checkpoints" / "step-00000004"
    again = run_ranks(world_size, train, recipe, tmp_path, checkpoint)
    rest = 2 * BLOCKS - 8 * 4
    assert stream(again, 4)[:rest] == stream(ranks)[8 * 4 :][:rest]
    for steps, orders in again:
        assert sorted(orders) == [2, 3]
        assert orders == again[0][1]
        assert sorted(steps) == list(range(4, STEPS))
    # Not a count is lost or added by moving: rank 0 alone holds what all ranks had counted.
    first, after = (
        read_extra(Checkpoint.open(one / "checkpoints" / "step-00000005"), "sample_order/")
        for one in (folder, tmp_path)
    )
    assert torch.equal(first["order"], after["order"])
    assert torch.equal(first["record"], after["record"])
    assert torch.equal(first["counted"][:, -1], after["counted"][:, -1])
    assert int(first["counted"][:, -1].sum()) == 3 * 8 * 16, "steps 2, 3 and 4"


def recorded(recipe: Recipe, folder: Path) -> Any:
    """Counts of the first steps with weights that do not change: every topology sees the same model."""
    process = assembly.start_process(recipe)
    trainer = assembly.build_trainer(recipe, process, folder)
    assert trainer.sample_order is not None
    recorder = trainer.sample_order.recorder
    trainer.model.train()
    with torch.no_grad():
        for step in range(4):
            for batch in trainer.batches[step]:
                objective = trainer.task.objective(trainer.engine.forward, batch, trainer.curriculum.knobs(0), None)
                recorder.add(batch, objective.output.experts_of_token)
    return recorder.counts, recorder.counted()


def test_the_sum_over_ranks_is_the_value_of_one(short_text: Path, tmp_path: Path) -> None:
    """A8, with the samples of an epoch and a half."""
    ((_, one),) = run_ranks(1, recorded, recipe_of(short_text, 1), tmp_path)
    assert int(one[:, -1].sum()) == 4 * 8 * 16
    assert int(one[:, -1].max()) == 2 * 16
    assert 0 < int(one[:, 0].sum()) < int(one[:, -1].sum())
    ranks = run_ranks(2, recorded, recipe_of(short_text, 2), tmp_path)
    assert all(torch.equal(total, one) for _, total in ranks)
    assert torch.equal(ranks[0][0] + ranks[1][0], one)
    assert not torch.equal(ranks[0][0], ranks[1][0])


def test_a_run_that_dies_goes_on_from_its_last_checkpoint(
    whole: tuple[Path, list[Any]], short_text: Path, tmp_path: Path
) -> None:
    """What was counted after the checkpoint is counted again, not twice."""
    _, ranks = whole
    # Waited for: a death two steps after it began may otherwise come before a slow disk has it.
    recipe = recipe_of(short_text, 2, checkpoint={"every_steps": 3, "background": False})
    run_ranks(2, train, recipe, tmp_path, None, 5)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000003"]
    again = run_ranks(2, train, recipe, tmp_path, tmp_path / "checkpoints" / "step-00000003")
    assert stream(again, 3) == stream(ranks)[24:]

"""A run that is stopped, killed or moved to another topology continues as if nothing had happened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run_ranks
from support.tiny import classification, tiny_recipe, write_examples

from smoe_train import assembly
from smoe_train.checkpoint import Checkpoint
from smoe_train.checkpoint.model_state import collect
from smoe_train.errors import RunFailedError
from smoe_train.recipe import Recipe
from smoe_train.reporting import METRICS, read_records


def train(recipe: Recipe, folder: Path, stop_after: int | None = None, resume_from: Path | None = None) -> None:
    """Trains like a worker; ``stop_after`` ends the process in the middle, without any clean-up."""
    process = assembly.start_process(recipe)
    trainer = assembly.build_trainer(recipe, process, folder)
    checkpoint = trainer.store.newest_sound(print) if resume_from is None else Checkpoint.open(resume_from)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    if process.is_first:
        trainer.journal = assembly.open_journal(recipe, folder, checkpoint.step if checkpoint else None)
    if stop_after is not None:
        step = trainer.engine.step
        calls = [trainer.state.step]

        def step_or_die(rate: float, **options: bool) -> bool:
            if calls[0] == stop_after:
                os._exit(0)
            calls[0] += 1
            return step(rate, **options)

        trainer.engine.step = step_or_die  # type: ignore[method-assign]
    trainer.train()


def losses(folder: Path) -> list[tuple[Any, ...]]:
    """Returns every step's figures, bit for bit, without times."""
    return [
        tuple(
            (key, value.hex() if isinstance(value, float) else value)
            for key, value in sorted(record.items())
            if key not in ("step_seconds", "seconds")
        )
        for record in read_records(folder / METRICS)
    ]


def die_and_return(recipe: Recipe, folder: Path, stop_after: int) -> None:
    """A rank that dies without a word: the harness needs its result file, so the work runs in a child."""
    child = os.fork()
    if child == 0:
        try:
            train(recipe, folder, stop_after)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0, "died of something else, and earlier"


def router(**options: Any) -> dict[str, Any]:
    """Returns the sections of a run with another policy."""
    return {"model": {"moe": {"router": options}}}


CASES = [
    ("fp32 ZeRO 1", 2, {"expert_parallel_size": 2}, {}),
    ("fp32 ZeRO 0", 2, {"expert_parallel_size": 2, "zero_stage": 0}, {}),
    ("fp32 ZeRO 2", 2, {"expert_parallel_size": 2, "zero_stage": 2}, {}),
    ("bf16", 2, {"expert_parallel_size": 2, "precision": "bf16"}, {}),
    ("one process", 1, {"expert_parallel_size": 1}, {}),
    ("local", 1, {"engine": "local"}, {}),
    (
        "SimSMoE, whose counters and due pairs are buffers",
        2,
        {"expert_parallel_size": 2},
        {
            "model": {
                "moe": {
                    "num_experts": 4,
                    "router": {
                        "type": "sim_smoe",
                        "similarity_coefficient": 0.5,
                        "frequency": 40,
                        "frequency_unit": "tokens",
                        "threshold": 0.0,
                        "min_tokens": 4,
                        "projection": "mlp",
                    },
                }
            }
        },
    ),
    (
        "dropout, jitter, k schedule, workers, accumulation",
        2,
        {"expert_parallel_size": 2},
        {
            "model": {"dropout": 0.1, "moe": {"router": {"type": "top_k", "jitter": 0.2}}},
            "curriculum": {"top_k": {"low": 2, "high": 4}},
            "training": {"micro_batch_size": 2},
            "loader": {"num_workers": 1},
        },
    ),
    ("into stage 2", 2, {"expert_parallel_size": 2}, router(type="stable_moe", stage_1_steps=5)),
    ("in stage 2", 2, {"expert_parallel_size": 2, "precision": "bf16"}, router(type="stable_moe", stage_1_steps=3)),
    (
        "SimSMoE over adaptive gating, whose counted gaps are a buffer too",
        2,
        {"expert_parallel_size": 2},
        {
            "model": {
                "moe": {
                    "num_experts": 4,
                    "router": {
                        "type": "sim_smoe",
                        "similarity_coefficient": 0.5,
                        "frequency": 20,
                        "frequency_unit": "tokens",
                        "threshold": 0.0,
                        "min_tokens": 4,
                        "base": {"type": "adaptive", "target_top2_share": 0.5, "base": {"type": "top_k"}},
                    },
                }
            }
        },
    ),
    ("balancing bias", 2, {"expert_parallel_size": 2, "precision": "bf16"}, router(type="sigmoid")),
]


@pytest.mark.parametrize(
    ("world_size", "parallel", "sections"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_a_resumed_run_is_bit_identical(
    tmp_path: Path, text: Path, world_size: int, parallel: dict[str, Any], sections: dict[str, Any]
) -> None:
    recipe = tiny_recipe(text, world_size, parallel=parallel, checkpoint={"background": False}, **sections)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
    run_ranks(world_size, train, recipe, straight)
    run_ranks(world_size, die_and_return, recipe, broken, 5)
    assert (broken / "checkpoints" / "step-00000004").exists()
    assert not (broken / "checkpoints" / "step-00000006").exists()
    run_ranks(world_size, train, recipe, broken)
    expected = losses(straight)
    assert [dict(record)["step"] for record in expected] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert losses(broken) == expected


EXAMPLE_CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "dropout, windows of lengths, accumulation": (
        {},
        {"dropout": 0.2, "length_window": 2},
        {"model": {"dropout": 0.1}, "loader": {"num_workers": 1}},
    ),
    "bf16, frozen experts and router, whose bias stays too": (
        {"precision": "bf16"},
        {"dropout": 0.2, "attention": "bidirectional", "pooling": "max"},
        {"initialise": {"freeze": ["experts", "router"]}, **router(type="sigmoid")},
    ),
    "an epoch that is ordered by what was counted on both sides of the break": (
        {"zero_stage": 2},
        {"dropout": 0.2, "length_window": 1},
        {
            **router(type="adaptive", base={"type": "top_k", "init_std": 0.3}, threshold=0.15),
            "curriculum": {"order": {"by": "mean_ratio"}},
        },
    ),
}


@pytest.mark.parametrize(("parallel", "task", "sections"), EXAMPLE_CASES.values(), ids=EXAMPLE_CASES)
def test_a_resumed_classifier_is_bit_identical(
    tmp_path: Path, parallel: dict[str, Any], task: dict[str, Any], sections: dict[str, Any]
) -> None:
    """The training split has 54 examples, so that step 7 begins the second epoch."""
    values = {**classification(write_examples(tmp_path / "examples"), **task), **sections}
    values["evaluation"] |= {"every_steps": 4}
    values["checkpoint"] = {"background": False}
    recipe = tiny_recipe(tmp_path, 2, parallel={"expert_parallel_size": 2, **parallel}, **values)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
    run_ranks(2, train, recipe, straight)
    run_ranks(2, die_and_return, recipe, broken, 5)
    assert not (broken / "checkpoints" / "step-00000006").exists()
    run_ranks(2, train, recipe, broken)
    assert losses(broken) == losses(straight)
    last = [Checkpoint.open(folder / "checkpoints" / "step-00000008").files for folder in (broken, straight)]
    assert last[0] == last[1], "the same bytes at the end"


def load_and_collect(recipe: Recipe, folder: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Loads a checkpoint and returns what this rank would save."""
    process = assembly.start_process(recipe)
    trainer = assembly.build_trainer(recipe, process, folder)
    trainer.resume(Checkpoint.open(checkpoint))
    files = collect(trainer.engine, process.rank, recipe.parallel.expert_parallel_size, process.device)
    return {name: tensor for file in files.values() for name, tensor in file.items()}


@pytest.mark.parametrize(("world_size", "size", "zero"), [(1, 1, 1), (2, 1, 1), (4, 4, 1), (4, 2, 2), (2, 2, 0)])
def test_another_topology_continues_the_run(tmp_path: Path, text: Path, world_size: int, size: int, zero: int) -> None:
    """Weights and moments arrive bit for bit; the next losses agree within fp32 rounding."""
    first = tiny_recipe(text, 2, parallel={"expert_parallel_size": 2})
    saved = tmp_path / "saved"
    saved.mkdir()
    run_ranks(2, train, first, saved)
    checkpoint = saved / "checkpoints" / "step-00000004"
    training = {"micro_batch_size": 8 // world_size}
    other = tiny_recipe(
        text, world_size, parallel={"expert_parallel_size": size, "zero_stage": zero}, training=training
    )
    held: dict[str, torch.Tensor] = {}
    for rank in run_ranks(world_size, load_and_collect, other, tmp_path / "unused", checkpoint):
        held |= rank
    source = Checkpoint.open(checkpoint)
    names = {name for name in source.tensors if not name.startswith("random/")}
    assert names == {name for name in held if not name.startswith("random/")}
    assert all(torch.equal(held[name], source.tensor(name)) for name in names)
    moved = tmp_path / "moved"
    moved.mkdir()
    run_ranks(world_size, train, other, moved, None, checkpoint)
    after = {r["step"]: r["loss"] for r in read_records(moved / METRICS) if r["split"] == "train"}
    before = {r["step"]: r["loss"] for r in read_records(saved / METRICS) if r["split"] == "train" and r["step"] > 4}
    assert after == pytest.approx(before, rel=1e-5)


def save_with_a_full_disk(recipe: Recipe, folder: Path) -> str:
    """Rank 1 cannot write its second checkpoint; returns what the run ends with."""
    from smoe_train.checkpoint import writing

    process = assembly.start_process(recipe)
    trainer = assembly.build_trainer(recipe, process, folder)
    write = writing.save_file

    def failing(tensors: Any, path: Path) -> None:
        if process.rank == 1 and "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path)

    writing.save_file = failing
    try:
        trainer.train()
    except RunFailedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("background", [True, False])
def test_a_rank_that_cannot_write_fails_the_save_everywhere(tmp_path: Path, text: Path, background: bool) -> None:
    recipe = tiny_recipe(
        text,
        2,
        parallel={"expert_parallel_size": 2},
        checkpoint={"failures_allowed": 0, "background": background},
    )
    messages = run_ranks(2, save_with_a_full_disk, recipe, tmp_path)
    assert messages[0] == messages[1]
    assert "rank 1: OSError: [Errno 28] No space left on device" in messages[0]
    assert "MB are needed" in messages[0]
    assert "are free there" in messages[0]
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["latest", "step-00000002"]
    Checkpoint.open(tmp_path / "checkpoints" / "step-00000002").verify()


def test_a_save_that_fails_does_not_end_a_run_that_may_lose_it(tmp_path: Path, text: Path) -> None:
    recipe = tiny_recipe(text, 2, parallel={"expert_parallel_size": 2}, checkpoint={"failures_allowed": 1})
    assert run_ranks(2, save_with_a_full_disk, recipe, tmp_path) == ["", ""]
    steps = [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))]
    assert steps == ["step-00000002", "step-00000006", "step-00000008"]

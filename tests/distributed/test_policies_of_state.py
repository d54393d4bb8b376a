"""Policies whose routing has a history: a second stage that is frozen, a bias that adapts; and one that is not local.

Losses, all SGD weights and all buffers are those of one process, at any topology and however the batch is cut.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parallel_runs import assert_equal_runs, recipe_for, train
from support.ranks import run_ranks
from support.tiny import tiny_recipe
from torch import Tensor

from smoe_train import assembly
from smoe_train.recipe import Recipe

SWITCH = 2
POLICIES: dict[str, dict[str, Any]] = {
    "stable_moe": {"type": "stable_moe", "stage_1_steps": SWITCH, "distilled": "convolution"},
    "sigmoid": {"type": "sigmoid", "bias_update_rate": 0.05},
    "expert_choice": {"type": "expert_choice", "allow_future_leak": True},
}
every_policy = pytest.mark.parametrize("policy", POLICIES)


def sections(policy: str) -> dict[str, Any]:
    return {"model": {"moe": {"router": POLICIES[policy], "z_loss_coefficient": 0.0}}}


@pytest.fixture(scope="module")
def reference(text: Path) -> dict[str, dict[str, Any]]:
    return {policy: train(recipe_for(text, 1, {"engine": "local"}, **sections(policy))) for policy in POLICIES}


def check(ranks: list[dict[str, Any]], expected: dict[str, Any], policy: str) -> None:
    assert_equal_runs(ranks, expected)
    names = [name for name in expected["weights"] if "bias_bits" in name]
    assert bool(names) == (policy == "sigmoid")
    for name in names:
        bits = expected["weights"][name]
        assert bits.any(), "the bias has moved"
        assert all(torch.equal(rank["weights"][name], bits) for rank in ranks)


@every_policy
@pytest.mark.parametrize(("world_size", "size", "zero"), [(1, 1, 1), (2, 1, 0), (2, 2, 2), (4, 2, 1), (4, 4, 1)])
def test_any_topology_equals_one_process(
    text: Path, reference: dict[str, Any], policy: str, world_size: int, size: int, zero: int
) -> None:
    parallel = {"expert_parallel_size": size, "zero_stage": zero}
    recipe = recipe_for(text, world_size, parallel, **sections(policy))
    check(run_ranks(world_size, train, recipe), reference[policy], policy)


@every_policy
@pytest.mark.parametrize("world_size", [1, 2])
def test_accumulation_is_one_big_batch(text: Path, reference: dict[str, Any], policy: str, world_size: int) -> None:
    """Four micro-batches a step, with the losses of stage 1 over the whole step, and one update of the bias."""
    training = {"micro_batch_size": 2 // world_size, "router_statistics": "step"}
    parallel = {"engine": "local"} if world_size == 1 else {"expert_parallel_size": 2}
    recipe = recipe_for(text, world_size, parallel, training=training, **sections(policy))
    ranks = [train(recipe)] if world_size == 1 else run_ranks(world_size, train, recipe)
    check(ranks, reference[policy], policy)


def test_stage_2_has_no_auxiliary_loss(reference: dict[str, Any]) -> None:
    """Invariant 13: not small but 0, from the switch on; before it they are at work."""
    losses = reference["stable_moe"]["losses"]
    for name in ("stable_balance_loss", "distillation_loss"):
        values = [step[name] for step in losses]
        assert all(value != 0.0 for value in values[:SWITCH]), name
        assert values[SWITCH:] == [0.0] * (len(values) - SWITCH), name


def router_history(recipe: Recipe) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Trains with the recipe's own optimizer; returns the routers' masters and weights as used, after each step."""
    process = assembly.start_process(recipe)
    trainer = assembly.build_trainer(recipe, process, Path("unused"))
    history: list[dict[str, tuple[Tensor, Tensor]]] = []
    step = trainer.engine.step

    def step_and_look(rate: float, **options: bool) -> bool:
        updated = step(rate, **options)
        history.append(
            {
                name: (trainer.engine.read_state(parameter)["weight"], parameter.detach().clone())
                for name, parameter in trainer.model.named_parameters()
                if ".router." in name
            }
        )
        return updated

    trainer.engine.step = step_and_look  # type: ignore[method-assign]
    trainer._validate = lambda: False  # type: ignore[method-assign]
    trainer._save = lambda best: None  # type: ignore[method-assign]
    trainer.train()
    return history


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {"engine": "local"}),
        (2, {"expert_parallel_size": 2, "zero_stage": 0}),
        (2, {"expert_parallel_size": 2, "zero_stage": 1}),
        (2, {"expert_parallel_size": 2, "zero_stage": 2}),
        (2, {"expert_parallel_size": 2, "zero_stage": 1, "precision": "bf16"}),
        (2, {"expert_parallel_size": 1, "zero_stage": 2, "precision": "bf16"}),
    ],
    ids=str,
)
def test_stage_2_freezes_to_the_bit(text: Path, world_size: int, parallel: dict[str, Any]) -> None:
    """Invariant 13: with AdamW's moments of stage 1 and a strong decay, neither masters nor weights change a bit.

    The centroids of the learned router train on, and before the switch everything changes.
    """
    recipe = tiny_recipe(
        text,
        world_size,
        parallel=parallel,
        optimizer={"weight_decay": 0.5},
        learning_rate={"peak": 0.05, "form": "constant"},
        training={"max_steps": 6},
        **sections("stable_moe"),
    )
    histories = [router_history(recipe)] if world_size == 1 else run_ranks(world_size, router_history, recipe)
    for history in histories:
        assert len(history) == 6
        for steps, (before, after) in enumerate(pairwise(history), start=1):
            assert len(after) == 2 * 4
            for name, (master, weight) in after.items():
                frozen = ".distilled." in name and steps >= SWITCH
                assert torch.equal(master, before[name][0]) == frozen, (name, steps)
                if frozen:
                    assert torch.equal(weight, before[name][1]), (name, steps)

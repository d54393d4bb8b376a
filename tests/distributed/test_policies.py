"""Linear, generated, frozen and cosine routers train alike at any topology, and with micro-batches as with one batch.

The trainer's own loop runs by SGD; the reference is one process with one big batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.parallel_runs import assert_equal_runs, recipe_for, train
from support.ranks import run_ranks

HYPER = {"type": "hyper_router", "hyper_hidden": 8, "hypernet_std": 0.3}
# Gradients of cosines grow as vectors shrink, and with them what rounding does in a few steps of SGD.
COSINE = {"type": "x_moe", "init_std": 0.5, "embedding_gain": 1.0}
GROWING = {"top_k": {"low": 4, "high": 8}}

# A balance loss that is felt: with 0.01 a wrong one would hide within the tolerance.
POLICIES: dict[str, dict[str, Any]] = {
    "top_k": {"router": {"type": "top_k", "bias": True, "init_std": 0.3}},
    "hyper_router": {"router": HYPER},
    "hyper_router, one hypernet": {"router": {**HYPER, "hypernet_scope": "model"}},
    "smoe_dropout": {"router": {"type": "smoe_dropout", "router_std": 0.3}, "curriculum": GROWING},
    "random": {"router": {"type": "random", "router_std": 0.3, "bias_std": 0.3}},
    "x_moe, softmax": {"router": COSINE},
    "x_moe, sigmoid": {"router": {**COSINE, "weights_from": "sigmoid"}},
    "x_moe, top-1": {"router": COSINE, "top_k": 1},
}
every_policy = pytest.mark.parametrize("policy", POLICIES)


def sections(policy: str) -> dict[str, Any]:
    """The recipe's sections for a policy."""
    moe = {"z_loss_coefficient": 0.01, "load_balance_coefficient": 0.3, **POLICIES[policy]}
    curriculum = {"curriculum": moe.pop("curriculum")} if "curriculum" in moe else {}
    return {"model": {"moe": moe}, **curriculum}


@pytest.fixture(scope="module")
def reference(text: Path) -> Any:
    """What one process makes of one big batch, by policy."""
    results: dict[str, dict[str, Any]] = {}

    def result(policy: str) -> dict[str, Any]:
        if policy not in results:
            results[policy] = train(recipe_for(text, 1, {"engine": "local"}, **sections(policy)))
        return results[policy]

    return result


def largest_difference(run: dict[str, Any], expected: dict[str, Any]) -> float:
    return max(float((value - expected["weights"][name]).abs().max()) for name, value in run["weights"].items())


@every_policy
@pytest.mark.parametrize("size", [1, 2, 4])
def test_expert_parallelism_changes_nothing(text: Path, reference: Any, policy: str, size: int) -> None:
    """Invariants 14 and 15: losses and weights after SGD steps; what ranks share is equal to the bit."""
    recipe = recipe_for(text, size, {"expert_parallel_size": size}, **sections(policy))
    assert_equal_runs(run_ranks(size, train, recipe), reference(policy))


@every_policy
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_are_one_batch(text: Path, reference: Any, policy: str, size: int) -> None:
    """With sums over the step, accumulation is exactly one big batch, the balance loss included."""
    parallel = {"engine": "local"} if size == 1 else {"expert_parallel_size": size}
    recipe = recipe_for(text, size, parallel, training={"micro_batch_size": 4 // size}, **sections(policy))
    assert recipe.training.router_statistics == "step"
    ranks = [train(recipe)] if size == 1 else run_ranks(size, train, recipe)
    assert_equal_runs(ranks, reference(policy))


@every_policy
def test_statistics_of_micro_batches_are_another_loss(text: Path, reference: Any, policy: str) -> None:
    """The comparison above can fail: balance over each micro-batch is a harder constraint, and trains otherwise."""
    training = {"micro_batch_size": 4, "router_statistics": "micro_batch"}
    run = train(recipe_for(text, 1, {"engine": "local"}, training=training, **sections(policy)))
    expected = reference(policy)
    assert run["losses"][0]["loss"] == pytest.approx(expected["losses"][0]["loss"], rel=5e-6)
    assert run["losses"][0]["load_balance_loss"] != pytest.approx(expected["losses"][0]["load_balance_loss"], rel=5e-6)
    assert largest_difference(run, expected) > 5e-5


@every_policy
def test_what_is_frozen_stays_and_what_is_trained_moves(text: Path, reference: Any, policy: str) -> None:
    """Invariants 1 and 11 through the trainer: router weights against a run of another length."""
    sooner = train(recipe_for(text, 1, {"engine": "local"}, training={"max_steps": 1}, **sections(policy)))["weights"]
    for name, value in reference(policy)["weights"].items():
        if ".router." in name:
            frozen = ".hypernet." in name or POLICIES[policy]["router"]["type"] in ("smoe_dropout", "random")
            assert torch.equal(value, sooner[name]) == frozen, name

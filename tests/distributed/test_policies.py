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

ADAPTIVE = {"type": "adaptive", "threshold": 0.15, "base": {"type": "top_k", "init_std": 0.3}}
# Mean responses of small outputs lie so close together that rounding in fp32 decides a few contests; norms do not.
CONTEST = {
    "type": "compete_smoe",
    "init_std": 0.3,
    "response": "l2norm",
    "score_norm": "standardise",
    "router_coefficient": 1.0,
    "diversity_coefficient": 0.3,
    "competition_balance_coefficient": 0.3,
}
SOMETIMES = {"competition": {"flip_rate": 0.3, "max_layers": 1}}
NO_BALANCE, NO_Z = {"load_balance_coefficient": 0.0}, {"z_loss_coefficient": 0.0}
# With this seed one layer competes in the first step, none in the second, and the other one in the last two.
COMBINATION_SEED = 13


def separating(base: dict[str, Any]) -> dict[str, Any]:
    """SimSMoE over a policy: every measured pair fires, from the second step on."""
    options = {"similarity_coefficient": 0.05, "frequency": 8, "frequency_unit": "tokens", "threshold": 0.0}
    return {"type": "sim_smoe", "min_tokens": 8, "max_pairs": 3, **options, "base": base}


# A policy over another one, and losses that have to be at work in some step for the comparison to mean something.
COMBINATIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "adaptive over compete_smoe": (
        {"router": {**ADAPTIVE, "base": CONTEST}, "curriculum": SOMETIMES},
        ("load_balance_loss", "diversity_loss", "router_distillation_loss", "competition_balance_loss"),
    ),
    "sim_smoe over adaptive": ({"router": separating(ADAPTIVE)}, ("similarity_loss", "load_balance_loss")),
    "sim_smoe over compete_smoe": (
        {"router": separating(CONTEST), "curriculum": SOMETIMES},
        ("similarity_loss", "diversity_loss", "router_distillation_loss", "load_balance_loss"),
    ),
    "sim_smoe over stable_moe": (
        {"router": separating({"type": "stable_moe", "stage_1_steps": 2}), **NO_BALANCE, **NO_Z},
        ("similarity_loss", "stable_balance_loss", "distillation_loss"),
    ),
    "sim_smoe over sigmoid": (
        {"router": separating({"type": "sigmoid", "init_std": 0.3, "bias_update_rate": 0.02}), **NO_Z},
        ("similarity_loss", "load_balance_loss"),
    ),
}
every_combination = pytest.mark.parametrize("policy", COMBINATIONS)


def sections(policy: str) -> dict[str, Any]:
    """The recipe's sections for a policy."""
    moe = {"z_loss_coefficient": 0.01, "load_balance_coefficient": 0.3}
    moe |= {"num_experts": 4, **COMBINATIONS[policy][0]} if policy in COMBINATIONS else POLICIES[policy]
    curriculum = {"curriculum": moe.pop("curriculum")} if "curriculum" in moe else {}
    seed = {"seed": COMBINATION_SEED} if policy in COMBINATIONS else {}
    return {"model": {"moe": moe}, **curriculum, **seed}


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


@every_combination
def test_every_loss_of_a_combination_is_at_work(reference: Any, policy: str) -> None:
    """What is compared below is not 0, and buffers have moved; experts compete in some steps, and not in others."""
    losses = reference(policy)["losses"]
    adapted = [value for name, value in reference(policy)["weights"].items() if name.endswith(("bias_bits_E", "EE"))]
    assert len(adapted) == (2 * policy.startswith("sim_smoe") + 2 * policy.endswith("sigmoid"))
    assert all(value.any() for value in adapted)
    for name in COMBINATIONS[policy][1]:
        assert any(abs(step[name]) > 1e-3 for step in losses), name
    if "diversity_loss" in losses[0]:
        assert any(step["diversity_loss"] == 0.0 for step in losses)


@pytest.mark.parametrize(
    ("policy", "size"), [*((name, 2) for name in COMBINATIONS), ("adaptive over compete_smoe", 4)], ids=str
)
def test_combinations_at_any_expert_parallelism(text: Path, reference: Any, policy: str, size: int) -> None:
    """E7: a policy over another has the losses, weights and counters of one process."""
    recipe = recipe_for(text, size, {"expert_parallel_size": size}, **sections(policy))
    assert_equal_runs(run_ranks(size, train, recipe), reference(policy), 1e-5)


@every_combination
def test_micro_batches_of_combinations_are_one_batch(text: Path, reference: Any, policy: str) -> None:
    """Four micro-batches: every loss that is a function of sums asks for the step's sums, whichever policy has it."""
    recipe = recipe_for(text, 1, {"engine": "local"}, training={"micro_batch_size": 2}, **sections(policy))
    assert recipe.training.router_statistics == "step"
    assert_equal_runs([train(recipe)], reference(policy), 1e-5)

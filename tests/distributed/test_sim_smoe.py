"""SimSMoE on several ranks: the checks, the similarity loss and what it trains are those of one process.

Training is by SGD, see `support.parallel_runs`; counters and due pairs are buffers, so they are among the weights that
are compared between topologies, and bit for bit between ranks. That a resumed run goes on with them is in test_resume.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.parallel_runs import assert_equal_runs, recipe_for, train
from support.ranks import run_ranks

LOSS = "similarity_loss"
# Every measured pair fires, from the second step on; large enough a coefficient for its gradient to matter.
ROUTER = {
    "type": "sim_smoe",
    "similarity_coefficient": 0.05,
    "frequency": 8,
    "frequency_unit": "tokens",
    "threshold": 0.0,
    "min_tokens": 12,
    "max_pairs": 3,
}
KINDS = {
    "linear kernel": {},
    "gaussian kernel": {"similarity": "cka_rbf", "candidate_tokens": 64},
    "over hyper_router": {"base": {"type": "hyper_router", "hyper_hidden": 8}, "projection": "mlp"},
}


def model(**options: Any) -> dict[str, Any]:
    return {"moe": {"num_experts": 4, "router": {**ROUTER, **options}}}


@pytest.fixture(scope="module")
def reference(text: Path) -> Any:
    """The run of one process by kind of similarity."""
    results: dict[str, dict[str, Any]] = {}

    def result(kind: str) -> dict[str, Any]:
        if kind not in results:
            results[kind] = train(recipe_for(text, 1, {"engine": "local"}, model=model(**KINDS[kind])))
        return results[kind]

    return result


def trackers(run: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in run["weights"].items() if name.endswith(("co_routed_EE", "due_P2"))}


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_checks_and_fires(text: Path, reference: Any, kind: str) -> None:
    """What is compared below is at work: pairs fire in every step but the first, and change the weights."""
    run = reference(kind)
    assert [step[LOSS] > 0 for step in run["losses"]] == [False, True, True, True]
    assert any((due >= 0).any() for name, due in trackers(run).items() if name.endswith("due_P2"))
    without = train(
        recipe_for(text, 1, {"engine": "local"}, model=model(**{**KINDS[kind], "similarity_coefficient": 0.0}))
    )
    name = "model.layers.1.moe.bank.experts.0.w_in"
    assert (run["weights"][name] - without["weights"][name]).abs().max() > 5e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "size", "zero"), [(2, 2, 1), (4, 4, 1), (4, 2, 2), (2, 1, 0)])
def test_losses_gradients_and_trackers_equal_one_process(
    text: Path, reference: Any, kind: str, world_size: int, size: int, zero: int
) -> None:
    """Equal pairs fire for any number of ranks, with the CKA of all ranks' tokens."""
    parallel = {"expert_parallel_size": size, "zero_stage": zero}
    ranks = run_ranks(world_size, train, recipe_for(text, world_size, parallel, model=model(**KINDS[kind])))
    assert_equal_runs(ranks, reference(kind), 1e-5)
    for name, tracker in trackers(reference(kind)).items():
        assert all(torch.equal(rank["weights"][name], tracker) for rank in ranks), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 2), (2, 1)])
def test_accumulation_is_one_big_batch(
    text: Path, reference: Any, kind: str, world_size: int, micro_batch_size: int
) -> None:
    """Sums of the step: four micro-batches give the pairs, the loss and the gradients of the whole batch."""
    training = {"micro_batch_size": micro_batch_size, "router_statistics": "step"}
    parallel = {"expert_parallel_size": world_size}
    recipe = recipe_for(text, world_size, parallel, training=training, model=model(**KINDS[kind]))
    assert_equal_runs(run_ranks(world_size, train, recipe), reference(kind), 1e-5)


def test_activation_checkpointing_changes_no_bit(text: Path) -> None:
    runs = [
        run_ranks(
            2,
            train,
            recipe_for(
                text, 2, {"expert_parallel_size": 2}, training={"activation_checkpointing": enabled}, model=model()
            ),
        )
        for enabled in (False, True)
    ]
    assert runs[0][0]["losses"] == runs[1][0]["losses"]
    for before, after in zip(*runs, strict=True):
        assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])


def test_bf16_counts_exactly_and_is_near_fp32(text: Path, reference: Any) -> None:
    """Counters stay integers in bf16, the CKA is that of bf16 outputs, and ranks agree on the pairs."""
    parallel = {"expert_parallel_size": 2, "precision": "bf16"}
    ranks = run_ranks(2, train, recipe_for(text, 2, parallel, model=model()))
    expected = reference("linear kernel")
    for name in trackers(expected):
        assert ranks[0]["weights"][name].dtype == torch.int64
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
    for step, one in zip(ranks[0]["losses"], expected["losses"], strict=True):
        assert step["loss"] == pytest.approx(one["loss"], abs=3e-2)
    assert ranks[0]["losses"][1][LOSS] == pytest.approx(expected["losses"][1][LOSS], rel=0.1)

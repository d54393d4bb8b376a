"""Adaptive gating on several ranks: the same losses, gradients, shares and thresholds as one process, nothing dropped.

Tokens visit different numbers of experts, so what ranks send each other differs in every step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.parallel_runs import assert_equal_runs, recipe_for, train
from support.ranks import run_ranks

from smoe_train import assembly
from smoe_train.data import prepare
from smoe_train.data.batches.loader import FixedBlocks, TrainBatches
from smoe_train.model import RankReduction
from smoe_train.recipe import Recipe
from smoe_train.schedules import Knobs

ROUTER: dict[str, Any] = {"type": "adaptive", "threshold": 0.15, "base": {"type": "top_k", "init_std": 0.3}}
TARGET = {**ROUTER, "target_top2_share": 0.3, "gap": "top2_renormalised"}
HYPER = {
    "type": "adaptive",
    "threshold": 0.15,
    "weights": "renormalised",
    "base": {"type": "hyper_router", "hyper_hidden": 8, "hypernet_std": 0.5},
}


def sections(router: dict[str, Any] = ROUTER, top_k: int = 2, **training: Any) -> dict[str, Any]:
    """Returns a recipe's sections; the balance loss weighs enough to show in the weights."""
    moe = {"top_k": top_k, "load_balance_coefficient": 0.5, "z_loss_coefficient": 0.01, "router": router}
    return {"model": {"moe": moe}, "training": training}


@pytest.fixture(scope="module")
def reference(text: Path) -> Any:
    """Results of one process by the settings that change them."""
    results: dict[str, dict[str, Any]] = {}

    def result(router: dict[str, Any] = ROUTER, top_k: int = 2) -> dict[str, Any]:
        key = repr((router, top_k))
        if key not in results:
            results[key] = train(recipe_for(text, 1, {"engine": "local"}, **sections(router, top_k)))
        return results[key]

    return result


@pytest.mark.parametrize(
    ("world_size", "size", "zero"), [(1, 1, 1), (2, 1, 1), (2, 2, 0), (2, 2, 2), (4, 2, 1), (4, 4, 1)]
)
def test_a11_losses_and_gradients_equal_one_process(
    text: Path, reference: Any, world_size: int, size: int, zero: int
) -> None:
    """A11: EP 1, 2 and 4, trained by SGD; the balance loss over tokens with one expert is at work."""
    recipe = recipe_for(text, world_size, {"expert_parallel_size": size, "zero_stage": zero}, **sections())
    expected = reference()
    assert all(one["load_balance_loss"] > 0.5 for one in expected["losses"])
    assert_equal_runs(run_ranks(world_size, train, recipe), expected)


@pytest.mark.parametrize(("router", "top_k"), [(TARGET, 2), (HYPER, 2), (ROUTER, 4)], ids=["target", "hyper", "k4"])
def test_a11_variants_equal_one_process(text: Path, reference: Any, router: dict[str, Any], top_k: int) -> None:
    """Thresholds from counted gaps, renormalised weights over HyperRouter, and up to four experts."""
    recipe = recipe_for(text, 2, {"expert_parallel_size": 2}, **sections(router, top_k))
    expected = reference(router, top_k)
    counts = [value for name, value in expected["weights"].items() if name.endswith("gap_counts_N")]
    assert len(counts) == (2 if router is TARGET else 0)
    assert all(count.sum() > 0 for count in counts)
    assert_equal_runs(run_ranks(2, train, recipe), expected)


@pytest.mark.parametrize(("world_size", "size"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("router", [ROUTER, TARGET], ids=["threshold", "target"])
def test_accumulation_is_one_big_batch(
    text: Path, reference: Any, world_size: int, size: int, router: dict[str, Any]
) -> None:
    """With training.router_statistics: step, f is that of all micro-batches and ranks."""
    recipe = recipe_for(
        text, world_size, {"expert_parallel_size": size}, **sections(router, micro_batch_size=4 // world_size)
    )
    assert_equal_runs(run_ranks(world_size, train, recipe), reference(router))


def test_statistics_of_a_micro_batch_are_another_loss(text: Path, reference: Any) -> None:
    """The comparison above can fail."""
    recipe = recipe_for(text, 1, {"engine": "local"}, **sections(micro_batch_size=4, router_statistics="micro_batch"))
    difference = train(recipe)["losses"][0]["load_balance_loss"] - reference()["losses"][0]["load_balance_loss"]
    assert abs(difference) > 1e-4


def test_activation_checkpointing_changes_no_bit(text: Path) -> None:
    plain, recomputed = (
        run_ranks(
            2, train, recipe_for(text, 2, {"expert_parallel_size": 2}, **sections(activation_checkpointing=enabled))
        )
        for enabled in (False, True)
    )
    assert plain[0]["losses"] == recomputed[0]["losses"]
    for before, after in zip(plain, recomputed, strict=True):
        assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])


@pytest.mark.parametrize("router", [ROUTER, TARGET], ids=["threshold", "target"])
def test_bf16_is_near_fp32(text: Path, reference: Any, router: dict[str, Any]) -> None:
    """The counts of gaps stay whole numbers and the first losses agree to about 1e-2."""
    recipe = recipe_for(text, 2, {"expert_parallel_size": 2, "precision": "bf16"}, **sections(router))
    expected = reference(router)
    for rank in run_ranks(2, train, recipe):
        torch.testing.assert_close(
            [one["loss"] for one in rank["losses"]], [one["loss"] for one in expected["losses"]], rtol=0.0, atol=2e-2
        )
        for name, value in rank["weights"].items():
            if name.endswith("gap_counts_N"):
                assert value.dtype == torch.int64
                assert abs(int(value.sum()) / int(expected["weights"][name].sum()) - 1) < 1e-4


def count_rows(recipe: Recipe) -> dict[str, list[Any]]:
    """Returns, by MoE layer, rows that this rank's experts ran and what the router said, in one forward pass."""
    process = assembly.start_process(recipe)
    corpus = prepare(recipe.data, recipe.tokenizer).tokens("train")
    training = recipe.training
    batch = TrainBatches(
        FixedBlocks(corpus, training.sequence_length),
        training.global_batch_size,
        training.micro_batch_size,
        recipe.seed,
        process.rank,
        process.world_size,
    )[0][0]
    model = assembly.build_model(recipe, 256, assembly.expert_banks(recipe, process))
    for module in model.modules():
        if hasattr(module, "set_deepspeed_parallelism"):
            module.set_deepspeed_parallelism()
    model.model.ranks = RankReduction(process.sum, process.world_size)
    rows: list[int] = []
    for block in model.model.layers:
        block.moe.bank.experts.register_forward_pre_hook(
            lambda _, given: rows.append(int(given[1].rows_per_expert_E.sum()))
        )
    with torch.no_grad():
        output = model(batch.input_ids_BS, knobs=Knobs(0, recipe.model.moe.top_k))
    counts = output.experts_of_token.values()
    return {
        "rows": rows,
        "wanted": [int(one.sum()) for one in counts],
        "two": [int((one >= 2).sum()) for one in counts],
        "tokens": [one.numel() for one in counts],
    }


@pytest.mark.parametrize("top_k", [2, 3])
def test_a4_a8_a11_rows_over_ranks(text: Path, top_k: int) -> None:
    """No token dropped: experts of all ranks together run tokens + further experts; counts are those of one rank."""
    one = count_rows(recipe_for(text, 1, {"engine": "local"}, **sections(top_k=top_k)))
    assert one["rows"] == one["wanted"]
    if top_k == 2:
        assert one["rows"] == [t + two for t, two in zip(one["tokens"], one["two"], strict=True)]
    assert all(0 < two < t for t, two in zip(one["tokens"], one["two"], strict=True))
    for world_size in (2, 4):
        recipe = recipe_for(text, world_size, {"expert_parallel_size": world_size}, **sections(top_k=top_k))
        ranks = run_ranks(world_size, count_rows, recipe)
        for name, values in one.items():
            assert [sum(layer) for layer in zip(*(rank[name] for rank in ranks), strict=True)] == values, name

"""Expert parallelism gives the losses and the gradients of one process, whatever the topology and ZeRO stage.

Training is by SGD: a wrong gradient scale shows in the weights, which Adam would hide. The reference is the plain
PyTorch engine with all experts in one process.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parallel_runs import assert_equal_runs, recipe_for, train
from support.ranks import run_ranks
from support.tiny import tiny_recipe

from smoe_train import assembly
from smoe_train.data import prepare
from smoe_train.model import RankReduction, SmoeForCausalLM
from smoe_train.recipe import Recipe
from smoe_train.schedules import Knobs


@pytest.fixture(scope="module")
def reference(text: Path) -> Any:
    """Reference results by the settings that change them."""
    results: dict[str, dict[str, Any]] = {}

    def result(**sections: Any) -> dict[str, Any]:
        key = repr(sections)
        if key not in results:
            change = sections.pop("change", None)
            results[key] = train(recipe_for(text, 1, {"engine": "local"}, **sections), change)
        return results[key]

    return result


TOPOLOGIES = [
    (1, 1, 0),
    (1, 1, 1),
    (2, 1, 1),
    (2, 2, 0),
    (2, 2, 1),
    (2, 2, 2),
    (4, 2, 0),
    (4, 2, 1),
    (4, 2, 2),
    (4, 4, 1),
    (4, 4, 2),
]


@pytest.mark.parametrize(("world_size", "size", "zero"), TOPOLOGIES)
def test_losses_and_gradients_equal_one_process(
    text: Path, reference: Any, world_size: int, size: int, zero: int
) -> None:
    recipe = recipe_for(text, world_size, {"expert_parallel_size": size, "zero_stage": zero})
    ranks = run_ranks(world_size, train, recipe)
    assert_equal_runs(ranks, reference())


@pytest.mark.parametrize(("world_size", "size", "zero"), [(2, 2, 0), (2, 2, 1), (4, 2, 2), (4, 4, 0)])
def test_clipping_uses_the_norm_over_all_experts(
    text: Path, reference: Any, world_size: int, size: int, zero: int
) -> None:
    training = {"gradient_clipping": 0.05}
    recipe = recipe_for(text, world_size, {"expert_parallel_size": size, "zero_stage": zero}, training=training)
    expected = reference(training=training)
    assert min(expected["norms"]) > 0.05  # clipping is active
    assert_equal_runs(run_ranks(world_size, train, recipe), expected)


@pytest.mark.parametrize(("world_size", "size", "zero"), [(1, 1, 1), (2, 2, 0), (2, 2, 1), (2, 2, 2)])
def test_accumulation_equals_the_reference_with_the_same_micro_batches(
    text: Path, reference: Any, world_size: int, size: int, zero: int
) -> None:
    """With router losses off nothing is counted ahead, and accumulation is one big batch for the task."""
    moe = {"model": {"moe": {"load_balance_coefficient": 0.0}}}
    parallel = {"expert_parallel_size": size, "zero_stage": zero}
    recipe = recipe_for(text, world_size, parallel, training={"micro_batch_size": 4 // world_size}, **moe)
    ranks = run_ranks(world_size, train, recipe)
    expected = reference(**moe)
    for rank in ranks:  # the balance loss of two halves is not that of the whole, and is not trained on here
        for losses, of_one in zip(rank["losses"], expected["losses"], strict=True):
            losses["load_balance_loss"] = of_one["load_balance_loss"]
    assert_equal_runs(ranks, expected)


def prefer_the_first_expert(model: SmoeForCausalLM) -> None:
    for router in model.routers().values():
        with torch.no_grad():
            router.bias[0] += 50.0  # type: ignore[index, operator, union-attr]


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 4), (4, 2)])
def test_one_expert_gets_every_token(text: Path, reference: Any, world_size: int, size: int) -> None:
    """Ranks that receive no token, and send none to most ranks, neither hang nor disturb anything."""
    moe = {"model": {"moe": {"top_k": 1, "router": {"type": "top_k", "softmax": "before_top_k", "bias": True}}}}
    recipe = recipe_for(text, world_size, {"expert_parallel_size": size}, **moe)
    expected = reference(change=prefer_the_first_expert, **moe)
    assert_equal_runs(run_ranks(world_size, train, recipe, prefer_the_first_expert), expected)
    initial = assembly.build_model(recipe, 256).state_dict()["model.layers.0.moe.bank.experts.w_in"]
    after = [expected["weights"][f"model.layers.0.moe.bank.experts.{i}.w_in"] for i in range(8)]
    assert [torch.equal(new, old) for new, old in zip(after, initial, strict=True)] == [False] + [True] * 7


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 4)])
def test_jitter_and_the_k_schedule_do_not_depend_on_the_topology(
    text: Path, reference: Any, world_size: int, size: int
) -> None:
    sections = {
        "model": {"moe": {"router": {"type": "top_k", "jitter": 0.3}, "z_loss_coefficient": 0.01}},
        "curriculum": {"top_k": {"form": "linear_increase", "low": 2, "high": 6, "steps": 4}},
    }
    recipe = recipe_for(text, world_size, {"expert_parallel_size": size}, **sections)
    assert_equal_runs(run_ranks(world_size, train, recipe), reference(**sections))


@pytest.mark.parametrize("kind", ["swiglu", "relu"])
def test_other_experts(text: Path, reference: Any, kind: str) -> None:
    sections = {"model": {"feed_forward": kind, "moe": {"layers": [1]}}}
    recipe = recipe_for(text, 2, {"expert_parallel_size": 2}, **sections)
    assert_equal_runs(run_ranks(2, train, recipe), reference(**sections))


def test_activation_checkpointing_changes_no_bit(text: Path) -> None:
    """The recomputed experts see the routing of the forward pass, and the collectives of the backward stay in step."""
    runs = [
        run_ranks(
            2, train, recipe_for(text, 2, {"expert_parallel_size": 2}, training={"activation_checkpointing": enabled})
        )
        for enabled in (False, True)
    ]
    assert runs[0][0]["losses"] == runs[1][0]["losses"]
    for before, after in zip(*runs, strict=True):
        assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])


@pytest.mark.parametrize(("world_size", "size", "zero"), [(1, 1, 1), (2, 2, 1), (2, 2, 2), (4, 2, 1)])
def test_bf16_is_near_fp32(text: Path, reference: Any, world_size: int, size: int, zero: int) -> None:
    """bf16 keeps 8 bits: the first losses agree to about 1e-2, and expert weights still move."""
    parallel = {"expert_parallel_size": size, "zero_stage": zero, "precision": "bf16"}
    ranks = run_ranks(world_size, train, recipe_for(text, world_size, parallel))
    expected = reference()
    for rank in ranks:
        torch.testing.assert_close(
            [one["loss"] for one in rank["losses"]], [one["loss"] for one in expected["losses"]], rtol=0.0, atol=2e-2
        )
        for name, value in rank["weights"].items():
            torch.testing.assert_close(value, expected["weights"][name], rtol=0.1, atol=5e-3)


def unequal_evaluation(recipe: Recipe) -> list[dict[str, float | int]]:
    from smoe_train.data.batches.loader import EvaluationBatches
    from smoe_train.evaluation import TextFigures, evaluate_language_model

    process = assembly.start_process(recipe)
    tokens = prepare(recipe.data, recipe.tokenizer)
    model = assembly.build_model(recipe, 256, assembly.expert_banks(recipe, process))
    for module in model.modules():
        if hasattr(module, "set_deepspeed_parallelism"):
            module.set_deepspeed_parallelism()
    model.model.ranks = RankReduction(process.sum, process.world_size)
    # 5 blocks and a rest: the ranks have different numbers of real rows, and some batches are padding alone.
    batches = EvaluationBatches(tokens.tokens("valid"), 16, 1, process.rank, process.world_size, max_tokens=85)
    knobs = [Knobs(0, k) for k in (1, 2, 8)]
    scores = evaluate_language_model(model, batches, knobs, TextFigures(1.0), process.device, process.sum)
    return [score.to_json() for score in scores]


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 4), (4, 1)])
def test_evaluation_in_lockstep_equals_one_process(text: Path, world_size: int, size: int) -> None:
    expected = unequal_evaluation(recipe_for(text, 1, {"engine": "local"}))
    assert [score["evaluated_tokens"] for score in expected] == [85, 85, 85]
    for scores in run_ranks(
        world_size, unequal_evaluation, recipe_for(text, world_size, {"expert_parallel_size": size})
    ):
        for score, one in zip(scores, expected, strict=True):
            assert score == pytest.approx(one, rel=1e-5)


def failing(rank_that_fails: int) -> None:
    import os

    assembly.start_process(tiny_recipe(Path("unused"), 2, parallel={"expert_parallel_size": 2})).barrier()
    if int(os.environ["RANK"]) == rank_that_fails:
        raise ValueError("on purpose")
    partial(torch.distributed.barrier)()


def test_the_harness_reports_the_failing_rank() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed[\s\S]*ValueError: on purpose"):
        run_ranks(2, failing, 1)

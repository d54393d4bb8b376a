"""C12: contests give the losses, outputs and gradients of one process, whatever the topology."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.parallel_runs import STEPS, assert_equal_runs, recipe_for, train
from support.ranks import run_ranks
from support.router_cases import D_MODEL, NUM_EXPERTS, RouterCase, context, tokens
from support.tiny import tiny_recipe

from smoe_train import assembly
from smoe_train.model import LocalExpertBank, StackedExperts
from smoe_train.model.initialise import KeyedDraw
from smoe_train.model.moe import MoeLayer
from smoe_train.parallel.topology import Topology
from smoe_train.routing.compete_smoe import COMPETITION_LOSSES

# Coefficients at which every loss moves weights visibly.
ROUTER = {
    "type": "compete_smoe",
    "score_norm": "standardise",
    "distillation": "tribrid",
    "router_coefficient": 1.0,
    "diversity_coefficient": 0.3,
    "competition_balance_coefficient": 0.3,
}


def sections(competition: dict[str, Any] | None = None, **router: Any) -> dict[str, Any]:
    return {
        "model": {"moe": {"router": {**ROUTER, **router}, "load_balance_coefficient": 0.1, "z_loss_coefficient": 0.01}},
        "curriculum": {"competition": competition or {"flip_rate": 0.4, "max_layers": 1}},
    }


@pytest.fixture(scope="module")
def reference(text: Path) -> Any:
    results: dict[str, dict[str, Any]] = {}

    def result(**parts: Any) -> dict[str, Any]:
        key = repr(parts)
        if key not in results:
            results[key] = train(recipe_for(text, 1, {"engine": "local"}, **parts))
        return results[key]

    return result


def test_the_runs_below_compete_and_route(text: Path, reference: Any) -> None:
    """In each of the four steps one layer competes and one routes, not always the same; every loss is at work."""
    schedule = recipe_for(text, 1, {"engine": "local"}, **sections()).schedule()
    competing = [schedule.knobs(step).competing_layers for step in range(STEPS)]
    assert [len(layers) for layers in competing] == [1] * STEPS
    assert len(set(competing)) == 2
    for step in reference(**sections())["losses"]:
        assert all(step[name] != 0.0 for name in (*COMPETITION_LOSSES, "load_balance_loss", "z_loss"))


@pytest.mark.parametrize(
    ("world_size", "size", "zero"), [(1, 1, 1), (2, 1, 1), (2, 2, 0), (2, 2, 1), (2, 2, 2), (4, 2, 1), (4, 4, 1)]
)
def test_training_equals_one_process(text: Path, reference: Any, world_size: int, size: int, zero: int) -> None:
    """C12: competing and routed steps; losses, gradient norms and the weights that SGD leads to."""
    parallel = {"expert_parallel_size": size, "zero_stage": zero}
    ranks = run_ranks(world_size, train, recipe_for(text, world_size, parallel, **sections()))
    assert_equal_runs(ranks, reference(**sections()))


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "v1", "distillation": "all"},
        {"response": "silu_mean", "winner_weights": "softmax", "distillation_loss": "kl"},
        {"competition_chunk_tokens": 7},
    ],
    ids=str,
)
def test_options(text: Path, reference: Any, options: dict[str, Any]) -> None:
    """Every layer in every step; with chunks of which the last is smaller."""
    parts = sections({"flip_rate": 1.0, "max_layers": None}, **options)
    ranks = run_ranks(2, train, recipe_for(text, 2, {"expert_parallel_size": 2}, **parts))
    assert_equal_runs(ranks, reference(**parts))


@pytest.mark.parametrize(("world_size", "size"), [(1, 1), (2, 2)])
def test_a_router_that_no_loss_reaches(text: Path, reference: Any, world_size: int, size: int) -> None:
    """With every step a contest and no distillation, the router gets no gradient at all and stays as it is."""
    parts = sections({"flip_rate": 1.0, "max_layers": None}, router_coefficient=0.0)
    ranks = run_ranks(world_size, train, recipe_for(text, world_size, {"expert_parallel_size": size}, **parts))
    assert_equal_runs(ranks, reference(**parts))


@pytest.mark.parametrize("chunk_tokens", [None, 9])
def test_activation_checkpointing_changes_no_bit(text: Path, chunk_tokens: int | None) -> None:
    """C9: collectives of the recomputation and of the backward pass stay in step on all ranks."""
    parts = sections({"flip_rate": 1.0, "max_layers": None}, competition_chunk_tokens=chunk_tokens)
    runs = [
        run_ranks(
            2,
            train,
            recipe_for(text, 2, {"expert_parallel_size": 2}, training={"activation_checkpointing": enabled}, **parts),
        )
        for enabled in (False, True)
    ]
    assert runs[0][0]["losses"] == runs[1][0]["losses"]
    for before, after in zip(*runs, strict=True):
        assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])


@pytest.mark.parametrize(("world_size", "size"), [(1, 1), (2, 2), (2, 1)])
def test_accumulation_equals_one_big_batch(text: Path, reference: Any, world_size: int, size: int) -> None:
    """C9: micro-batches share the decision, and with the step's sums their balance loss is that of the whole."""
    training = {"micro_batch_size": 4 // world_size, "router_statistics": "step"}
    recipe = recipe_for(text, world_size, {"expert_parallel_size": size}, training=training, **sections())
    assert_equal_runs(run_ranks(world_size, train, recipe), reference(**sections()))


@pytest.mark.parametrize(("world_size", "size"), [(1, 1), (2, 2), (4, 2)])
def test_bf16_is_near_fp32(text: Path, reference: Any, world_size: int, size: int) -> None:
    parts = sections({"flip_rate": 1.0, "max_layers": None}, score_norm="none")
    parallel = {"expert_parallel_size": size, "precision": "bf16"}
    expected = reference(**parts)
    for rank in run_ranks(world_size, train, recipe_for(text, world_size, parallel, **parts)):
        for step, wanted in zip(rank["losses"], expected["losses"], strict=True):
            assert step["loss"] == pytest.approx(wanted["loss"], abs=2e-2)
            for name in COMPETITION_LOSSES:
                assert step[name] == pytest.approx(wanted[name], abs=5e-2), name


def one_layer(chunk_tokens: int | None, recompute: bool, world_size: int, size: int, shares: list[int]) -> Any:
    """One contest on this rank's share of 24 tokens, its last tokens padding; what came out and all gradients, fp64."""
    parallel = {"engine": "local"} if world_size == 1 else {"expert_parallel_size": size}
    process = assembly.start_process(tiny_recipe(Path("unused"), world_size, parallel=parallel))
    case = RouterCase("compete_smoe", (("init_std", 0.3), ("competition_chunk_tokens", chunk_tokens)))

    def make(ids: range) -> StackedExperts:
        experts = StackedExperts(ids, D_MODEL, 12, "relu", 0.5, 0.1)
        experts.initialise(KeyedDraw(0, "experts"))
        return experts

    if world_size == 1:
        layer = MoeLayer(case.routers()[0], LocalExpertBank(NUM_EXPERTS, make))
    else:
        from smoe_train.parallel.deepspeed_bank import DeepSpeedExpertBank

        topology = Topology.create(world_size, size, NUM_EXPERTS)
        layer = MoeLayer(case.routers()[0], DeepSpeedExpertBank(topology, process.rank, make))
        layer.bank.set_deepspeed_parallelism()
    layer = layer.double().train()
    layer.recompute = recompute
    width = 24 // world_size
    mine = slice(process.rank * width, (process.rank + 1) * width)
    real = torch.cat([torch.arange(24 // len(shares)) < share for share in shares])[mine]
    x_TD = tokens(24, scale=1.0)[mine].double().requires_grad_()
    average = torch.tensor(sum(shares) / world_size)
    ctx = context(
        2,
        competing=True,
        token_mask_T=real,
        tokens_per_rank=average,
        sum_over_ranks=process.sum,
        num_ranks=world_size,
    )
    merged = layer(x_TD, torch.zeros(width, dtype=torch.int64), ctx)
    weights = torch.linspace(-1, 1, 24 * D_MODEL).view(24, D_MODEL)[mine].double()
    total = (merged.out_TD * weights).sum() * world_size + sum(merged.losses[name] for name in COMPETITION_LOSSES)
    total.backward()  # of which the mean over ranks is the value of the whole batch
    experts = {
        f"{name}.{i}": value / world_size
        for name, p in layer.bank.experts.named_parameters()
        for i, value in zip(layer.bank.experts.expert_ids, p.grad, strict=True)
    }
    return {
        "out": merged.out_TD.detach(),
        "x": x_TD.grad / world_size,
        "router": layer.router.weight.grad / world_size,
        "losses": {name: value.detach() / world_size for name, value in merged.losses.items()},
        "experts": experts,
    }


@pytest.mark.parametrize("shares", [[6, 6, 6, 6], [6, 0, 3, 1]], ids=str)
@pytest.mark.parametrize(("chunk_tokens", "recompute"), [(None, False), (None, True), (4, True)])
def test_one_layer_to_fp64_rounding(shares: list[int], chunk_tokens: int | None, recompute: bool) -> None:
    """C12: outputs, losses and every gradient on 4 ranks are those of one, also where a rank holds padding alone."""
    expected = one_layer(None, False, 1, 1, shares)
    ranks = run_ranks(4, one_layer, chunk_tokens, recompute, 4, 4, shares)
    close = {"rtol": 1e-10, "atol": 1e-12}
    for name in ("out", "x"):
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), expected[name], **close)
    torch.testing.assert_close(sum(rank["router"] for rank in ranks), expected["router"], **close)
    for name, value in expected["losses"].items():
        torch.testing.assert_close(sum(rank["losses"][name] for rank in ranks), value, **close, msg=name)
    assert sum(len(rank["experts"]) for rank in ranks) == len(expected["experts"])
    for rank in ranks:
        for name, value in rank["experts"].items():
            torch.testing.assert_close(value, expected["experts"][name], **close, msg=name)

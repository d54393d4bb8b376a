"""The exchange between ranks: bit-equal to all experts in one process, and every byte that it sends is counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.parallel_runs import STEPS, recipe_for, train
from support.ranks import run_ranks
from support.tiny import tiny_recipe
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smoe_train import assembly
from smoe_train.model import LocalExpertBank, StackedExperts
from smoe_train.model.initialise import KeyedDraw
from smoe_train.parallel import traffic
from smoe_train.parallel.footprint import contest_bytes
from smoe_train.parallel.topology import Topology

D_MODEL, NUM_EXPERTS, TOP_K, TOKENS = 16, 8, 3, 24
TOPOLOGIES = [(2, 2), (4, 4), (4, 2)]
DTYPES = [torch.float32, torch.bfloat16]


def make_experts(dtype: torch.dtype) -> Any:
    def make(ids: range) -> StackedExperts:
        # Not swiglu: how torch rounds a sigmoid depends on where in a buffer it stands.
        experts = StackedExperts(ids, D_MODEL, 24, "relu", 0.5, 0.5)
        experts.initialise(KeyedDraw(0, "experts"))
        return experts.to(dtype)

    return make


def batch(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, experts with empty slots among them and none that is visited twice, and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(rank)
    order = torch.rand(TOKENS, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    ids_TK = torch.where(torch.rand(TOKENS, TOP_K, generator=generator) < 0.2, -1, order)
    x_TD, grad_TKD = (
        torch.randn(*shape, generator=generator) for shape in ((TOKENS, D_MODEL), (*ids_TK.shape, D_MODEL))
    )
    return x_TD.to(dtype).requires_grad_(), ids_TK, grad_TKD.to(dtype)


def bank_of(world_size: int, size: int, dtype: torch.dtype) -> tuple[Any, int]:
    """Joins the ranks; returns the bank of this one and its rank."""
    assembly.start_process(tiny_recipe(Path("unused"), world_size, parallel={"expert_parallel_size": size}))
    from smoe_train.parallel.deepspeed_bank import DeepSpeedExpertBank

    rank = int(os.environ["RANK"])
    bank = DeepSpeedExpertBank(Topology.create(world_size, size, NUM_EXPERTS), rank, make_experts(dtype))
    bank.set_deepspeed_parallelism()
    traffic.bytes_sent.clear()
    return bank, rank


def one_layer(world_size: int, size: int, dtype: torch.dtype, recompute: bool) -> dict[str, Any]:
    """One pass forward and backward; outputs, gradients, and the bytes that this rank sent by kind."""
    bank, rank = bank_of(world_size, size, dtype)
    x_TD, ids_TK, grad_TKD = batch(rank, dtype)
    plan = bank.plan(x_TD, ids_TK)
    y_TKD = checkpoint(bank.run, x_TD, plan, use_reentrant=False) if recompute else bank.run(x_TD, plan)
    y_TKD.backward(grad_TKD)
    weights = [parameter.grad for parameter in bank.experts.parameters()]
    return {"y": y_TKD.detach(), "dx": x_TD.grad, "weights": weights, "sent": dict(traffic.bytes_sent)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("world_size", "size"), TOPOLOGIES)
def test_outputs_and_gradients_equal_one_process_to_the_bit(world_size: int, size: int, dtype: torch.dtype) -> None:
    """Each expert gets the rows it would get in one process, in the same order: the ranks' one after the other."""
    ranks = run_ranks(world_size, one_layer, world_size, size, dtype, False)
    for first in range(0, world_size, size):
        tokens, ids, grads = zip(*(batch(rank, dtype) for rank in range(first, first + size)), strict=True)
        bank, x_TD = LocalExpertBank(NUM_EXPERTS, make_experts(dtype)), torch.cat(tokens).detach().requires_grad_()
        y_TKD = bank(x_TD, torch.cat(ids))
        y_TKD.backward(torch.cat(grads))
        group = ranks[first : first + size]
        assert torch.equal(torch.cat([rank["y"] for rank in group]), y_TKD)
        assert torch.equal(torch.cat([rank["dx"] for rank in group]), x_TD.grad)
        for index, parameter in enumerate(bank.experts.parameters()):
            assert torch.equal(torch.cat([rank["weights"][index] for rank in group]), parameter.grad)


def rows_sent(sender: int, receiver: int, size: int) -> int:
    """Counts, token by token, the slots of a rank whose expert another one holds."""
    if sender == receiver or sender // size != receiver // size:
        return 0
    ids = batch(sender, torch.float32)[1].flatten().tolist()
    return sum(1 for i in ids if i >= 0 and i // (NUM_EXPERTS // size) == receiver % size)


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("world_size", "size"), TOPOLOGIES)
def test_bytes_are_those_of_the_rows_that_leave(
    world_size: int, size: int, dtype: torch.dtype, recompute: bool
) -> None:
    """Rows travel in their dtype; a recomputation sends tokens again, but neither counts nor outputs."""
    row = D_MODEL * dtype.itemsize
    for rank, result in enumerate(run_ranks(world_size, one_layer, world_size, size, dtype, recompute)):
        leave = sum(rows_sent(rank, other, size) for other in range(world_size))
        come = sum(rows_sent(other, rank, size) for other in range(world_size))
        assert leave != come  # or mistaking one for the other would not show
        assert result["sent"] == {
            "counts": (size - 1) * NUM_EXPERTS // size * 8,
            "tokens": leave * row * (2 if recompute else 1),
            "outputs": come * row,
            "outputs_gradients": leave * row,
            "tokens_gradients": come * row,
        }


def one_contest(world_size: int, dtype: torch.dtype, recompute: bool) -> dict[str, int]:
    """A contest that every expert wins equally often; returns the bytes that this rank sent by kind."""
    bank, rank = bank_of(world_size, world_size, dtype)
    x_TD = batch(rank, dtype)[0]
    winners_TK = (torch.arange(TOKENS).unsqueeze(1) + torch.arange(TOP_K)) % NUM_EXPERTS
    respond, choose = lambda y_RD: y_RD.float().square().mean(dim=-1), lambda responses_TE, part: winners_TK[part]
    responses_TE, _, y_TKD = bank.compete(x_TD, respond, choose, None, recompute)
    (responses_TE.sum() + y_TKD.sum()).backward()
    assert dist.get_world_size(bank._group) == world_size
    return dict(traffic.bytes_sent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", [2, 4])
def test_contests_send_what_the_footprint_says(world_size: int, dtype: torch.dtype) -> None:
    expected = contest_bytes(TOKENS, D_MODEL, NUM_EXPERTS, TOP_K, world_size, dtype.itemsize)
    for sent in run_ranks(world_size, one_contest, world_size, dtype, False):
        assert sum(sent.values()) == expected
    for again in run_ranks(world_size, one_contest, world_size, dtype, True):
        twice = ("contest_tokens", "contest_responses")
        assert again == {kind: number * (2 if kind in twice else 1) for kind, number in sent.items()}


def test_the_record_of_a_step_has_the_mean_of_the_ranks(text: Path) -> None:
    """Both layers of every step, forward and backward, but not the self-test before the first."""
    recipe = recipe_for(text, 2, {"expert_parallel_size": 2})
    ranks = run_ranks(2, train_and_count, recipe)
    found = [sum(values) / 2 for values in zip(*(rank["bytes"] for rank in ranks), strict=True)]
    assert len(found) == STEPS
    assert min(found) > 0
    for rank in ranks:
        assert rank["recorded"] == found


def train_and_count(recipe: Any) -> dict[str, Any]:
    from unittest.mock import patch

    from smoe_train.parallel.deepspeed_engine import DeepSpeedEngine
    from smoe_train.training.meter import Meter

    counted: list[int] = []
    recorded: list[float] = []
    forward, step, read = DeepSpeedEngine.forward, DeepSpeedEngine.step, Meter.read
    before = 0

    def counted_forward(self: Any, **inputs: Any) -> Any:
        nonlocal before
        before = sum(traffic.bytes_sent.values())
        return forward(self, **inputs)

    def counted_step(self: Any, *arguments: Any, **options: Any) -> bool:
        counted.append(sum(traffic.bytes_sent.values()) - before)
        return step(self, *arguments, **options)

    def kept_read(self: Any) -> Any:
        records = read(self)
        recorded.extend(record["expert_parallel_bytes"] for record in records[0])
        return records

    with (
        patch.object(DeepSpeedEngine, "forward", counted_forward),
        patch.object(DeepSpeedEngine, "step", counted_step),
        patch.object(Meter, "read", kept_read),
    ):
        train(recipe)
    return {"bytes": counted, "recorded": recorded}

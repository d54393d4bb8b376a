"""A run whose loss is computed some tokens at a time equals the plain one, in one process and under ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.parallel_runs import assert_equal_runs, recipe_for, train
from support.ranks import run_ranks

from smoe_train.model import SmoeForCausalLM

CHUNKED = {"performance": {"logits_chunk_tokens": 7}}  # no divisor of a micro-batch's tokens


def sections(tied: bool) -> dict[str, Any]:
    """A vocabulary of 256, with router losses counted ahead where there is accumulation."""
    return {"model": {"tie_embeddings": tied, "moe": {"z_loss_coefficient": 0.01}}}


def refuse_logits(model: SmoeForCausalLM) -> None:
    """Lets a run fail that computes the logits of all tokens after all."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the head was run on all tokens")

    model.lm_head.register_forward_pre_hook(refuse)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def plain(request: Any, text: Path) -> Any:
    """Whether embeddings are tied, and the run with all logits in one process."""
    return request.param, train(recipe_for(text, 1, {"engine": "local"}, **sections(request.param)))


def test_one_process(text: Path, plain: Any) -> None:
    tied, expected = plain
    found = train(recipe_for(text, 1, {"engine": "local"}, **sections(tied), **CHUNKED), refuse_logits)
    assert_equal_runs([found], expected)


@pytest.mark.parametrize(("world_size", "size", "zero"), [(1, 1, 1), (2, 1, 0), (2, 2, 0), (2, 2, 1), (2, 2, 2)])
def test_zero(text: Path, plain: Any, world_size: int, size: int, zero: int) -> None:
    """Gradients of the head, tied or not, are reduced like all others; activations are recomputed besides."""
    tied, expected = plain
    parallel = {"expert_parallel_size": size, "zero_stage": zero}
    training = {"activation_checkpointing": "all"}
    recipe = recipe_for(text, world_size, parallel, training=training, **sections(tied), **CHUNKED)
    assert_equal_runs(run_ranks(world_size, train, recipe, refuse_logits), expected)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_accumulation(text: Path, plain: Any, zero: int) -> None:
    tied, expected = plain
    training = {"micro_batch_size": 2, "router_statistics": "step"}
    recipe = recipe_for(text, 2, {"zero_stage": zero}, training=training, **sections(tied), **CHUNKED)
    assert_equal_runs(run_ranks(2, train, recipe, refuse_logits), expected, 1e-5)


def test_bf16_is_near_the_plain_form(text: Path) -> None:
    """The loss of a step is no bf16 number, and near that of the plain form."""
    parallel = {"expert_parallel_size": 2, "precision": "bf16"}
    plain, found = (
        run_ranks(2, train, recipe_for(text, 2, parallel, **sections(True), **form))[0]["losses"]
        for form in ({}, CHUNKED)
    )
    for one, other in zip(found, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
    assert found[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5), "from the same weights"
    losses = torch.tensor([one["loss"] for one in found])
    assert not torch.equal(losses.bfloat16().float(), losses)

"""The search for what is not finite, with experts on two ranks: all ranks run it, and the earliest finding is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.parallel_runs import recipe_for
from support.ranks import run_ranks

from smoe_train import assembly
from smoe_train.data import prepare
from smoe_train.recipe import Recipe
from smoe_train.training.diagnosis import Finding, describe, find_non_finite

NAN = float("nan")


def poison(model: Any, place: str) -> None:
    """Makes something on this rank NaN whenever it is computed."""
    if place == "embedding":
        model.get_submodule("model.embed_tokens").register_forward_hook(lambda module, inputs, output: output * NAN)
    elif place == "expert":
        model.get_submodule("model.layers.1.moe.bank.experts").register_forward_hook(
            lambda module, inputs, output: torch.where(
                (inputs[1].row_of_slot_TK < inputs[1].rows_per_expert_E[0]).unsqueeze(-1), output * NAN, output
            )
        )
    elif place == "gradient":
        model.get_submodule("model.layers.0.moe.bank.experts").w_in.register_hook(lambda gradient: gradient * NAN)


def search(recipe: Recipe, place: str, poisoned: int, folder: Path) -> Any:
    """Searches in the middle of a step; returns the findings of this rank and of all, and what the step was like."""
    process = assembly.start_process(recipe)
    trainer = assembly.build_trainer(recipe, process, folder)
    model, engine = trainer.model, trainer.engine
    batches, knobs = next(trainer.batches.steps(0, 1)), trainer.curriculum.knobs(0)

    def losses() -> Any:
        return (trainer.task.objective(model, batch, knobs, None).total for batch in batches)

    model.train()
    for batch in batches:
        engine.backward(trainer.task.objective(engine.forward, batch, knobs, None).total)
    if process.rank == poisoned:
        poison(model, place)
    found = find_non_finite(model, losses) if place != "no search" else None
    values = [float(loss) for loss in losses()]
    engine.step(0.1)
    values += [float(engine.gradient_norm), *(float(loss) for loss in losses())]
    return found, process.gather_objects(found), values


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("place", ["embedding", "expert", "gradient", "nothing"])
def test_every_rank_names_its_own_first_place(text: Path, tmp_path: Path, place: str, zero_stage: int) -> None:
    parallel = {"expert_parallel_size": 2, "zero_stage": zero_stage}
    recipe = recipe_for(text, 2, parallel, training={"micro_batch_size": 2})
    prepare(recipe.data, recipe.tokenizer)
    ranks = run_ranks(2, search, recipe, place, 1, tmp_path)
    told = describe(ranks[0][1])
    assert ranks[0][1] == ranks[1][1] == [rank[0] for rank in ranks]
    if place == "nothing":
        assert [rank[0] for rank in ranks] == [None, None]
        undisturbed = run_ranks(2, search, recipe, "no search", 1, tmp_path)
        assert [rank[2] for rank in ranks] == [rank[2] for rank in undisturbed], "the step was disturbed"
        return
    names = {
        "embedding": "rank 1, the output of model.embed_tokens (",
        "expert": "rank 1, the output of model.layers.1.moe.bank.experts (experts 4) (",
        "gradient": "rank 1, the gradient of the parameter model.layers.0.moe.bank.experts.w_in of experts 4, 5, 6",
    }
    assert told.startswith(f"first on {names[place]}"), told
    other: Finding | None = ranks[0][0]
    if place == "gradient":
        assert other is None
    elif other is not None:  # the first to be reached by it through the exchange of tokens
        assert other.order > ranks[1][0].order

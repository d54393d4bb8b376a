"""The trainer's own loop, run by SGD on any topology, and the comparison of what came out with one process.

SGD shows a wrong gradient scale in the weights, which Adam would hide. The reference is the plain PyTorch engine with
all experts in one process. Nothing of the loop is written out again: what runs is `Trainer.train`, with its pass for
the sums of a step, its late freezing and its adaptation of routers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from support.tiny import tiny_recipe

from smoe_train import assembly
from smoe_train.assembly import build
from smoe_train.checkpoint.model_state import expert_name, parameters_of, saved_buffers
from smoe_train.model import SmoeForCausalLM
from smoe_train.recipe import Recipe

STEPS = 4
RATE = 0.1


class Records:
    """Stands for the journal, on every rank: it keeps the records of the steps."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def metrics(self, records: list[dict[str, Any]]) -> None:
        self.steps += records

    def routing(self, records: list[dict[str, Any]]) -> None:
        """Looks at no health figures."""

    def note(self, text: str) -> None:
        """Shows no line to anyone."""


def sgd(groups: list[dict[str, Any]], config: Any) -> torch.optim.Optimizer:
    """Stands for the recipe's optimizer."""
    return torch.optim.SGD(groups, lr=0.0)


def train(recipe: Recipe, change: Callable[[SmoeForCausalLM], None] | None = None) -> dict[str, Any]:
    """Trains by SGD, without validation and checkpoints.

    Args:
        recipe: From `recipe_for`.
        change: What is done to the model before the first step.

    Returns:
        ``losses``: for each step the global mean of the task loss (``loss``) and of each router loss by name;
        ``norms``: gradient norms; ``weights``: parameters and saved buffers of this rank by topology-free name.
    """
    build_model = build.build_model

    def changed_model(*arguments: Any) -> SmoeForCausalLM:
        model = build_model(*arguments)
        if change is not None:
            change(model)  # before an engine copies its values
        return model

    process, records = assembly.start_process(recipe), Records()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(build, "make_optimizer", sgd),
        patch.object(build, "build_model", changed_model),
    ):
        trainer = assembly.build_trainer(recipe, process, Path(folder))
    trainer.journal = records  # type: ignore[assignment]
    with patch.object(trainer, "_validate", lambda: False), patch.object(trainer, "_save", lambda best: None):
        trainer.train()
    names = {"loss", *(key.removesuffix("_weighted") for key in records.steps[0] if key.endswith("_weighted"))}
    weights = {name: buffer.clone() for name, buffer in saved_buffers(trainer.model)}
    for name, parameter, owner in parameters_of(trainer.model):
        value = trainer.engine.read_state(parameter)["weight"]
        if owner is None:
            weights[name] = value
        else:
            weights |= {expert_name(name, i): one for i, one in zip(owner.expert_ids, value, strict=True)}
    return {
        "losses": [{name: record[name] for name in sorted(names)} for record in records.steps],
        "norms": [record["gradient_norm"] for record in records.steps],
        "weights": weights,
    }


def recipe_for(text: Path, world_size: int, parallel: dict[str, Any], **sections: Any) -> Recipe:
    """Returns a recipe whose micro-batches make one global batch without accumulation unless told otherwise."""
    training = {
        "max_steps": STEPS,
        "micro_batch_size": 8 // world_size,
        "gradient_clipping": None,
        **sections.pop("training", {}),
    }
    fixed = {"optimizer": {"weight_decay": 0.0}, "learning_rate": {"peak": RATE, "form": "constant"}}
    return tiny_recipe(text, world_size, parallel=parallel, training=training, **fixed, **sections)


def assert_equal_runs(ranks: list[dict[str, Any]], expected: dict[str, Any], tolerance: float = 5e-6) -> None:
    """Compares losses, gradient norms and weights of all ranks with a reference; shared weights must be bit-equal.

    Args:
        ranks: What `train` returned on each rank.
        expected: What it returned in one process.
        tolerance: Of losses and weights, absolute, for values around 1.
    """
    weights: dict[str, torch.Tensor] = {}
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], expected["losses"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(rank["norms"], expected["norms"], rtol=1e-4, atol=1e-6)
        for name, value in rank["weights"].items():
            if name in weights:
                assert torch.equal(weights[name], value), f"{name} differs between ranks that hold it"
            weights[name] = value
    assert weights.keys() == expected["weights"].keys()
    for name, value in weights.items():
        torch.testing.assert_close(
            value, expected["weights"][name], rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )

"""Ways to spoil the numbers of a run, on one of its ranks or on all, whenever chosen steps are computed."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from smoe_train.training.trainer import Trainer

POISONED_RANK = 1

Fault = Callable[[Trainer], None]

# Where a number is spoilt on rank 1, and how the run must name it.
PLACES = {
    "the embedding's output": "the output of model.embed_tokens (",
    "a router's logits": "the logits of model.layers.0.moe.router (",
    "an expert's output": "the output of model.layers.1.moe.bank.experts (experts ",
    "the loss": "the loss, though the output of every module is finite",
    "a gradient": "the gradient of the parameter model.layers.1.attention.qkv.weight (",
}


def poison(place: str, value: float, steps: set[int]) -> Fault:
    """Spoils a number on one rank whenever one of these steps is computed."""

    def install(trainer: Trainer) -> None:
        if trainer.process.rank != POISONED_RANK:
            return
        model, now = trainer.model, during(trainer, steps)

        def spoil(values: Tensor) -> Tensor:
            return torch.cat([values[:1] * value, values[1:]]) if now() else values

        if place == "the loss":
            change_objective(
                trainer, lambda found: replace(found, total=found.total + value, task=found.task + value), now
            )
        elif place == "a gradient":
            model.get_submodule("model.layers.1.attention.qkv").weight.register_hook(spoil)
        elif place == "a router's logits":
            change_assignments(model.routers()[0], lambda found: _spoilt(found, spoil), now)
        else:
            path = "model.embed_tokens" if place.startswith("the embedding") else "model.layers.1.moe.bank.experts"
            model.get_submodule(path).register_forward_hook(lambda module, inputs, output: spoil(output))

    return install


def during(trainer: Trainer, steps: Container[int]) -> Callable[[], bool]:
    """Returns what says whether one of these steps is being computed, for the first time or again."""
    computed = [0]

    def look(module: Any, inputs: Any, options: dict[str, Any]) -> None:
        computed[0] = options["knobs"].step + 1 if module.training else 0

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    return lambda: computed[0] in steps


def times(factor: float, found: Any) -> Any:
    """Returns an objective whose losses are so many times as large."""
    return replace(found, total=factor * found.total, task=factor * found.task)


def _spoilt(found: Any, spoil: Callable[[Tensor], Tensor]) -> Any:
    return replace(found, logits_TE=spoil(found.logits_TE), weights_TK=spoil(found.weights_TK))


def change_objective(trainer: Trainer, change: Callable[[Any], Any], now: Callable[[], bool]) -> None:
    """Passes what a trainer's steps are trained on through a change."""
    objective = trainer.task.objective

    def changed(*arguments: Any) -> Any:
        return change(objective(*arguments)) if now() else objective(*arguments)

    trainer.task.objective = changed  # type: ignore[method-assign]


def change_assignments(router: Any, change: Callable[[Any], Any], now: Callable[[], bool]) -> None:
    """Passes a router's assignments through a change."""

    class Changed(type(router)):  # type: ignore[misc]
        def assign(self, *arguments: Any) -> Any:
            found = super().assign(*arguments)
            return change(found) if now() else found

    router.__class__ = Changed

"""What a run is trained and judged on: one trainer serves every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from smoe_train.data.batches.loader import EvaluationBatches, ExampleBatches, MicroBatch
from smoe_train.data.examples import TaskInfo
from smoe_train.evaluation import (
    StatSums,
    TextFigures,
    evaluate_classifier,
    evaluate_language_model,
)
from smoe_train.model import SmoePreTrainedModel
from smoe_train.routing import StepTotals
from smoe_train.schedules import Knobs
from smoe_train.training.objectives import (
    Forward,
    Objective,
    language_modelling,
    sequence_classification,
)


@dataclass(frozen=True)
class Validation:
    """The result of a validation.

    Attributes:
        top_k: Experts a token.
        loss: The task's mean loss.
        cost: What chooses the best checkpoint, the lower the better.
        record: Figures for metrics.jsonl by name.
        routing: Summed routing statistics of each MoE layer, on the device.
    """

    top_k: int
    loss: float
    cost: float
    record: dict[str, Any]
    routing: StatSums


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """A validation was broken off, since the run is to stop."""


class Interruptible:
    """Batches of which no more come once the run is to stop.

    Args:
        batches: All of them; every rank has the same number.
        stopping: Returns whether to stop, the same on every rank; all ranks call it for every batch.
    """

    def __init__(self, batches: EvaluationBatches | ExampleBatches, stopping: Callable[[], bool]) -> None:
        self._batches, self._stopping = batches, stopping

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        for batch in self._batches:
            if self._stopping():
                raise Interrupted
            yield batch


def never() -> bool:
    """Returns that nothing is to stop."""
    return False


class Task(Protocol):
    """What the trainer needs to know of a task."""

    split: str
    """Name of the validation split in records."""

    def objective(self, forward: Forward, batch: MicroBatch, knobs: Knobs, totals: StepTotals | None) -> Objective:
        """Returns the losses of a micro-batch."""
        ...

    def validate(self, knobs: Sequence[Knobs]) -> list[Validation]:
        """Returns the result of each way to run the model; all ranks call it.

        Raises:
            Interrupted: The run is to stop.
        """
        ...

    def figures(self, loss: float) -> dict[str, float]:
        """Returns what else to record of a training loss."""
        ...


@dataclass
class LanguageModelling:
    """Next-token prediction, validated on the whole validation split.

    Attributes:
        model: The model.
        batches: Validation batches of this rank.
        train_bytes_per_token: Bytes of text a token of the training split stands for.
        valid: What the validation split's tokens stand for.
        device: Where to compute.
        sum_over_ranks: Adds a tensor up over the ranks.
        stopping: Returns whether the run is to stop, the same on every rank.
    """

    model: SmoePreTrainedModel
    batches: EvaluationBatches
    train_bytes_per_token: float
    valid: TextFigures
    device: torch.device
    sum_over_ranks: Callable[[Tensor], Tensor]
    stopping: Callable[[], bool] = never
    split: str = "valid"

    def objective(self, forward: Forward, batch: MicroBatch, knobs: Knobs, totals: StepTotals | None) -> Objective:
        """Returns the losses of a micro-batch."""
        return language_modelling(forward, batch, knobs, self.model.config, totals)

    def validate(self, knobs: Sequence[Knobs]) -> list[Validation]:
        """Returns cross-entropy, which chooses checkpoints, bits per byte and perplexity."""
        batches = Interruptible(self.batches, self.stopping)
        scores = evaluate_language_model(self.model, batches, knobs, self.valid, self.device, self.sum_over_ranks)
        return [Validation(one.top_k, one.loss, one.loss, one.to_json(), one.routing) for one in scores]

    def figures(self, loss: float) -> dict[str, float]:
        """Returns bits per byte."""
        return {"bits_per_byte": loss / (math.log(2.0) * self.train_bytes_per_token)}


@dataclass
class Classification:
    """One class or number for each example, validated on the slice of the training split that chooses checkpoints.

    Attributes:
        model: The model.
        batches: Validation batches of this rank.
        task: What is asked.
        labels: Labels of the validation examples, float64 [N].
        device: Where to compute.
        sum_over_ranks: Adds a tensor up over the ranks.
        stopping: Returns whether the run is to stop, the same on every rank.
    """

    model: SmoePreTrainedModel
    batches: ExampleBatches
    task: TaskInfo
    labels: Any
    device: torch.device
    sum_over_ranks: Callable[[Tensor], Tensor]
    stopping: Callable[[], bool] = never
    split: str = "selection"

    def objective(self, forward: Forward, batch: MicroBatch, knobs: Knobs, totals: StepTotals | None) -> Objective:
        """Returns the losses of a micro-batch."""
        return sequence_classification(forward, batch, knobs, self.model.config, totals)

    def validate(self, knobs: Sequence[Knobs]) -> list[Validation]:
        """Returns the task's metrics, whose mean chooses checkpoints."""
        batches = Interruptible(self.batches, self.stopping)
        scores = evaluate_classifier(
            self.model, batches, knobs, self.task, self.labels, self.device, self.sum_over_ranks
        )
        return [Validation(one.top_k, one.loss, one.cost, one.to_json(), one.routing) for one in scores]

    def figures(self, loss: float) -> dict[str, float]:
        """Returns nothing: a micro-batch is too small for the task's metrics."""
        return {}


__all__ = ["Classification", "Interrupted", "LanguageModelling", "Task", "Validation"]

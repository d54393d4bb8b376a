"""What a micro-batch is trained on: the task's loss, and with the router losses the total that is differentiated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from smoe_train.data.loader import MicroBatch
from smoe_train.model import SmoeConfig, SmoeOutput, language_model_loss, weighted_router_loss
from smoe_train.routing import StepTotals
from smoe_train.schedules import Knobs
from smoe_train.training.engine import Engine


@dataclass(frozen=True)
class Objective:
    """The losses of one micro-batch.

    Attributes:
        total: What is differentiated: task loss plus weighted router losses.
        task: Task loss alone, detached (nats a token).
        output: What the model returned.
    """

    total: Tensor
    task: Tensor
    output: SmoeOutput


def language_modelling(
    engine: Engine, batch: MicroBatch, knobs: Knobs, config: SmoeConfig, step_totals: StepTotals | None = None
) -> Objective:
    """Next-token prediction on full sequences.

    Args:
        engine: Runs the model.
        batch: Micro-batch without padding: every token is real.
        knobs: What the step is run with.
        config: Holds the router losses' coefficients.
        step_totals: Sums over the step's micro-batches, if they were collected.
    """
    if knobs.sequence_length is not None:
        batch = batch.in_sequences_of(knobs.sequence_length)
    output = engine.forward(
        input_ids=batch.input_ids_BS, knobs=knobs, sample_index=batch.sample_index_B, step_totals=step_totals
    )
    task = language_model_loss(output.logits, batch.labels_BS)
    router = weighted_router_loss(output.router_losses, config, knobs.loss_weights)
    return Objective(task + router, task.detach(), output)

"""What a micro-batch is trained on: the task's loss, and with the router losses the total that is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smoe_train.data.batches.loader import MicroBatch
from smoe_train.model import (
    SmoeConfig,
    SmoeOutput,
    classification_loss,
    weighted_router_loss,
)
from smoe_train.routing import StepTotals
from smoe_train.schedules import Knobs

Forward = Callable[..., SmoeOutput]
MakeObjective = Callable[[Forward, MicroBatch, Knobs, StepTotals | None], "Objective"]


@dataclass(frozen=True)
class Objective:
    """The losses of one micro-batch.

    Attributes:
        total: What is differentiated: task loss plus weighted router losses.
        task: Task loss alone, with its graph (nats a token, nats an example, or squared error).
        output: What the model returned.
    """

    total: Tensor
    task: Tensor
    output: SmoeOutput


def language_modelling(
    forward: Forward, batch: MicroBatch, knobs: Knobs, config: SmoeConfig, step_totals: StepTotals | None = None
) -> Objective:
    """Next-token prediction.

    Args:
        forward: Runs the model.
        batch: Micro-batch of full sequences, or of packed documents.
        knobs: What the step is run with.
        config: Holds the router losses' coefficients.
        step_totals: Sums over the step's micro-batches, if they were collected.
    """
    if knobs.sequence_length is not None:
        batch = batch.in_sequences_of(knobs.sequence_length)
    # Where every position has a label, the plain mean; otherwise micro-batches have different numbers of them.
    whole = batch.document_BS is None and not batch.has_padding
    num_targets = None if whole else batch.targets_per_micro_batch
    # The loss is the model's part: it may do without the logits of all tokens, and an engine sees the head's weight.
    output = forward(
        **model_inputs(batch), knobs=knobs, step_totals=step_totals, targets=batch.labels, num_targets=num_targets
    )
    assert output.task_loss is not None
    return _with_router_losses(output.task_loss, output, config, knobs)


def sequence_classification(
    forward: Forward, batch: MicroBatch, knobs: Knobs, config: SmoeConfig, step_totals: StepTotals | None = None
) -> Objective:
    """One class or number for each sequence; arguments as for `language_modelling`."""
    output = forward(**model_inputs(batch), knobs=knobs, step_totals=step_totals)
    assert output.logits is not None
    return _with_router_losses(classification_loss(output.logits, batch.labels), output, config, knobs)


def model_inputs(batch: MicroBatch) -> dict[str, Any]:
    """Returns what the model is called with, beside what the step is run with."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids_BS, "sample_index": batch.sample_index_B}
    if batch.has_padding:
        inputs |= {
            "attention_mask": batch.token_mask_BS,
            "tokens_per_micro_batch": batch.tokens_per_micro_batch,
        }
    if batch.document_BS is not None:
        inputs["document_ids"] = batch.document_BS
    return inputs


def _with_router_losses(task: Tensor, output: SmoeOutput, config: SmoeConfig, knobs: Knobs) -> Objective:
    router = weighted_router_loss(output.router_losses or {}, config, knobs.loss_weights)
    return Objective(task + router, task, output)

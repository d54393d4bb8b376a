"""Metrics of a classifier or regressor over a whole split, on all ranks in lockstep, at any k.

Shape suffixes: B examples of a micro-batch, N of the split, C outputs, P passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_train.data.batches.loader import MicroBatch
from smoe_train.data.examples import TaskInfo
from smoe_train.errors import RunFailedError
from smoe_train.evaluation.language_model import StatSums, add_stats
from smoe_train.evaluation.metrics import Numbers, compute_metrics, task_score
from smoe_train.routing.contract import same_on_one_rank
from smoe_train.schedules import Knobs


@dataclass(frozen=True)
class ClassifierScore:
    """How well a model does a task on a split, and what it answered.

    Attributes:
        top_k: Experts a token.
        examples: Examples with a label; the figures are over them.
        loss: Mean cross-entropy (nats an example), or mean squared error; NaN without labels.
        metrics: The task's metrics by name; none without labels.
        score: Their mean; NaN without labels.
        predictions: float64 [N], class ids, or numbers as the model gives them (GLUE's metrics take them unclipped).
        logits_NC: fp32 [N, C] on the host, the same on every rank.
        routing: Summed routing statistics of each MoE layer over this rank's examples, on the device.
    """

    top_k: int
    examples: int
    loss: float
    metrics: dict[str, float]
    score: float
    predictions: Numbers = field(repr=False, compare=False)
    logits_NC: Tensor = field(repr=False, compare=False)
    routing: StatSums = field(default_factory=dict, repr=False, compare=False)

    @property
    def cost(self) -> float:
        """The negative score: what chooses the best checkpoint."""
        return -self.score

    def to_json(self) -> dict[str, float | int]:
        """Returns the figures by name; without labels there is nothing but k and 0 examples."""
        figures = {"loss": self.loss, **self.metrics, "score": self.score} if self.metrics else {}
        return {"top_k": self.top_k, **figures, "evaluated_examples": self.examples}


def evaluate_classifier(
    model: nn.Module,
    batches: Iterable[MicroBatch],
    knobs: Sequence[Knobs],
    task: TaskInfo,
    labels: Numbers,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor] = same_on_one_rank,
) -> list[ClassifierScore]:
    """Returns one score for each way to run the model, the same on every rank.

    Every rank must get the same number of batches of the same width. A row that only fills a batch up has
    ``block_B`` -1 and counts nowhere. Each rank writes the outputs of its examples into a tensor of zeros for the
    whole split, and one sum over the ranks completes it, so nothing depends on how the examples were spread. The model
    is left in the mode it was in, and no random number is drawn.

    Args:
        model: A sequence classifier of this package.
        batches: This rank's share of the split; ``block_B`` is the number of the example in it.
        knobs: What to run the model with, one pass each; they differ in k.
        task: What is asked.
        labels: [N], the labels of the whole split, NaN where there is none.
        device: Where to compute.
        sum_over_ranks: Adds a tensor up over the ranks.

    Raises:
        RunFailedError: An output is NaN or infinite; every rank raises it.
    """
    passes = list({one.top_k: one for one in knobs}.values())
    # The last column counts how often an example was seen.
    outputs_PNC = torch.zeros(len(passes), len(labels), task.num_outputs + 1, device=device)
    routing: dict[int, StatSums] = {one.top_k: {} for one in passes}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for host_batch in batches:
            real_B = host_batch.block_B >= 0
            place_B, kept_B = host_batch.block_B[real_B].to(device), real_B.nonzero().squeeze(1).to(device)
            batch = host_batch.to(device)
            for number, one in enumerate(passes):
                output = model(
                    input_ids=batch.input_ids_BS,
                    attention_mask=batch.token_mask_BS,
                    knobs=one,
                    sample_index=batch.sample_index_B,
                    use_cache=False,
                )
                rows_BC = F.pad(output.logits[kept_B].float(), (0, 1), value=1.0)
                outputs_PNC[number].index_add_(0, place_B, rows_BC)
                add_stats(routing[one.top_k], output.routing_stats)
    model.train(was_training)
    outputs_PNC = sum_over_ranks(outputs_PNC).cpu()
    assert bool((outputs_PNC[..., -1] == 1.0).all()), "the batches of all ranks do not hold each example once"
    scores = {
        one.top_k: _score(one.top_k, task, labels, outputs_NC[:, :-1], routing[one.top_k])
        for one, outputs_NC in zip(passes, outputs_PNC, strict=True)
    }
    return [scores[one.top_k] for one in knobs]


def _score(top_k: int, task: TaskInfo, labels: Numbers, logits_NC: Tensor, routing: StatSums) -> ClassifierScore:
    bad = int((~logits_NC.isfinite()).any(dim=1).sum())
    if bad:
        raise RunFailedError(
            f"task {task.name}: the model's outputs for {bad:,} of {len(labels):,} examples are NaN or infinite, so it "
            "has diverged; take an earlier checkpoint, or train with a lower learning_rate.peak"
        )
    regression = task.kind == "regression"
    predictions: Numbers = (logits_NC[:, 0] if regression else logits_NC.argmax(dim=1)).double().numpy()
    known = ~np.isnan(labels)
    if not known.any():
        return ClassifierScore(top_k, 0, math.nan, {}, math.nan, predictions, logits_NC, routing)
    outputs, targets = logits_NC[torch.from_numpy(known)].double(), torch.from_numpy(labels[known])
    loss = F.mse_loss(outputs[:, 0], targets) if regression else F.cross_entropy(outputs, targets.long())
    metrics = compute_metrics(task, labels[known], predictions[known])
    examples = int(known.sum())
    return ClassifierScore(top_k, examples, loss.item(), metrics, task_score(metrics), predictions, logits_NC, routing)

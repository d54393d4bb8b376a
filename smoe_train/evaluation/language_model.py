"""Cross-entropy, bits per byte and perplexity over a whole split, on all ranks in lockstep, at any k."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_train.data.loader import IGNORED_LABEL, EvaluationBatches
from smoe_train.routing.contract import same_on_one_rank
from smoe_train.schedules import Knobs

StatSums = dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class LanguageModelScore:
    """How well a model predicts a split.

    Attributes:
        top_k: Experts a token.
        loss: Mean cross-entropy (nats a token).
        bits_per_byte: Information the model needs for a byte of the original text.
        perplexity: exp(loss), per token.
        tokens: Predicted tokens.
        routing: Summed routing statistics of each MoE layer, on the device.
    """

    top_k: int
    loss: float
    bits_per_byte: float
    perplexity: float
    tokens: int
    routing: StatSums = field(default_factory=dict, repr=False, compare=False)

    def to_json(self) -> dict[str, float | int]:
        """Returns the figures by name."""
        return {
            "top_k": self.top_k,
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
        }


def evaluate_language_model(
    model: nn.Module,
    batches: EvaluationBatches,
    knobs: Sequence[Knobs],
    bytes_per_token: float,
    device: torch.device,
    sum_over_ranks: Callable[[Tensor], Tensor] = same_on_one_rank,
) -> list[LanguageModelScore]:
    """Returns one score for each way to run the model.

    Every rank must get the same number of batches; ranks that run out get padded ones, which count nowhere. The model
    is left in the mode it was in, and no random number is drawn.

    Args:
        model: A causal language model of this package.
        batches: This rank's share of the split.
        knobs: What to run the model with, one pass each; they differ in k.
        bytes_per_token: Bytes of original text that a token stands for on average.
        device: Where to compute.
        sum_over_ranks: Adds a tensor up over the ranks.
    """
    was_training = model.training
    model.eval()
    sums = {one.top_k: torch.zeros(2, dtype=torch.float64, device=device) for one in knobs}
    routing: dict[int, StatSums] = {one.top_k: {} for one in knobs}
    with torch.no_grad():
        for index, host_batch in enumerate(batches):
            batch = host_batch.to(device)
            # Only the last batch holds padding, on any rank. The ranks must agree on whether there is a mask, since
            # counting its tokens is a collective; without one, attention takes the kernel it takes in training.
            mask = batch.token_mask_BS if index + 1 == len(batches) else None
            for one in {one.top_k: one for one in knobs}.values():
                top_k = one.top_k
                output = model(
                    input_ids=batch.input_ids_BS,
                    attention_mask=mask,
                    knobs=one,
                    sample_index=batch.sample_index_B,
                    use_cache=False,
                )
                labels = batch.labels_BS.flatten()
                loss = F.cross_entropy(
                    output.logits.flatten(0, 1).float(), labels, ignore_index=IGNORED_LABEL, reduction="sum"
                )
                sums[top_k] += torch.stack([loss.double(), (labels != IGNORED_LABEL).sum().double()])
                add_stats(routing[top_k], output.routing_stats)
    model.train(was_training)
    return [_score(one.top_k, sum_over_ranks(sums[one.top_k]), bytes_per_token, routing[one.top_k]) for one in knobs]


def add_stats(sums: StatSums, stats: Mapping[int, Mapping[str, Tensor]] | None) -> None:
    """Adds one pass's routing statistics to the sums of each layer."""
    for layer, values in (stats or {}).items():
        target = sums.setdefault(layer, {})
        for name, value in values.items():
            target[name] = target[name] + value if name in target else value


def _score(top_k: int, sums: Tensor, bytes_per_token: float, routing: StatSums) -> LanguageModelScore:
    total, tokens = sums.tolist()
    loss = total / max(tokens, 1.0)
    bits = loss / math.log(2.0) / bytes_per_token
    return LanguageModelScore(top_k, loss, bits, math.exp(min(loss, 700.0)), int(tokens), routing)

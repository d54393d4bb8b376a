"""Cross-entropy, bits per byte and perplexity over a whole split, on all ranks in lockstep, at any k.

Perplexity by word is ``exp(loss * tokens / words)``: the information of all the split's tokens, spread over the words
of the original text (between white space, and one for each end of a line). It compares models with different
tokenizers. The split's first token, which is not predicted, counts as much as the others do on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from smoe_train.data.batches.loader import IGNORED_LABEL, MicroBatch
from smoe_train.routing.contract import same_on_one_rank
from smoe_train.schedules import Knobs

StatSums = dict[int, dict[str, Tensor]]


class Batches(Protocol):
    """Micro-batches whose number is known, as `EvaluationBatches`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[MicroBatch]: ...


@dataclass(frozen=True)
class TextFigures:
    """What the tokens of a split stand for.

    Attributes:
        bytes_per_token: Bytes of the original text that a token stands for on average.
        tokens_per_word: Tokens of a word on average; None where figures by word are not usual for the data.
    """

    bytes_per_token: float
    tokens_per_word: float | None = None


@dataclass(frozen=True)
class LanguageModelScore:
    """How well a model predicts a split.

    Attributes:
        top_k: Experts a token.
        loss: Mean cross-entropy (nats a token).
        bits_per_byte: Information the model needs for a byte of the original text.
        perplexity: exp(loss), per token.
        word_perplexity: Per word of the original text, whatever the tokenizer; None where the data has no such figure.
        tokens: Predicted tokens.
        routing: Summed routing statistics of each MoE layer, on the device.
    """

    top_k: int
    loss: float
    bits_per_byte: float
    perplexity: float
    word_perplexity: float | None
    tokens: int
    routing: StatSums = field(default_factory=dict, repr=False, compare=False)

    def to_json(self) -> dict[str, float | int]:
        """Returns the figures by name."""
        by_word = {} if self.word_perplexity is None else {"word_perplexity": self.word_perplexity}
        return {
            "top_k": self.top_k,
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            **by_word,
            "evaluated_tokens": self.tokens,
        }


def evaluate_language_model(
    model: nn.Module,
    batches: Batches,
    knobs: Sequence[Knobs],
    text: TextFigures,
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
        text: What the split's tokens stand for.
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
            mask = batch.token_mask_BS if batch.has_padding or index + 1 == len(batches) else None
            for one in {one.top_k: one for one in knobs}.values():
                top_k = one.top_k
                output = model(
                    input_ids=batch.input_ids_BS,
                    attention_mask=mask,
                    document_ids=batch.document_BS,
                    knobs=one,
                    sample_index=batch.sample_index_B,
                    use_cache=False,
                    targets=batch.labels,
                    num_targets=1.0,  # the sum
                )
                count = (batch.labels != IGNORED_LABEL).sum()
                sums[top_k] += torch.stack([output.task_loss.double(), count.double()])
                add_stats(routing[top_k], output.routing_stats)
    model.train(was_training)
    return [_score(one.top_k, sum_over_ranks(sums[one.top_k]), text, routing[one.top_k]) for one in knobs]


def add_stats(sums: StatSums, stats: Mapping[int, Mapping[str, Tensor]] | None) -> None:
    """Adds one pass's routing statistics to the sums of each layer."""
    for layer, values in (stats or {}).items():
        target = sums.setdefault(layer, {})
        for name, value in values.items():
            target[name] = target[name] + value if name in target else value


def _score(top_k: int, sums: Tensor, text: TextFigures, routing: StatSums) -> LanguageModelScore:
    total, tokens = sums.tolist()
    loss = total / max(tokens, 1.0)
    by_word = None if text.tokens_per_word is None else _exp(loss * text.tokens_per_word)
    bits = loss / math.log(2.0) / text.bytes_per_token
    return LanguageModelScore(top_k, loss, bits, _exp(loss), by_word, int(tokens), routing)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))

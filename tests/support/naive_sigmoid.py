"""The sigmoid router as loops over tokens in fp64: the oracle of the fast one. Nothing here comes from the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from support.naive_moe import best_experts, feed_forward
from torch import Tensor


@dataclass
class NaiveSigmoid:
    """What the loops compute."""

    out_TD: Tensor
    ids: list[list[int]]
    load_balance_loss: Tensor


def naive_sigmoid(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias: Sequence[float],
    experts: Mapping[str, Tensor],
    kind: str,
    top_k: int,
    normalise: bool,
    scaling_factor: float,
    real: Sequence[bool],
) -> NaiveSigmoid:
    """Routes and runs each token on its own.

    Args:
        x_TD: Tokens.
        weight_ED: The router's weight.
        bias: Of each expert in the selection.
        experts: Stacked weights by name.
        kind: relu, gelu or swiglu.
        top_k: Experts a token.
        normalise: Whether a token's weights are divided by their sum.
        scaling_factor: Factor on the weights.
        real: False for padding.
    """
    num_experts = len(weight_ED)
    out, all_ids = [], []
    counts, shares = [0] * num_experts, [torch.zeros((), dtype=x_TD.dtype)] * num_experts
    for t, x_D in enumerate(x_TD):
        y_D, ids = torch.zeros_like(x_D), []
        if real[t]:
            scores = [1 / (1 + torch.exp(-(weight_ED[i] * x_D).sum())) for i in range(num_experts)]
            ids = best_experts([s + b for s, b in zip(scores, bias, strict=True)], top_k)
            total = sum(scores[i] for i in ids) if normalise else 1.0
            for i in ids:
                y_D = y_D + scaling_factor * scores[i] / total * feed_forward(x_D, i, experts, kind)
                counts[i] += 1
            shares = [share + score / sum(scores) for share, score in zip(shares, scores, strict=True)]
        out.append(y_D)
        all_ids.append(ids)
    balance = num_experts * sum(c / sum(counts) * p / sum(real) for c, p in zip(counts, shares, strict=True))
    return NaiveSigmoid(torch.stack(out), all_ids, balance)

"""A mixture-of-experts layer as loops over tokens and slots in fp64: the oracle of the fast one.

Nothing here comes from the package: softmax, selection, activations and losses are written out again. Gradients come
from autograd through these loops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class NaiveResult:
    """What the loops compute: outputs, the experts of each token (best first), their weights, and both losses."""

    out_TD: Tensor
    ids: list[list[int]]
    weights: list[list[Tensor]]
    load_balance_loss: Tensor
    z_loss: Tensor


def softmax(scores: Sequence[Tensor]) -> list[Tensor]:
    """exp(s_i) / sum_j exp(s_j)."""
    top = max(score.item() for score in scores)
    powers = [torch.exp(score - top) for score in scores]
    total = sum(powers[1:], powers[0])
    return [power / total for power in powers]


def best_experts(scores: Sequence[Tensor], top_k: int) -> list[int]:
    """The ids of the highest scores, best first; the lower id wins a tie."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))[:top_k]


def feed_forward(x_D: Tensor, expert: int, weights: Mapping[str, Tensor], kind: str) -> Tensor:
    """One expert on one token."""
    hidden_F = x_D @ weights["w_in"][expert]
    if kind == "swiglu":
        gate_F = x_D @ weights["w_gate"][expert]
        hidden_F = gate_F / (1 + torch.exp(-gate_F)) * hidden_F
        return hidden_F @ weights["w_out"][expert]
    hidden_F = hidden_F + weights["b_in"][expert]
    hidden_F = hidden_F.clamp(min=0) if kind == "relu" else 0.5 * hidden_F * (1 + torch.erf(hidden_F / math.sqrt(2)))
    return hidden_F @ weights["w_out"][expert] + weights["b_out"][expert]


def slot_weights(scores: Sequence[Tensor], chosen: Sequence[int], rule: str) -> list[Tensor]:
    """The combination weights of the chosen experts under one of the three softmax rules."""
    if rule == "after_top_k":
        return softmax([scores[i] for i in chosen])
    probabilities = softmax(scores)
    kept = [probabilities[i] for i in chosen]
    return kept if rule == "before_top_k" else [p / sum(kept[1:], kept[0]) for p in kept]


def naive_moe(
    x_TD: Tensor,
    router: tuple[Tensor, Tensor | None],
    experts: Mapping[str, Tensor],
    kind: str,
    top_k: int,
    rule: str,
    real: Sequence[bool] | None = None,
) -> NaiveResult:
    """Routes and runs each token on its own.

    Args:
        x_TD: Tokens.
        router: Weight [E, D] and bias [E] or None.
        experts: Stacked weights by name.
        kind: relu, gelu or swiglu.
        top_k: Experts a token.
        rule: after_top_k, before_top_k or before_top_k_renormalised.
        real: False for padding.
    """
    weight_ED, bias_E = router
    num_experts = weight_ED.shape[0]
    real = [True] * len(x_TD) if real is None else real
    out, all_ids, all_weights = [], [], []
    counts, probability = [0] * num_experts, [torch.zeros((), dtype=x_TD.dtype)] * num_experts
    squares = torch.zeros((), dtype=x_TD.dtype)
    for x_D, is_real in zip(x_TD, real, strict=True):
        y_D = torch.zeros_like(x_D)
        ids, weights = [], []
        if is_real:
            scores = [(weight_ED[i] * x_D).sum() + (0 if bias_E is None else bias_E[i]) for i in range(num_experts)]
            ids = best_experts(scores, top_k)
            weights = slot_weights(scores, ids, rule)
            for i, weight in zip(ids, weights, strict=True):
                y_D = y_D + weight * feed_forward(x_D, i, experts, kind)
                counts[i] += 1
            probability = [p + q for p, q in zip(probability, softmax(scores), strict=True)]
            top = max(score.item() for score in scores)
            squares = squares + (top + torch.log(sum(torch.exp(score - top) for score in scores))) ** 2
        out.append(y_D)
        all_ids.append(ids)
        all_weights.append(weights)
    tokens, slots = max(sum(real), 1), max(sum(counts), 1)
    balance = num_experts * sum(c / slots * p / tokens for c, p in zip(counts, probability, strict=True))
    return NaiveResult(torch.stack(out), all_ids, all_weights, balance, squares / tokens)


def naive_hyper_router(
    embedding: Tensor, net: Mapping[str, Tensor], num_experts: int, d_model: int, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Generates a router's weight and bias value by value: theta = W2 relu(W1 e + b1) + b2, a row of d+1 an expert."""
    hidden = [
        ((row * embedding).sum() + b).clamp(min=0)
        for row, b in zip(net["hidden_weight"], net["hidden_bias"], strict=True)
    ]
    theta = [
        sum(row[i] * hidden[i] for i in range(len(hidden))) + b
        for row, b in zip(net["output_weight"], net["output_bias"], strict=True)
    ]
    width = d_model + 1 if bias else d_model
    rows = [torch.stack(theta[j * width : j * width + d_model]) for j in range(num_experts)]
    return torch.stack(rows), torch.stack([theta[j * width + d_model] for j in range(num_experts)]) if bias else None

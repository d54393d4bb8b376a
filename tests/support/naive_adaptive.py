"""Adaptive gating as loops over tokens and slots: the oracle of the fast one; only its neighbour's loops are shared.

Written from the equations of arXiv 2310.07188 (its eq. 4 is the balance loss). Gradients come from autograd through
these loops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from support.naive_moe import NaiveResult, best_experts, feed_forward, softmax
from torch import Tensor


def chosen_experts(p: Sequence[Tensor], top_k: int, threshold: float, gap: str) -> list[int]:
    """The best expert, and each next one as long as it lies within the threshold."""
    first, *others = best_experts(p, top_k)
    chosen = [first]
    for other in others:
        high, low = p[first].item(), p[other].item()
        distance = high - low
        if gap == "top2_renormalised":
            distance = high / (high + low) - low / (high + low)
        if distance > threshold:
            break
        chosen.append(other)
    return chosen


def naive_adaptive(
    x_TD: Tensor,
    router: tuple[Tensor, Tensor | None],
    experts: Mapping[str, Tensor],
    kind: str,
    top_k: int,
    threshold: float,
    gap: str = "full",
    weights: str = "raw",
    balance_tokens: str = "top1_only",
    real: Sequence[bool] | None = None,
) -> NaiveResult:
    """Routes and runs each token on its own; arguments as `support.naive_moe.naive_moe` and the policy's options."""
    weight_ED, bias_E = router
    num_experts = weight_ED.shape[0]
    real = [True] * len(x_TD) if real is None else real
    zero = torch.zeros((), dtype=x_TD.dtype)
    out, all_ids, all_weights = [], [], []
    counts, probability, squares = [0] * num_experts, [zero] * num_experts, zero
    for x_D, is_real in zip(x_TD, real, strict=True):
        y_D, ids, slot_weights = torch.zeros_like(x_D), [], []
        if is_real:
            scores = [(weight_ED[i] * x_D).sum() + (0 if bias_E is None else bias_E[i]) for i in range(num_experts)]
            p = softmax(scores)
            ids = chosen_experts(p, top_k, threshold, gap)
            slot_weights = [p[i] for i in ids]
            if weights == "renormalised":
                total = sum(slot_weights[1:], slot_weights[0])
                slot_weights = [weight / total for weight in slot_weights]
            for i, weight in zip(ids, slot_weights, strict=True):
                y_D = y_D + weight * feed_forward(x_D, i, experts, kind)
            if balance_tokens == "all" or len(ids) == 1:
                for i in ids:
                    counts[i] += 1
            probability = [one + other for one, other in zip(probability, p, strict=True)]
            top = max(score.item() for score in scores)
            squares = squares + (top + torch.log(sum(torch.exp(score - top) for score in scores))) ** 2
        out.append(y_D)
        all_ids.append(ids)
        all_weights.append(slot_weights)
    tokens, slots = max(sum(real), 1), max(sum(counts), 1)
    balance = num_experts * sum(c / slots * p / tokens for c, p in zip(counts, probability, strict=True))
    return NaiveResult(torch.stack(out), all_ids, all_weights, balance, squares / tokens)

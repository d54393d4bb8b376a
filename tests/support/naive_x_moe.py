"""X-MoE's layer as loops over tokens, experts and slots in fp64: norms, cosines, weights and losses written out.

Nothing here comes from the package; experts, softmax and selection are those of the other oracle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from support.naive_moe import NaiveResult, best_experts, feed_forward, softmax
from torch import Tensor


def cosine(u: Tensor, v: Tensor) -> Tensor:
    """u . v / (|u| |v|)."""
    return (u * v).sum() / ((u * u).sum().sqrt() * (v * v).sum().sqrt())


def naive_x_moe(
    x_TD: Tensor,
    router: Mapping[str, Tensor],
    experts: Mapping[str, Tensor],
    kind: str,
    top_k: int,
    rule: str,
    balance_temperature: float,
    real: Sequence[bool],
) -> NaiveResult:
    """Routes and runs each token on its own.

    Args:
        x_TD: Tokens.
        router: ``projection`` [P, D], ``embeddings`` [E, P] and ``log_temperature`` a, with tau = 0.01 + exp(a).
        experts: Stacked weights by name.
        kind: relu, gelu or swiglu.
        top_k: Experts a token.
        rule: after_top_k, before_top_k, before_top_k_renormalised or sigmoid.
        balance_temperature: tau0.
        real: False for padding.
    """
    projection, embeddings = router["projection"], router["embeddings"]
    temperature = 0.01 + torch.exp(router["log_temperature"][0])
    num_experts = len(embeddings)
    zero = torch.zeros((), dtype=x_TD.dtype)
    out, all_ids, all_weights = [], [], []
    counts, probability, squares = [0] * num_experts, [zero] * num_experts, zero
    for x_D, is_real in zip(x_TD, real, strict=True):
        y_D, ids, weights = torch.zeros_like(x_D), [], []
        if is_real:
            projected = torch.stack([(row * x_D).sum() for row in projection])
            cosines = [cosine(projected, embedding) for embedding in embeddings]
            logits = [value / temperature for value in cosines]
            ids = best_experts(logits, top_k)
            if rule == "sigmoid":
                weights = [1 / (1 + torch.exp(-logits[i])) for i in ids]
            elif rule == "after_top_k":
                weights = softmax([logits[i] for i in ids])
            else:
                of_all = softmax(logits)
                total = sum(of_all[i] for i in ids) if rule == "before_top_k_renormalised" else 1
                weights = [of_all[i] / total for i in ids]
            for i, weight in zip(ids, weights, strict=True):
                y_D = y_D + weight * feed_forward(x_D, i, experts, kind)
                counts[i] += 1
            at_tau0 = softmax([value / balance_temperature for value in cosines])
            probability = [p + q for p, q in zip(probability, at_tau0, strict=True)]
            squares = squares + torch.log(sum(torch.exp(logit) for logit in logits)) ** 2
        out.append(y_D)
        all_ids.append(ids)
        all_weights.append(weights)
    tokens, slots = max(sum(real), 1), max(sum(counts), 1)
    balance = num_experts * sum(c / slots * p / tokens for c, p in zip(counts, probability, strict=True))
    return NaiveResult(torch.stack(out), all_ids, all_weights, balance, squares / tokens)

"""StableMoE as loops over tokens in fp64: the oracle of the fast one. Nothing here comes from the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from support.naive_moe import best_experts, feed_forward, softmax
from torch import Tensor


@dataclass
class NaiveStable:
    """What the loops compute."""

    out_TD: Tensor
    ids: list[list[int]]
    stable_balance_loss: Tensor
    distillation_loss: Tensor


def features(kind: str, weights: Mapping[str, Tensor], ids: Sequence[int], real: Sequence[bool], t: int, length: int):
    """What the distilled router sees of token t: its own embedding and, by kind, those before it in its sequence."""
    table = weights["distilled.embedding.weight"]
    window = [t - lag for lag in range({"word": 1, "bigram": 2, "convolution": 5}[kind])]
    present = [s for s in window if s >= 0 and s // length == t // length and real[s]]
    if kind == "convolution":
        return sum(weights["distilled.taps"][t - s] @ table[ids[s]] for s in present)
    return sum(table[ids[s]] for s in present) / len(present)


def naive_stable_moe(
    x_TD: Tensor,
    token_ids: Sequence[int],
    weights: Mapping[str, Tensor],
    experts: Mapping[str, Tensor],
    feed_forward_kind: str,
    distilled: str,
    stage: int,
    top_k: int,
    length: int,
    real: Sequence[bool],
) -> NaiveStable:
    """Routes and runs each token on its own.

    Args:
        x_TD: Tokens.
        token_ids: Their vocabulary ids.
        weights: The router's parameters by name.
        experts: Stacked weights by name.
        feed_forward_kind: relu, gelu or swiglu.
        distilled: word, bigram or convolution.
        stage: 1 or 2.
        top_k: Experts a token.
        length: Tokens of a sequence.
        real: False for padding.
    """
    num_experts = len(weights["centroids"])
    zero = torch.zeros((), dtype=x_TD.dtype)
    out, all_ids = [], []
    members: list[list[Tensor]] = [[] for _ in range(num_experts)]
    cross_entropy = zero
    for t, x_D in enumerate(x_TD):
        y_D, ids = torch.zeros_like(x_D), []
        if real[t]:
            scores = [(weights["centroids"][i] * x_D).sum() for i in range(num_experts)]
            seen = features(distilled, weights, token_ids, real, t, length)
            said = [(weights["distilled.centroids"][i] * seen).sum() for i in range(num_experts)]
            ids = best_experts(scores if stage == 1 else said, top_k)
            for i in ids:
                weight = 1 / (1 + torch.exp(-scores[i]))
                members[i].append(weight)
                y_D = y_D + weight * feed_forward(x_D, i, experts, feed_forward_kind)
                cross_entropy = cross_entropy - torch.log(softmax(said)[i]) / top_k
        out.append(y_D)
        all_ids.append(ids)
    if stage == 2:
        return NaiveStable(torch.stack(out), all_ids, zero, zero)
    slots = sum(len(one) for one in members)
    mean = slots / num_experts
    # The paper's sum, (|A_i| - n) / n times the sum of the weights in A_i, over the number of slots.
    balance = sum(((len(one) - mean) / mean * sum(one, zero) for one in members), zero) / slots
    return NaiveStable(torch.stack(out), all_ids, balance, cross_entropy / sum(real))

"""Expert choice as loops in fp64: the oracle of the fast one. Nothing here comes from the package."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from support.naive_moe import feed_forward, softmax
from torch import Tensor


@dataclass
class NaiveChoice:
    """What the loops compute."""

    out_TD: Tensor
    ids: list[list[int]]
    z_loss: Tensor


def naive_expert_choice(
    x_TD: Tensor,
    weight_ED: Tensor,
    experts: Mapping[str, Tensor],
    kind: str,
    top_k: int,
    length: int,
    limit: int | None,
    real: Sequence[bool],
) -> NaiveChoice:
    """Lets each expert choose, group by group.

    Args:
        x_TD: Tokens.
        weight_ED: The router's weight.
        experts: Stacked weights by name.
        kind: relu, gelu or swiglu.
        top_k: Mean number of experts a token.
        length: Tokens of a group.
        limit: Most experts a token, or None.
        real: False for padding.
    """
    num_experts = len(weight_ED)
    scores = [[(row * x_D).sum() for row in weight_ED] for x_D in x_TD]
    chosen: list[list[int]] = [[] for _ in x_TD]
    probability = [softmax(of_token) for of_token in scores]
    for start in range(0, len(x_TD), length):
        group = [t for t in range(start, start + length) if real[t]]
        capacity = math.ceil(len(group) * top_k / num_experts)
        for expert in range(num_experts):
            by_probability = sorted(group, key=lambda t, e=expert: (-probability[t][e].item(), t))
            for t in by_probability[:capacity]:
                chosen[t].append(expert)
    out, squares = [], torch.zeros((), dtype=x_TD.dtype)
    for t, x_D in enumerate(x_TD):
        chosen[t].sort(key=lambda e, t=t: (-probability[t][e].item(), e))
        chosen[t] = chosen[t][:limit]
        y_D = torch.zeros_like(x_D)
        for expert in chosen[t]:
            y_D = y_D + probability[t][expert] * feed_forward(x_D, expert, experts, kind)
        out.append(y_D)
        if real[t]:
            squares = squares + torch.log(sum(torch.exp(score) for score in scores[t])) ** 2
    return NaiveChoice(torch.stack(out), chosen, squares / sum(real))

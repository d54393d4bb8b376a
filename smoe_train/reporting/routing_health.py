"""Routing health of each layer from the sums that routers return; pure arithmetic on host numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# The sums that `routing_record` gives a meaning of their own, or that only routers adapt to; all others are averaged.
KNOWN = frozenset(
    {
        "slots_E",
        "probability_E",
        "tokens",
        "two_expert_tokens",
        "entropy",
        "margin",
        "gap_counts_N",
        "wanted_slots",
        "co_routed_EE",
    }
)


def routing_record(sums: Mapping[str, Sequence[float] | float], top_k: int) -> dict[str, Any]:
    """Returns what routing.jsonl says about one layer.

    Args:
        sums: ``slots_E``, ``probability_E``, ``tokens``, ``two_expert_tokens``, ``entropy`` and ``margin``, summed over
            tokens, micro-batches and ranks; see `smoe_train.routing.losses.routing_stats`. ``wanted_slots``, tokens
            times their k, is needed where k changed in between or a policy uses fewer on purpose. Other sums
            become means, see `further_means`.
        top_k: Experts a token that the router aimed at.

    Returns:
        ``load`` (shares of the routed slots), ``load_max_over_mean`` (1 is balanced, E is collapsed), ``entropy``
        (nats, mean of the tokens' router entropies) and ``entropy_normalised`` (by ln E), ``load_entropy_normalised``
        (entropy of the load by ln E), ``dead_experts`` (no slot at all), ``top1_margin`` (mean p_first - p_second),
        ``experts_per_token``, ``two_expert_share`` (tokens with two experts or more), and ``dropped_share`` (wanted
        slots that no expert received).
    """
    slots = [float(value) for value in _sequence(sums["slots_E"])]
    tokens = max(_number(sums["tokens"]), 1.0)
    total = sum(slots)
    wanted = _number(sums.get("wanted_slots", tokens * top_k))
    num_experts = len(slots)
    load = [value / total if total else 0.0 for value in slots]
    scale = math.log(num_experts) if num_experts > 1 else 1.0
    return {
        "tokens": _number(sums["tokens"]),
        "top_k": top_k,
        "load": load,
        "load_max_over_mean": max(load) * num_experts,
        "load_entropy_normalised": -sum(share * math.log(share) for share in load if share > 0.0) / scale,
        "entropy": _number(sums["entropy"]) / tokens,
        "entropy_normalised": _number(sums["entropy"]) / tokens / scale,
        "dead_experts": sum(value == 0.0 for value in slots),
        "top1_margin": _number(sums["margin"]) / tokens,
        "experts_per_token": total / tokens,
        "two_expert_share": _number(sums["two_expert_tokens"]) / tokens,
        "dropped_share": max(0.0, 1.0 - total / max(wanted, 1.0)),
        **further_means(sums),
    }


def further_means(sums: Mapping[str, Sequence[float] | float]) -> dict[str, Any]:
    """Returns the means of what a policy sums beyond the sums that all have.

    A sum ``name`` is divided by ``tokens``, a sum ``name/count`` by the sum ``count`` and becomes ``name``; where
    nothing was counted there is no mean.
    """
    means: dict[str, Any] = {}
    for key in sorted(sums.keys() - KNOWN):
        name, _, count = key.partition("/")
        total, counted = sums[key], _number(sums[count or "tokens"])
        if counted:
            means[name] = total / counted if isinstance(total, int | float) else [value / counted for value in total]
    return means


def _sequence(value: Sequence[float] | float) -> Sequence[float]:
    assert not isinstance(value, (int, float))
    return value


def _number(value: Sequence[float] | float) -> float:
    assert isinstance(value, (int, float))
    return float(value)

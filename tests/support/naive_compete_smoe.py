"""CompeteSMoE as loops over tokens and experts in fp64: the oracle of the fast one.

Nothing here comes from the package. Gradients come from autograd through these loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class NaiveContest:
    """What the loops compute: outputs, winners (best first) and weights of each token, losses, and counts."""

    out_TD: Tensor
    winners: list[list[int]]
    weights: list[list[Tensor]]
    losses: dict[str, Tensor]
    agreement: float
    ties: int
    spread: float


def sigmoid(value: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-value))


RESPONSES: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus_mean": lambda y: sum(torch.log(1 + torch.exp(v)) for v in y) / len(y),
    "l2norm": lambda y: torch.sqrt(sum(v * v for v in y)),
    "relu_mean": lambda y: sum(v if v > 0 else 0 * v for v in y) / len(y),
    "silu_mean": lambda y: sum(v * sigmoid(v) for v in y) / len(y),
    "sigmoid_mean": lambda y: sum(sigmoid(v) for v in y) / len(y),
}


def softmax(scores: Sequence[Tensor]) -> list[Tensor]:
    top = max(score.item() for score in scores)
    powers = [torch.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def best(scores: Sequence[Tensor], top_k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))[:top_k]


def expert(x_D: Tensor, i: int, weights: Mapping[str, Tensor]) -> Tensor:
    """A two-layer network with ReLU and biases, or a gated one with SiLU without."""
    hidden = x_D @ weights["w_in"][i]
    if "w_gate" in weights:
        gate = x_D @ weights["w_gate"][i]
        return (gate * sigmoid(gate) * hidden) @ weights["w_out"][i]
    return (hidden + weights["b_in"][i]).clamp(min=0) @ weights["w_out"][i] + weights["b_out"][i]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    length = math.sqrt((a * a).sum().item()) * math.sqrt((b * b).sum().item())
    if length == 0:
        return 0 * (a * b).sum()
    return (a * b).sum() / (torch.sqrt((a * a).sum()) * torch.sqrt((b * b).sum()))


def standing(responses: Sequence[Tensor], score_norm: str, temperature: float) -> list[Tensor]:
    """The scores whose softmax is the distribution of responses."""
    if score_norm == "standardise":
        mean = sum(responses) / len(responses)
        variance = sum((s - mean) ** 2 for s in responses) / len(responses)
        responses = [(s - mean) / torch.sqrt(variance + 1e-12) for s in responses]
    return [s / temperature for s in responses]


def mismatch(p: Sequence[Tensor], target: Sequence[Tensor], some: Sequence[int] | None, kind: str) -> Tensor:
    """How far the router's probabilities are from the target, over all experts or over some."""
    chosen = range(len(p)) if some is None else some
    if kind == "mse":
        return sum((p[i] - target[i]) ** 2 for i in chosen) / len(chosen)
    p_total, target_total = sum(p[i] for i in chosen), sum(target[i] for i in chosen)
    result = 0 * p_total
    for i in chosen:
        if target[i] > 0:
            result = result + target[i] / target_total * torch.log(target[i] / target_total / (p[i] / p_total))
    return result


def naive_compete(
    x_TD: Tensor,
    router_ED: Tensor,
    experts: Mapping[str, Tensor],
    top_k: int,
    options: Mapping[str, object],
    real: Sequence[bool] | None = None,
) -> NaiveContest:
    """Lets all experts compete for each token on its own.

    Args:
        x_TD: Tokens.
        router_ED: The router's weight.
        experts: Stacked weights by name.
        top_k: Winners a token.
        options: ``response``, ``winner_weights``, ``score_norm``, ``temperature``, ``target``, ``distillation``,
            ``distillation_loss`` and ``theta``.
        real: False for padding.
    """
    num_experts = router_ED.shape[0]
    real = [True] * len(x_TD) if real is None else real
    tokens = max(sum(real), 1)
    zero = 0 * router_ED.sum()
    out, all_winners, all_weights = [], [], []
    distillation, diversity = zero, zero
    counts, standing_sum = [0] * num_experts, [zero] * num_experts
    agreed, ties, spread = 0.0, 0, 0.0
    for x_D, is_real in zip(x_TD, real, strict=True):
        if not is_real:
            out.append(torch.zeros_like(x_D))
            all_winners.append([])
            all_weights.append([])
            continue
        y = [expert(x_D, i, experts) for i in range(num_experts)]
        s = [RESPONSES[options["response"]](one) for one in y]
        won = best(s, top_k)
        if options["winner_weights"] == "softmax":
            weights = softmax([s[i] for i in won])
        else:
            weights = [s[i] / sum(s[j] for j in won) for i in won]
        out.append(sum(w * y[i] for w, i in zip(weights, won, strict=True)))
        scores = standing(s, options["score_norm"], options["temperature"])
        shares = softmax(scores)
        target = [share.detach() for share in shares]
        if options["target"] == "winners":
            among = dict(zip(won, softmax([scores[i] for i in won]), strict=True))
            target = [among[i].detach() if i in among else torch.zeros_like(shares[i]) for i in range(num_experts)]
        logits = [(router_ED[i] * x_D).sum() for i in range(num_experts)]
        p, routed, kind = softmax(logits), best(logits, top_k), options["distillation_loss"]
        parts = {"topk": mismatch(p, target, won, kind), "routed": mismatch(p, target, routed, kind)}
        further = {"hybrid": parts["topk"], "tribrid": parts["topk"] + parts["routed"]}
        if options["distillation"] == "topk":
            distillation = distillation + parts["topk"]
        else:
            distillation = distillation + mismatch(p, target, None, kind)
            distillation = distillation + options["theta"] * further.get(options["distillation"], 0.0)
        pairs = [(a, b) for a in won for b in won if a != b]
        if pairs:
            diversity = diversity + sum(cosine(y[a], y[b]) for a, b in pairs) / len(pairs)
        for i in won:
            counts[i] += 1
        standing_sum = [total + share for total, share in zip(standing_sum, shares, strict=True)]
        agreed += len(set(won) & set(routed)) / top_k
        values = [one.item() for one in s]
        ties += any(values[i] == values[j] for i in won for j in range(num_experts) if j not in won)
        mean = sum(values) / num_experts
        spread += math.sqrt(sum((value - mean) ** 2 for value in values) / num_experts)
        all_winners.append(won)
        all_weights.append(weights)
    slots = max(sum(counts), 1)
    balance = num_experts * sum(c / slots * total / tokens for c, total in zip(counts, standing_sum, strict=True))
    losses = {
        "router_distillation_loss": distillation / tokens,
        "diversity_loss": diversity / tokens,
        "competition_balance_loss": balance,
    }
    return NaiveContest(torch.stack(out), all_winners, all_weights, losses, agreed, ties, spread)

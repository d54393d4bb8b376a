"""SimSMoE as loops over tokens, pairs and Gram entries in fp64: the oracle of the vectorised one.

Nothing here comes from the package. HSIC is written with full Gram matrices and the centring matrix H, its unbiased
estimate as Song et al. (JMLR 2012, eq. 5) have it. Gradients come from autograd through these loops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor


def gram(rows: Sequence[Tensor], kernel: str, sigma: float = 0.8, mode: str = "median_fraction") -> Tensor:
    """The kernel of every two rows; the median distance is that between different rows and carries no gradient."""
    n = len(rows)
    if kernel == "cka_linear":
        return torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])
    width = sigma
    if mode == "median_fraction":
        distances = sorted(
            math.sqrt(sum((p - q) ** 2 for p, q in zip(rows[i].tolist(), rows[j].tolist(), strict=True)))
            for i, j in combinations(range(n), 2)
        )
        width = sigma * distances[(len(distances) - 1) // 2]
        if width == 0.0:
            return torch.ones(n, n, dtype=torch.float64)
    return torch.stack([torch.stack([torch.exp(-((a - b) ** 2).sum() / (2 * width**2)) for b in rows]) for a in rows])


def hsic(k: Tensor, other: Tensor, estimator: str) -> Tensor:
    """tr(KHLH) / n^2, or the unbiased estimate from Gram matrices without their diagonals."""
    n = len(k)
    if estimator == "biased":
        h = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64) / n
        return torch.trace(k @ h @ other @ h) / n**2
    off = 1 - torch.eye(n, dtype=torch.float64)
    k, other, one = k * off, other * off, torch.ones(n, dtype=torch.float64)
    return (
        torch.trace(k @ other)
        + (one @ k @ one) * (one @ other @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ k @ other @ one)
    ) / (n * (n - 3))


def cka(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    kernel: str,
    estimator: str,
    sigma: float = 0.8,
    mode: str = "median_fraction",
) -> Tensor | None:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)); None where a representation does not vary or there are too few rows."""
    if len(x) < 4 or any(len({tuple(row.tolist()) for row in rows}) < 2 for rows in (x, y)):
        return None
    k, other = gram(x, kernel, sigma, mode), gram(y, kernel, sigma, mode)
    own = hsic(k, k, estimator), hsic(other, other, estimator)
    if min(value.item() for value in own) <= 0:
        return None
    return hsic(k, other, estimator) / torch.sqrt(own[0] * own[1])


def project(y_D: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    """No head, one matrix, or one hidden layer."""
    if "hidden_weight" in head:
        y_D = torch.stack([(row * y_D).sum() for row in head["hidden_weight"]]) + head["hidden_bias"]
        y_D = y_D.clamp(min=0)
    return torch.stack([(row * y_D).sum() for row in head["weight"]]) if "weight" in head else y_D


def shared_counts(ids: Sequence[Sequence[int]], num_experts: int) -> list[list[int]]:
    """How many tokens chose both experts, above the diagonal."""
    counts = [[0] * num_experts for _ in range(num_experts)]
    for experts in ids:
        for one, other in combinations(experts, 2):
            counts[min(one, other)][max(one, other)] += 1
    return counts


def next_state(
    counts: Sequence[Sequence[int]],
    due: Sequence[tuple[int, int]],
    shared: Sequence[Sequence[int]],
    limit: float,
    max_pairs: int,
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The counters after a step, and the pairs that the next one checks: highest first, the lower pair in a tie."""
    pairs = list(combinations(range(len(counts)), 2))
    after = [list(row) for row in counts]
    for i, j in pairs:
        after[i][j] = 0 if (i, j) in due else after[i][j] + shared[i][j]
    exceeding = [pair for pair in pairs if after[pair[0]][pair[1]] > limit]
    return after, sorted(exceeding, key=lambda pair: (-after[pair[0]][pair[1]], pair))[:max_pairs]


def similarity_loss(
    ids: Sequence[Sequence[int]],
    outputs: Sequence[Mapping[int, Tensor]],
    due: Sequence[tuple[int, int]],
    head: Mapping[str, Tensor],
    *,
    kernel: str,
    estimator: str,
    threshold: float,
    min_tokens: int = 4,
    max_tokens: int = 10**9,
    candidates: int = 10**9,
    sigma: float = 0.8,
    mode: str = "median_fraction",
) -> tuple[Tensor, list[tuple[int, int]]]:
    """The sum of the CKA of the pairs that are due and collapsed, and which these are.

    Args:
        ids: Experts of each token of the global batch; empty for padding.
        outputs: Each token's expert outputs by expert.
        due: Pairs to check.
        head: Weights of the projection by name.
        kernel: cka_linear or cka_rbf.
        estimator: Of the loss; the decision is debiased.
        threshold: Least debiased CKA of a collapsed pair.
        min_tokens: Fewest shared tokens.
        max_tokens: Most shared tokens used, the first ones (Gaussian kernel).
        candidates: Every ceil(tokens / candidates)-th token is looked at (Gaussian kernel).
        sigma: Width of the Gaussian kernel.
        mode: Its unit.
    """
    total, fired = torch.zeros((), dtype=torch.float64), []
    stride = math.ceil(len(ids) / candidates)
    for i, j in due:
        shared = [t for t, experts in enumerate(ids) if i in experts and j in experts]
        if kernel == "cka_rbf":
            shared = [t for t in shared if t % stride == 0][:max_tokens]
        if len(shared) < max(min_tokens, 4):
            continue
        x, y = ([project(outputs[t][expert], head) for t in shared] for expert in (i, j))
        decision = cka(x, y, kernel, "debiased", sigma, mode)
        value = cka(x, y, kernel, estimator, sigma, mode)
        if decision is not None and value is not None and decision.item() >= threshold:
            total = total + value
            fired.append((i, j))
    return total, fired

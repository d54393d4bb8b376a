"""Centred kernel alignment (CKA) of two representations of the same tokens, for several pairs of them at once.

Everything is a pure function of tensors, differentiable, of static shape, and finite whatever it is given: a similarity
that is not defined (too few tokens, constant values) is 0 and carries a gradient of 0.

Shape suffixes: P pairs, N rows (tokens), W width of a representation, M sums of a pair.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Estimator = Literal["biased", "debiased"]
SigmaMode = Literal["median_fraction", "absolute"]

LEAST_TOKENS = 4  # the unbiased estimator divides by n (n - 3)
# Rounding of fp32 values leaves constant outputs a relative variance of about 1e-14; less than this is no variation.
LEAST_VARIATION = 1e-12


class Similarity(NamedTuple):
    """CKA of each pair, 0 where it is not defined, and whether it is."""

    value_P: Tensor
    defined_P: Tensor


def linear_sums(x_PNW: Tensor, y_PNW: Tensor, shared_PN: Tensor) -> Tensor:
    """Returns the sums over tokens [P, M], fp64, that the linear CKA of each pair is a function of.

    They add up over parts of a batch, so the similarity of a whole batch needs no token of another rank. They are fp64
    because sums of fourth powers cancel where the mean of the outputs is large beside their spread.

    Args:
        x_PNW: One representation.
        y_PNW: The other one of the same tokens.
        shared_PN: Which tokens count.
    """
    n_PN1 = shared_PN.unsqueeze(-1).double()
    x, y = x_PNW.double() * n_PN1, y_PNW.double() * n_PN1
    q, r = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    products = [x.mT @ y, x.mT @ x, y.mT @ y]
    vectors = [x, y, x * r, y * q, x * q, y * r]
    numbers = [n_PN1, q * r, q * q, r * r]
    return torch.cat(
        [*(one.flatten(1) for one in products), *(one.sum(1) for one in vectors), *(one.sum(1) for one in numbers)], 1
    )


def cka_linear(sums_PM: Tensor, width: int, estimator: Estimator, min_tokens: int = LEAST_TOKENS) -> Similarity:
    """Returns the CKA with the kernel ``x . y`` in its feature form, without any matrix of tokens by tokens.

    Biased: ``|X'Y|^2 / (|X'X| |Y'Y|)`` of centred X and Y (Frobenius norms). Debiased: the same ratio of unbiased
    estimates of HSIC (Song et al., "Feature selection via dependence maximization", JMLR 2012, eq. 5); it averages 0
    for independent representations and may be negative.

    Source: Kornblith et al., arXiv 1905.00414, eq. 4.

    Args:
        sums_PM: From `linear_sums`, of any number of parts.
        width: W.
        estimator: Which one.
        min_tokens: Shared tokens below which the similarity is not defined.
    """
    w = width
    sizes = [w * w] * 3 + [w] * 6 + [1] * 4
    xy, xx, yy, sx, sy, xr, yq, xq, yr, n, qr, qq, rr = sums_PM.split(sizes, dim=1)
    xy, xx, yy = (one.unflatten(1, (w, w)) for one in (xy, xx, yy))
    n, qr, qq, rr = (one.squeeze(1) for one in (n, qr, qq, rr))
    q, r = (one.diagonal(dim1=1, dim2=2).sum(-1) for one in (xx, yy))
    enough = n >= max(min_tokens, LEAST_TOKENS)
    n = torch.where(enough, n, LEAST_TOKENS)
    varies = _varies(q, sx.square().sum(-1), n) & _varies(r, sy.square().sum(-1), n)
    if estimator == "biased":
        cross = _centred_square(xy, sx, sy, n)
        own = _centred_square(xx, sx, sx, n), _centred_square(yy, sy, sy, n)
    else:
        cross = _feature_hsic(xy, (sx, sy), (xr, yq), (q, r, qr), n)
        own = (
            _feature_hsic(xx, (sx, sx), (xq, xq), (q, q, qq), n),
            _feature_hsic(yy, (sy, sy), (yr, yr), (r, r, rr), n),
        )
    return _ratio(cross, *own, enough & varies)


def cka_rbf(
    x_PNW: Tensor,
    y_PNW: Tensor,
    shared_PN: Tensor,
    estimator: Estimator,
    sigma: float,
    sigma_mode: SigmaMode,
    min_tokens: int = LEAST_TOKENS,
) -> Similarity:
    """Returns the CKA with the kernel ``exp(-|x - y|^2 / (2 sigma^2))`` in its Gram form: N^2 numbers a pair.

    Source: SimSMoE, arXiv 2406.15883; Kornblith et al., arXiv 1905.00414, for sigma as a fraction of the median
    distance. Deviation: the median carries no gradient.

    Args:
        x_PNW: One representation.
        y_PNW: The other one of the same tokens.
        shared_PN: Which rows count.
        estimator: Which one, see `cka_linear`.
        sigma: Width of the kernel.
        sigma_mode: In units of the median distance between two tokens of the same representation, or absolute: the
            similarity then depends on the scale of the outputs, and is near 1 for independent ones of deviation 1.
        min_tokens: Shared tokens below which the similarity is not defined.
    """
    n = shared_PN.sum(1).double()
    enough = n >= max(min_tokens, LEAST_TOKENS)
    n = torch.where(enough, n, LEAST_TOKENS)
    same = torch.eye(shared_PN.shape[1], dtype=torch.bool, device=shared_PN.device)
    both_PNN = shared_PN.unsqueeze(2) & shared_PN.unsqueeze(1)
    grams, varies = [], enough
    for rows_PNW in (x_PNW, y_PNW):
        rows = rows_PNW.double() * shared_PN.unsqueeze(2)
        varies = varies & _varies(rows.square().sum((1, 2)), rows.sum(1).square().sum(-1), n)
        distances = _squared_distances(rows, shared_PN, n).masked_fill(same, 0.0)
        scale = torch.full_like(n, sigma)
        if sigma_mode == "median_fraction":
            median = _median(distances.detach().sqrt(), both_PNN & ~same)
            varies = varies & (median > 0)
            scale = sigma * torch.where(median > 0, median, 1.0)
        grams.append(torch.exp(-distances / (2 * scale.square().view(-1, 1, 1))) * both_PNN)
    form = _biased_hsic if estimator == "biased" else _gram_hsic
    k, k_other = (
        _centred(gram, both_PNN, n) if estimator == "biased" else gram.masked_fill(same, 0.0) for gram in grams
    )
    return _ratio(form(k, k_other, n), form(k, k, n), form(k_other, k_other, n), varies)


def _centred_square(products: Tensor, s: Tensor, t: Tensor, n: Tensor) -> Tensor:
    """The squared Frobenius norm of centred products, from products and sums."""
    return (products - s.unsqueeze(2) * t.unsqueeze(1) / n.view(-1, 1, 1)).square().sum((1, 2))


def _feature_hsic(
    products: Tensor,
    sums: tuple[Tensor, Tensor],
    cubes: tuple[Tensor, Tensor],
    squares: tuple[Tensor, Tensor, Tensor],
    n: Tensor,
) -> Tensor:
    """Unbiased HSIC of linear kernels: X'Y; sums of x, y; of x |y|^2, y |x|^2; of |x|^2, |y|^2, |x|^2 |y|^2."""
    (s, t), (sr, tq), (square_s, square_t, fourth) = sums, cubes, squares
    trace = products.square().sum((1, 2)) - fourth
    through = (torch.einsum("pv,pvw->pw", s, products) * t - s * sr - t * tq).sum(1) + fourth
    return _unbiased_hsic(trace, s.square().sum(1) - square_s, t.square().sum(1) - square_t, through, n)


def _biased_hsic(k: Tensor, k_other: Tensor, n: Tensor) -> Tensor:
    return (k * k_other).sum((1, 2)) / n.square()


def _gram_hsic(k: Tensor, k_other: Tensor, n: Tensor) -> Tensor:
    through = (k.sum(2) * k_other.sum(2)).sum(1)
    return _unbiased_hsic((k * k_other).sum((1, 2)), k.sum((1, 2)), k_other.sum((1, 2)), through, n)


def _unbiased_hsic(trace: Tensor, all_k: Tensor, all_l: Tensor, through: Tensor, n: Tensor) -> Tensor:
    """HSIC from sums over Gram matrices without diagonals: tr(KL), 1'K1, 1'L1 and 1'KL1."""
    pairs = all_k * all_l / ((n - 1) * (n - 2))
    return (trace + pairs - 2 * through / (n - 2)) / (n * (n - 3))


def _ratio(cross: Tensor, own_x: Tensor, own_y: Tensor, defined: Tensor) -> Similarity:
    product = torch.where(own_x > 0, own_x, 0.0) * torch.where(own_y > 0, own_y, 0.0)
    defined = defined & (product > 0)
    # Both branches of a where are differentiated, so the one that is not taken must be harmless too.
    value = torch.where(defined, cross, 0.0) / torch.where(defined, product, 1.0).sqrt()
    return Similarity(value, defined.detach())


def _varies(squares: Tensor, squared_sum: Tensor, n: Tensor) -> Tensor:
    """Whether values differ by more than rounding, from the sum of their squares and the square of their sum."""
    squares, squared_sum = squares.detach(), squared_sum.detach()
    return squares - squared_sum / n > LEAST_VARIATION * squares


def _squared_distances(rows_PNW: Tensor, shared_PN: Tensor, n: Tensor) -> Tensor:
    # Distances do not depend on the origin; a near one keeps their differences exact.
    mean = rows_PNW.detach().sum(1, keepdim=True) / n.view(-1, 1, 1)
    rows = (rows_PNW - mean) * shared_PN.unsqueeze(2)
    squares = rows.square().sum(-1)
    return (squares.unsqueeze(2) + squares.unsqueeze(1) - 2 * rows @ rows.mT).clamp(min=0.0)


def _median(values_PNN: Tensor, counted_PNN: Tensor) -> Tensor:
    """The lower median of the values that count, 0 if there are none."""
    ordered = values_PNN.masked_fill(~counted_PNN, torch.inf).flatten(1).sort(dim=1).values
    count = counted_PNN.sum((1, 2))
    middle = ordered.gather(1, ((count - 1) // 2).clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(count > 0, middle, 0.0)


def _centred(gram_PNN: Tensor, both_PNN: Tensor, n: Tensor) -> Tensor:
    """H K H over the rows that count, 0 elsewhere."""
    mean_PN = gram_PNN.sum(2) / n.unsqueeze(1)
    mean_P = mean_PN.sum(1) / n
    return (gram_PNN - mean_PN.unsqueeze(2) - mean_PN.unsqueeze(1) + mean_P.view(-1, 1, 1)) * both_PNN

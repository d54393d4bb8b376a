"""The order of samples from easy to hard: a pure function of their difficulties and the shuffled order.

Shape suffixes: N samples, L MoE layers, W samples of a window.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

OrderBy = Literal["cosine", "mean_ratio", "l2"]
Indices = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

# Distances that are equal but for the rounding of sums and roots count as equal: then the shuffled order decides.
DECIMALS = 12


def easy_first(complexity_NL: Values, shuffled_N: Indices, by: OrderBy, window_samples: int | None = None) -> Indices:
    """Returns the samples from easy to hard within consecutive windows of the shuffled order: a permutation.

    The complexity of a sample is C = [r_1 .. r_L], r_l the share of its tokens that visited several experts in MoE
    layer l. The reference of a window is its sample with the smallest mean of C, R. Keys, smallest first:

    - ``cosine``: ``1 - C.R / (|C| |R|)``.
    - ``mean_ratio``: ``mean(C)``.
    - ``l2``: ``|C - R|``.

    Equal keys, and equal candidates for R, keep their shuffled order.

    A zero vector has no direction. With ``cosine`` samples without any token that visited several experts come first,
    and R is the easiest of the others. A sample without a record is taken for an average one: its C is the mean of
    those recorded. Without any record the order is the shuffled one.

    Source: arXiv 2310.07188, section on the curriculum, which has ``cosine`` over all data. Own: ``mean_ratio`` and
    ``l2``, windows, what is done with zero vectors, ties and samples without a record; R has the smallest share instead
    of the smallest number of such tokens, the same for samples of equal length.

    Args:
        complexity_NL: Float64 in [0, 1]; rows of NaN where there is no record.
        shuffled_N: A permutation of the samples.
        by: What is compared.
        window_samples: Samples of a window, the last one being shorter; None for one window.
    """
    known_N: npt.NDArray[np.bool_] = np.isfinite(complexity_NL.sum(axis=1))
    if not known_N.any():
        return shuffled_N.copy()
    complexity_NL = np.where(known_N[:, None], complexity_NL, complexity_NL[known_N].mean(axis=0))
    window = window_samples or len(shuffled_N)
    windows = [shuffled_N[start : start + window] for start in range(0, len(shuffled_N), window)]
    return np.concatenate([one_W[np.argsort(_keys(complexity_NL[one_W], by), kind="stable")] for one_W in windows])


def _keys(complexity_WL: Values, by: OrderBy) -> Values:
    mean_W: Values = np.round(complexity_WL.mean(axis=1), DECIMALS)
    if by == "mean_ratio":
        return mean_W
    if by == "l2":
        difference_WL = complexity_WL - complexity_WL[mean_W.argmin()]
        distance_W: Values = np.round(np.linalg.norm(difference_WL, axis=1), DECIMALS)
        return distance_W
    length_W: Values = np.linalg.norm(complexity_WL, axis=1)
    some_W: npt.NDArray[np.bool_] = length_W > 0.0
    if not some_W.any():
        return mean_W
    reference = np.where(some_W, mean_W, np.inf).argmin()
    unit_WL = complexity_WL / np.where(some_W, length_W, 1.0)[:, None]
    angle_W: Values = np.where(some_W, np.round(1.0 - unit_WL @ unit_WL[reference], DECIMALS), -1.0)
    return angle_W


def spread_within_batches(difficulty_N: Values, order: Indices, batch_size: int, first_place: int = 0) -> float:
    """Returns the mean over batches of the standard deviation of difficulty within a batch.

    Args:
        difficulty_N: By sample.
        order: Samples in the order of training.
        batch_size: Samples of a batch.
        first_place: Place of the first sample within its batch; what precedes it there does not count.
    """
    batch = (first_place + np.arange(len(order))) // batch_size
    count = np.bincount(batch)
    values = difficulty_N[order]
    mean = np.bincount(batch, values) / count
    variance = np.bincount(batch, (values - mean[batch]) ** 2) / count
    return float(np.sqrt(variance).mean())


__all__ = ["OrderBy", "easy_first", "spread_within_batches"]

"""The order of samples in an epoch: a pure function of (seed, epoch)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from smoe_train.data.batches.micro_batch import Indices

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MASK_64 = (1 << 64) - 1


def splitmix64(key: int, count: int) -> npt.NDArray[np.uint64]:
    """Returns the first ``count`` outputs of SplitMix64 (Steele, Lea & Flood 2014) seeded with ``key``."""
    steps = np.arange(1, count + 1, dtype=np.uint64)
    z = np.uint64(key & MASK_64) + steps * np.uint64(GOLDEN_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@lru_cache(maxsize=4)  # a batch sees at most two epochs; the rest is for a second loader in the process
def block_order(num_blocks: int, seed: int, epoch: int) -> Indices:
    """Returns the order of the blocks in an epoch: a read-only permutation, int64.

    Blocks are sorted by a hash, ties by their number, so the order depends on nothing but the arguments: no library's
    random generator is involved.
    """
    order = np.argsort(splitmix64(_epoch_key(seed, epoch), num_blocks), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def by_length_in_windows(
    order_N: Indices, lengths_N: Indices, batch_size: int, window_batches: int, seed: int, epoch: int
) -> Indices:
    """Returns the samples of an epoch so that those of a batch are about equally long, and batches come as they fall.

    The epoch's batches are taken in windows of ``window_batches``; the samples of a window are sorted by length (equal
    ones stay in their order) and cut into batches, and these are shuffled within the window. Samples that share their
    batch with the epoch before or after, fewer than a batch at each end, keep their places.

    Args:
        order_N: The shuffled order of the epoch.
        lengths_N: By sample.
        batch_size: Samples of a global batch.
        window_batches: Batches of a window; 1 leaves the order as it is.
        seed: Run seed.
        epoch: Which epoch this is the order of.
    """
    if window_batches == 1:
        return order_N
    start = -epoch * len(order_N) % batch_size  # the epoch's first place in a batch of its own
    num_batches = max(len(order_N) - start, 0) // batch_size
    result = order_N.copy()
    whole = order_N[start : start + num_batches * batch_size]
    window = np.arange(len(whole)) // (batch_size * window_batches)
    batches = whole[np.lexsort((lengths_N[whole], window))].reshape(num_batches, batch_size)
    # The complement keeps these numbers apart from the ones that shuffle the samples.
    hashes = splitmix64(~_epoch_key(seed, epoch), num_batches)
    shuffled = np.lexsort((hashes, np.arange(num_batches) // window_batches))
    result[start : start + len(whole)] = batches[shuffled].reshape(-1)
    result.flags.writeable = False
    return result


def _epoch_key(seed: int, epoch: int) -> int:
    return int(splitmix64(int(splitmix64(seed, 1)[0]) ^ epoch, 1)[0])


__all__ = ["block_order", "by_length_in_windows", "splitmix64"]

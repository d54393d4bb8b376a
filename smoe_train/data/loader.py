"""Batches as a pure function of (seed, step): the position in the data is one integer, the step.

Shape suffixes: B samples of a micro-batch, S tokens of a sample.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smoe_train.data.loader_config import LoaderConfig
from smoe_train.data.tokenizer import TokenArray
from smoe_train.errors import DataError

IGNORED_LABEL = -100
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MASK_64 = (1 << 64) - 1

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds to the model at once.

    Attributes:
        input_ids_BS: int64 token ids; 0 where the mask is False.
        labels_BS: int64, the token that follows each input (already shifted); -100 where there is nothing to predict.
        token_mask_BS: bool, False for padding, which is routed nowhere and counts nowhere.
        sample_index_B: int64, the index of each sample within the step's global batch, whatever the world size; in
            evaluation, within the split.
        block_B: int64, the number of each sample's block in the split: what it is, whatever its place in the order.
    """

    input_ids_BS: Tensor
    labels_BS: Tensor
    token_mask_BS: Tensor
    sample_index_B: Tensor
    block_B: Tensor

    def in_sequences_of(self, length: int) -> MicroBatch:
        """Returns the same tokens as sequences of ``length``, which divides S.

        ``sample_index_B`` then numbers the parts, so that a token's index in the global batch stays what it was.
        """
        parts = self.input_ids_BS.shape[1] // length
        index = torch.arange(parts, device=self.sample_index_B.device)
        return MicroBatch(
            self.input_ids_BS.reshape(-1, length),
            self.labels_BS.reshape(-1, length),
            self.token_mask_BS.reshape(-1, length),
            (self.sample_index_B.unsqueeze(1) * parts + index).reshape(-1),
            self.block_B.repeat_interleave(parts),
        )

    def to(self, device: torch.device | str) -> MicroBatch:
        """Returns the micro-batch on a device; the copy may still be on its way there."""
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    def pin_memory(self) -> MicroBatch:
        """Returns the micro-batch in page-locked memory; torch's DataLoader calls this."""
        return MicroBatch(*(tensor.pin_memory() for tensor in self._tensors()))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, item.name) for item in fields(self)]


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
    key = int(splitmix64(int(splitmix64(seed, 1)[0]) ^ epoch, 1)[0])
    order = np.argsort(splitmix64(key, num_blocks), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


class TrainBatches(Dataset[list[MicroBatch]]):
    """The training batches of one rank; ``batches[step]`` is the list of its micro-batches in that step.

    Block i has the inputs [i*S, (i+1)*S) and, as labels, the same shifted by one; the last (N - 1) mod S tokens of a
    split of N tokens make no block. Sample g = step * global_batch_size + j is block ``g mod num_blocks`` of the order
    of epoch ``g // num_blocks``: every block comes once an epoch, and a batch may span the end of one. Micro-batch m
    of rank r holds j = m*(world*micro) + b*world + r: the samples of a step do not depend on the world size, and those
    next to each other in the order go to different ranks.

    The order of an epoch is `block_order`, unless `orders` holds another one for it (see `steps`).

    Args:
        tokens: The split, 1-D, best a memory map.
        sequence_length: S.
        global_batch_size: Samples a step, over all ranks.
        micro_batch_size: B.
        seed: Decides the order of the blocks.
        rank: This rank's place among those that read different data.
        world_size: Number of those ranks.
        num_workers: Processes that prepare batches ahead; has no influence on their contents.

    Attributes:
        orders: By epoch, orders of the blocks that take the place of the shuffled one.

    Raises:
        DataError: The split has too few tokens for one global batch of different blocks.
    """

    def __init__(
        self,
        tokens: TokenArray,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        assert global_batch_size % (world_size * micro_batch_size) == 0, (
            f"global_batch_size {global_batch_size} is not a multiple of world_size {world_size} * "
            f"micro_batch_size {micro_batch_size}"
        )
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.orders: dict[int, Indices] = {}
        self.num_blocks = (len(tokens) - 1) // sequence_length
        if self.num_blocks < global_batch_size:
            raise DataError(
                f"the training split has {len(tokens):,} tokens, too few for one global batch of {global_batch_size} "
                f"different blocks of {sequence_length} tokens ({global_batch_size * sequence_length + 1:,}); "
                "use more text, a smaller training.global_batch_size, or shorter sequences"
            )

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of this rank in one step."""
        return self.global_batch_size // (self.world_size * self.micro_batch_size)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        """Returns the micro-batches of a step."""
        stride = self.world_size * self.micro_batch_size
        own_B = self.rank + self.world_size * np.arange(self.micro_batch_size, dtype=np.int64)
        return [self._micro_batch(step, m * stride + own_B) for m in range(self.accumulation_steps)]

    def epochs_of(self, step: int) -> range:
        """Returns the epochs that the samples of a step belong to: one, or two where one ends within the step."""
        first = step * self.global_batch_size
        return range(first // self.num_blocks, (first + self.global_batch_size - 1) // self.num_blocks + 1)

    def first_step_of(self, epoch: int) -> int:
        """Returns the first step with a sample of an epoch."""
        return epoch * self.num_blocks // self.global_batch_size

    def order_of(self, epoch: int) -> Indices:
        """Returns the order of the blocks in an epoch."""
        given = self.orders.get(epoch)
        return block_order(self.num_blocks, self.seed, epoch) if given is None else given

    def steps(
        self, first_step: int, last_step: int, next_order: Callable[[int], Indices] | None = None
    ) -> Iterator[list[MicroBatch]]:
        """Yields the micro-batches of each step in [first_step, last_step), prepared ahead by the workers.

        Args:
            first_step: Where to begin.
            last_step: Where to end.
            next_order: Makes the order of an epoch after the first, which is shuffled. It is called when the step
                before the epoch's first step is done, so workers prepare nothing ahead across that point. An epoch
                whose order is in `orders` already, as after a resume in its middle, is not asked for.
        """
        if next_order is None:
            return self._prepared(first_step, last_step)
        return self._ordered_steps(first_step, last_step, next_order)

    def _ordered_steps(
        self, first_step: int, last_step: int, next_order: Callable[[int], Indices]
    ) -> Iterator[list[MicroBatch]]:
        step = first_step
        while step < last_step:
            epochs = self.epochs_of(step)
            self.orders = {epoch: order for epoch, order in self.orders.items() if epoch in epochs}
            for epoch in epochs:
                if epoch > 0 and epoch not in self.orders:
                    self.orders[epoch] = next_order(epoch)
            end = min(self.first_step_of(epochs[-1] + 1), last_step)
            yield from self._prepared(step, end)
            step = end

    def _prepared(self, first_step: int, last_step: int) -> Iterator[list[MicroBatch]]:
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(first_step, last_step),
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            pin_memory=torch.accelerator.is_available(),
            # Without a generator of its own the loader would draw from torch's global one.
            generator=torch.Generator(),
        )
        return iter(loader)

    def _micro_batch(self, step: int, sample_B: Indices) -> MicroBatch:
        epoch_B, place_B = np.divmod(step * self.global_batch_size + sample_B, self.num_blocks)
        block_B = np.empty_like(sample_B)
        for epoch in np.unique(epoch_B):
            here = epoch_B == epoch
            block_B[here] = self.order_of(int(epoch))[place_B[here]]
        positions = block_B[:, None] * self.sequence_length + np.arange(self.sequence_length + 1)
        ids = torch.from_numpy(self.tokens[positions].astype(np.int64))
        return MicroBatch(
            input_ids_BS=ids[:, :-1].contiguous(),
            labels_BS=ids[:, 1:].contiguous(),
            token_mask_BS=torch.ones(len(sample_B), self.sequence_length, dtype=torch.bool),
            sample_index_B=torch.from_numpy(sample_B),
            block_B=torch.from_numpy(block_B),
        )

    def __getstate__(self) -> dict[str, Any]:
        # Workers that are not forked get a pickle. A memory map would be pickled as all its tokens.
        state = dict(self.__dict__)
        tokens = self.tokens
        # The base of a slice of a map is that map; only the whole map can be opened again by its name and offset.
        if isinstance(tokens, np.memmap) and isinstance(getattr(tokens, "base", None), mmap.mmap):
            state["tokens"] = (tokens.filename, tokens.dtype, tokens.offset, tokens.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(state["tokens"], tuple):
            filename, dtype, offset, shape = state["tokens"]
            self.tokens = np.memmap(filename, dtype=dtype, mode="r", offset=offset, shape=shape)


class EvaluationBatches:
    """The micro-batches in which one rank evaluates its share of a split, in order.

    Over all ranks every token but the first is predicted exactly once. Every rank has the same number of
    micro-batches of the same shape, so that ranks stay in lockstep; what lies beyond the end is masked out.

    Args:
        tokens: The split, 1-D.
        sequence_length: S; each block is predicted with no more context than itself.
        micro_batch_size: B.
        rank: This rank's place among those that read different data.
        world_size: Number of those ranks.
        max_tokens: Predict only the first so many.

    Raises:
        DataError: The split has no token to predict.
    """

    def __init__(
        self,
        tokens: TokenArray,
        sequence_length: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        max_tokens: int | None = None,
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        assert max_tokens is None or max_tokens > 0, f"max_tokens is {max_tokens}"
        if len(tokens) < 2:
            raise DataError(f"the split has {len(tokens)} tokens; evaluation needs at least 2, so use more text")
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.predicted_tokens = min(len(tokens) - 1, max_tokens or len(tokens))

    def __len__(self) -> int:
        """Number of micro-batches, the same on every rank."""
        return -(-self.predicted_tokens // (self.sequence_length * self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches."""
        for m in range(len(self)):
            first = (m * self.world_size + self.rank) * self.micro_batch_size
            yield self._micro_batch(first + np.arange(self.micro_batch_size, dtype=np.int64))

    def _micro_batch(self, block_B: Indices) -> MicroBatch:
        positions = block_B[:, None] * self.sequence_length + np.arange(self.sequence_length)
        mask = positions < self.predicted_tokens
        positions[~mask] = 0
        input_ids_BS, labels_BS = (self.tokens[positions + shift].astype(np.int64) for shift in (0, 1))
        input_ids_BS[~mask] = 0
        labels_BS[~mask] = IGNORED_LABEL
        return MicroBatch(
            input_ids_BS=torch.from_numpy(input_ids_BS),
            labels_BS=torch.from_numpy(labels_BS),
            token_mask_BS=torch.from_numpy(mask),
            sample_index_B=torch.from_numpy(block_B),
            block_B=torch.from_numpy(block_B),
        )


def _unchanged(batch: list[MicroBatch]) -> list[MicroBatch]:
    return batch


__all__ = ["IGNORED_LABEL", "EvaluationBatches", "Indices", "LoaderConfig", "MicroBatch", "TrainBatches", "block_order"]

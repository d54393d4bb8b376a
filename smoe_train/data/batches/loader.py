"""Batches as a pure function of (seed, step): the position in the data is one integer, the step.

What a sample is, `samples` and `packing` say; here they are put in order and shared out to ranks. Of an epoch nothing
is held but the order of its samples, 8 bytes each.

Shape suffixes: B samples of a micro-batch, J samples of a step's global batch, S tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from smoe_train.data.batches.block_order import block_order, by_length_in_windows
from smoe_train.data.batches.loader_config import LoaderConfig
from smoe_train.data.batches.micro_batch import IGNORED_LABEL, Indices, MicroBatch
from smoe_train.data.batches.packing import PackedDocuments
from smoe_train.data.batches.samples import FixedBlocks, PaddedExamples, Rows, Samples
from smoe_train.data.source import Offsets
from smoe_train.data.tokenizer import TokenArray
from smoe_train.errors import DataError


class TrainBatches(Dataset[list[MicroBatch]]):
    """The training batches of one rank; ``batches[step]`` is the list of its micro-batches in that step.

    Sample g = step * global_batch_size + j is block ``g mod num_blocks`` of the order of epoch ``g // num_blocks``:
    every block comes once an epoch, and a batch may span the end of one. Micro-batch m of rank r holds
    j = m*(world*micro) + b*world + r: the samples of a step do not depend on the world size, and those next to each
    other in the order go to different ranks.

    The order of an epoch is `block_order`, with `length_window` above 1 `by_length_in_windows` of it, unless `orders`
    holds another one for it (see `steps`).

    Args:
        samples: The training split.
        global_batch_size: Samples a step, over all ranks.
        micro_batch_size: B.
        seed: Decides the order of the blocks.
        rank: This rank's place among those that read different data.
        world_size: Number of those ranks.
        num_workers: Processes that prepare batches ahead; has no influence on their contents.
        length_window: Global batches whose samples are sorted by length before they are cut into batches; 1 for none.

    Attributes:
        orders: By epoch, orders of the blocks that take the place of the shuffled one.

    Raises:
        DataError: The split has too few samples for one global batch of different ones.
    """

    def __init__(
        self,
        samples: Samples,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        length_window: int = 1,
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        assert global_batch_size % (world_size * micro_batch_size) == 0, (
            f"global_batch_size {global_batch_size} is not a multiple of world_size {world_size} * "
            f"micro_batch_size {micro_batch_size}"
        )
        samples.require(global_batch_size)
        self._lengths_N = samples.lengths() if length_window > 1 else None
        assert length_window == 1 or self._lengths_N is not None, "samples of one length have no length_window"
        self.samples = samples
        self.sequence_length = samples.sequence_length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.length_window = length_window
        self.orders: dict[int, Indices] = {}
        self.num_blocks = len(samples)
        self._by_length: dict[int, Indices] = {}

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of this rank in one step."""
        return self.global_batch_size // (self.world_size * self.micro_batch_size)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        """Returns the micro-batches of a step."""
        block_J = self.blocks_of(step)
        width = self.samples.width(block_J)
        num_micro_batches = self.world_size * self.accumulation_steps
        shares = _shares(self.samples.counts(block_J), num_micro_batches)
        index_J = np.arange(self.global_batch_size, dtype=np.int64)
        own_MB = index_J.reshape(self.accumulation_steps, self.micro_batch_size, self.world_size)[..., self.rank]
        return [
            _micro_batch(
                self.samples.read(block_J[index_B], width), index_B, block_J[index_B], shares, self.samples.has_padding
            )
            for index_B in own_MB
        ]

    def blocks_of(self, step: int) -> Indices:
        """Returns the numbers of all samples of a step, over all ranks, int64 [J]."""
        first = step * self.global_batch_size
        epoch_J, place_J = np.divmod(np.arange(first, first + self.global_batch_size), self.num_blocks)
        return np.concatenate([self.order_of(epoch)[place_J[epoch_J == epoch]] for epoch in self.epochs_of(step)])

    def tokens_of(self, step: int) -> int:
        """Returns the number of real tokens of a step, over all ranks."""
        return self.samples.counts(self.blocks_of(step))[0]

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
        if given is not None:
            return given
        shuffled = block_order(self.num_blocks, self.seed, epoch)
        if self._lengths_N is None:
            return shuffled
        if epoch not in self._by_length:
            self._by_length = {one: order for one, order in self._by_length.items() if abs(one - epoch) == 1}
            self._by_length[epoch] = by_length_in_windows(
                shuffled, self._lengths_N, self.global_batch_size, self.length_window, self.seed, epoch
            )
        return self._by_length[epoch]

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
        assert self.length_window == 1, "sorting by length would undo the order that is given"
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


class EvaluationBatches:
    """The micro-batches in which one rank evaluates its share of a split of text, in order.

    Over all ranks every token but the first is predicted exactly once; with documents, every token but the first of
    its document, from that document alone. Every rank has the same number of micro-batches of the same shape, so that
    ranks stay in lockstep; what lies beyond the end is masked out, and only the last micro-batch has such padding.

    Args:
        tokens: The split, 1-D.
        sequence_length: S; each block is predicted with no more context than itself.
        micro_batch_size: B.
        rank: This rank's place among those that read different data.
        world_size: Number of those ranks.
        max_tokens: Evaluate only the first so many.
        document_ends: Where each document ends, strictly ascending token offsets; None takes the split for one text.

    Attributes:
        predicted_tokens: Over all ranks.

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
        document_ends: Offsets | None = None,
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        assert max_tokens is None or max_tokens > 0, f"max_tokens is {max_tokens}"
        if len(tokens) < 2:
            raise DataError(f"the split has {len(tokens)} tokens; evaluation needs at least 2, so use more text")
        self.tokens = tokens
        self.document_ends = document_ends
        self.sequence_length = sequence_length
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self._stop = min(len(tokens) - 1, max_tokens or len(tokens))
        self.predicted_tokens = self._predicted_before(self._stop)
        if not self.predicted_tokens:
            raise DataError(
                f"the first {self._stop:,} tokens of the split are documents of one token each, which leaves nothing "
                "to predict within a document; use longer documents, or packing that ignores them"
            )

    def __len__(self) -> int:
        """Number of micro-batches, the same on every rank."""
        return -(-self._stop // (self.sequence_length * self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches."""
        span = self.world_size * self.micro_batch_size * self.sequence_length  # tokens of one turn of all ranks
        for m in range(len(self)):
            block_B = (m * self.world_size + self.rank) * self.micro_batch_size + np.arange(
                self.micro_batch_size, dtype=np.int64
            )
            stop = min((m + 1) * span, self._stop)
            targets = self._predicted_before(stop) - self._predicted_before(m * span)
            shares = _shares((stop - m * span, targets), self.world_size)
            yield _micro_batch(self._read(block_B), block_B, block_B, shares, m + 1 == len(self))

    def _predicted_before(self, position: int) -> int:
        if self.document_ends is None:
            return position
        return position - int(np.searchsorted(self.document_ends, position, side="right"))

    def _read(self, block_B: Indices) -> Rows:
        positions = block_B[:, None] * self.sequence_length + np.arange(self.sequence_length)
        mask = positions < self._stop
        positions[~mask] = 0
        input_ids_BS, labels_BS = (self.tokens[positions + shift].astype(np.int64) for shift in (0, 1))
        input_ids_BS[~mask] = 0
        labels_BS[~mask] = IGNORED_LABEL
        if self.document_ends is None:
            return Rows(input_ids_BS, labels_BS, mask)
        document_BS, next_BS = (
            np.searchsorted(self.document_ends, positions + shift, side="right") for shift in (0, 1)
        )
        labels_BS[document_BS != next_BS] = IGNORED_LABEL
        document_BS -= document_BS[:, :1].copy()
        document_BS[~mask] = -1
        return Rows(input_ids_BS, labels_BS, mask, document_BS)


class ExampleBatches:
    """The micro-batches in which one rank evaluates its share of labelled examples, short ones first.

    Over all ranks every example comes exactly once; ``block_B`` is its number. Every rank has the same number of
    micro-batches, and those of one turn are equally wide on all ranks; rows that are missing to that are padding alone
    and have ``block_B`` -1.

    Args:
        samples: The examples.
        micro_batch_size: B.
        rank: This rank's place among those that read different data.
        world_size: Number of those ranks.
    """

    def __init__(self, samples: PaddedExamples, micro_batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.samples = samples
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Number of micro-batches, the same on every rank."""
        return -(-len(self.samples) // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yields this rank's micro-batches."""
        order_N = np.argsort(self.samples.lengths(), kind="stable").astype(np.int64)
        turn = self.micro_batch_size * self.world_size
        for m in range(len(self)):
            block_J = order_N[m * turn : (m + 1) * turn]
            shares = _shares(self.samples.counts(block_J), self.world_size)
            index_B = m * turn + self.rank + self.world_size * np.arange(self.micro_batch_size, dtype=np.int64)
            real_B = index_B < len(order_N)
            block_B = np.where(real_B, order_N[np.where(real_B, index_B, 0)], -1)
            # The number of a sample is its index too; rows of padding need one that no sample has.
            sample_B = np.where(real_B, block_B, index_B)
            rows = self.samples.read(block_B, self.samples.width(block_J))
            yield _micro_batch(rows, sample_B, block_B, shares, True)


def _shares(counts: tuple[int, int], num_micro_batches: int) -> tuple[float, float]:
    # Nothing to predict gives a sum of 0, which a divisor of 0 would make NaN.
    tokens, targets = counts
    return tokens / num_micro_batches, max(targets, 1) / num_micro_batches


def _micro_batch(
    rows: Rows, index_B: Indices, block_B: Indices, shares: tuple[float, float], has_padding: bool
) -> MicroBatch:
    tokens, targets = shares
    return MicroBatch(
        input_ids_BS=torch.from_numpy(rows.input_ids_BS),
        labels=torch.from_numpy(rows.labels),
        token_mask_BS=torch.from_numpy(rows.token_mask_BS),
        sample_index_B=torch.from_numpy(np.ascontiguousarray(index_B)),
        block_B=torch.from_numpy(block_B),
        tokens_per_micro_batch=tokens,
        targets_per_micro_batch=targets,
        document_BS=None if rows.document_BS is None else torch.from_numpy(rows.document_BS),
        has_padding=has_padding,
    )


def _unchanged(batch: list[MicroBatch]) -> list[MicroBatch]:
    return batch


__all__ = [
    "IGNORED_LABEL",
    "EvaluationBatches",
    "ExampleBatches",
    "FixedBlocks",
    "Indices",
    "LoaderConfig",
    "MicroBatch",
    "PackedDocuments",
    "PaddedExamples",
    "Samples",
    "TrainBatches",
    "block_order",
]

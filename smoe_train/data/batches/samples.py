"""Kinds of samples: what block number i of a split consists of, and how some of them are put into one tensor.

Shape suffixes: B samples of a micro-batch, J samples of a step's global batch, N samples of a split, S tokens of a
sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from smoe_train.data.batches.memory_map import ReopensMaps
from smoe_train.data.batches.micro_batch import IGNORED_LABEL, Indices
from smoe_train.data.examples import TaskKind
from smoe_train.data.tokenizer import TokenArray
from smoe_train.errors import DataError

MULTIPLE_OF_TOKENS = 8  # widths of padded batches: matrix units want it, and there are fewer different ones


@dataclass(frozen=True)
class Rows:
    """Samples side by side; the fields are those of `MicroBatch`, on the host."""

    input_ids_BS: Indices
    labels: npt.NDArray[Any]
    token_mask_BS: npt.NDArray[np.bool_]
    document_BS: Indices | None = None


class Samples(ReopensMaps, ABC):
    """The samples of one split, numbered from 0; may be read in any order, by any number of processes.

    Attributes:
        sequence_length: Most tokens of a sample.
        has_padding: Whether rows may hold padding.
    """

    sequence_length: int
    has_padding: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def counts(self, block_J: Indices) -> tuple[int, int]:
        """Returns the number of real tokens and of labels in some samples."""

    @abstractmethod
    def read(self, block_B: Indices, width: int) -> Rows:
        """Returns samples, each padded on the right to ``width``."""

    def width(self, block_J: Indices) -> int:
        """Returns the width in which the samples of a global batch are read."""
        return self.sequence_length

    def lengths(self) -> Indices | None:
        """Returns the number of tokens of each sample, int64 [N]; None if all are alike."""
        return None

    def require(self, global_batch_size: int) -> None:
        """Raises DataError if there are not enough for one global batch of different samples."""
        if len(self) < global_batch_size:
            raise DataError(
                f"the training split has {len(self):,} samples, too few for one global batch of {global_batch_size} "
                "different ones; use more data or a smaller training.global_batch_size"
            )


class FixedBlocks(Samples):
    """A text cut into blocks of S tokens.

    Block i has the inputs [i*S, (i+1)*S) and, as labels, the same shifted by one; the last (N - 1) mod S tokens of a
    split of N tokens make no block.

    Args:
        tokens: The split, 1-D, best a memory map.
        sequence_length: S.
    """

    def __init__(self, tokens: TokenArray, sequence_length: int) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        """Number of blocks."""
        return max(len(self.tokens) - 1, 0) // self.sequence_length

    def counts(self, block_J: Indices) -> tuple[int, int]:
        """Returns S tokens and S labels a block."""
        return (len(block_J) * self.sequence_length,) * 2

    def read(self, block_B: Indices, width: int) -> Rows:
        """Returns blocks."""
        positions = block_B[:, None] * width + np.arange(width + 1)
        ids = self.tokens[positions].astype(np.int64)
        return Rows(
            np.ascontiguousarray(ids[:, :-1]),
            np.ascontiguousarray(ids[:, 1:]),
            np.ones((len(block_B), width), dtype=np.bool_),
        )

    def require(self, global_batch_size: int) -> None:
        """Raises DataError if there are not enough for one global batch of different blocks."""
        if len(self) < global_batch_size:
            raise DataError(
                f"the training split has {len(self.tokens):,} tokens, too few for one global batch of "
                f"{global_batch_size} different blocks of {self.sequence_length} tokens "
                f"({global_batch_size * self.sequence_length + 1:,}); "
                "use more text, a smaller training.global_batch_size, or shorter sequences"
            )


class Examples(Protocol):
    """What `PaddedExamples` needs of a split of an `ExampleStore`."""

    @property
    def labels(self) -> npt.NDArray[np.float64]:
        """Class id or number of each, [N]; NaN where it is not published."""

    @property
    def smallest_max_tokens(self) -> int:
        """The shortest length to which an example can be cut."""

    def __len__(self) -> int:
        """Number of examples."""

    def lengths(self, max_tokens: int) -> Indices:
        """Returns the tokens of each example, cut to ``max_tokens``, [N]."""

    def tokens_of(self, row: int, max_tokens: int) -> Indices:
        """Returns the ids of one example, cut to ``max_tokens``."""


class PaddedExamples(Samples):
    """Labelled examples, a row each, padded on the right with 0.

    Rows are as wide as the longest example of the step's global batch, rounded up to a multiple of 8 (at most S): what
    is computed depends neither on the world size nor on the size of a micro-batch.

    Args:
        examples: A split of an example store.
        sequence_length: S, to which longer examples are cut.
        kind: Whether labels are classes or numbers.
        rows: Which examples of the split, in the order of their numbers here; None for all.

    Attributes:
        rows: int64 [N], the row in the split of each sample.

    Raises:
        DataError: S has no room for an example's separators.
    """

    has_padding = True

    def __init__(self, examples: Examples, sequence_length: int, kind: TaskKind, rows: Indices | None = None) -> None:
        if sequence_length < examples.smallest_max_tokens:
            raise DataError(
                f"sequences of {sequence_length} tokens have no room for an example with its separators, which needs "
                f"{examples.smallest_max_tokens} at least; set a larger training.sequence_length"
            )
        self.examples = examples
        self.sequence_length = sequence_length
        self.kind = kind
        self.rows = np.arange(len(examples), dtype=np.int64) if rows is None else np.asarray(rows, dtype=np.int64)
        self._lengths = examples.lengths(sequence_length)[self.rows]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.rows)

    @property
    def labels(self) -> npt.NDArray[np.float64]:
        """Float64 [N], class id or number of each sample; NaN where it is not published."""
        return np.asarray(self.examples.labels)[self.rows]

    def lengths(self) -> Indices:
        """Returns the number of tokens of each example."""
        return self._lengths

    def counts(self, block_J: Indices) -> tuple[int, int]:
        """Returns the tokens of some examples, and one label each."""
        return int(self._lengths[block_J].sum()), len(block_J)

    def width(self, block_J: Indices) -> int:
        """Returns the length of the longest, rounded up."""
        longest = int(self._lengths[block_J].max())
        return min(-(-longest // MULTIPLE_OF_TOKENS) * MULTIPLE_OF_TOKENS, self.sequence_length)

    def read(self, block_B: Indices, width: int) -> Rows:
        """Returns examples; block -1 is a row of padding without a label."""
        ids_BS = np.zeros((len(block_B), width), dtype=np.int64)
        mask_BS = np.zeros((len(block_B), width), dtype=np.bool_)
        labels_B = np.full(len(block_B), np.nan)
        for place, block in enumerate(block_B.tolist()):
            if block >= 0:
                row = int(self.rows[block])
                ids = self.examples.tokens_of(row, self.sequence_length)
                ids_BS[place, : len(ids)] = ids
                mask_BS[place, : len(ids)] = True
                labels_B[place] = self.examples.labels[row]
        if self.kind == "regression":
            return Rows(ids_BS, labels_B.astype(np.float32), mask_BS)
        return Rows(ids_BS, np.nan_to_num(labels_B, nan=IGNORED_LABEL).astype(np.int64), mask_BS)


__all__ = ["Examples", "FixedBlocks", "PaddedExamples", "Rows", "Samples"]

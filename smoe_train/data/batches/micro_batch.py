"""What one rank feeds to the model at once.

Shape suffixes: B samples of a micro-batch, S tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IGNORED_LABEL = -100

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Token ids with what is to be said about them.

    The two divisors are those of the whole step over all ranks, shared out equally among its micro-batches: a sum over
    a micro-batch divided by them is its part of the mean over the step, however unlike the micro-batches are. They
    are known without communication.

    Attributes:
        input_ids_BS: int64 token ids; 0 where the mask is False.
        labels: int64 [B, S], the token that follows each input (already shifted), -100 where there is nothing to
            predict; or int64 [B], a class each, -100 for none; or float32 [B], a number each, NaN for none.
        token_mask_BS: bool, False for padding, which is routed nowhere and counts nowhere.
        sample_index_B: int64, the index of each sample within the step's global batch, whatever the world size; in
            evaluation, within the split.
        block_B: int64, the number of each sample in its split: what it is, whatever its place in the order; -1 for a
            row that is all padding.
        tokens_per_micro_batch: Real tokens of the step over its number of micro-batches on all ranks.
        targets_per_micro_batch: The same of labels.
        document_BS: int64, the number of each token's document within its sample, -1 for padding; a token attends to
            its own document only. None if a sample is one text.
        has_padding: Whether the model must be given the mask: the same on all ranks, unlike the mask's contents.
    """

    input_ids_BS: Tensor
    labels: Tensor
    token_mask_BS: Tensor
    sample_index_B: Tensor
    block_B: Tensor
    tokens_per_micro_batch: float
    targets_per_micro_batch: float
    document_BS: Tensor | None = None
    has_padding: bool = False

    @classmethod
    def full(
        cls, input_ids_BS: Tensor, labels_BS: Tensor, sample_index_B: Tensor, block_B: Tensor | None = None
    ) -> MicroBatch:
        """Returns a micro-batch without padding, with a label at each token, in a step of others like it."""
        return cls(
            input_ids_BS,
            labels_BS,
            torch.ones_like(input_ids_BS, dtype=torch.bool),
            sample_index_B,
            sample_index_B if block_B is None else block_B,
            tokens_per_micro_batch=float(input_ids_BS.numel()),
            targets_per_micro_batch=float(input_ids_BS.numel()),
        )

    def in_sequences_of(self, length: int) -> MicroBatch:
        """Returns the same tokens as sequences of ``length``, which divides S; there must be a label at each token.

        ``sample_index_B`` then numbers the parts, so that a token's index in the global batch stays what it was.
        """
        parts = self.input_ids_BS.shape[1] // length
        index = torch.arange(parts, device=self.sample_index_B.device)
        return replace(
            self,
            input_ids_BS=self.input_ids_BS.reshape(-1, length),
            labels=self.labels.reshape(-1, length),
            token_mask_BS=self.token_mask_BS.reshape(-1, length),
            sample_index_B=(self.sample_index_B.unsqueeze(1) * parts + index).reshape(-1),
            block_B=self.block_B.repeat_interleave(parts),
            document_BS=None if self.document_BS is None else self.document_BS.reshape(-1, length),
        )

    def to(self, device: torch.device | str) -> MicroBatch:
        """Returns the micro-batch on a device; the copy may still be on its way there."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """Returns the micro-batch in page-locked memory; torch's DataLoader calls this."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return MicroBatch(**{**values, **changed})


__all__ = ["IGNORED_LABEL", "Indices", "MicroBatch"]

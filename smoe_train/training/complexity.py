"""How hard each sample was, counted while training on it, and the order of the next epoch that follows from it.

Shape suffixes: N samples (blocks of the training split), L MoE layers, B samples of a micro-batch, S their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from smoe_train.checkpoint import Checkpoint, read_extra
from smoe_train.data.batches.curriculum_order import Indices, easy_first, spread_within_batches
from smoe_train.data.batches.loader import MicroBatch, TrainBatches, block_order
from smoe_train.errors import CheckpointError
from smoe_train.schedules import SampleOrderConfig

SEVERAL = 2  # experts from which on a token counts as hard


class ComplexityRecorder:
    """Counts by sample, in each MoE layer, the tokens that visited several experts.

    Counts are integers that add up over micro-batches and ranks, so they do not depend on how a batch was cut. A table
    has a column for each layer and a last one for the real tokens of the sample.

    Args:
        num_samples: N.
        layers: Indices of the MoE layers.
        device: Where to count; nothing is read from it before `close`.
        sum_over_ranks: Adds a tensor up over the ranks.

    Attributes:
        counts: int32 [N, L + 1], what this rank has seen since the last `close`.
        record: int32 [N, L + 1] on the CPU, the same on every rank: what was last seen of each sample before that.
    """

    def __init__(
        self,
        num_samples: int,
        layers: Sequence[int],
        device: torch.device,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self._layers = tuple(layers)
        self._sum = sum_over_ranks
        self.counts = torch.zeros(num_samples, len(self._layers) + 1, dtype=torch.int32, device=device)
        self.record = torch.zeros(num_samples, len(self._layers) + 1, dtype=torch.int32)

    def add(self, batch: MicroBatch, experts_of_token: Mapping[int, Tensor]) -> None:
        """Takes in one micro-batch, without waiting for the device.

        Args:
            batch: As the loader made it.
            experts_of_token: By layer, how many experts each token visited, 0 for padding; B * S tokens in order, in
                sequences of any length.
        """
        samples = len(batch.block_B)
        columns = [(experts_of_token[layer].view(samples, -1) >= SEVERAL).sum(dim=1) for layer in self._layers]
        columns.append(batch.token_mask_BS.sum(dim=1))
        self.counts.index_add_(0, batch.block_B, torch.stack(columns, dim=1).to(self.counts.dtype))

    def counted(self) -> Tensor:
        """Returns the counts of all ranks since the last `close`, on the CPU; all ranks must call it."""
        return self._sum(self.counts).cpu()

    def close(self) -> None:
        """Makes the counts of all ranks the record of the samples seen, and starts anew; all ranks must call it."""
        counted = self.counted()
        self.record = torch.where(counted[:, -1:] > 0, counted, self.record)
        self.counts.zero_()

    def complexity(self) -> npt.NDArray[np.float64]:
        """Returns the shares of such tokens [N, L] by the record; NaN where a sample has none."""
        record = self.record.numpy().astype(np.float64)
        tokens = np.where(record[:, -1:] > 0, record[:, -1:], np.nan)
        return record[:, :-1] / tokens


class SampleOrder:
    """Orders the samples of each epoch but the first by what was recorded of them.

    An epoch's order is made before the first step that holds one of its samples, from the steps before. Where an epoch
    ends within that step, its last samples, fewer than a global batch, are not recorded yet: they keep their record of
    the epoch before (in the first epoch they have none, see `easy_first`), and what they show in that step counts
    together with their next pass.

    Args:
        config: The recipe's section.
        batches: The training batches of this rank, whose orders this is.
        recorder: Counts of this rank.
        is_first: Whether this is rank 0, which makes the orders.
        from_first: Returns rank 0's object on every rank.
    """

    def __init__(
        self,
        config: SampleOrderConfig,
        batches: TrainBatches,
        recorder: ComplexityRecorder,
        is_first: bool,
        from_first: Callable[[Indices | None], Indices],
    ) -> None:
        self.recorder = recorder
        self.note = ""
        self._config = config
        self._batches = batches
        self._is_first = is_first
        self._from_first = from_first

    def of_epoch(self, epoch: int) -> Indices:
        """Returns the order of an epoch that is about to begin; all ranks must call it.

        One rank makes it: on unlike hosts, floating-point sums might differ in their last bit and the orders with them.
        `note` then says on rank 0 what came of it.
        """
        self.recorder.close()
        return self._from_first(self._make(epoch) if self._is_first else None)

    def _make(self, epoch: int) -> Indices:
        batches = self._batches
        complexity_NL = self.recorder.complexity()
        shuffled = block_order(batches.num_blocks, batches.seed, epoch)
        order = easy_first(complexity_NL, shuffled, self._config.by, self._config.window_samples)
        ratio_N = complexity_NL.mean(axis=1)
        lowest, median, highest = np.nanquantile(ratio_N, (0.0, 0.5, 1.0))
        filled_N = np.nan_to_num(ratio_N, nan=float(np.nanmean(ratio_N)))
        batch_size = batches.global_batch_size
        first_place = epoch * batches.num_blocks % batch_size
        within, at_random = (spread_within_batches(filled_N, one, batch_size, first_place) for one in (order, shuffled))
        self.note = (
            f"epoch {epoch + 1}: samples ordered by {self._config.by}; share of tokens with several experts by sample: "
            f"min {lowest:.4f}, median {median:.4f}, max {highest:.4f}; deviation within a batch {within:.4f} "
            f"({at_random:.4f} if shuffled)"
        )
        return order

    def tensors(self) -> dict[str, Tensor]:
        """Returns what a checkpoint keeps, the same for any number of ranks; all ranks must call it."""
        found = {"record": self.recorder.record, "counted": self.recorder.counted()}
        if self._batches.orders:
            newest = max(self._batches.orders)
            found |= {"order": torch.from_numpy(self._batches.orders[newest]), "epoch": torch.tensor(newest)}
        return {f"sample_order/{name}": tensor for name, tensor in found.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from what `tensors` returned when the checkpoint was written, whatever the number of ranks then.

        Raises:
            CheckpointError: The checkpoint is of other data or another model, or has nothing recorded.
        """
        saved = read_extra(checkpoint, "sample_order/")
        if not saved:
            raise CheckpointError(f"{checkpoint.path}: was written without curriculum.order; start anew to use it")
        for name in ("record", "counted"):
            if saved[name].shape != self.recorder.record.shape:
                raise CheckpointError(
                    f"{checkpoint.path}: {name} of the samples has shape {tuple(saved[name].shape)}, this run needs "
                    f"{tuple(self.recorder.record.shape)}; it is of other data or of another model"
                )
        self.recorder.record = saved["record"]
        if self._is_first:  # the sum over ranks is what it was
            self.recorder.counts.copy_(saved["counted"])
        else:
            self.recorder.counts.zero_()
        # None of an epoch that the run has been in before it was taken back.
        self._batches.orders = {int(saved["epoch"]): saved["order"].numpy()} if "order" in saved else {}


__all__ = ["ComplexityRecorder", "SampleOrder"]

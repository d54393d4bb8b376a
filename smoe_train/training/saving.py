"""Checkpoints of a run that is training: copied between two steps, written while it goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from smoe_train.checkpoint import CheckpointStore, collect
from smoe_train.checkpoint.store import Saved
from smoe_train.errors import RunFailedError
from smoe_train.training.engine import Engine

if TYPE_CHECKING:
    from smoe_train.parallel.process import Process


@dataclass
class Saver:
    """Saves the state of a run together with the other ranks.

    Attributes:
        engine: Holds weights and moments.
        process: This process among its peers.
        store: Where checkpoints go.
        expert_parallel_size: Ranks that share one set of experts.
        tokenizer: Files of the tokenizer, saved with each checkpoint.
        background: Whether training goes on while a checkpoint is written.
        failures_allowed: Saves in a row that may fail before the run ends.
        note: Tells on rank 0 whoever watches.
        best_ended: Told on every rank whether the checkpoint that was to be the best was written.
    """

    engine: Engine
    process: Process
    store: CheckpointStore
    expert_parallel_size: int
    tokenizer: Mapping[str, bytes]
    background: bool = True
    failures_allowed: int = 0
    note: Callable[[str], None] = field(default=lambda text: None)
    best_ended: Callable[[bool], None] = field(default=lambda saved: None)
    failures: int = 0

    def save(self, step: int, state: Mapping[str, Any], extra: Mapping[str, Tensor], best: bool) -> None:
        """Starts to write the state, or a copy of it; all ranks call it between two steps.

        Args:
            step: Optimizer steps taken.
            state: What to store besides tensors, JSON values.
            extra: What else to save, the same on every rank.
            best: Whether it is the best checkpoint so far.

        Raises:
            RunFailedError: Too many saves in a row have failed.
        """
        self.settle()  # of one that takes longer than the steps between two
        # One that is waited for needs no copies: nothing changes before it is on disk.
        copy, process = self.background, self.process
        files = collect(self.engine, process.rank, self.expert_parallel_size, process.device, extra, copy)
        self.store.begin(step, files, state, best, self.tokenizer)
        if not self.background:
            self.settle()

    def advance(self) -> None:
        """Goes on with a save under way, for which no rank is writing any more; all ranks call it between two steps.

        Raises:
            RunFailedError: Too many saves in a row have failed.
        """
        if self.store.saving:
            self._judge(self.store.advance())

    def settle(self, last: bool = False) -> None:
        """Waits until nothing is being saved any more; all ranks call it.

        Args:
            last: Whether no other save follows, so that it must not fail.

        Raises:
            RunFailedError: Too many saves in a row have failed, or the last one.
        """
        saved = self.store.settle()
        if last and saved is not None and saved.problem is not None:
            raise RunFailedError(f"the last checkpoint of the run: {saved.problem}")
        self._judge(saved)
        if last and self.failures:
            raise RunFailedError("the last checkpoint of the run could not be written; see above")

    def _judge(self, saved: Saved | None) -> None:
        if saved is None:
            return
        if saved.best:
            self.best_ended(saved.problem is None)
        if saved.problem is None:
            self.failures = 0
            self.note(f"checkpoint {saved.path}{' (best so far)' if saved.best else ''}")
            if saved.warning is not None:
                self.note(f"warning: {saved.warning}")
            return
        self.failures += 1
        if self.failures > self.failures_allowed:
            in_a_row = f"{self.failures} saves in a row, checkpoint.failures_allowed is {self.failures_allowed}"
            raise RunFailedError(f"{saved.problem} ({in_a_row})")
        if self.process.is_first:
            print(f"warning: {saved.problem}; training goes on, the next save tries again", file=sys.stderr)

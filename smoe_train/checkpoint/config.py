"""The recipe's checkpoint section."""

from __future__ import annotations

from pydantic import Field

from smoe_train.config import StrictModel


class CheckpointConfig(StrictModel):
    """When checkpoints are written and how many stay."""

    every_steps: int = Field(500, ge=1)
    """Optimizer steps between checkpoints; one is also written at the end and when the run is asked to stop."""
    keep_last: int = Field(3, ge=1)
    """How many of the newest checkpoints to keep; the best by validation loss is kept besides."""
    background: bool = True
    """Training waits only until the state is copied to host memory; a thread writes it. Each rank needs memory for the
    copy of what it writes (12 bytes a parameter). If false, training waits until it is on disk, and without ZeRO no
    memory is needed on a CPU. The last checkpoint of a run is always waited for."""
    failures_allowed: int = Field(2, ge=0)
    """How many saves in a row may fail (full disk, lost file system) before the run ends with exit code 1. Training
    goes on with a warning in between, and the next save tries again; earlier checkpoints stay as they were. A run whose
    last save fails ends with exit code 1 in any case."""

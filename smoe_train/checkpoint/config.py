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

"""Options of the loader, apart from it so that reading a recipe does not load torch."""

from __future__ import annotations

from pydantic import Field

from smoe_train.config import StrictModel


class LoaderConfig(StrictModel):
    """How batches are brought to the process that trains; no option changes what they contain."""

    num_workers: int = Field(0, ge=0)
    """Processes that make batches ahead of time, each the next two steps. A batch is a copy out of a memory map (about
    a millisecond), so 0, the training process itself, is rarely slower; workers help where the disk is slow."""

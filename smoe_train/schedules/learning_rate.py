"""Learning rate as a pure function of the step: warm-up, then constant, linear or cosine decay."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from smoe_train.config import StrictModel


class LearningRateConfig(StrictModel):
    """The learning rate over training."""

    peak: float = Field(1e-3, gt=0.0)
    """Highest learning rate."""
    form: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up; step 0 already moves, with peak / warmup_steps."""
    final_fraction: float = Field(0.0, ge=0.0, le=1.0)
    """Learning rate at the end of training as a fraction of the peak; only for cosine and linear."""


def learning_rate(config: LearningRateConfig, step: int, max_steps: int) -> float:
    """Returns the learning rate of an optimizer step, counted from 0.

    The decay reaches ``final_fraction`` at ``max_steps``, one step after the last, so no step is spent at 0.
    """
    if step < config.warmup_steps:
        return config.peak * (step + 1) / config.warmup_steps
    if config.form == "constant":
        return config.peak
    progress = min((step - config.warmup_steps) / max(max_steps - config.warmup_steps, 1), 1.0)
    shape = 1.0 - progress if config.form == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.peak * (config.final_fraction + (1.0 - config.final_fraction) * shape)

"""One place that turns an optimizer step into the knobs of that step; pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from smoe_train.config import StrictModel

TopKForm = Literal[
    "linear_increase",
    "cosine_increase",
    "exponential_increase",
    "multi_step_increase",
    "linear_decrease",
    "cosine_decrease",
    "exponential_decrease",
    "multi_step_decrease",
]

EXPONENTIAL_DECAY = 0.99
EXPONENTIAL_STAGES = 300
MULTI_STEPS = 5
LARGEST_MULTI_STEP = 2 ** (MULTI_STEPS - 1)


class TopKScheduleConfig(StrictModel):
    """How the number of experts a token changes over training (SMoE-Dropout 2303.01610, HyperRouter 2312.07035)."""

    form: TopKForm = "linear_increase"
    """Shape of the change; ``*_increase`` goes from ``low`` to ``high``, ``*_decrease`` from ``high`` to ``low``. As in
    the released code, ``exponential`` stops 5 % short of its goal, and ``multi_step`` goes through 1, 2, 4, 8, 16."""
    low: int = Field(ge=1)
    """Fewest experts a token."""
    high: int = Field(ge=1)
    """Most experts a token."""
    steps: int | None = Field(None, ge=1)
    """Steps that the change takes; training.max_steps if not given. Afterwards the last value stays."""


class CurriculumConfig(StrictModel):
    """What changes over training."""

    top_k: TopKScheduleConfig | None = None
    """Schedule of the experts a token in training; without it, model.moe.top_k throughout. Evaluation and inference
    use model.moe.top_k in either case."""


@dataclass(frozen=True)
class Knobs:
    """What one optimizer step is run with, the same on every rank and in every micro-batch.

    Attributes:
        step: Optimizer step, counted from 0.
        top_k: Experts a token.
    """

    step: int
    top_k: int


@dataclass(frozen=True)
class Curriculum:
    """Maps steps to knobs.

    Attributes:
        config: The recipe's section.
        top_k: Experts a token where no schedule says otherwise.
        max_steps: Length of training, the default length of schedules.
    """

    config: CurriculumConfig
    top_k: int
    max_steps: int

    def knobs(self, step: int) -> Knobs:
        """Returns the knobs of an optimizer step."""
        schedule = self.config.top_k
        if schedule is None:
            return Knobs(step, self.top_k)
        return Knobs(step, top_k_at(schedule, step, schedule.steps or self.max_steps))

    def top_k_values(self) -> frozenset[int]:
        """Returns every k that training will use."""
        schedule = self.config.top_k
        if schedule is None:
            return frozenset({self.top_k})
        length = schedule.steps or self.max_steps
        values = {self.knobs(0).top_k}

        def add_between(first: int, last: int) -> None:
            # k never turns back, so between two steps with the same k there is no other.
            before, after = (top_k_at(schedule, step, length) for step in (first, last))
            values.add(after)
            if before != after and last - first > 1:
                middle = (first + last) // 2
                add_between(first, middle)
                add_between(middle, last)

        add_between(0, min(length, self.max_steps - 1))
        return frozenset(values)


def top_k_at(schedule: TopKScheduleConfig, step: int, steps: int) -> int:
    """Returns k at a step, with 0 <= step; from ``steps`` on it is the final value.

    The increasing forms are those of the released code of SMoE-Dropout and HyperRouter, with t = step / steps:
    ``round((high - low) t) + low``, ``round((low - high) cos(pi t / 2)) + high``,
    ``round((low - high) 0.99^stage) + high`` over 300 stages, and powers of two from 1 in 5 equal parts, clipped to
    [low, high]. Rounding is to even, as Python's. Decreasing forms mirror them in time.
    """
    form, _, direction = schedule.form.rpartition("_")
    low, high = schedule.low, schedule.high
    position = min(step, steps)
    if direction == "decrease":
        position = steps - position
    if form == "linear":
        value = round((high - low) * position / steps) + low
    elif form == "cosine":
        value = round((low - high) * math.cos(math.pi * position / (2 * steps))) + high
    elif form == "exponential":
        stage = position * EXPONENTIAL_STAGES // steps
        value = round((low - high) * EXPONENTIAL_DECAY**stage) + high
    else:
        value = int(2 ** min(MULTI_STEPS * position // steps, MULTI_STEPS - 1))
    return min(max(value, low), high)

"""One place that turns an optimizer step into the knobs of that step; pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from smoe_train.config import StrictModel
from smoe_train.schedules.competition import CompetitionConfig, CompetitionSchedule

# The step of a pass outside training: every schedule has ended, a policy of several stages is in its last.
AFTER_TRAINING = 2**62

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
    low: int = Field(ge=1, le=4096)
    """Fewest experts a token."""
    high: int = Field(ge=1, le=4096)
    """Most experts a token."""
    steps: int | None = Field(None, ge=1)
    """Steps that the change takes; training.max_steps if not given. Afterwards the last value stays."""


class ValueScheduleConfig(StrictModel):
    """How a number changes over training."""

    form: Literal["linear", "cosine", "exponential"] = "linear"
    """Shape of the way from ``first`` to ``last``; ``exponential`` multiplies by the same factor at every step."""
    first: float
    """Value until ``start_step``."""
    last: float
    """Value after the change."""
    start_step: int = Field(0, ge=0)
    """First step of the change."""
    steps: int | None = Field(None, ge=1)
    """Steps that the change takes; until training.max_steps if not given."""


class SequenceLengthConfig(StrictModel):
    """Short sequences first (Shortformer, arXiv 2012.15832): a training sequence is cut into equal parts at first."""

    low: int = Field(ge=1)
    """Length at the start; training.sequence_length must be ``low`` times a power of two. The length doubles at equal
    intervals. The tokens of a step stay the same: none is left out, each part is a sequence of its own."""
    steps: int = Field(ge=1)
    """Steps until the full length is reached."""


class SampleOrderConfig(StrictModel):
    """Samples of similar difficulty together, easy ones first (adaptive gating, arXiv 2310.07188).

    The difficulty of a sample is, layer by layer, the share of its tokens that visited more than one expert when it was
    last trained on. The first epoch is shuffled as without this section; each later one is re-ordered as it begins.
    """

    by: Literal["cosine", "mean_ratio", "l2"] = "cosine"
    """``cosine``: most similar in direction to the easiest sample first, as the paper has it; a hard sample whose
    layers are equally hard passes for easy. ``mean_ratio`` (recommended): lowest mean share over the layers first.
    ``l2``: smallest Euclidean distance to the easiest sample first."""
    window_samples: int | None = Field(None, ge=2)
    """Order only within consecutive windows of so many samples of the shuffled epoch, each from easy to hard, so that
    difficulty does not rise over a whole epoch; null for one window, the epoch."""


class CurriculumConfig(StrictModel):
    """What changes over training."""

    top_k: TopKScheduleConfig | None = None
    """Schedule of the experts a token in training; without it, model.moe.top_k throughout. Evaluation and inference
    use model.moe.top_k in either case."""
    threshold: ValueScheduleConfig | None = None
    """Schedule of the threshold of adaptive gating; without it, the router's own option throughout."""
    competition: CompetitionConfig | None = None
    """When experts compete; only with the router compete_smoe, whose default is this section's defaults."""
    loss_weights: dict[str, ValueScheduleConfig] = Field(default_factory=dict)
    """By name of an auxiliary loss, a factor on its coefficient."""
    sequence_length: SequenceLengthConfig | None = None
    """Shorter training sequences at first; without it, training.sequence_length throughout."""
    order: SampleOrderConfig | None = None
    """Re-orders the samples by difficulty before each epoch but the first; only with routers that give tokens different
    numbers of experts. Without it, every epoch is shuffled."""


@dataclass(frozen=True)
class Knobs:
    """What one optimizer step is run with, the same on every rank and in every micro-batch.

    Attributes:
        step: Optimizer step, counted from 0.
        top_k: Experts a token.
        threshold: Threshold of adaptive gating; None leaves the router's option.
        competing_layers: Layers whose experts compete.
        loss_weights: Factors on the coefficients of auxiliary losses; 1 where none is given.
        sequence_length: Tokens of a training sequence; None leaves them as they are.
    """

    step: int
    top_k: int
    threshold: float | None = None
    competing_layers: frozenset[int] = frozenset()
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    sequence_length: int | None = None


@dataclass(frozen=True)
class Curriculum:
    """Maps steps to knobs.

    Attributes:
        config: The recipe's section.
        top_k: Experts a token where no schedule says otherwise.
        max_steps: Length of training, the default length of schedules.
        sequence_length: Full length of a training sequence.
        competition: When experts compete; None if they never do.
    """

    config: CurriculumConfig
    top_k: int
    max_steps: int
    sequence_length: int
    competition: CompetitionSchedule | None = None

    def knobs(self, step: int) -> Knobs:
        """Returns the knobs of an optimizer step."""
        config, schedule = self.config, self.config.top_k
        length = config.sequence_length
        return Knobs(
            step=step,
            top_k=self.top_k if schedule is None else top_k_at(schedule, step, schedule.steps or self.max_steps),
            threshold=self._threshold(step),
            competing_layers=self.competition.competing(step) if self.competition is not None else frozenset(),
            loss_weights={name: value_at(one, step, self.max_steps) for name, one in config.loss_weights.items()},
            sequence_length=None if length is None else sequence_length_at(length, step, self.sequence_length),
        )

    def evaluation_knobs(self, step: int, top_k: int | None = None) -> Knobs:
        """Returns the knobs of a pass without training after ``step`` optimizer steps."""
        return Knobs(step=step, top_k=self.top_k if top_k is None else top_k, threshold=self._threshold(step))

    def outline(self) -> list[dict[str, float]]:
        """Returns the scheduled knobs by name at the first step, about each quarter of training, and the last step."""
        rows: list[dict[str, float]] = []
        for step in sorted({(self.max_steps - 1) * quarter // 4 for quarter in range(5)}):
            knobs = self.knobs(step)
            row: dict[str, float] = {} if self.config.top_k is None else {"top_k": knobs.top_k}
            if knobs.threshold is not None:
                row["threshold"] = knobs.threshold
            if knobs.sequence_length is not None:
                row["sequence_length"] = knobs.sequence_length
            row |= {f"loss_weights.{name}": factor for name, factor in knobs.loss_weights.items()}
            rows.append({"step": step, **row})
        return rows if len(rows[0]) > 1 else []

    def _threshold(self, step: int) -> float | None:
        schedule = self.config.threshold
        return None if schedule is None else value_at(schedule, step, self.max_steps)

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


def value_at(schedule: ValueScheduleConfig, step: int, max_steps: int) -> float:
    """Returns a scheduled number at a step; from the end of the change on it is ``last``, to the bit."""
    steps = schedule.steps or max(max_steps - schedule.start_step, 1)
    share = min(max((step - schedule.start_step) / steps, 0.0), 1.0)
    if share in (0.0, 1.0):
        return schedule.last if share else schedule.first
    if schedule.form == "exponential":
        return float(schedule.first * (schedule.last / schedule.first) ** share)
    if schedule.form == "cosine":
        share = (1.0 - math.cos(math.pi * share)) / 2.0
    return schedule.first + (schedule.last - schedule.first) * share


def sequence_length_at(schedule: SequenceLengthConfig, step: int, full: int) -> int:
    """Returns the length of training sequences at a step: ``low`` doubled at equal intervals up to ``full``."""
    doublings = (full // schedule.low).bit_length() - 1
    return min(schedule.low << (min(step, schedule.steps) * doublings // schedule.steps), full)

"""Schedules: pure functions from an optimizer step to what that step is run with."""

from smoe_train.schedules.competition import CompetitionConfig, CompetitionSchedule
from smoe_train.schedules.curriculum import (
    AFTER_TRAINING,
    Curriculum,
    CurriculumConfig,
    Knobs,
    SampleOrderConfig,
    SequenceLengthConfig,
    TopKScheduleConfig,
    ValueScheduleConfig,
    sequence_length_at,
    top_k_at,
    value_at,
)
from smoe_train.schedules.learning_rate import LearningRateConfig, learning_rate

__all__ = [
    "AFTER_TRAINING",
    "CompetitionConfig",
    "CompetitionSchedule",
    "Curriculum",
    "CurriculumConfig",
    "Knobs",
    "LearningRateConfig",
    "SampleOrderConfig",
    "SequenceLengthConfig",
    "TopKScheduleConfig",
    "ValueScheduleConfig",
    "learning_rate",
    "sequence_length_at",
    "top_k_at",
    "value_at",
]

"""Schedules: pure functions from an optimizer step to what that step is run with."""

from smoe_train.schedules.curriculum import Curriculum, CurriculumConfig, Knobs, TopKScheduleConfig, top_k_at
from smoe_train.schedules.learning_rate import LearningRateConfig, learning_rate

__all__ = [
    "Curriculum",
    "CurriculumConfig",
    "Knobs",
    "LearningRateConfig",
    "TopKScheduleConfig",
    "learning_rate",
    "top_k_at",
]

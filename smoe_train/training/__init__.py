"""Training: the loop, the engine of one process, optimizer groups, objectives and state."""

from smoe_train.training.config import EvaluationConfig, OptimizerConfig, TrainingConfig

__all__ = ["EvaluationConfig", "OptimizerConfig", "TrainingConfig"]

"""Evaluation: language-model scores over whole splits, metrics of downstream tasks."""

from smoe_train.evaluation.classification import ClassifierScore, evaluate_classifier
from smoe_train.evaluation.language_model import (
    LanguageModelScore,
    StatSums,
    TextFigures,
    add_stats,
    evaluate_language_model,
)

__all__ = [
    "ClassifierScore",
    "LanguageModelScore",
    "StatSums",
    "TextFigures",
    "add_stats",
    "evaluate_classifier",
    "evaluate_language_model",
]

"""Evaluation: language-model scores over whole splits, and text generation."""

from smoe_train.evaluation.language_model import (
    LanguageModelScore,
    StatSums,
    add_stats,
    evaluate_language_model,
)

__all__ = ["LanguageModelScore", "StatSums", "add_stats", "evaluate_language_model"]

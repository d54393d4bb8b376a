"""The metrics of GLUE from their definitions, by loops over Python numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

Values = Sequence[float]


def accuracy(labels: Values, predictions: Values) -> float:
    return sum(1 for y, p in zip(labels, predictions, strict=True) if y == p) / len(labels)


def f1(labels: Values, predictions: Values) -> float:
    """2 * precision * recall / (precision + recall) of class 1; 0 where any of them is undefined."""
    found = sum(1 for p in predictions if p == 1)
    there = sum(1 for y in labels if y == 1)
    right = sum(1 for y, p in zip(labels, predictions, strict=True) if y == p == 1)
    if right == 0:
        return 0.0
    precision, recall = right / found, right / there
    return 2 * precision * recall / (precision + recall)


def matthews(labels: Values, predictions: Values) -> float:
    """Gorodkin's R_K: the correlation of one-hot vectors, summed over the classes."""
    classes = sorted({*labels, *predictions})

    def covariance(a: Values, b: Values) -> float:
        total = 0.0
        for one in classes:
            hot_a, hot_b = [float(x == one) for x in a], [float(x == one) for x in b]
            mean_a, mean_b = sum(hot_a) / len(a), sum(hot_b) / len(b)
            total += sum((x - mean_a) * (y - mean_b) for x, y in zip(hot_a, hot_b, strict=True))
        return total

    spread = covariance(labels, labels) * covariance(predictions, predictions)
    return covariance(labels, predictions) / math.sqrt(spread) if spread > 1e-12 else 0.0


def pearson(labels: Values, predictions: Values) -> float:
    mean_y, mean_p = math.fsum(labels) / len(labels), math.fsum(predictions) / len(predictions)
    both = math.fsum((y - mean_y) * (p - mean_p) for y, p in zip(labels, predictions, strict=True))
    spread = math.fsum((y - mean_y) ** 2 for y in labels) * math.fsum((p - mean_p) ** 2 for p in predictions)
    return both / math.sqrt(spread) if spread > 1e-12 else 0.0


def spearman(labels: Values, predictions: Values) -> float:
    return pearson(_ranks(labels), _ranks(predictions))


def _ranks(values: Values) -> list[float]:
    """The places from 1 of the sorted values; equal ones share the mean of theirs."""
    return [sum(1 for b in values if b < a) + (sum(1 for b in values if b == a) + 1) / 2 for a in values]


NAIVE = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}

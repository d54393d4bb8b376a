"""The metrics of GLUE, and what a model that never looks at its input would score."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from smoe_train.data.examples import Metric, TaskInfo
from smoe_train.errors import DataError

Numbers = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int64]

logger = logging.getLogger("smoe_train")


def compute_metrics(task: TaskInfo, labels: Numbers, predictions: Numbers) -> dict[str, float]:
    """Returns the task's metrics by name, in its order; every one is a finite number.

    They are what GLUE's evaluation computes (arXiv 1804.07461, section 3): ``accuracy``; ``f1`` of class 1 alone;
    ``matthews`` (over all classes where there are more than two, Gorodkin 2004); ``pearson`` and ``spearman``, with
    average ranks for ties.

    Three figures are undefined where there is nothing to correlate or to find. Each is then 0 and logged as a warning:
    ``matthews`` if labels or predictions are all of one class, and ``f1`` if neither has class 1, both as in
    scikit-learn; ``pearson`` and ``spearman`` if labels or predictions are constant, for which SciPy, and so GLUE's
    code, gives NaN. A constant predicts nothing of the order, and a NaN could be neither averaged nor written as JSON.

    Args:
        task: Says which metrics.
        labels: [N], class ids or numbers.
        predictions: [N], of the same kind, finite.

    Raises:
        DataError: There are no examples, or ``f1`` is asked for with more classes than two.
    """
    found = _compute(task, labels, predictions)
    for name, (_, undefined) in found.items():
        if undefined:
            logger.warning("%s: %s is undefined, as %s, and counts as 0", task.name, name, undefined)
    return {name: value for name, (value, _) in found.items()}


def task_score(metrics: Mapping[str, float]) -> float:
    """Returns the mean of a task's metrics: the one figure that GLUE ranks by, and that chooses checkpoints."""
    return math.fsum(metrics.values()) / len(metrics)


def constant_prediction(task: TaskInfo, train_labels: Numbers) -> float:
    """Returns the best guess without looking: the commonest class of the training split, or the mean of its numbers.

    Of classes that are equally common, the one with the lowest id.
    """
    if task.kind == "regression":
        return float(np.mean(train_labels))
    return float(np.argmax(np.bincount(train_labels.astype(np.int64), minlength=len(task.labels))))


def constant_baseline(task: TaskInfo, train_labels: Numbers, labels: Numbers) -> dict[str, float]:
    """Returns what `constant_prediction` scores on a split, by metric; its correlations are 0."""
    constant = np.full(len(labels), constant_prediction(task, train_labels))
    return {name: value for name, (value, _) in _compute(task, labels, constant).items()}


def _compute(task: TaskInfo, labels: Numbers, predictions: Numbers) -> dict[str, tuple[float, str]]:
    """Returns each metric, and why it is undefined if it is."""
    assert labels.shape == predictions.shape, f"{labels.shape} labels, {predictions.shape} predictions"
    assert np.isfinite(labels).all(), "a label is not a number"
    assert np.isfinite(predictions).all(), "a prediction is not a number"
    if len(labels) == 0:
        raise DataError(f"task {task.name}: there are no labelled examples to measure on")
    if "f1" in task.metrics and len(task.labels) != 2:
        raise DataError(
            f"task {task.name}: the metric f1 is that of class 1 of two, and this task has {len(task.labels)} classes; "
            "use accuracy or matthews"
        )
    if task.kind == "classification":
        return {name: _OF_CLASSES[name](labels.astype(np.int64), predictions.astype(np.int64)) for name in task.metrics}
    return {name: _correlation(name, labels, predictions) for name in task.metrics}


def _accuracy(labels: Classes, predictions: Classes) -> tuple[float, str]:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions)), ""


def _f1(labels: Classes, predictions: Classes) -> tuple[float, str]:
    from sklearn.metrics import f1_score

    there = (labels == 1).any() or (predictions == 1).any()
    value = float(f1_score(labels, predictions, pos_label=1, zero_division=0.0))
    return value, "" if there else "neither labels nor predictions have class 1"


def _matthews(labels: Classes, predictions: Classes) -> tuple[float, str]:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that there is a single label, as is logged
        value = float(matthews_corrcoef(labels, predictions))
    constant = _constant(labels) or _constant(predictions)
    return value, "labels or predictions are all of one class" if constant else ""


def _correlation(name: Metric, labels: Numbers, predictions: Numbers) -> tuple[float, str]:
    from scipy import stats

    if _constant(labels) or _constant(predictions):
        return 0.0, "labels or predictions are constant"
    with warnings.catch_warnings():
        # What is constant but for rounding has a value in GLUE's code too, if a doubtful one.
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        value = float({"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name](predictions, labels)[0])
    return (0.0, "the numbers are too large") if math.isnan(value) else (value, "")


def _constant(values: Numbers | Classes) -> bool:
    return bool((values == values[0]).all())


_OF_CLASSES: dict[Metric, Callable[[Classes, Classes], tuple[float, str]]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
}

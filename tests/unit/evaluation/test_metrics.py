"""GLUE's metrics against their definitions, hand computations and published figures."""

import json
import logging

import numpy as np
import pytest
import sklearn.metrics  # noqa: F401 - here, so that no test waits for it
from hypothesis import given, settings
from hypothesis import strategies as st
from support.naive_metrics import NAIVE

from smoe_train.data.examples import TaskInfo
from smoe_train.errors import DataError
from smoe_train.evaluation.metrics import compute_metrics, constant_baseline, constant_prediction, task_score

BINARY = TaskInfo("mrpc", "classification", ("0", "1"), ("accuracy", "f1", "matthews"))
SEVERAL = TaskInfo("banking77", "classification", tuple("abcde"), ("accuracy", "matthews"))
NUMBERS = TaskInfo("stsb", "regression", (), ("pearson", "spearman"), 0.0, 5.0)

# Eighths: numbers with many ties whose spread is never lost to rounding.
number = st.integers(-40, 80).map(lambda eighths: eighths / 8)


def pairs(value):
    return st.lists(st.tuples(value, value), min_size=1, max_size=40)


def agree(task, rows):
    labels, predictions = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    found = compute_metrics(task, labels, predictions)
    expected = {name: NAIVE[name](labels.tolist(), predictions.tolist()) for name in task.metrics}
    assert found == pytest.approx(expected, abs=1e-9)
    assert list(found) == list(task.metrics)
    json.dumps(found, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(rows=pairs(st.integers(0, 1)))
def test_two_classes(rows):
    agree(BINARY, rows)


@settings(max_examples=60, deadline=None)
@given(rows=pairs(st.integers(0, 4)))
def test_several_classes(rows):
    agree(SEVERAL, rows)


@settings(max_examples=60, deadline=None)
@given(rows=pairs(number))
def test_numbers(rows):
    agree(NUMBERS, rows)


def figures(task, labels, predictions):
    return compute_metrics(task, np.array(labels, dtype=np.float64), np.array(predictions, dtype=np.float64))


def test_by_hand():
    """3 true positives, 1 false positive, 2 false negatives, 4 true negatives."""
    found = figures(BINARY, [1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    assert found["accuracy"] == pytest.approx(7 / 10)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert found["matthews"] == pytest.approx((3 * 4 - 1 * 2) / (4 * 5 * 5 * 6) ** 0.5)
    assert task_score(found) == pytest.approx(sum(found.values()) / 3)
    # Deviations -1 0 1 and -1 2 -1 over 1 2 3 and 1 4 1; ranks 1 2 3 and 1.5 3 1.5.
    assert figures(NUMBERS, [1, 2, 3], [1, 4, 1]) == pytest.approx({"pearson": 0.0, "spearman": 0.0}, abs=1e-12)
    # Three times the deviations: -4 -1 5 and -16 -10 26.
    found = figures(NUMBERS, [1, 2, 4], [2, 4, 16])
    assert found == pytest.approx({"pearson": 204 / (42 * 1032) ** 0.5, "spearman": 1.0})


def test_the_majority_of_mrpc_scores_what_papers_print():
    """Of MRPC's 408 dev pairs 279 are paraphrases: accuracy 68.4, F1 81.2."""
    labels = np.array([1.0] * 279 + [0.0] * 129)
    found = constant_baseline(BINARY, np.array([1.0, 1.0, 0.0]), labels)
    assert {name: round(100 * value, 1) for name, value in found.items()} == {
        "accuracy": 68.4,
        "f1": 81.2,
        "matthews": 0.0,
    }


@pytest.mark.parametrize(
    ("task", "labels", "predictions", "expected"),
    [
        (BINARY, [0, 0, 1], [1, 1, 1], {"matthews"}),
        (BINARY, [1, 1, 1], [1, 1, 1], {"matthews"}),
        (BINARY, [0, 0, 0], [0, 0, 0], {"matthews", "f1"}),
        (BINARY, [1], [1], {"matthews"}),
        (NUMBERS, [1, 2, 3], [2.5, 2.5, 2.5], {"pearson", "spearman"}),
        (NUMBERS, [2, 2, 2], [1, 2, 3], {"pearson", "spearman"}),
        (NUMBERS, [2], [3], {"pearson", "spearman"}),
        (NUMBERS, [1, 2, 3], [1e308, 1e308, -1e308], {"pearson"}),
    ],
)
def test_what_is_undefined_is_0_and_said(task, labels, predictions, expected, caplog, recwarn):
    caplog.set_level(logging.WARNING, logger="smoe_train")
    found = figures(task, labels, predictions)
    assert {name for name in expected if found[name] != 0.0} == set()
    said = {record.getMessage().split(": ")[1].split()[0] for record in caplog.records}
    assert said == expected
    assert [str(one.message) for one in recwarn if "RuntimeWarning" not in str(one.category)] == []


def test_what_is_defined_is_said_by_nobody(caplog):
    figures(BINARY, [0, 1, 1], [0, 1, 0])
    figures(NUMBERS, [0, 1, 1], [0, 1, 0])
    assert caplog.records == []


def test_the_constant_comes_from_the_training_labels(caplog):
    assert constant_prediction(SEVERAL, np.array([3.0, 1.0, 3.0, 0.0])) == 3.0
    assert constant_prediction(SEVERAL, np.array([4.0, 2.0, 2.0, 4.0])) == 2.0, "the lowest of those as common"
    assert constant_prediction(NUMBERS, np.array([1.0, 2.0, 4.5])) == 2.5
    assert constant_baseline(NUMBERS, np.array([1.0]), np.array([1.0, 5.0])) == {"pearson": 0.0, "spearman": 0.0}
    assert constant_baseline(SEVERAL, np.array([3.0]), np.array([3.0, 3.0, 3.0, 1.0])) == {
        "accuracy": 0.75,
        "matthews": 0.0,
    }
    assert caplog.records == [], "that a constant correlates with nothing need not be said"


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (BINARY, 0, "task mrpc: there are no labelled examples"),
        (TaskInfo("mine", "classification", tuple("abc"), ("f1",)), 3, "this task has 3 classes; use accuracy"),
    ],
)
def test_mistakes(task, rows, message):
    with pytest.raises(DataError, match=message):
        figures(task, [1] * rows, [1] * rows)

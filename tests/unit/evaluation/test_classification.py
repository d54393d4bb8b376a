"""Scores of a classifier over a split, against loops over single examples; ranks are threads that meet in the sum."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from smoe_train.data.examples import TaskInfo
from smoe_train.errors import RunFailedError
from smoe_train.evaluation.classification import evaluate_classifier
from smoe_train.schedules import Knobs

CPU = torch.device("cpu")
CLASSES = TaskInfo("rte", "classification", ("entailment", "not_entailment", "other"), ("accuracy", "matthews"))
NUMBER = TaskInfo("stsb", "regression", (), ("pearson", "spearman"), 0.0, 5.0)
COUNT = 13
IDS = np.random.default_rng(0).integers(1, 30, (COUNT, 6))
LABELS = np.random.default_rng(1).integers(0, 3, COUNT).astype(np.float64)


class FakeModel(nn.Module):
    """Outputs depend on the tokens of the example and on k; what is padding answers with something absurd."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.calls = outputs, 0

    def forward(self, input_ids, attention_mask, knobs, sample_index, use_cache):
        assert not use_cache
        assert not self.training
        self.calls += 1
        angle_BC = input_ids.sum(dim=1, keepdim=True) * torch.arange(1.0, self.outputs + 1) * knobs.top_k
        logits_BC = torch.where(attention_mask.any(dim=1, keepdim=True), 3.0 * torch.sin(angle_BC), math.nan)
        return SimpleNamespace(logits=logits_BC, routing_stats={1: {"tokens": attention_mask.sum()}})


def batches(rank=0, world_size=1, size=4, count=COUNT):
    for start in range(rank * size, -(-count // (size * world_size)) * size * world_size, size * world_size):
        place_B = torch.arange(start, start + size)
        real_B = place_B < count
        ids_BS = torch.from_numpy(IDS[place_B.clamp(max=count - 1)]) * real_B.unsqueeze(1)
        batch = SimpleNamespace(
            input_ids_BS=ids_BS,
            token_mask_BS=ids_BS > 0,
            sample_index_B=place_B,
            block_B=torch.where(real_B, place_B, -1),
        )
        batch.to = lambda device, batch=batch: batch
        yield batch


def expected(outputs, top_k):
    """Logits of one example after the other."""
    rows = [int(row.sum()) for row in IDS]
    return [[3.0 * math.sin(total * (c + 1) * top_k) for c in range(outputs)] for total in rows]


def test_classes_against_a_loop():
    (found,) = evaluate_classifier(FakeModel(3), batches(), [Knobs(5, 2)], CLASSES, LABELS, CPU)
    logits = expected(3, 2)
    answers = [row.index(max(row)) for row in logits]
    losses = [
        math.log(sum(math.exp(value) for value in row)) - row[int(label)]
        for row, label in zip(logits, LABELS, strict=True)
    ]
    assert found.predictions.tolist() == answers
    assert found.metrics["accuracy"] == np.mean(np.array(answers) == LABELS)
    assert found.loss == pytest.approx(sum(losses) / COUNT, rel=1e-5)
    assert found.score == -found.cost == sum(found.metrics.values()) / 2
    figures = {"loss": found.loss, **found.metrics, "score": found.score}
    assert found.to_json() == {"top_k": 2, **figures, "evaluated_examples": COUNT}
    assert (found.examples, found.top_k) == (COUNT, 2)
    assert found.logits_NC.shape == (COUNT, 3)
    assert float(found.routing[1]["tokens"]) == IDS.size, "padding is counted nowhere"


def test_numbers_are_taken_as_they_come():
    labels = LABELS + 0.5
    (found,) = evaluate_classifier(FakeModel(1), batches(), [Knobs(5, 2)], NUMBER, labels, CPU)
    answers = [row[0] for row in expected(1, 2)]
    assert found.predictions.tolist() == pytest.approx(answers, rel=1e-5)
    assert min(answers) < 0.0, "below the smallest label, so that clipping would show"
    squares = [(answer - label) ** 2 for answer, label in zip(answers, labels, strict=True)]
    assert found.loss == pytest.approx(sum(squares) / COUNT, rel=1e-5)
    assert found.metrics["pearson"] == pytest.approx(np.corrcoef(answers, labels)[0, 1], rel=1e-5)


@pytest.mark.parametrize(("world_size", "size"), [(2, 4), (3, 2), (2, 16)])
def test_ranks_see_each_example_once_and_agree(world_size, size):
    models = [FakeModel(3) for _ in range(world_size)]
    meeting, shares = threading.Barrier(world_size, timeout=30), []

    def total(values):
        shares.append(values)
        meeting.wait()
        return sum(shares)

    def rank_of(rank):
        own = batches(rank, world_size, size)
        return evaluate_classifier(models[rank], own, [Knobs(5, 2), Knobs(5, 1)], CLASSES, LABELS, CPU, total)

    with ThreadPoolExecutor(world_size) as pool:
        ranks = list(pool.map(rank_of, range(world_size)))
    alone = evaluate_classifier(FakeModel(3), batches(), [Knobs(5, 2), Knobs(5, 1)], CLASSES, LABELS, CPU)
    assert len(shares) == world_size, "one sum for all passes"
    for scores in ranks:
        assert [one.to_json() for one in scores] == [one.to_json() for one in alone]
        assert all(torch.equal(one.logits_NC, same.logits_NC) for one, same in zip(scores, alone, strict=True))
    assert sum(float(scores[0].routing[1]["tokens"]) for scores in ranks) == IDS.size


def test_an_example_that_is_missing_or_comes_twice_is_noticed():
    for wrong in (batches(count=COUNT - 1), [*batches(), *batches()]):
        with pytest.raises(AssertionError, match="each example once"):
            evaluate_classifier(FakeModel(3), wrong, [Knobs(5, 2)], CLASSES, LABELS, CPU)


def test_several_k_are_those_of_single_passes_and_each_is_computed_once():
    model = FakeModel(3)
    knobs = [Knobs(5, k) for k in (2, 1, 2)]
    together = evaluate_classifier(model, batches(), knobs, CLASSES, LABELS, CPU)
    assert model.calls == 2 * 4
    single = [evaluate_classifier(FakeModel(3), batches(), [one], CLASSES, LABELS, CPU)[0] for one in knobs]
    assert [one.to_json() for one in together] == [one.to_json() for one in single]
    assert together[0].loss != together[1].loss


def test_a_split_without_labels_has_predictions_only():
    (found,) = evaluate_classifier(FakeModel(3), batches(), [Knobs(5, 2)], CLASSES, np.full(COUNT, np.nan), CPU)
    assert found.to_json() == {"top_k": 2, "evaluated_examples": 0}
    assert math.isnan(found.loss)
    assert math.isnan(found.score)
    (labelled,) = evaluate_classifier(FakeModel(3), batches(), [Knobs(5, 2)], CLASSES, LABELS, CPU)
    assert found.predictions.tolist() == labelled.predictions.tolist()


def test_figures_are_over_the_examples_with_a_label():
    half = np.where(np.arange(COUNT) < 6, LABELS, np.nan)
    (found,) = evaluate_classifier(FakeModel(3), batches(), [Knobs(5, 2)], CLASSES, half, CPU)
    first = batches(count=6, size=2)
    (alone,) = evaluate_classifier(FakeModel(3), first, [Knobs(5, 2)], CLASSES, LABELS[:6], CPU)
    assert found.to_json() == alone.to_json()
    assert len(found.predictions) == COUNT


def test_outputs_that_are_no_numbers_end_the_run():
    class Diverged(FakeModel):
        def forward(self, *arguments, **named):
            output = super().forward(*arguments, **named)
            output.logits[0, 1] = math.inf
            return output

    with pytest.raises(RunFailedError, match="task rte: the model's outputs for 4 of 13 examples"):
        evaluate_classifier(Diverged(3), batches(), [Knobs(5, 2)], CLASSES, LABELS, CPU)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(training):
    model = FakeModel(3).train(training)
    evaluate_classifier(model, batches(), [Knobs(5, 2)], CLASSES, LABELS, CPU)
    assert model.training is training

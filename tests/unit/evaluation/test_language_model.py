"""Scores over a whole split, against a naive loop over single sequences."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import tiny_recipe

from smoe_train.assembly import build_model
from smoe_train.data.batches.loader import EvaluationBatches
from smoe_train.evaluation import TextFigures, add_stats, evaluate_language_model
from smoe_train.schedules import Knobs

CPU = torch.device("cpu")
LENGTH = 8
# 45 predicted tokens: 5 whole blocks and one of 5 tokens, in micro-batches of 4 blocks.
TOKENS = np.random.default_rng(0).integers(0, 32, 46).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
    moe = {"router": {"type": "hyper_router", "hyper_hidden": 8}}
    return build_model(tiny_recipe(Path("unused"), model={"dropout": 0.3, "moe": moe}), 32)


def score(model, top_k_values, **options):
    batches = EvaluationBatches(TOKENS, LENGTH, 4, **options)
    return evaluate_language_model(model, batches, [Knobs(5, k) for k in top_k_values], TextFigures(2.0), CPU)


def naive(model, top_k, predicted=45):
    """Sums the negative log-probabilities one block and one token at a time, without padding or batches."""
    model.eval()
    total = 0.0
    slots = torch.zeros(8)
    with torch.no_grad():
        for start in range(0, predicted, LENGTH):
            stop = min(start + LENGTH, predicted)
            ids = torch.tensor(TOKENS[start:stop].astype(np.int64)).unsqueeze(0)
            output = model(input_ids=ids, knobs=Knobs(5, top_k))
            for position in range(stop - start):
                target = int(TOKENS[start + position + 1])
                total -= float(torch.log_softmax(output.logits[0, position].double(), dim=-1)[target])
            slots += output.routing_stats[1]["slots_E"]
    return total / predicted, slots


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_a_padded_batched_pass_equals_a_naive_loop(model, top_k):
    (found,) = score(model, [top_k])
    loss, slots = naive(model, top_k)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(loss / math.log(2.0) / 2.0, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert (found.tokens, found.top_k) == (45, top_k)
    assert found.routing[1]["slots_E"].tolist() == slots.tolist()
    assert float(found.routing[1]["tokens"]) == 45.0, "padding is counted nowhere"


def test_several_k_are_those_of_single_passes(model):
    together = score(model, [2, 1, 8])
    assert [one.to_json() for one in together] == [score(model, [k])[0].to_json() for k in (2, 1, 8)]
    assert len({one.loss for one in together}) == 3, "k must matter for this to say anything"


def test_a_k_that_is_named_twice_is_computed_once(model):
    once, twice = score(model, [2]), score(model, [2, 2])
    assert [one.to_json() for one in twice] == [once[0].to_json()] * 2
    assert torch.equal(twice[0].routing[1]["slots_E"], once[0].routing[1]["slots_E"])


def test_only_the_first_tokens(model):
    (found,) = score(model, [2], max_tokens=11)
    assert found.tokens == 11
    assert found.loss == pytest.approx(naive(model, 2, 11)[0], rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(model, training):
    model.train(training)
    score(model, [2])
    assert model.training is training
    assert all(module.training is training for module in model.modules())


def test_no_random_number_is_drawn_and_no_gradient_kept(model):
    model.train()
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    score(model, [2, 3])
    after = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ranks_add_up(model):
    shares = []
    for rank in range(3):
        batches = EvaluationBatches(TOKENS, LENGTH, 1, rank, 3)
        evaluate_language_model(
            model, batches, [Knobs(5, 2)], TextFigures(2.0), CPU, lambda values: shares.append(values.clone()) or values
        )
    total, tokens = torch.stack(shares).sum(dim=0).tolist()
    (whole,) = score(model, [2])
    assert tokens == 45
    assert total / tokens == pytest.approx(whole.loss, rel=1e-6)


def test_a_perplexity_beyond_every_float_is_no_error(model):
    batches = EvaluationBatches(TOKENS, LENGTH, 4)
    (found,) = evaluate_language_model(
        model, batches, [Knobs(5, 2)], TextFigures(2.0), CPU, lambda values: values * torch.tensor([1e6, 1.0])
    )
    assert found.loss > 700
    assert math.isfinite(found.perplexity)


def test_statistics_add_up_by_layer_without_changing_what_came_in():
    first, sums = {1: {"x": torch.tensor([1.0])}}, {}
    add_stats(sums, first)
    add_stats(sums, {1: {"x": torch.tensor([2.0])}, 3: {"x": torch.tensor([5.0])}})
    add_stats(sums, None)
    assert {layer: values["x"].tolist() for layer, values in sums.items()} == {1: [3.0], 3: [5.0]}
    assert first[1]["x"].tolist() == [1.0]

"""What the meter makes of losses and routing sums: means over micro-batches and ranks, sums over the window."""

import math
from types import SimpleNamespace

import pytest
import torch

from smoe_train.training.meter import Meter, routing_records

COEFFICIENTS = {"load_balance_loss": 0.5, "z_loss": 0.0}


def stats(slots, tokens):
    return {
        "slots_E": torch.tensor(slots),
        "probability_E": torch.tensor([tokens / 2.0, tokens / 2.0]),
        "tokens": torch.tensor(float(tokens)),
        "two_expert_tokens": torch.tensor(0.0),
        "entropy": torch.tensor(0.5 * tokens),
        "margin": torch.tensor(0.25 * tokens),
    }


def objective(task, balance, slots, tokens=4):
    losses = {"load_balance_loss": torch.tensor(balance, requires_grad=True), "z_loss": torch.tensor(2.0)}
    output = SimpleNamespace(router_losses=losses, routing_stats={1: stats(slots, tokens)})
    return SimpleNamespace(total=torch.tensor(task), task=torch.tensor(task), output=output)


def alone(values):
    return values


def test_losses_are_means_of_the_micro_batches():
    meter = Meter(1, alone, COEFFICIENTS)
    meter.add(objective(1.0, 1.0, [3.0, 1.0]))
    meter.add(objective(2.0, 3.0, [2.0, 2.0]))
    meter.end_step({"step": 1, "top_k": 1, "gradient_norm": torch.tensor(0.25), "learning_rate": 0.5}, {})
    meter.add(objective(4.0, 1.0, [4.0, 0.0]))
    meter.end_step({"step": 2, "top_k": 1, "gradient_norm": 0.5, "learning_rate": 0.1}, {})
    steps, routing = meter.read()
    seconds = [record.pop("step_seconds") for record in steps]
    assert seconds[0] == seconds[1] > 0.0
    assert steps == [
        {
            "step": 1, "top_k": 1, "gradient_norm": 0.25, "learning_rate": 0.5, "loss": 1.5, "load_balance_loss": 2.0,
            "load_balance_loss_weighted": 1.0, "z_loss": 2.0, "z_loss_weighted": 0.0,
        },
        {
            "step": 2, "top_k": 1, "gradient_norm": 0.5, "learning_rate": 0.1, "loss": 4.0, "load_balance_loss": 1.0,
            "load_balance_loss_weighted": 0.5, "z_loss": 2.0, "z_loss_weighted": 0.0,
        },
    ]  # fmt: skip
    (layer,) = routing
    assert layer["layer"] == 1
    assert layer["load"] == pytest.approx([9 / 12, 3 / 12])
    assert (layer["tokens"], layer["experts_per_token"], layer["dead_experts"]) == (12.0, 1.0, 0)
    assert layer["load_max_over_mean"] == pytest.approx(1.5)
    assert layer["entropy"] == pytest.approx(0.5)
    assert layer["top1_margin"] == pytest.approx(0.25)


def test_a_step_returns_its_own_sums_and_a_window_starts_anew():
    meter = Meter(1, alone, COEFFICIENTS)
    for slots in ([1.0, 3.0], [2.0, 2.0]):
        meter.add(objective(1.0, 1.0, slots))
        returned = meter.end_step({"step": 1, "top_k": 1}, {})
        assert returned[1]["slots_E"].tolist() == slots
    assert meter.read()[1][0]["load"] == [3 / 8, 5 / 8]
    assert meter.read() == ([], [])
    meter.add(objective(7.0, 1.0, [0.0, 4.0]))
    meter.end_step({"step": 3, "top_k": 1}, {})
    (step,), (layer,) = meter.read()
    assert (step["step"], step["loss"], layer["load"], layer["dead_experts"]) == (3, 7.0, [0.0, 1.0], 1)


def test_each_step_is_weighted_with_its_own_factors():
    """The raw value stays; the weighted one is raw x coefficient x the curriculum's factor of that step."""
    meter = Meter(1, alone, COEFFICIENTS)
    for factors in ({}, {"load_balance_loss": 0.5}, {"load_balance_loss": 0.0, "z_loss": 7.0}):
        meter.add(objective(1.0, 3.0, [2.0, 2.0]))
        meter.end_step({"step": 1, "top_k": 1}, factors)
    steps, _ = meter.read()
    assert [step["load_balance_loss"] for step in steps] == [3.0] * 3
    assert [step["load_balance_loss_weighted"] for step in steps] == [1.5, 0.75, 0.0]
    assert [step["z_loss_weighted"] for step in steps] == [0.0] * 3, "nothing, however often, is nothing"


def test_losses_are_means_over_ranks_and_routing_is_a_sum():
    def two_ranks(values):  # the other rank has seen the same twice over
        return values * 3

    meter = Meter(2, two_ranks, COEFFICIENTS)
    meter.add(objective(2.0, 1.0, [3.0, 1.0]))
    meter.end_step({"step": 1, "top_k": 1}, {})
    (step,), (layer,) = meter.read()
    assert step["loss"] == 3.0
    assert layer["tokens"] == 12.0


def test_what_the_step_returns_is_not_changed_by_later_steps():
    meter = Meter(1, alone, COEFFICIENTS)
    meter.add(objective(1.0, 1.0, [1.0, 3.0]))
    first = meter.end_step({"step": 1, "top_k": 1}, {})
    meter.add(objective(1.0, 1.0, [4.0, 0.0]))
    meter.end_step({"step": 2, "top_k": 1}, {})
    assert first[1]["slots_E"].tolist() == [1.0, 3.0]


def test_a_loss_that_is_not_finite_is_read_as_it_is():
    meter = Meter(1, alone, COEFFICIENTS)
    meter.add(objective(math.nan, 1.0, [1.0, 3.0]))
    meter.end_step({"step": 1, "top_k": 1}, {})
    assert math.isnan(meter.read()[0][0]["loss"])


def test_the_routing_of_a_step_that_was_skipped_does_not_count():
    meter = Meter(1, alone, COEFFICIENTS)
    meter.add(objective(1.0, 1.0, [1.0, 3.0]))
    meter.end_step({"step": 1, "top_k": 1}, {})
    meter.add(objective(math.nan, 1.0, [4.0, 0.0]))
    meter.end_step({"step": 2, "top_k": 1, "skipped": True}, {})
    steps, (layer,) = meter.read()
    assert [step.get("skipped") for step in steps] == [None, True]
    assert (layer["load"], layer["tokens"], layer["dropped_share"]) == ([0.25, 0.75], 4.0, 0.0)
    meter.add(objective(math.nan, 1.0, [4.0, 0.0]))
    meter.end_step({"step": 3, "top_k": 1, "skipped": True}, {})
    assert len(meter.read()[0]) == 1
    assert meter.read() == ([], [])


def test_a_dense_model_has_no_routing_records():
    assert routing_records({}, 2, pytest.fail) == []


def test_layers_come_in_order_from_one_reduction():
    calls = []

    def reduce(values):
        calls.append(values.shape)
        return values

    records = routing_records({3: stats([2.0, 2.0], 2), 0: stats([1.0, 3.0], 2)}, 2, reduce)
    assert [record["layer"] for record in records] == [0, 3]
    assert [record["load"] for record in records] == [[0.25, 0.75], [0.5, 0.5]]
    assert calls == [(16,)]

"""Routing health by hand: 4 experts, 10 tokens."""

import math

import pytest

from smoe_train.reporting.routing_health import routing_record


def test_figures_by_hand():
    sums = {
        "slots_E": [10.0, 5.0, 5.0, 0.0],
        "probability_E": [4.0, 2.0, 2.0, 2.0],
        "tokens": 10.0,
        "entropy": 5.0,
        "margin": 3.0,
    }
    record = routing_record(sums, top_k=2)
    assert record["load"] == [0.5, 0.25, 0.25, 0.0]
    assert record["load_max_over_mean"] == 2.0
    assert record["load_entropy_normalised"] == pytest.approx(1.5 * math.log(2) / math.log(4))
    assert record["entropy"] == 0.5
    assert record["entropy_normalised"] == pytest.approx(0.5 / math.log(4))
    assert record["dead_experts"] == 1
    assert record["top1_margin"] == 0.3
    assert record["experts_per_token"] == 2.0
    assert record["dropped_share"] == 0.0


def test_a_window_in_which_k_changed_drops_nothing():
    """5 tokens with k = 1, then 5 with k = 3: 20 slots wanted and filled, though the last k would want 30."""
    sums = {"slots_E": [5.0] * 4, "probability_E": [2.5] * 4, "tokens": 10.0, "entropy": 1.0, "margin": 1.0}
    assert routing_record({**sums, "wanted_slots": 20.0}, top_k=3)["dropped_share"] == 0.0
    assert routing_record({**sums, "wanted_slots": 25.0}, top_k=3)["dropped_share"] == pytest.approx(0.2)


def test_no_token_at_all_is_no_division_by_zero():
    sums = {"slots_E": [0.0, 0.0], "probability_E": [0.0, 0.0], "tokens": 0.0, "entropy": 0.0, "margin": 0.0}
    record = routing_record(sums, top_k=1)
    assert record["load"] == [0.0, 0.0]
    assert record["dead_experts"] == 2

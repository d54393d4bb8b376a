"""Routing health by hand: 4 experts, 10 tokens."""

import math

import pytest

from smoe_train.reporting.routing_health import routing_record


def test_figures_by_hand():
    sums = {
        "slots_E": [10.0, 5.0, 5.0, 0.0],
        "probability_E": [4.0, 2.0, 2.0, 2.0],
        "tokens": 10.0,
        "two_expert_tokens": 7.0,
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
    assert record["two_expert_share"] == 0.7
    assert "threshold" not in record
    assert record["dropped_share"] == 0.0


def test_a_policy_that_uses_fewer_slots_on_purpose_drops_nothing():
    """10 tokens of which 3 have a second expert, at thresholds of 0.1 and 0.2 in two halves of the window."""
    sums = {"slots_E": [6.0, 7.0], "probability_E": [5.0, 5.0], "tokens": 10.0, "two_expert_tokens": 3.0}
    record = routing_record({**sums, "entropy": 1.0, "margin": 1.0, "wanted_slots": 13.0, "threshold": 1.5}, top_k=2)
    assert record["dropped_share"] == 0.0
    assert record["two_expert_share"] == 0.3
    assert record["experts_per_token"] == 1.3
    assert record["threshold"] == 0.15


def test_a_window_in_which_k_changed_drops_nothing():
    """5 tokens with k = 1, then 5 with k = 3: 20 slots wanted and filled, though the last k would want 30."""
    sums = {"slots_E": [5.0] * 4, "probability_E": [2.5] * 4, "tokens": 10.0, "entropy": 1.0, "margin": 1.0}
    sums["two_expert_tokens"] = 5.0
    assert routing_record({**sums, "wanted_slots": 20.0}, top_k=3)["dropped_share"] == 0.0
    assert routing_record({**sums, "wanted_slots": 25.0}, top_k=3)["dropped_share"] == pytest.approx(0.2)


def test_no_token_at_all_is_no_division_by_zero():
    sums = {"slots_E": [0.0, 0.0], "probability_E": [0.0, 0.0], "tokens": 0.0, "entropy": 0.0, "margin": 0.0}
    sums["two_expert_tokens"] = 0.0
    record = routing_record(sums, top_k=1)
    assert record["load"] == [0.0, 0.0]
    assert record["dead_experts"] == 2


def test_further_sums_become_means():
    """A sum is divided by the tokens, ``name/count`` by that count; what nobody counted has no mean."""
    sums = {
        "slots_E": [2.0, 2.0],
        "probability_E": [2.0, 2.0],
        "tokens": 4.0,
        "entropy": 1.0,
        "margin": 1.0,
        "two_expert_tokens": 0.0,
        "competing": 2.0,
        "agreement/competing": 1.5,
        "bias_E": [8.0, -2.0],
        "late": 0.0,
        "mean/late": 0.0,
    }
    record = routing_record(sums, top_k=1)
    assert record["competing"] == 0.5
    assert record["agreement"] == 0.75
    assert record["bias_E"] == [2.0, -0.5]
    assert record["late"] == 0.0
    assert "mean" not in record
    assert "agreement/competing" not in record
    assert record["entropy"] == 0.25
